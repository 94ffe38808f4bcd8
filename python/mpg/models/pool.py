"""What the cache rows of a runner are for: texts, each under a model or adapter.

Knows which row is whose; nothing of forwards.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from mpg.models import beginnings
from mpg.models.beginnings import count_common
from mpg.models.cache import RaggedCache
from mpg.models.graphs import bucket
from mpg.models.runner import LoadedModel, Merge, ModelRunner, Slot
from mpg.models.shift import PROMPT, OwnText
from mpg.models.stack import Layout

View: TypeAlias = tuple[LoadedModel, Merge | None]  # what one runner runs: a model, or a sum of its adapters


@dataclass(eq=False)
class Pair:
    """A text, by its row, under a slot: what a cache row is for.

    prompt      that the cache row holds, but for the last token; () where it may have lost some of it
    own         how the text that it is read for differs from the base's prompt
    is_spoiled  it may hold NaN
    """

    row: int
    slot: Slot
    prompt: tuple[int, ...] = ()
    own: OwnText = PROMPT
    is_spoiled: bool = False


@dataclass(eq=False)
class Pool:
    """A runner with what its cache rows are for, by adapter: in the order of their rows, where all have the same slots.

    spare  cache rows beyond these that forwards have filled up their number with, and which may hold anything
    """

    runner: ModelRunner
    pairs: list[Pair] = field(default_factory=list)
    spare: set[int] = field(default_factory=set)

    @property
    def is_merged(self) -> bool:
        return bool(self.runner.key.merged)

    def begins_as(
        self, group: int, text: tuple[int, ...], rows: Container[int] | None = None
    ) -> list[tuple[RaggedCache | None, int, int]]:
        """The places that an adapter has read much of what a text begins with in: cache, place, and how much. rows:
        of which texts, default all"""
        shared = [
            (self.runner.cache, place, count_common(text, pair.prompt))
            for place, pair in enumerate(self.pairs)
            if pair.slot.group == group and not pair.is_spoiled and (rows is None or pair.row in rows)
        ]
        return [found for found in shared if found[2] >= beginnings.MIN_SHARED]

    def places(self, slots: Iterable[Slot]) -> list[range]:
        """Where the pairs of some slots are, as runs of neighbours."""
        wanted, places = set(slots), list[range]()
        for place, pair in enumerate(self.pairs):
            if pair.slot in wanted:
                start = places.pop().start if places and places[-1].stop == place else place
                places.append(range(start, place + 1))
        return places

    def fill_up(self, places: range) -> int:
        """How many spare rows to run behind these places, so that captured forwards which name their adapters by row,
        as those of unlike requests do, have few sizes."""
        if self.runner.graphs is None or places.stop < len(self.pairs) or self.layout(places, "cpu").groups is None:
            return 0
        stop = min(places.start + bucket(len(places), 1), self.runner.num_rows)
        self.spare.update(range(places.stop, stop))
        return stop - places.stop

    def layout(self, places: Iterable[int], device: torch.device | str) -> Layout:
        return Layout.of([self.pairs[place].slot.group for place in places], device)
