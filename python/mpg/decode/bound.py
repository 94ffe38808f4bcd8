"""The state of SCR's online bound M, one per sequence (section 3.3). Its arithmetic is the op `update_bound_`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import mpg_ext
from mpg.options import Options


def normalise_weights(weights: Tensor) -> Tensor:
    """alpha, summing to 1 where its sum is positive: what M bounds a score of (section 3.1). out: (B, N)"""
    total = weights.sum(1, keepdim=True)
    return torch.where(total > 0, weights / total, weights)


@dataclass(frozen=True)
class Bound:
    """log M and what it is estimated from; the ops write these tensors in place.

    window      (B, W), the last W accepted log-scores, a ring
    num_scores  (B,) int64, scores pushed so far
    num_rounds  (B,) int64, rounds seen so far
    log_bound   (B,), log M
    frozen      (B,) bool
    """

    window: Tensor
    num_scores: Tensor
    num_rounds: Tensor
    log_bound: Tensor
    frozen: Tensor
    log_initial_bound: float
    log_gamma: float
    tau: float

    @classmethod
    def initial(cls, options: Options, batch_size: int, dtype: torch.dtype, device: torch.device) -> Bound:
        """The bound before the first round: M_0, an empty window, not frozen."""
        log_initial_bound = math.log(options.initial_bound)
        counts = torch.zeros(2, batch_size, dtype=torch.int64, device=device)
        return cls(
            window=torch.zeros(batch_size, options.window, dtype=dtype, device=device),
            num_scores=counts[0],
            num_rounds=counts[1],
            log_bound=torch.full((batch_size,), log_initial_bound, dtype=dtype, device=device),
            frozen=torch.zeros(batch_size, dtype=torch.bool, device=device),
            log_initial_bound=log_initial_bound,
            log_gamma=math.log(options.gamma),
            tau=options.tau,
        )

    def reset(self, rows: Tensor) -> None:
        """Begin anew in some rows."""
        for tensor, initial in zip(self.tensors(), (0, 0, 0, self.log_initial_bound, False), strict=True):
            tensor[rows] = initial

    def update(self, scores: Tensor, active: Tensor) -> None:
        """Count a round of the active sequences, in which these scores (B, P) were pushed."""
        mpg_ext.update_bound_(self.tensors(), scores, active, constants=self.constants())

    def tensors(self) -> list[Tensor]:
        """The state, as the ops take it."""
        return [self.window, self.num_scores, self.num_rounds, self.log_bound, self.frozen]

    def constants(self) -> list[float]:
        """What does not change, as the ops take it."""
        return [self.log_initial_bound, self.log_gamma, self.tau]

    def is_warming_up(self) -> Tensor:
        """Whether log M is still log M_0: the first W + 1 rounds, or fewer than two scores. out: (B,) bool"""
        return (self.num_rounds <= self.window.shape[1]) | (self.num_scores < 2)
