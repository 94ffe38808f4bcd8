"""The combined rows of a target: which models they need, and what the target makes of those models' logits.

Combine first, normalise, warp last. The arithmetic is the op `combine_rows`; here is what each target feeds it. A
target is a function; a new f-divergence is one more, with a line in `TARGETS`. Knows no model and no loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

import mpg_ext

# Base and anchor: logits (B, P, V), where needed; attributes: logits (N, B, P, V); weights: (B, P, N), signed; a
# temperature, or None.
# out: the normalised log-rows (B, P, V), or with a temperature probabilities, and the logarithm (B, P) of what each was
# divided by: -inf where the row is empty, NaN where a model's logits are NaN or +inf
Combine: TypeAlias = Callable[[Tensor | None, Tensor | None, Tensor, Tensor, float | None], tuple[Tensor, Tensor]]


def arithmetic(
    base: Tensor | None, anchor: Tensor | None, attributes: Tensor, weights: Tensor, temperature: float | None
) -> tuple[Tensor, Tensor]:
    """v = sum_i w_i pi_i; with another anchor than the base, v = base * sum_i w_i pi_i / anchor (Eq. 10-13)."""
    return mpg_ext.combine_rows(attributes, weights, base, anchor, target="arithmetic", temperature=temperature)


def anchored(
    base: Tensor | None, anchor: Tensor | None, attributes: Tensor, weights: Tensor, temperature: float | None
) -> tuple[Tensor, Tensor]:
    """v = base * [1 + sum_i w_i (pi_i / anchor - 1)]_+: Eq. 7 for a chi-squared regulariser while nothing clips.

    Arithmetic with the anchor as one more model, of weight 1 - sum_i w_i.
    """
    assert base is not None and anchor is not None
    members = torch.cat([anchor[None], attributes])
    shares = torch.cat([1 - weights.sum(-1, keepdim=True), weights], -1)
    if base is anchor:
        base = anchor = None  # the ratio to it cancels
    return arithmetic(base, anchor, members, shares, temperature)


def geometric(
    base: Tensor | None, anchor: Tensor | None, attributes: Tensor, weights: Tensor, temperature: float | None
) -> tuple[Tensor, Tensor]:
    """log v = log base + sum_i w_i (log pi_i - log anchor): Eq. 7 for the reverse KL, token by token."""
    return mpg_ext.combine_rows(attributes, weights, base, anchor, target="geometric", temperature=temperature)


def base_alone(
    base: Tensor | None, anchor: Tensor | None, attributes: Tensor, weights: Tensor, temperature: float | None
) -> tuple[Tensor, Tensor]:
    """v = base: no attribute counts."""
    assert base is not None
    return arithmetic(None, None, base[None], weights.new_ones(*base.shape[:2], 1), temperature)


TARGETS: dict[str, Combine] = {
    "arithmetic": arithmetic,
    "anchored": anchored,
    "geometric": geometric,
    "base": base_alone,
}


def references(target: str, anchor_is_base: bool) -> tuple[str, ...]:
    """The roles that a target needs beside the attributes'."""
    if target == "base" or (anchor_is_base and target != "arithmetic"):
        return ("base",)
    return () if anchor_is_base else ("base", "anchor")


def base_cancels(target: str, alpha: Sequence[float]) -> bool:
    """Whether a target whose anchor is its base does not depend on it: base^(1 - sum_i w_i) prod_i pi_i^w_i, or
    (1 - sum_i w_i) base + sum_i w_i pi_i, where sum_i w_i = 1. The row of the largest weight may then stand in the
    base's place; under geometric if none is negative, else a token without any probability would be another matter."""
    is_whole = math.isclose(math.fsum(alpha), 1, rel_tol=1e-12)
    return is_whole and (target == "anchored" or (target == "geometric" and min(alpha) >= 0))


def is_one_model(weights: Tensor, target: str) -> Tensor:
    """Whether a target's row is that of a single model, where the anchor is the base.

    weights: (B, N), alpha
    out: (B,) bool
    """
    if target == "base":
        return torch.ones(len(weights), dtype=torch.bool, device=weights.device)
    is_single = (weights != 0).sum(1) == 1
    return is_single if target == "arithmetic" else is_single & (weights.sum(1) == 1)
