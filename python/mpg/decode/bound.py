"""The state of SCR's online bound M, one per sequence (section 3.3). Its arithmetic is the op `update_bound_`."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

import mpg_ext
from mpg.decode.batch import Batch
from mpg.options import Options
from mpg_ext.ops import Score


def _normalise(alpha: Tensor) -> Tensor:
    total = alpha.sum(1, keepdim=True)
    return torch.where(total > 0, alpha / total, alpha)


class Bound:
    """log M and what it is estimated from; the ops write these tensors in place.

    weights     (B, N), alpha, summing to 1 where its sum is positive: what M bounds a score of (section 3.1)
    window      (B, W), the last W accepted log-scores, a ring
    num_scores  (B,) int64, scores pushed so far
    num_rounds  (B,) int64, rounds seen so far
    log_bound   (B,), log M
    frozen      (B,) bool
    score       the kind of score that M bounds
    constants   log M_0, log gamma and tau, as the ops take them
    """

    weights: Tensor
    window: Tensor
    num_scores: Tensor
    num_rounds: Tensor
    log_bound: Tensor
    frozen: Tensor

    def __init__(self, options: Options, batch: Batch):
        """The bound before the first round: M_0, an empty window, not frozen."""
        self.score = cast(Score, options.target)
        self.constants = [math.log(options.initial_bound), math.log(options.gamma), options.tau]
        state, dtype = batch.state, batch.weights.dtype
        state.hold(self, "weights", state.zeros(state.most_attributes, dtype=dtype), by_attribute=True)
        state.hold(self, "window", state.zeros(options.window, dtype=dtype))
        state.hold(self, "num_scores", state.zeros())
        state.hold(self, "num_rounds", state.zeros())
        state.hold(self, "log_bound", state.zeros(dtype=dtype))
        state.hold(self, "frozen", state.zeros(dtype=torch.bool))
        self.reset(torch.arange(len(batch), device=state.device), batch.weights)

    def reset(self, rows: Tensor, alpha: Tensor) -> None:
        """Begin anew in some rows, whose alpha (len(rows), N) this is."""
        self.weights[rows] = _normalise(alpha)
        for tensor, initial in zip(self.tensors(), (0, 0, 0, self.constants[0], False), strict=True):
            tensor[rows] = initial

    def update(self, scores: Tensor, active: Tensor) -> None:
        """Count a round of the active sequences, in which these scores (B, P) were pushed."""
        mpg_ext.update_bound_(self.tensors(), scores, active, constants=self.constants)

    def tensors(self) -> list[Tensor]:
        """The state, as the ops take it."""
        return [self.window, self.num_scores, self.num_rounds, self.log_bound, self.frozen]

    def is_warming_up(self) -> Tensor:
        """Whether log M is still log M_0: the first W + 1 rounds, or fewer than two scores. out: (B,) bool"""
        return (self.num_rounds <= self.window.shape[1]) | (self.num_scores < 2)
