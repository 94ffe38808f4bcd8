"""Where every random decision comes from: generators whose draws have keys, and the two that the proofs use.

A key is (request seed, the request's own round, purpose, index) and no key is used twice. Keys by position would be
wrong: a position is drafted again after a rejection, and given the rejection its old uniform is no longer uniform.
So a request's uniforms depend on neither its batch nor its place there. Knows nothing of models or of what is drawn.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

import mpg_ext

T = TypeVar("T")


class Purpose(enum.IntEnum):
    """What a uniform decides; part of its key."""

    DRAFT = 0  # a drafted token, by its index in the chunk
    ACCEPT = 1  # one prefix of the chunk, by its length - 1
    FALLBACK = 2  # the single token after a rejected chunk
    EMPTY = 3  # the base's token where the fallback has none
    LAST = 4  # the token drawn from the target's row, or from what verification left of it


class Generator(Protocol):
    """What a decode loop draws through. `active` (B,) bool says whose draw counts; the others' are garbage."""

    def bernoulli(self, probs: Tensor, purpose: Purpose, index: int, active: Tensor) -> Tensor:
        """True with probability `probs` (B,) in [0, 1]. out: (B,) bool"""

    def categorical(self, rows: Tensor, purpose: Purpose, index: int, active: Tensor) -> Tensor:
        """A token from each unnormalised row (B, V) >= 0. out: (B,) int64, in [0, V) even where a row is empty"""


class KeyedGenerator:
    """The production generator: Philox uniforms under keys that live on the device.

    seeds   (B,) int64, one per request
    rounds  (B,) int64, each request's round; the batch advances it
    """

    def __init__(self, seeds: Tensor, rounds: Tensor):
        self.seeds, self.rounds = seeds, rounds

    def uniforms(self, purpose: Purpose, count: int, active: Tensor) -> Tensor:
        """Uniforms of index 0..count-1 for the fused ops. out: (B, count) float64 in [0, 1)"""
        return mpg_ext.draw_uniforms(self.seeds, self.rounds, purpose=int(purpose), count=count)

    def bernoulli(self, probs: Tensor, purpose: Purpose, index: int, active: Tensor) -> Tensor:
        return self._uniform(purpose, index) < probs

    def categorical(self, rows: Tensor, purpose: Purpose, index: int, active: Tensor) -> Tensor:
        return mpg_ext.draw_tokens(rows, self._uniform(purpose, index))

    def _uniform(self, purpose: Purpose, index: int) -> Tensor:
        return mpg_ext.draw_uniforms(self.seeds, self.rounds, purpose=int(purpose), count=1, first=index)[:, 0]


class RecordingGenerator(KeyedGenerator):
    """A keyed generator that asserts, draw by draw, that no key is ever used twice."""

    def __init__(self, seeds: Tensor, rounds: Tensor):
        super().__init__(seeds, rounds)
        self.keys: set[tuple[int, int, int, int]] = set()

    def uniforms(self, purpose: Purpose, count: int, active: Tensor) -> Tensor:
        for index in range(count):
            self._record(purpose, index, active)
        return super().uniforms(purpose, count, active)

    def bernoulli(self, probs: Tensor, purpose: Purpose, index: int, active: Tensor) -> Tensor:
        self._record(purpose, index, active)
        return super().bernoulli(probs, purpose, index, active)

    def categorical(self, rows: Tensor, purpose: Purpose, index: int, active: Tensor) -> Tensor:
        self._record(purpose, index, active)
        return super().categorical(rows, purpose, index, active)

    def _record(self, purpose: Purpose, index: int, active: Tensor) -> None:
        for b in active.nonzero()[:, 0].tolist():
            key = (int(self.seeds[b]), int(self.rounds[b]), int(purpose), index)
            assert key not in self.keys, f"key {key} is used twice"
            self.keys.add(key)


class ReplayingGenerator:
    """Follows one written path of decisions per sequence and notes the branches it leaves aside.

    paths    (B, D) int8, the decisions of each sequence as outcome numbers, -1 after its last; past it a sequence takes
             the first outcome of positive probability, and every other one becomes a new path in `untried`
    probs    (B,) float64, probability of what each sequence decided so far
    untried  list of (., D) paths
    """

    def __init__(self, paths: Tensor):
        self.paths = paths.clone()
        self.probs = torch.ones(len(paths), dtype=torch.float64)
        self.untried: list[Tensor] = []
        self._depths = torch.zeros(len(paths), 1, dtype=torch.int64)

    def bernoulli(self, probs: Tensor, purpose: Purpose, index: int, active: Tensor) -> Tensor:
        return self._follow(torch.stack([1 - probs, probs], -1), active).bool()

    def categorical(self, rows: Tensor, purpose: Purpose, index: int, active: Tensor) -> Tensor:
        return self._follow(rows / rows.sum(-1, keepdim=True), active)

    def _follow(self, probs: Tensor, active: Tensor) -> Tensor:
        planned = self.paths.gather(1, self._depths)[:, 0].long()
        is_possible = probs > 0
        first = is_possible.int().argmax(1)
        is_new = active & (planned < 0)
        outcomes = torch.where(is_new, first, planned) * active
        rows, others = (is_possible & is_new[:, None] & (torch.arange(probs.shape[1]) > first[:, None])).nonzero(
            as_tuple=True
        )
        if len(rows):
            branches = self.paths[rows]
            self.untried.append(branches.scatter_(1, self._depths[rows], others[:, None].to(branches.dtype)))
        decided = torch.where(active, outcomes, self.paths.gather(1, self._depths)[:, 0].long())
        self.paths.scatter_(1, self._depths, decided[:, None].to(self.paths.dtype))
        self.probs *= torch.where(active, probs.gather(1, outcomes[:, None])[:, 0].double(), 1.0)
        self._depths += active[:, None]
        return outcomes


def enumerate_branches(
    run: Callable[[ReplayingGenerator, int], Sequence[T]], *, width: int = 8192, max_decisions: int = 96
) -> Iterator[tuple[float, T]]:
    """Every outcome of a decode loop with its exact probability, by walking each branch of the loop itself.

    run            takes a generator and a batch size B, decodes B copies of one request and returns their B results
    width          branches followed at a time
    max_decisions  of one branch

    out: (probability, result) pairs; the probabilities add up to 1
    """
    paths = torch.full((1, max_decisions), -1, dtype=torch.int8)
    while len(paths):
        batch, paths = paths[-width:], paths[:-width]
        rng = ReplayingGenerator(batch)
        results = run(rng, len(batch))
        yield from zip(rng.probs.tolist(), results, strict=True)
        paths = torch.cat([paths, *rng.untried])
