"""Temperature, top-k, top-p and min-p against a brute-force walk down the sorted row, with many ties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mpg_ext
import reference
from covering import cases_of
from memory import laid_out, nothing_else_written
from seeds import seeded
from twins import U, around, assert_within, softmax_error

INF, NAN = math.inf, math.nan


def brute_force(row: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """The definition in Python numbers, one kept token at a time."""
    largest = max(row)
    mass = [math.exp((x - largest) / temperature) for x in row]
    order = sorted(range(len(row)), key=lambda y: (-row[y], y))
    if top_k > 0:
        order = order[:top_k]
    total, before, kept = math.fsum(mass[y] for y in order), 0.0, []
    for y in order:
        if top_p == 1 or before < top_p * total:
            kept.append(y)
        before += mass[y]
    kept = [y for y in kept if mass[y] >= min_p]
    total = math.fsum(mass[y] for y in kept)
    return [mass[y] / total if y in kept else 0.0 for y in range(len(row))]


# Masses are powers of two at temperature 1: sums are exact, so that equal masses and full budgets are, too.
LEVELS = [-math.inf, *(-k * math.log(2) for k in range(4)), 0.0, -0.0]


@given(
    row=st.lists(st.sampled_from(LEVELS), min_size=1, max_size=40).filter(lambda row: max(row) > -INF),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([1.0, 0.97, 0.9, 0.61, 0.5, 0.33, 1e-6]),
    min_p=st.sampled_from([0.0, 0.2, 0.3, 0.7, 1.0]),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_ties_are_cut_in_token_order(device, dtype, row, top_k, top_p, min_p):
    if dtype == torch.float32:
        row = torch.tensor(row).tolist()
    elif device.type == "cuda":
        pytest.skip("float64 is for the CPU")
    options = {"temperature": 1.0, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    wanted = torch.tensor([brute_force(row, **options)], dtype=dtype, device=device)
    rows = torch.tensor([row], dtype=dtype, device=device)
    for ops in (mpg_ext, reference):
        out = ops.warp_rows(rows, **options)
        assert torch.equal(out > 0, wanted > 0)
        torch.testing.assert_close(out, wanted)


OPTIONS = [
    {},
    {"top_k": 5},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02},
]


@cases_of("warp_rows")
def test_op_keeps_the_tokens_of_the_twin_exactly_to_rounding(device, V, B, layout, temperature, top_k, top_p, min_p):
    """Rows with ties, every third of them -inf but for one token. They repeat after nine, for the sake of the twin.

    Rounding may move tokens over the cut of top-p, by the errors of the masses before them and of all together, each at
    most U (log V + 10) of the total; or over that of min-p, by U (|t| + 6) of a mass exp(t).
    """
    nine = (torch.randn(9, V, generator=seeded(V))[: max(B, 1)] * 2).round(decimals=2).to(device)
    nine[2::3, :-1] = -INF
    repeated = torch.arange(B, device=device) % 9
    rows = laid_out(nine[repeated], layout)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    with nothing_else_written([rows]):
        out = mpg_ext.warp_rows(rows, **options)
    few, many = (
        reference.warp_rows(
            nine.double(),
            **options
            | {
                "top_p": top_p + side * 2 * U * (math.log(V) + 10) if top_p < 1 else 1.0,
                "min_p": min_p * (1 - side * U * (6 - math.log(min_p))) if min_p > 0 else 0.0,
            },
        )[repeated]
        > 0
        for side in (-1, 1)
    )
    is_kept = out > 0
    assert (is_kept | ~few).all() and (many | ~is_kept).all()
    rank = nine.argsort(dim=-1, descending=True, stable=True).argsort(-1)[repeated]
    assert torch.equal(is_kept, rank < is_kept.sum(-1, keepdim=True))
    logits = (nine.double() / temperature if temperature > 0 else nine.double())[repeated]
    exact = logits.masked_fill(~is_kept, -INF).softmax(-1)
    assert_within(out, around(exact, softmax_error(exact)))


@pytest.mark.parametrize(
    "options", [{"top_p": 0.9}, {"top_k": 3000}, {"top_k": 9000, "top_p": 0.8}, {"top_p": 0.95, "min_p": 0.01}], ids=str
)
def test_ties_of_long_rows_are_cut_in_token_order_where_the_twin_cuts(device, options):
    """Hundreds of equal values all over a row; rounding may move the cut by a token."""
    rows = (torch.randn(2, 20_000, generator=seeded(4)) * 2).round(decimals=1).to(device)
    is_kept = mpg_ext.warp_rows(rows, temperature=0.9, **options) > 0
    wanted = (reference.warp_rows(rows.double(), temperature=0.9, **options) > 0).sum(-1)
    assert ((is_kept.sum(-1) - wanted).abs() <= 1).all()
    rank = rows.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    assert torch.equal(is_kept, rank < is_kept.sum(-1, keepdim=True))


def test_rows_with_options_of_their_own_are_those_of_each_alone(device):
    """All of them tensors, or one at a time beside numbers for all rows."""
    rows = (torch.randn(8, 9000, generator=seeded(8)) * 2).round(decimals=1).to(device)
    options = {
        "temperature": torch.tensor([0.0, 0.7, 1.0, 3.0, 0.7, 1.0, 1e-50, 1.0], dtype=torch.float64, device=device),
        "top_k": torch.tensor([0, 40, 5, 0, 10**6, 1, 3, 300], device=device),
        "top_p": torch.tensor([1.0, 0.9, 1.0, 0.5, 0.9, 0.3, 0.9, 0.2], dtype=torch.float64, device=device),
        "min_p": torch.tensor([0.0, 0.0, 0.1, 0.01, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64, device=device),
    }
    defaults = {"temperature": 0.8, "top_k": 30, "top_p": 0.7, "min_p": 0.02}
    for own in (options, *({name: options[name]} for name in options)):
        out = mpg_ext.warp_rows(rows, **defaults | own)
        for r in range(len(rows)):
            alone = mpg_ext.warp_rows(rows[r : r + 1], **defaults | {name: own[name][r].item() for name in own})
            assert torch.equal(out[r : r + 1], alone)
        torch.testing.assert_close(out, reference.warp_rows(rows, **defaults | own))


def test_options_on_the_device_that_are_none_spoil_no_other_row(device):
    rows = torch.tensor([0.1, 0.4, 0.2, 0.3], device=device).log().repeat(9, 1)
    bad = torch.tensor([1.0, NAN, INF, -1.0, -INF, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64, device=device)
    out = mpg_ext.warp_rows(rows, temperature=bad)
    assert torch.equal(out.isnan().all(-1), out.isnan().any(-1))
    assert out.isnan().any(-1).tolist() == [False, True, True, True, True, False, False, False, False]
    every, first = [0.1, 0.4, 0.2, 0.3], [0.0, 1.0, 0.0, 0.0]
    for name, row_of in (("top_p", first), ("min_p", every)):
        values = torch.tensor([1.0 if name == "top_p" else 0.0, -1.0, -INF], dtype=torch.float64, device=device)
        out = mpg_ext.warp_rows(rows[:3], temperature=1.0, **{name: values})
        for row, wanted in zip(out, (every, row_of, row_of), strict=True):
            assert_row(row, wanted)
    out = mpg_ext.warp_rows(rows[:3], temperature=1.0, top_k=torch.tensor([-1, -(2**62), 2**62], device=device))
    for row in out:
        assert_row(row, every)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float64_rows_equal_the_twin(options):
    rows = (torch.randn(6, 500, dtype=torch.float64, generator=seeded(3)) * 2).round(decimals=1)
    out = mpg_ext.warp_rows(rows, temperature=0.8, **options)
    torch.testing.assert_close(out, reference.warp_rows(rows, temperature=0.8, **options), rtol=1e-13, atol=1e-15)


def warp(probs: list[float], device: torch.device, temperature: float = 1.0, **options: float) -> Tensor:
    return mpg_ext.warp_rows(torch.tensor([probs], device=device).log(), temperature=temperature, **options)[0]


def assert_row(row: Tensor, wanted: list[float]) -> None:
    torch.testing.assert_close(row.cpu(), torch.tensor(wanted, dtype=row.dtype))


def test_each_warp_by_hand(device):
    row = [0.1, 0.4, 0.2, 0.3]
    assert_row(warp(row, device), row)
    assert_row(warp(row, device, temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30])
    assert_row(warp(row, device, top_k=2), [0, 4 / 7, 0, 3 / 7])
    assert_row(warp(row, device, top_p=0.69), [0, 4 / 7, 0, 3 / 7])
    assert_row(warp(row, device, top_p=0.71), [0, 4 / 9, 2 / 9, 3 / 9])
    assert_row(warp(row, device, min_p=0.6), [0, 4 / 7, 0, 3 / 7])


def test_top_p_counts_what_top_k_left(device):
    # .4 and .3 of .9: the third is reached only beyond .78 of what the first three hold.
    assert_row(warp([0.1, 0.4, 0.2, 0.3], device, top_k=3, top_p=0.75), [0, 4 / 7, 0, 3 / 7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_p_just_below_one_keeps_every_token(dtype):
    rows = torch.rand(50, 999, dtype=dtype, generator=seeded(0)) * 3
    out = mpg_ext.warp_rows(rows, temperature=1.0, top_p=1 - 2**-53)
    torch.testing.assert_close(out, rows.softmax(-1))
    assert (out > 0).all()


def test_rows_need_not_be_normalised(device):
    row = torch.tensor([[0.1, 0.4, 0.2, 0.3]], device=device).log() + 100
    assert_row(mpg_ext.warp_rows(row, temperature=1.0, top_k=2)[0], [0, 4 / 7, 0, 3 / 7])


def test_temperature_zero_is_the_largest_and_lowest_token(device):
    for temperature in (0.0, 1e-50):
        assert_row(warp([0.1, 0.2, 0.4, 0.3], device, temperature), [0, 0, 1, 0])
    assert_row(warp([0.1, 0.4, 0.1, 0.4], device, 0.0), [0, 1, 0, 0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_empty_and_invalid_rows_say_so_and_touch_no_other(device, temperature):
    rows = torch.zeros(4, 7, device=device)
    rows[0], rows[1, 3], rows[2, 6] = -INF, NAN, INF
    out = mpg_ext.warp_rows(rows, temperature=temperature, top_k=3, top_p=0.9)
    assert (out[0] == 0).all()
    assert out[1].isnan().all() and out[2].isnan().all()
    assert_row(out[3], [1, 0, 0, 0, 0, 0, 0] if temperature == 0 else [1 / 3, 1 / 3, 1 / 3, 0, 0, 0, 0])
