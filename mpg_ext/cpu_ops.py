"""The ops that are on the CPU alone, where small models spend their time otherwise than on a GPU.

What ops.py says of all ops holds here too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attend_rows(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention of R rows that have their own lengths: softmax(scale query key^T) value over the keys up to a position.

    On the CPU alone. A row's keys are read as far as its queries reach; what lies behind them may be anything. Sums are
    in acc, and do not depend on the other rows. G neighbouring heads of queries share each of H heads of keys and
    values (grouped-query attention).

    query: (R, H * G, q, D), float32, float16, bfloat16 or float64, D at least 1
    key, value: (R, H, S, D) and (R, H, S, E), dtype of query, S at least 1. Any strides; where the last of one of the
        three is not 1, it is copied
    positions: (R, q) int64, of every query: it attends to the keys 0 to its position; read as if clipped to [0, S - 1]
    scale: default D ** -0.5

    out: (R, q, H * G, E), dtype of query; NaN where a score is NaN or +inf, or all of them are -inf, and where a value
    is NaN, or infinite and its weight 0
    """
    return torch.ops.mpg.attend_rows(query, key, value, positions, scale=scale)


def linear_panels(
    x: Tensor,
    panels: Tensor,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    groups: Tensor | None = None,
    *,
    out_features: int | None = None,
    blocks: Sequence[int] = (),
) -> Tensor:
    """A linear layer x weight^T + bias whose weight lies in panels of 16 outputs, as BLAS libraries pack theirs; with
    down, up and groups, of which there are all or none, also what `lora_shrink` and `lora_expand_` add to it.

    On the CPU alone, and made for few rows: memory is read once for all of them. Sums are in float32, in an order that
    depends on `in` alone: not on the other rows, nor on the number of threads.

    x: (..., in), float32; any strides, copied where it is not contiguous
    panels: (T, in, 16), float32: panels[t, i, j] is weight[16 t + j, i], and zero behind the last output
    bias: (out,), float32
    down, up, groups: (G, r, in), (G, r, out) and (R,), as those ops take them; x then has the tokens of R rows in order
    out_features: out, more than 16 (T - 1) and at most 16 T; default 16 T
    blocks: of up, as `lora_expand_` takes them

    out: (..., out), float32
    """
    return torch.ops.mpg.linear_panels(x, panels, bias, down, up, groups, out_features=out_features, blocks=blocks)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0, rounds_first: bool = False) -> Tensor:
    """Rows over their root mean square, times offset + weight: x / sqrt(mean(x^2) + eps) * (offset + weight).

    On the CPU alone. Sums are in acc, in an order that depends on `in` alone: not on the other rows, nor on the number
    of threads.

    x: (..., in), float32, float16, bfloat16 or float64, in at least 1; any strides, copied where it is not contiguous
    weight: (in,), dtype of x
    offset: of the weight: 1 where what is stored is its distance from 1, as in Gemma
    rounds_first: whether what is multiplied has been rounded to the dtype of x, as in Llama

    out: (..., in), dtype of x; a row with NaN is NaN throughout, one with infinite numbers NaN there and 0 elsewhere
    """
    return torch.ops.mpg.rms_norm(x, weight, eps, offset, rounds_first)
