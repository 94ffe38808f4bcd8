"""Decisions that prove something of a sampler: that no key decides twice, and the law, by walking every branch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from composed import Composed
from mpg.decode.rng import Decisions, Purpose

T = TypeVar("T")


class Recording(Decisions):
    """Keyed decisions that assert, draw by draw, that no key is ever used twice."""

    def __init__(self, seeds: Tensor, rounds: Tensor):
        super().__init__(seeds, rounds)
        self.keys: set[tuple[int, int, int, int]] = set()

    def uniforms(self, purpose: Purpose, count: int, active: Callable[[], Tensor], first: int = 0) -> Tensor:
        for index in range(first, first + count):
            self.record(purpose, index, active())
        return super().uniforms(purpose, count, active, first)

    def record(self, purpose: Purpose, index: int, active: Tensor) -> None:
        for b in active.nonzero()[:, 0].tolist():
            key = (int(self.seeds[b]), int(self.rounds[b]), int(purpose), index)
            assert key not in self.keys, f"key {key} is used twice"
            self.keys.add(key)


class RecordingComposed(Composed, Recording):
    """The same step by step."""


class Replaying(Composed):
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

    def draw_ahead(self, purpose: Purpose, count: int) -> None:
        """No uniform is drawn."""

    def bernoulli(self, probs: Tensor, purpose: Purpose, index: int, active: Callable[[], Tensor]) -> Tensor:
        return self._follow(torch.stack([1 - probs, probs], -1), active()).bool()

    def categorical(self, rows: Tensor, purpose: Purpose, index: int, active: Callable[[], Tensor]) -> Tensor:
        return self._follow(rows / rows.sum(-1, keepdim=True), active())

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
    run: Callable[[Replaying, int], Sequence[T]], *, width: int = 8192, max_decisions: int = 96
) -> Iterator[tuple[float, T]]:
    """Every outcome of a decode loop with its exact probability, by walking each branch of the loop itself.

    run            takes what decides and a batch size B, decodes B copies of one request and returns their B results
    width          branches followed at a time
    max_decisions  of one branch

    out: (probability, result) pairs; the probabilities add up to 1
    """
    paths = torch.full((1, max_decisions), -1, dtype=torch.int8)
    while len(paths):
        batch, paths = paths[-width:], paths[:-width]
        decide = Replaying(batch)
        results = run(decide, len(batch))
        yield from zip(decide.probs.tolist(), results, strict=True)
        paths = torch.cat([paths, *decide.untried])
