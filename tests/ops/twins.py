"""How the result of an op is held against that of its twin: accuracy of numbers, validity of draws.

Knows no op.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def in_float64(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [t.double() if t is not None and t.is_floating_point() else t for t in inputs]


def assert_as_accurate(out: Tensor, plain: Tensor, exact: Tensor, scale: float = 1.0) -> None:
    """Off by at most twice what plain torch is off in the same dtype, against float64, and one rounding.

    NaN and infinities where float64 has them.

    scale: of the numbers that these were computed from, where that is larger than theirs
    """
    out, plain, exact = out.double(), plain.double(), exact.double()
    is_finite = exact.isfinite()
    torch.testing.assert_close(out[~is_finite], exact[~is_finite], rtol=0, atol=0, equal_nan=True)
    if is_finite.any():
        error, plain_error = ((x - exact)[is_finite].abs().max().item() for x in (out, plain))
        one_rounding = torch.finfo(torch.float32).eps * (1 + max(exact[is_finite].abs().max().item(), scale))
        assert error <= 2 * plain_error + one_rounding


def assert_drawn(tokens: Tensor, masses: Tensor, uniforms: Tensor, tolerance: float) -> None:
    """Each token has mass, and inverting the cumulated masses (B, V) float64 at the uniform may give it.

    tolerance: the part of the total by which rounding may have moved an edge
    """
    cumulated = masses.cumsum(-1)
    total = cumulated[:, -1]
    mass = masses.gather(1, tokens[:, None])[:, 0]
    above = cumulated.gather(1, tokens[:, None])[:, 0] / total
    assert (mass > 0).all()
    assert (above - mass / total <= uniforms + tolerance).all()
    assert (uniforms - tolerance <= above).all()
