"""Texts that are read before they have a row, in parts, so that rounds go on between them.

Knows models and what each has to read; nothing of requests.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from mpg.models import beginnings
from mpg.models.beginnings import Text, count_common
from mpg.models.cache import RaggedCache
from mpg.models.pool import Pool, View
from mpg.models.runner import ModelRunner, Slot
from mpg.models.stack import Layout
from mpg.models.upload import Upload

if TYPE_CHECKING:
    from mpg.models.ensemble import Ensemble

Asked: TypeAlias = Sequence[tuple[Slot, tuple[int, ...]]]  # what each model has to read


class Ahead:
    """What has been read of texts that wait for a row, and how much of all texts has been.

    pools       of the session in which they will have one
    num_read    tokens of prompts that models have read, each model and adapter counted, but for every prompt's last
    num_reused  those that they need not, as a row or what is kept had them
    """

    def __init__(self, ensemble: Ensemble, pools: Mapping[View, Pool]) -> None:
        self.ensemble, self.pools = ensemble, pools
        self._texts: dict[Text, RaggedCache] = {}
        self.num_read = self.num_reused = 0

    def num_unread(self, asked: Asked, rows: Container[int]) -> list[int]:
        """Tokens that each model would read, of those that would read any, where these texts got a row now. rows: whose
        texts stay"""
        unread = [len(text) - 1 - shared for _, text, (_, _, shared) in self._unread(asked, rows)]
        return [*unread, *(len(text) - 1 for slot, text in asked if slot.merge is not None)]

    def read(self, asked: Asked, part: int) -> Iterator[None]:
        """Read texts, and no others that were begun: `part` tokens, over all models, before each yield."""
        self._texts, left = {}, part
        for slot, text, (source, row, first) in self._unread(asked):
            loaded, device = slot.model, slot.model.model.device
            runner = ModelRunner(loaded, loaded.runner_key((), 1, len(text)))
            if source is not None:
                runner.cache.take(range(row, row + 1), first, source)
                self.num_reused += first
            tokens = Upload().add([text]).on(device)
            while first < len(text) - 1:
                last = min(first + left, len(text) - 1)
                fed, start = tokens[:, first:last], torch.full((1,), first, device=device)
                with self.ensemble.observer(True):
                    runner.forward(slice(0, 1), Layout.of([slot.group], device), fed, start, last, logits_to_keep=1)
                self.num_read += last - first
                first, left = last, left - (last - first)
                if left == 0:
                    yield
                    left = part
            self._texts[loaded.reader(slot.group), text] = runner.cache

    def find(self, reader: Hashable, text: tuple[int, ...]) -> tuple[RaggedCache, int] | None:
        """A cache of one row that begins as a text, of those read ahead or kept, and for how many positions."""
        if (cache := self._texts.get((reader, text))) is not None:
            return cache, len(text) - 1
        found = [(cache, count_common(text, other)) for (its, other), cache in self._texts.items() if its == reader]
        found += [] if (kept := self.ensemble.kept.find(reader, text)) is None else [kept]
        return max((one for one in found if one[1] >= beginnings.MIN_SHARED), key=itemgetter(1), default=None)

    def count(self, lengths: Mapping[int, int], unread: Sequence[int], begun: Mapping[int, tuple[Any, int]]) -> None:
        """Note what rows of a pool are to hold, tokens by place, and what of it is read now, as `Reading` has it."""
        own = set(map(id, self._texts.values()))
        before = sum(shared for at, (source, shared) in begun.items() if id(source) in own and shared == lengths[at])
        read = sum(lengths[at] - (begun[at][1] if at in begun else 0) for at in unread)
        self.num_read += read
        self.num_reused += sum(lengths.values()) - read - before  # which was counted when it was read ahead

    def forget(self) -> None:
        self._texts = {}

    def _unread(
        self, asked: Asked, rows: Container[int] | None = None
    ) -> Iterator[tuple[Slot, tuple[int, ...], tuple[RaggedCache | None, int, int]]]:
        """The texts that a model has something of to read, each with a cache, a row of it, and how much of it that
        holds; looked up one by one, as rounds come between them, in which rows move. rows: those looked at, default all

        A sum of adapters reads its own at once, when it has weights.
        """
        for slot, text in asked:
            reader = slot.model.reader(slot.group)
            if slot.merge is not None or (reader, text) in self._texts:
                continue
            pool, apart = self.pools.get((slot.model, None)), self.find(reader, text)
            found: list[tuple[RaggedCache | None, int, int]] = [(None, 0, 0)]
            found += [] if apart is None else [(apart[0], 0, apart[1])]
            found += [] if pool is None else pool.begins_as(slot.group, text, rows)
            best = max(found, key=itemgetter(2))
            if best[2] < len(text) - 1:
                yield slot, text, best
