"""Rows of logits more than 2**32 elements apart, along every dimension of every tensor that ops take with strides."""

from __future__ import annotations

import pytest
import torch

import mpg_ext
from calls import calls, clone
from memory import far_apart

CASES = [
    (op, name, dimension)
    for op, call in calls().items()
    for name, rows in call.items()
    if name.endswith("logits")
    for dimension in range(rows.dim() - 1)
]


@pytest.mark.parametrize(("op", "name", "dimension"), CASES)
def test_offsets_beyond_32_bits_reach_their_row(device, op, name, dimension, tmp_path):
    call = calls(device)[op]
    wanted = getattr(mpg_ext, op)(**clone(call))
    out = getattr(mpg_ext, op)(**clone(call) | {name: far_apart(call[name], dimension, tmp_path)})
    torch.testing.assert_close(out, wanted)
