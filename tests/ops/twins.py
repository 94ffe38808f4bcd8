"""How far rounding may take what an op computes in float32, and results held against that.

Bounds follow from exact values (in float64, of the same inputs), from how ill-conditioned the formula is there, and
from the number of roundings. So they are the same on every machine, whatever the order of a sum, with fused
multiply-adds or without. Knows Eq. 7 to 16, no op.

A rounding is off by at most U of its result, exp by 4 U of its value, log by 2 U: what the libraries and our own
functions promise. Errors add up to first order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

U = torch.finfo(torch.float32).eps / 2


class Range(NamedTuple):
    """Where numbers have to lie, both ends float64 and included; NaN where they have to be NaN."""

    low: Tensor
    high: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Range:
        return Range(function(self.low), function(self.high))

    def widened(self, error: Callable[[Tensor], Tensor]) -> Range:
        """By the error of what is computed from it, which `error` gives for exact values."""
        return Range(around(self.low, error(self.low)).low, around(self.high, error(self.high)).high)


def around(exact: Tensor, error: Tensor) -> Range:
    """Infinities are exact."""
    error = error.where(exact.isfinite(), 0)
    return Range(exact - error, exact + error)


def assert_within(out: Tensor, expected: Range) -> None:
    out = out.double()
    is_wrong = ~((expected.low <= out) & (out <= expected.high)) & ~(out.isnan() & expected.low.isnan())
    if is_wrong.any():
        first = tuple(is_wrong.nonzero()[0].tolist())
        low, high = (end[first].item() for end in expected)
        wrong = f"{int(is_wrong.sum())} of {out.numel()} numbers, the first at {first}"
        raise AssertionError(f"{wrong}: expected {low!r} to {high!r}, got {out[first].item()!r}")


def assert_drawn(tokens: Tensor, masses: Range, uniforms: Tensor) -> None:
    """Each token may have mass, and inverting the cumulated masses (B, V) at the uniform may give it.

    The share of the total below a token is smallest where what is below is small and the rest is large. Masses are
    added in float64.
    """
    num_tokens = masses.low.shape[1]
    index = tokens[:, None]
    rounding = num_tokens * torch.finfo(torch.float64).eps

    def sums(end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a row: the masses before the token, its own, and those after it."""
        own = end.gather(1, index)[:, 0]
        before = end.where(torch.arange(num_tokens, device=end.device) < index, 0).sum(-1)
        return before, own, end.sum(-1) - before - own

    (before_low, _, after_low), (before_high, own_high, after_high) = (sums(end) for end in masses)
    assert (own_high > 0).all()
    assert (before_low / (before_low + own_high + after_high) <= uniforms + rounding).all()
    reached = before_high + own_high
    assert (uniforms - rounding <= reached / (reached + after_low.clamp(min=0))).all()


def in_float64(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [t.double() if t is not None and t.is_floating_point() else t for t in inputs]


def sum_error(num_roundings: float) -> float:
    """Relative error of a sum of numbers of one sign whose longest chain has so many roundings.

    Each is at most U of the sum, in either direction: as independent ones they exceed 7 U sqrt(n) in one of 10**10 sums
    (2 exp(-7**2 / 2), Hoeffding's inequality); n U is sure.
    """
    return U * min(num_roundings, 7 * math.sqrt(num_roundings))


def row_sum_error(V: int) -> float:
    """Relative error of a sum of exponentials over a row.

    A chain takes in at most 2048 of them; slices are merged in a row or in trees, each merge 8 roundings: an exp, two
    products and a sum.
    """
    return sum_error(min(V, 2048) + 8 * (V / 2048 + math.log2(V)))


def logprob_error(logprobs: Tensor, V: int) -> Tensor:
    """Absolute error of log-probabilities l = t - log sum_v exp(t_v) with t = (x - max) / temperature <= 0.

    t takes 4 roundings (of the difference, the temperature, its inverse, the product), and 2 more where the exp is one
    of powers of 2; |t| <= |l|. In the sum each exp is off by 6 U |t_v| + 4 U, on average over its terms by at most
    6 U log V + 4 U, since the mean of |t_v| is the entropy less the log of the sum. The log is at most log V.
    """
    return U * (5 * logprobs.abs() + 8 * math.log(V) + 4) + row_sum_error(V)


def ratio_error(attributes: Tensor, anchor: Tensor, V: int) -> Tensor:
    """Absolute error of the difference of two log-probabilities, both off by `logprob_error`; 0 of infinite ones."""
    error = logprob_error(attributes, V) + logprob_error(anchor, V) + U * (attributes - anchor).abs()
    return error.where(error.isfinite(), 0)


def score_range(log_ratios: Tensor, errors: Tensor | float, weights: Tensor, score: str) -> Range:
    """Scores (..., K) of the prefixes of log-ratios (N, ..., K), which are off by `errors`; weights (N, ..., 1).

    A prefix is a sum of up to K ratios, each addition a rounding of at most the sum of their magnitudes. The geometric
    score is a sum of N products. The arithmetic one is the log of a difference of sums: a term's exp turns the absolute
    error of its prefix into a relative one, and N running maxima cost it 6 roundings each and what moves it to the last
    maximum; all errors count in full where the sums cancel. A difference of at most 8 eps of both sums together is 0.
    """
    N, K = len(log_ratios), log_ratios.shape[-1]
    is_used = weights != 0
    is_capped = (log_ratios == -math.inf) & (weights < 0) & (score == "geometric")
    terms = log_ratios.where(~is_capped, -80)
    prefixes = terms.cumsum(-1)
    errors = (errors + (K - 1) * U * terms.abs()).where(terms.isfinite(), 0).cumsum(-1)
    if score == "geometric":
        products = (weights * prefixes).where(is_used, 0)
        error = weights.abs() * errors + (N + 1) * U * products.abs()
        return around(products.sum(0), error.sum(0))

    largest = prefixes.where(is_used, -math.inf).amax(0)
    largest = largest.where(largest != -math.inf, 0)
    below = prefixes - largest
    magnitudes = (weights.abs() * below.exp()).where(is_used, 0)
    relative = errors + U * (below.abs() + 6 * N)
    error = (magnitudes * relative.expm1()).where(magnitudes != 0, 0).sum(0) + (N + 1) * U * magnitudes.sum(0)
    total, difference = magnitudes.sum(0), (magnitudes * weights.sign()).sum(0)

    def log(end: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        value = end.where(~(end <= 16 * U * total), 0).log()
        return value + largest, (U * (2 * value.abs() + (value + largest).abs())).where(value.isfinite(), 0)

    low, low_error = log(difference - error, total + error)
    high, high_error = log(difference + error, total - error)
    return Range(low - low_error, high + high_error)


def normalized_range(log_masses: Range) -> tuple[Range, Range]:
    """Rows (..., V) of log-masses less the log of their sum, and these logs (...). Rows without mass stay so."""
    V = log_masses.low.shape[-1]
    totals = log_masses.map(lambda end: end.logsumexp(-1, keepdim=True))
    rows = Range(log_masses.low - totals.high, log_masses.high - totals.low)
    rows, of_rows = (numbers.widened(lambda end: logprob_error(end, V)) for numbers in (rows, totals))
    return rows.map(lambda end: end.where(totals.high != -math.inf, -math.inf)), of_rows.map(lambda end: end[..., 0])


def accepted_range(draft_probs: Tensor, scores: Range, log_bound: Tensor) -> Range:
    """Masses draft_probs * min(1, exp(score - log_bound)): a difference, an exp (0 below exp(-87)), a product."""

    def masses(end: Tensor, sign: int) -> Tensor:
        excess = (end - log_bound).clamp(max=0)
        mass = draft_probs * excess.exp() * (1 + sign * U * (excess.abs() + 6))
        return mass.where((draft_probs > 0) & (end != -math.inf), 0)

    return Range((masses(scores.low, -1) - 2.0**-125).clamp(min=0), masses(scores.high, 1))


def product_error(magnitudes: Tensor, num_terms: int, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Absolute error of sums of so many products, whose magnitudes add up to `magnitudes`, rounded to `dtype`.

    A chain of a sum has a product and an addition a term; below the smallest normal number digits are lost.
    """
    stored = torch.finfo(dtype)
    return sum_error(2 * num_terms) * magnitudes + stored.eps / 2 * exact.abs() + stored.tiny * stored.eps


def softmax_error(probs: Tensor) -> Tensor:
    """Absolute error of probabilities exp(t) / sum_v exp(t_v), t rounded from float64, the sum taken in float64.

    The exp of t is off by U |t| + 4 U of itself, |t| <= |log p|, the sum by the mean of that (see `logprob_error`); the
    result is rounded. Below exp(-87) an exp is 0.
    """
    V = probs.shape[-1]
    return U * probs * ((probs.log().abs()).where(probs > 0, 0) + math.log(V) + 10) + 2.0**-125
