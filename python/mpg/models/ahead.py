"""Texts that are read before they have a row, in parts, so that rounds go on between them.

Knows models and what each has to read; nothing of requests.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, TypeAlias

import torch

from mpg.models.beginnings import Text
from mpg.models.cache import RaggedCache
from mpg.models.pool import Pool, View
from mpg.models.runner import ModelRunner, Slot
from mpg.models.stack import Layout
from mpg.models.upload import Upload

if TYPE_CHECKING:
    from mpg.models.ensemble import Ensemble

Asked: TypeAlias = Sequence[tuple[Slot, tuple[int, ...]]]  # what each model has to read


class Ahead:
    """What has been read of texts that wait for a row.

    pools  of the session in which they will have one
    """

    def __init__(self, ensemble: Ensemble, pools: Mapping[View, Pool]) -> None:
        self.ensemble, self.pools = ensemble, pools
        self._texts: dict[Text, RaggedCache] = {}

    def num_unread(self, asked: Asked) -> int:
        """Tokens that a model would read where these texts got a row now, at most."""
        return max((len(text) - 1 - shared for _, text, (_, _, shared) in self._unread(asked)), default=0)

    def read(self, asked: Asked, part: int) -> Iterator[None]:
        """Read texts, and no others that were begun, `part` tokens by one model before each yield."""
        self._texts = {}
        for slot, text, (source, row, shared) in self._unread(asked):
            loaded, device = slot.model, slot.model.model.device
            runner = ModelRunner(loaded, loaded.runner_key((), 1, len(text)))
            if source is not None:
                runner.cache.take(range(row, row + 1), shared, source)
            tokens = Upload().add([text]).on(device)
            for first in range(shared, len(text) - 1, part):
                last = min(first + part, len(text) - 1)
                fed, start = tokens[:, first:last], torch.full((1,), first, device=device)
                with self.ensemble.observer(True):
                    runner.forward(slice(0, 1), Layout.of([slot.group], device), fed, start, last, logits_to_keep=1)
                yield
            self._texts[loaded.reader(slot.group), text] = runner.cache

    def find(self, reader: Hashable, text: tuple[int, ...]) -> tuple[RaggedCache, int] | None:
        """A cache of one row that begins as a text, of this one or an earlier one, and for how many positions."""
        if (cache := self._texts.get((reader, text))) is not None:
            return cache, len(text) - 1
        return self.ensemble.kept.find(reader, text)

    def forget(self) -> None:
        self._texts = {}

    def _unread(self, asked: Asked) -> list[tuple[Slot, tuple[int, ...], tuple[RaggedCache | None, int, int]]]:
        """The texts that a model has not read ahead, each with a cache, a row of it, and how much of it that holds.

        A sum of adapters reads its own at once, when it has weights.
        """
        unread = []
        for slot, text in asked:
            reader = slot.model.reader(slot.group)
            if slot.merge is None and (reader, text) not in self._texts:
                pool, kept = self.pools.get((slot.model, None)), self.ensemble.kept.find(reader, text)
                found: list[tuple[RaggedCache | None, int, int]] = [(None, 0, 0)]
                found += [] if kept is None else [(kept[0], 0, kept[1])]
                found += [] if pool is None else pool.begins_as(slot.group, text)
                unread.append((slot, text, max(found, key=itemgetter(2))))
        return unread
