"""lora_shrink and lora_expand_: rows that each run an adapter of their own, against exact products."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import mpg_ext
import reference
from covering import cases_of
from memory import laid_out, nothing_else_written
from seeds import seeded
from twins import around, assert_within, product_error

GROUPS = 4


def normal(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, generator=seeded(sum(shape))).to(device, dtype)


def groups_of(num_rows: int, device: torch.device) -> Tensor:
    """Runs of one, two and more rows, most in order, some without an adapter."""
    pattern = torch.tensor([0, 1, 1, 1, 2, 3, 3, 0, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1])
    return pattern[-num_rows:].to(device) if num_rows else pattern[:0].to(device)


def block_diagonal(up: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """An up factor with so many blocks, about alike, and what they are to the op."""
    ranks, outputs = ([size * i // count for i in range(count + 1)] for size in up.shape[1:])
    diagonal, blocks = torch.zeros_like(up), []
    for (rank, next_rank), (first, end) in zip(pairwise(ranks), pairwise(outputs), strict=True):
        diagonal[:, rank:next_rank, first:end] = up[:, rank:next_rank, first:end]
        blocks += [next_rank - rank, first, end]
    return diagonal, blocks


@cases_of("lora_shrink")
def test_shrink_is_exact_to_rounding(device, features, rank, K, B, dtype, layout):
    options = {"dtype": dtype, "device": device}
    x = laid_out(normal(B, K, features, **options), layout)
    down, groups = normal(GROUPS, rank, features, **options), groups_of(B, device)
    with nothing_else_written([x, down, groups]):
        hidden = mpg_ext.lora_shrink(x, down, groups)
    exact, magnitudes = (reference.lora_shrink(f(x.double()), f(down.double()), groups) for f in (lambda t: t, abs))
    assert hidden.dtype == dtype
    assert_within(hidden, around(exact, product_error(magnitudes, features, exact, dtype)))


@cases_of("lora_expand_")
def test_expand_adds_to_rows_exactly_to_rounding_and_touches_nothing_else(
    device, features, rank, K, B, dtype, layout, is_of_all, num_blocks
):
    options = {"dtype": dtype, "device": device}
    out = laid_out(normal(B, K, features, **options), layout)
    hidden = laid_out(normal(B, K, rank * (GROUPS if is_of_all else 1), **options), layout)
    up, blocks = block_diagonal(normal(GROUPS, rank, features, **options), num_blocks)
    groups = groups_of(B, device)
    exact, magnitudes = out.double(), out.double().abs()
    reference.lora_expand_(exact, hidden.double(), up.double(), groups)
    reference.lora_expand_(magnitudes, hidden.double().abs(), up.double().abs(), groups)
    with nothing_else_written([hidden, up, groups], [out]):
        mpg_ext.lora_expand_(out, hidden, up, groups, blocks=blocks)
    assert_within(out, around(exact, product_error(magnitudes, rank + 1, exact, dtype)))


def run_both(x: Tensor, down: Tensor, up: Tensor, groups: Tensor) -> Tensor:
    out = x.new_ones(*x.shape[:2], up.shape[2])
    mpg_ext.lora_expand_(out, mpg_ext.lora_shrink(x, down, groups), up, groups)
    return out


@pytest.mark.parametrize("q", [1, 5])
@pytest.mark.parametrize("groups", [[1, 2, 3], [0, 0, 1, 1, 1, 2], [3, 1, 1, 3, 0, 3], [2] * 13], ids=str)
def test_rows_of_runs_of_unequal_length_get_the_numbers_that_they_get_alone(device, groups, q):
    options = {"dtype": torch.float32, "device": device}
    x = normal(len(groups), q, 100, **options)
    down, up, row_groups = (
        normal(GROUPS, 6, 100, **options), normal(GROUPS, 6, 50, **options), torch.tensor(groups, device=device)
    )  # fmt: skip
    out = run_both(x, down, up, row_groups)
    for i in range(len(groups)):
        assert torch.equal(out[i : i + 1], run_both(x[i : i + 1], down, up, row_groups[i : i + 1]))


def test_rows_of_a_group_outside_run_the_plain_base_and_read_no_factor(device):
    options = {"dtype": torch.float32, "device": device}
    x, down, up = (normal(*shape, **options) for shape in [(5, 2, 9), (GROUPS, 3, 9), (GROUPS, 3, 7)])
    down[0], up[0] = torch.nan, torch.nan
    groups = torch.tensor([-(2**40), 0, 1, GROUPS, 2**40], device=device)
    hidden, out = mpg_ext.lora_shrink(x, down, groups), run_both(x, down, up, groups)
    is_plain = torch.tensor([True, True, False, True, True])
    assert (hidden.cpu() == 0).all((1, 2)).equal(is_plain)
    assert (out.cpu() == 1).all((1, 2)).equal(is_plain)
    assert out.isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "columns", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_of_all", [False, True])
def test_long_runs_are_those_of_the_twin(dtype, layout, is_of_all):
    """On the CPU those are torch's products in 16 bits, of all rows of a run at once where their tokens lie in line."""
    options = {"dtype": dtype, "device": torch.device("cpu")}
    x, down, up = (normal(*shape, **options) / 8 for shape in [(9, 130, 256), (GROUPS, 33, 256), (GROUPS, 33, 256)])
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 5, 3, 3])
    hidden = mpg_ext.lora_shrink(x, down, groups)
    if is_of_all:  # each row's own part among others
        hidden = torch.cat([torch.where(groups[:, None, None] == g, hidden, torch.nan) for g in range(GROUPS)], 2)
    out = torch.ones(9, 130, 300, dtype=dtype)[..., 7:263] if layout == "columns" else laid_out(x, layout)
    wanted = out.clone()
    reference.lora_expand_(wanted, reference.lora_shrink(x, down, groups), up, groups)
    with nothing_else_written([hidden, up], [out]):
        mpg_ext.lora_expand_(out, hidden, up, groups)
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("column", [32, 33])  # the second does not lie on 16 bytes
def test_expand_adds_to_the_columns_of_a_joined_product_from_the_ranks_of_a_joined_shrink(device, column):
    options = {"dtype": torch.bfloat16, "device": device}
    product, hidden = normal(3, 2, 64, **options), normal(3, 2, 8, **options)
    up, groups = normal(GROUPS, 4, 16, **options), torch.tensor([1, 1, 3], device=device)
    wanted = product.clone()
    reference.lora_expand_(wanted[..., column : column + 16], hidden[..., 4:], up, groups)
    out = product[..., column : column + 16]
    with nothing_else_written([hidden, up], [out]):
        mpg_ext.lora_expand_(out, hidden[..., 4:], up, groups)
    torch.testing.assert_close(product, wanted, rtol=2**-7, atol=2**-7)


def test_the_cpu_reads_nothing_between_blocks():
    options = {"dtype": torch.float32, "device": torch.device("cpu")}
    up, blocks = block_diagonal(normal(GROUPS, 16, 1100, **options), 3)
    up[up == 0] = torch.nan
    out = torch.zeros(4, 3, 1100)
    mpg_ext.lora_expand_(out, normal(4, 3, 16, **options), up, groups_of(4, options["device"]), blocks=blocks)
    assert out.isfinite().all()


def test_float64_is_computed_in_float64():
    options = {"dtype": torch.float64, "device": torch.device("cpu")}
    x, down, up = (normal(*shape, **options) for shape in [(5, 3, 99), (GROUPS, 7, 99), (GROUPS, 7, 33)])
    groups, wanted = torch.tensor([1, 1, 2, 3, 0]), torch.ones(5, 3, 33, dtype=torch.float64)
    reference.lora_expand_(wanted, reference.lora_shrink(x, down, groups), up, groups)
    torch.testing.assert_close(run_both(x, down, up, groups), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_stored_as_torch_rounds_them(device, dtype):
    """Products of two numbers of 16 bits, whatever their bits: ties, subnormal numbers, infinities, NaN."""
    hidden, up = (
        torch.randint(-(2**15), 2**15, (256,), generator=seeded(n)).short().view(dtype).to(device) for n in (1, 2)
    )
    hidden[0] = torch.nan
    out = torch.zeros(1, 256, 256, dtype=dtype, device=device)
    mpg_ext.lora_expand_(out, hidden[None, :, None], up.expand(2, 1, 256), torch.ones(1, device=device).long())
    wanted = (hidden.float()[:, None] * up.float()).to(dtype)
    assert wanted.isinf().any()
    torch.testing.assert_close(out[0], wanted, rtol=0, atol=0, equal_nan=True)
