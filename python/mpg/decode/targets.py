"""The combined rows of a target: which models they need, and what the target makes of those models' logits.

Combine first, normalise, warp last. The arithmetic is the op `combine_rows`; here is what each target feeds it. A
target is a small class; a new f-divergence is one more. Knows no model and no loop.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

import mpg_ext


class Target(Protocol):
    """A rule that combines rows.

    references  the roles needed beside the attributes', given whether anchor and base are one model
    combine     base, anchor: logits (B, P, V) where needed; attributes: logits (N, B, P, V);
                weights: (B, P, N), signed
                out: the normalised log-rows (B, P, V) and the logarithm of what each was divided by (B, P):
                -inf where the row is empty, NaN where a model's logits are NaN or +inf
    """

    def references(self, anchor_is_base: bool) -> tuple[str, ...]: ...

    def combine(
        self, base: Tensor | None, anchor: Tensor | None, attributes: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]: ...


class Arithmetic:
    """v = sum_i w_i pi_i; with another anchor than the base, v = base * sum_i w_i pi_i / anchor (Eq. 10-13)."""

    def references(self, anchor_is_base: bool) -> tuple[str, ...]:
        return () if anchor_is_base else ("base", "anchor")

    def combine(
        self, base: Tensor | None, anchor: Tensor | None, attributes: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        return mpg_ext.combine_rows(attributes, weights, base, anchor, target="arithmetic")


class Anchored:
    """v = base * [1 + sum_i w_i (pi_i / anchor - 1)]_+: Eq. 7 for a chi-squared regulariser while nothing clips.

    Arithmetic with the anchor as one more model, of weight 1 - sum_i w_i.
    """

    def references(self, anchor_is_base: bool) -> tuple[str, ...]:
        return ("base",) if anchor_is_base else ("base", "anchor")

    def combine(
        self, base: Tensor | None, anchor: Tensor | None, attributes: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert base is not None and anchor is not None
        members = torch.cat([anchor[None], attributes])
        shares = torch.cat([1 - weights.sum(-1, keepdim=True), weights], -1)
        if base is anchor:
            base = anchor = None  # the ratio to it cancels
        return mpg_ext.combine_rows(members, shares, base, anchor, target="arithmetic")


class Geometric:
    """log v = log base + sum_i w_i (log pi_i - log anchor): Eq. 7 for the reverse KL, token by token."""

    def references(self, anchor_is_base: bool) -> tuple[str, ...]:
        return ("base",) if anchor_is_base else ("base", "anchor")

    def combine(
        self, base: Tensor | None, anchor: Tensor | None, attributes: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        return mpg_ext.combine_rows(attributes, weights, base, anchor, target="geometric")


class Base:
    """v = base: no attribute counts."""

    def references(self, anchor_is_base: bool) -> tuple[str, ...]:
        return ("base",)

    def combine(
        self, base: Tensor | None, anchor: Tensor | None, attributes: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert base is not None
        one = torch.ones(*base.shape[:2], 1, dtype=weights.dtype, device=weights.device)
        return mpg_ext.combine_rows(base[None], one, None, None, target="arithmetic")


TARGETS: dict[str, Target] = {
    "arithmetic": Arithmetic(),
    "anchored": Anchored(),
    "geometric": Geometric(),
    "base": Base(),
}


def is_one_model(weights: Tensor, target: str) -> Tensor:
    """Whether a target's row is that of a single model, where the anchor is the base.

    weights: (B, N), alpha
    out: (B,) bool
    """
    if target == "base":
        return torch.ones(len(weights), dtype=torch.bool, device=weights.device)
    is_single = (weights != 0).sum(1) == 1
    return is_single if target == "arithmetic" else is_single & (weights.sum(1) == 1)
