"""Means and shares with their intervals, from a bootstrap over prompts. Knows numbers alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2000
FEW_PROMPTS = 12  # over fewer the intervals come out too narrow


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % percentile interval, from a bootstrap over prompts."""

    value: float
    low: float
    high: float


class Bootstrap:
    """Ratios of sums over prompts, and over the same resamples of them for whatever is compared."""

    def __init__(self, num_prompts: int, seed: int) -> None:
        self.resamples = np.random.default_rng(seed).integers(num_prompts, size=(NUM_RESAMPLES, num_prompts))

    def ratios(self, numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
        """numerators, denominators (P,). out: (1 + NUM_RESAMPLES,), that of all prompts first; NaN over nothing"""
        over, under = (
            np.concatenate([[sums.sum()], sums[self.resamples].sum(1)]) for sums in (numerators, denominators)
        )
        return np.divide(over, under, out=np.full(len(over), np.nan), where=under != 0)

    @staticmethod
    def estimate(ratios: np.ndarray) -> Estimate:
        """The first, with the interval that the others span; those over nothing do not count."""
        others = ratios[1:]
        low, high = np.quantile(others[~np.isnan(others)], [0.025, 0.975])
        return Estimate(float(ratios[0]), float(low), float(high))
