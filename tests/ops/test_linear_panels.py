"""linear_panels: rows times weights that lie in panels, against exact products."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import mpg_ext
import reference
from covering import cases_of
from memory import laid_out, nothing_else_written
from mpg.models.linear import PANEL, pack
from seeds import seeded
from twins import around, assert_within, product_error


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(sum(shape)))


@cases_of("linear_panels")
def test_products_are_exact_to_rounding(features, outputs, B, has_bias, layout):
    x, weight, bias = laid_out(normal(B, features), layout), normal(outputs, features), normal(outputs)
    panels = laid_out(pack(weight), layout)
    arguments = (x, panels, bias if has_bias else None)
    exact = reference.linear_panels(*(t if t is None else t.double() for t in arguments), out_features=outputs)
    assert torch.allclose(exact, x.double() @ weight.double().T + (bias.double() if has_bias else 0))
    magnitudes = x.double().abs() @ weight.double().abs().T + (bias.double().abs() if has_bias else 0)
    with nothing_else_written([x, panels, bias]):
        out = mpg_ext.linear_panels(*arguments, out_features=outputs)
    assert out.dtype == torch.float32
    assert_within(out, around(exact, product_error(magnitudes, features + 1, exact, torch.float32)))


def test_a_row_is_what_it_is_alone_whatever_the_others_and_the_threads_are():
    x, panels, threads = normal(29, 1500), pack(normal(500, 1500)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([mpg_ext.linear_panels(row, panels)[None] for row in x])
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            for num_rows in range(1, len(x) + 1):
                assert torch.equal(mpg_ext.linear_panels(x[:num_rows], panels), alone[:num_rows])
    finally:
        torch.set_num_threads(threads)


def test_leading_dimensions_are_those_of_the_input_and_outputs_are_all_that_panels_have_by_default():
    x, panels = normal(2, 3, 5), pack(normal(20, 5))
    out = mpg_ext.linear_panels(x, panels)
    assert out.shape == (2, 3, 2 * PANEL)
    assert torch.equal(out[..., 20:], torch.zeros(2, 3, 12))
    assert torch.equal(mpg_ext.linear_panels(x[1, 2], panels, out_features=20), out[1, 2, :20])


@pytest.mark.parametrize("shape", [(3, 1), (3, 5), (15,)], ids=str)
def test_adapters_of_rows_add_what_their_own_ops_do(shape):
    x, panels, bias = normal(*shape, 40), pack(normal(50, 40)), normal(50)
    down, up, groups = normal(4, 6, 40), normal(4, 6, 50), torch.tensor([0, 3, 1])
    up[:, :2, 20:] = up[:, 2:, :20] = 0
    hidden = mpg_ext.lora_shrink(x.view(3, -1, 40), down, groups)
    for blocks in ((), (2, 0, 20, 4, 20, 50)):
        wanted = mpg_ext.linear_panels(x, panels, bias, out_features=50)
        mpg_ext.lora_expand_(wanted.view(3, -1, 50), hidden, up, groups, blocks=blocks)
        out = mpg_ext.linear_panels(x, panels, bias, down, up, groups, out_features=50, blocks=blocks)
        assert torch.equal(out, wanted)


def test_infinities_and_nan_reach_their_own_row_and_output_alone():
    x, weight = normal(9, 40), normal(50, 40)
    x[2, 5], x[7, 0], weight[33, 1] = math.nan, math.inf, math.nan
    out = mpg_ext.linear_panels(x, pack(weight), out_features=50)
    is_wrong = torch.zeros(9, 50, dtype=torch.bool)
    is_wrong[2] = is_wrong[7] = is_wrong[:, 33] = True
    assert torch.equal(~out.isfinite(), is_wrong)


@pytest.mark.skipif(not (torch.cuda.is_available() and mpg_ext.build_info()["cuda"]), reason="no CUDA build or no GPU")
def test_tensors_on_a_gpu_are_refused():
    with pytest.raises(ValueError, match="x must be on the CPU, where this op alone is, got cuda"):
        mpg_ext.linear_panels(torch.zeros(1, 4, device="cuda"), torch.zeros(1, 4, 16, device="cuda"))
