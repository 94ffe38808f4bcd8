"""rms_norm: rows over their root mean square, against exact ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import mpg_ext
import reference
from covering import cases_of
from memory import laid_out, nothing_else_written
from seeds import seeded
from twins import U, around, assert_within, sum_error

EPS = 1e-6


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=seeded(sum(shape))).to(dtype)


def error_of(exact: Tensor, weight: Tensor, rounds_first: bool) -> Tensor:
    """How far rounding may take `exact` (..., in).

    A mean square is off by its sum of products, the division and eps, its root by half of that; then come the root, its
    inverse, offset + weight and two products. What is stored is rounded to the dtype, before the second product too, by
    half a digit, or below the smallest normal number by half of that one's last.
    """
    stored = torch.finfo(weight.dtype)
    relative = 1 + (sum_error(2 * len(weight)) + 2 * U) / 2 + 5 * U
    relative *= (1 + stored.eps / 2) ** (1 + rounds_first)
    return (relative - 1) * exact.abs() + stored.tiny * stored.eps * (1 + rounds_first * weight.double().abs())


@cases_of("rms_norm")
def test_rows_are_exact_to_rounding(features, B, offset, rounds_first, dtype, layout):
    scales = torch.tensor([0.001, 1, 100])[torch.arange(B) % 3][:, None]  # of the first eps is half of what counts
    x, weight = laid_out((normal(B, features) * scales).to(dtype), layout), normal(features, dtype=dtype)
    options = {"eps": EPS, "offset": offset, "rounds_first": rounds_first}
    exact = reference.rms_norm(x.double(), weight.double(), **options)
    with nothing_else_written([x, weight]):
        out = mpg_ext.rms_norm(x, weight, **options)
    assert out.dtype == dtype
    assert_within(out, around(exact, error_of(exact, weight, rounds_first)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_multiplied_has_been_rounded_only_where_that_is_asked_for(dtype):
    x = torch.tensor([1.0, -7.0], dtype=dtype).repeat(50)  # root mean square 5
    weight = normal(100, dtype=dtype)
    normed = x.float() * 0.2
    rounded, whole = normed.to(dtype) * weight, (normed * weight.float()).to(dtype)
    assert not torch.equal(rounded, whole)
    assert torch.equal(mpg_ext.rms_norm(x, weight, eps=0.0, rounds_first=True), rounded)
    assert torch.equal(mpg_ext.rms_norm(x, weight, eps=0.0), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_what_it_is_alone_whatever_the_others_and_the_threads_are(dtype):
    x, weight, threads = normal(99, 1500, dtype=dtype), normal(1500, dtype=dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.stack([mpg_ext.rms_norm(row, weight, eps=EPS) for row in x])
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            for num_rows in (1, 2, 40, 99):
                assert torch.equal(mpg_ext.rms_norm(x[:num_rows], weight, eps=EPS), alone[:num_rows])
            assert torch.equal(mpg_ext.rms_norm(x.view(3, 11, 3, -1), weight, eps=EPS), alone.view(3, 11, 3, -1))
    finally:
        torch.set_num_threads(threads)


def test_infinities_and_nan_reach_their_own_row_alone():
    x, weight = normal(4, 40), normal(40)
    x[1, 5], x[2, 7] = math.nan, math.inf
    out = mpg_ext.rms_norm(x, weight, eps=EPS)
    assert out[1].isnan().all() and out[[0, 3]].isfinite().all()
    assert out[2].isnan().equal(torch.arange(40) == 7) and (out[2].nan_to_num() == 0).all()


@pytest.mark.skipif(not (torch.cuda.is_available() and mpg_ext.build_info()["cuda"]), reason="no CUDA build or no GPU")
def test_tensors_on_a_gpu_are_refused():
    with pytest.raises(ValueError, match="x must be on the CPU, where this op alone is, got cuda"):
        mpg_ext.rms_norm(torch.zeros(1, 4, device="cuda"), torch.zeros(4, device="cuda"), eps=EPS)
