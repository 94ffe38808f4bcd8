"""Rows of logits more than 2**32 elements apart, along every dimension of every tensor that ops take with strides."""

from __future__ import annotations

import pytest
import torch

import mpg_ext
from calls import ON_CPU_ALONE, calls, clone, written_by
from memory import far_apart

CASES = [
    (op, name, dimension)
    for op, call in calls().items()
    for name, rows in call.items()
    if name.endswith("logits") or name in ("x", "hidden", "out", "query", "key", "value")
    for dimension in range(rows.dim() - 1)
]


@pytest.mark.parametrize(("op", "name", "dimension"), CASES)
def test_offsets_beyond_32_bits_reach_their_row(device, op, name, dimension, tmp_path):
    if device.type == "cuda" and op in ON_CPU_ALONE:
        pytest.skip("on the CPU alone")
    near, far = clone(calls(device)[op]), clone(calls(device)[op])
    far[name] = far_apart(far[name], dimension, tmp_path)
    wanted, out = (getattr(mpg_ext, op)(**call) for call in (near, far))
    torch.testing.assert_close([out, *written_by(far)], [wanted, *written_by(near)])
