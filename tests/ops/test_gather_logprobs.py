"""gather_logprobs against log_softmax and against values worked out by hand."""

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
from twins import around, assert_within, logprob_error

INF, NAN = math.inf, math.nan


def assert_exact_to_rounding(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> None:
    with nothing_else_written([logits, tokens]):
        out = mpg_ext.gather_logprobs(logits, tokens, temperature=temperature)
    assert out.dtype == torch.float32
    exact = reference.gather_logprobs(logits.double(), tokens, temperature=temperature)
    assert_within(out, around(exact, logprob_error(exact, logits.shape[-1])))


@cases_of("gather_logprobs")
def test_logprobs_are_exact_to_rounding(device, V, K, B, dtype, layout):
    """Among rows with ties and rows of -inf but for one token; a few tokens lie outside the vocabulary."""
    generator = seeded(V + K)
    logits = (torch.randn(B, K, V, generator=generator) * 6).to(dtype)
    logits[1::3] = logits[1::3].round()
    logits[2::3, :, 1:] = -INF
    tokens = torch.randint(-1, V + 1, (B, K), generator=generator)
    tokens[:, 0] = V - 1
    assert_exact_to_rounding(
        laid_out(logits.to(device), layout), tokens.to(device), temperature=0.7 if dtype == torch.float16 else 1.0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", range(13, 31))
def test_every_remainder_of_the_vector_width_and_every_misalignment(device, dtype, V):
    """Rows V apart start at every offset from 16 bytes; neighbours of a row must not enter its sum."""
    storage = torch.full((20, V + 1), 30.0, device=device, dtype=dtype)
    rows = storage[:, :V]
    rows.copy_(torch.randn(20, V, generator=seeded(V)))
    assert_exact_to_rounding(rows[:, None], torch.arange(20, device=device)[:, None] % V)


def test_vocabulary_of_more_slices_than_a_warp_has_lanes(device):
    """Gemma 3's is 33 slices long; of the second row the last holds nearly all."""
    logits = torch.randn(2, 1, 262_208, generator=seeded(0))
    logits[1, 0, -1] = 20
    assert_exact_to_rounding(logits.to(device), torch.tensor([[0], [262_207]], device=device))


def test_leading_dimensions_may_have_any_strides(device):
    logits = torch.randn(3, 4, 7, 40, generator=seeded(0)).to(device)
    view = logits[:, ::2].transpose(0, 1)[..., 3:17]  # (2, 3, 7, 14)
    tokens = torch.arange(21, device=device).view(3, 7) % 14
    for rows in view:
        assert_exact_to_rounding(rows, tokens)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
@pytest.mark.parametrize("V", [1, 9, 300, 9000])
def test_logits_far_from_zero_lose_nothing(device, V, shift):
    logits = torch.randn(2, 1, V, generator=seeded(V)).to(device) + shift
    assert_exact_to_rounding(logits, torch.tensor([[0], [V - 1]], device=device))


def test_expanded_rows_share_their_memory(device):
    logits = torch.tensor([0.0, math.log(3.0)], device=device).expand(2, 3, 2)
    out = mpg_ext.gather_logprobs(logits, torch.ones(2, 3, dtype=torch.int64, device=device))
    torch.testing.assert_close(out, torch.full((2, 3), math.log(0.75), device=device))


def test_temperature_divides_the_logits(device):
    logits = torch.tensor([[[0.0, 2 * math.log(3.0)]]], device=device)
    out = mpg_ext.gather_logprobs(logits, torch.tensor([[1]], device=device), temperature=2.0)
    assert out.item() == pytest.approx(math.log(0.75), rel=1e-6)


@pytest.mark.parametrize("temperature", [2.0**-126, 1e-6, 1e6, 2.0**126])
def test_extreme_temperatures_leave_the_largest_token_or_none_apart(device, temperature):
    logits = torch.tensor([2.0, 1.0, 2.0, -INF] * 20, device=device).expand(1, 3, 80)
    out = mpg_ext.gather_logprobs(logits, torch.tensor([[2, 1, 3]], device=device), temperature=temperature)
    smaller = -math.log(40) - 1 / temperature if temperature < 1 else -math.log(60)
    largest = -math.log(40 if temperature < 1 else 60)
    torch.testing.assert_close(out.cpu(), torch.tensor([[largest, smaller, -INF]]))


def test_float64_logits_give_float64_logprobs():
    logits = torch.randn(4, 3, 300, dtype=torch.float64, generator=seeded(0)) * 5
    tokens = torch.arange(12).view(4, 3)
    out = mpg_ext.gather_logprobs(logits, tokens, temperature=1.3)
    torch.testing.assert_close(out, reference.gather_logprobs(logits, tokens, temperature=1.3), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("V", [5, 50, 10000])
def test_invalid_rows_are_nan_and_a_lone_token_is_certain(device, dtype, V):
    if dtype == torch.float64 and device.type == "cuda":
        pytest.skip("float64 is for the CPU")
    rows = torch.full((6, V), -INF)
    rows[1, V - 1] = 3.0  # all -inf but one
    rows[2] = 0.0
    rows[2, 1] = NAN
    rows[3, 0] = INF
    rows[4] = 0.0
    rows[4, V // 2] = INF
    rows[5, 2] = NAN  # NaN among -inf
    tokens = torch.tensor([0, V - 1, 0, 0, 0, 0], device=device)
    out = mpg_ext.gather_logprobs(rows[:, None].to(device, dtype), tokens[:, None])[:, 0]
    assert out[1].item() == 0.0
    assert out[[0, 2, 3, 4, 5]].isnan().all()


def test_excluded_token_has_logprob_minus_infinity(device):
    logits = torch.tensor([[[0.0, -INF, 0.0]]], device=device)
    assert mpg_ext.gather_logprobs(logits, torch.tensor([[1]], device=device)).item() == -INF


@pytest.mark.parametrize("token", [-1, 3, 2**40, -(2**62)])
def test_token_outside_the_vocabulary_is_minus_infinity_and_never_read(device, token):
    logits = torch.zeros(1, 1, 3, device=device)
    assert mpg_ext.gather_logprobs(logits, torch.tensor([[token]], device=device)).item() == -INF


@pytest.mark.parametrize("bits", [0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF, 0x8001, 0xFBFF])
def test_float16_conversion_covers_subnormals_and_extremes(device, bits):
    half = torch.tensor([bits], dtype=torch.uint16).view(torch.float16)
    logits = torch.cat([half, torch.zeros(1, dtype=torch.float16)]).to(device).view(1, 1, 2)
    tokens = torch.zeros(1, 1, dtype=torch.int64, device=device)
    assert_exact_to_rounding(logits, tokens)


def test_no_rows_give_no_logprobs(device):
    out = mpg_ext.gather_logprobs(
        torch.empty(0, 4, 9, device=device), torch.empty(0, 4, dtype=torch.int64, device=device)
    )
    assert out.shape == (0, 4)


def test_threads_do_not_change_the_result():
    logits = torch.randn(64, 4, 3000, generator=seeded(2))
    tokens = torch.zeros(64, 4, dtype=torch.int64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = mpg_ext.gather_logprobs(logits, tokens)
        torch.set_num_threads(3)
        assert torch.equal(mpg_ext.gather_logprobs(logits, tokens), alone)
    finally:
        torch.set_num_threads(threads)
