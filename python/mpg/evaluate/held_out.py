"""What weights are worth on held-out items, and how far above others, with intervals by a bootstrap over the items.

Knows what items scored; nothing of models and of how weights are searched (`tune`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

from mpg.paper.statistics import Bootstrap, Estimate

SEED = 0

# What items scored, by the item's id and the pole, from 0 to 1; None is missing
ItemScores: TypeAlias = Mapping[str, Mapping[str, "float | None"]]


def estimate_value(scores: ItemScores) -> Estimate | None:
    """The mean over poles of their mean scores; None without scores."""
    return _mean_over_poles(_mean_by_pole(scores)) if scores else None


def estimate_gain(scores: ItemScores, others: ItemScores) -> Estimate | None:
    """How far the value of scores is above that of others, on the same resamples of items; None without either.

    Raises ValueError for scores of different items.
    """
    if not (scores and others):
        return None
    if scores.keys() != others.keys():
        apart = min(scores.keys() ^ others.keys())
        raise ValueError(f"held_out: expected scores of the same items, got {apart} on one side alone")
    return _mean_over_poles(_mean_by_pole(scores) - _mean_by_pole(others))


def _mean_by_pole(scores: ItemScores) -> np.ndarray:
    """(poles, 1 + NUM_RESAMPLES), of all items first; NaN where no item of a resample has a score of the pole"""
    bootstrap, rows = Bootstrap(len(scores), SEED), [scores[item] for item in sorted(scores)]
    means = []
    for pole in sorted({pole for row in rows for pole in row}):
        own = np.array([row.get(pole) for row in rows], float)  # NaN for None
        means.append(bootstrap.ratios(np.nan_to_num(own), ~np.isnan(own)))
    return np.array(means)


def _mean_over_poles(of_poles: np.ndarray) -> Estimate:
    """The mean of the poles that a resample has, over resamples."""
    is_there = ~np.isnan(of_poles)
    sums, counts = np.where(is_there, of_poles, 0.0).sum(0), is_there.sum(0)
    return Bootstrap.estimate(np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0))
