"""attend_rows: rows of their own lengths, against the softmax of exact scores."""

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
from twins import U, around, assert_within, product_error, sum_error

HEADS = 2  # of keys
PART = 512  # keys that the op takes at once


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=seeded(sum(shape))).to(dtype)


def positions_of(num_rows: int, num_queries: int, num_keys: int) -> Tensor:
    """Of chunks that end anywhere, some of them before the first key or behind the last."""
    last = torch.randint(num_keys + num_queries, (num_rows, 1), generator=seeded(num_keys))
    return last - torch.arange(num_queries).flip(0)


def error_of(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scale: float | None, exact: Tensor
) -> Tensor:
    """How far rounding may take `exact` (R, q, heads, E).

    A score is off by the rounding of its products and of the scale. Its exp turns that into a relative error of a
    weight, which has more from the difference to the maximum, the exp, and one such step a part; the sum that weights
    are divided by is off by as much on average, at most by the largest. Weighted values are then a sum of products.
    """
    dtype, groups, (num_keys, size) = query.dtype, query.shape[1] // key.shape[1], key.shape[2:]
    query, key, value = (x.double() for x in (query, *(x.repeat_interleave(groups, 1) for x in (key, value))))
    is_read = (torch.arange(num_keys) <= positions.clamp(0, num_keys - 1)[..., None])[:, None]  # (R, 1, q, S)
    scale = size**-0.5 if scale is None else scale
    scores = ((query @ key.mT) * scale).where(is_read, -math.inf)
    errors = (sum_error(2 * size) * (query.abs() @ key.abs().mT) * scale).where(is_read, 0) + U * scores.abs()
    below = (scores - scores.amax(-1, keepdim=True)).abs()
    relative = errors + 2 * U * below + U * (16 + 8 * math.ceil(num_keys / PART)) + sum_error(num_keys)
    weights, relative = scores.softmax(-1), relative.where(is_read, 0)
    relative = relative + relative.amax(-1, keepdim=True)
    own, magnitudes = (((weights * by) @ value.abs()).transpose(1, 2) for by in (relative, 1))
    return own + product_error(magnitudes, num_keys, exact, dtype)


@cases_of("attend_rows")
def test_rows_are_exact_to_rounding_and_nothing_behind_them_is_read(features, keys, K, groups, scale, B, dtype, layout):
    query = laid_out(normal(B, HEADS * groups, K, features, dtype=dtype), layout)
    key = laid_out(normal(B, HEADS, keys, features, dtype=dtype), layout)
    value = laid_out(normal(B, HEADS, keys, features + 3, dtype=dtype), layout)
    positions = positions_of(B, K, keys)
    scale = 0.3 if scale == "given" else None
    exact = reference.attend_rows(*(x.double() for x in (query, key, value)), positions, scale=scale)
    error = error_of(query, key, value, positions, scale, exact)
    for row, last in enumerate(positions.amax(1).clamp(min=0).tolist()):
        key[row, :, last + 1 :] = value[row, :, last + 1 :] = math.nan
    with nothing_else_written([query, key, value, positions]):
        out = mpg_ext.attend_rows(query, key, value, positions, scale=scale)
    assert out.dtype == dtype
    assert_within(out, around(exact, error))


def test_a_query_that_reaches_a_key_or_value_of_nan_is_nan_and_no_other_is():
    query, key, value = normal(3, 2, 2, 8), normal(3, 2, 9, 8), normal(3, 2, 9, 8)
    positions = torch.tensor([[3, 4], [3, 4], [3, 4]])
    key[1, :, 4], value[2, 1, 4] = math.nan, math.nan
    out = mpg_ext.attend_rows(query, key, value, positions)
    is_nan = torch.zeros(3, 2, 2, dtype=torch.bool)  # row, query, head
    is_nan[1, 1] = is_nan[2, 1, 1] = True
    assert out.isnan().all(-1).equal(is_nan)
    assert out.isnan().any(-1).equal(is_nan)


@pytest.mark.parametrize("num_keys", [3, PART + 3])
def test_scores_without_a_finite_one_give_nan_and_excluded_keys_count_for_nothing(num_keys):
    query, value = torch.ones(1, 1, 1, 4), normal(1, 1, num_keys, 4)
    key, last = torch.full((1, 1, num_keys, 4), -math.inf), torch.tensor([[num_keys - 1]])
    assert mpg_ext.attend_rows(query, key, value, last).isnan().all()
    key[0, 0, -1] = 0.0
    assert torch.equal(mpg_ext.attend_rows(query, key, value, last)[0, 0, 0], value[0, 0, -1])
    key[0, 0, 1] = math.inf
    assert mpg_ext.attend_rows(query, key, value, last).isnan().all()


def test_scores_as_large_as_numbers_are_do_not_overflow():
    query, key = torch.full((1, 1, 1, 1), 1e19), torch.tensor([1e19, -1e19, 1e19]).view(1, 1, 3, 1)
    value = torch.tensor([1.0, 5.0, 3.0]).view(1, 1, 3, 1)
    assert mpg_ext.attend_rows(query, key, value, torch.tensor([[2]])).item() == 2
    assert mpg_ext.attend_rows(query, key, value, torch.tensor([[2]]), scale=0.0).item() == 3


def test_threads_do_not_change_the_result():
    query, key, value = normal(37, 6, 1, 64), normal(37, 3, 300, 64), normal(37, 3, 300, 64)
    positions, threads = positions_of(37, 1, 300), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = mpg_ext.attend_rows(query, key, value, positions)
        torch.set_num_threads(3)
        assert torch.equal(mpg_ext.attend_rows(query, key, value, positions), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not (torch.cuda.is_available() and mpg_ext.build_info()["cuda"]), reason="no CUDA build or no GPU")
def test_tensors_on_a_gpu_are_refused():
    query, held, positions = (torch.zeros(*shape, device="cuda") for shape in [(1, 1, 1, 4), (1, 1, 3, 4), (1, 1)])
    with pytest.raises(ValueError, match="query must be on the CPU, where this op alone is, got cuda"):
        mpg_ext.attend_rows(query, held, held, positions.long())
