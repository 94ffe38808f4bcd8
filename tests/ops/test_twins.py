"""That the ranges that results are held against hold float32 arithmetic, and nothing that is wrong by much more."""

from __future__ import annotations

import math

import pytest
import torch

from seeds import seeded
from twins import Range, around, assert_drawn, assert_within, logprob_error, score_range


@pytest.mark.parametrize("V", [33, 999])
def test_logprobs_without_a_token_or_with_half_the_digits_are_found(V):
    logits = torch.randn(20, V, generator=seeded(V))
    exact = logits.double().log_softmax(-1)
    expected = around(exact, logprob_error(exact, V))
    assert_within(logits.log_softmax(-1), expected)
    for wrong in (logits - logits[:, 1:].logsumexp(-1, keepdim=True), logits.bfloat16().float().log_softmax(-1)):
        with pytest.raises(AssertionError, match=r"of \d+ numbers, the first at \(0, \d+\): expected -"):
            assert_within(wrong, expected)


@pytest.mark.parametrize("end", [math.nan, math.inf, -math.inf, 0.0])
def test_nan_and_infinities_are_themselves_alone(end):
    exact = torch.tensor([end], dtype=torch.float64)
    expected = around(exact, exact.abs() + 1e-6)
    assert_within(exact, expected)
    for wrong in {math.nan, math.inf, -math.inf, 1.0} - {end}:
        if not (math.isnan(wrong) and math.isnan(end)):
            with pytest.raises(AssertionError):
                assert_within(torch.tensor([wrong]), expected)


def test_range_of_a_difference_widens_as_its_terms_cancel():
    """In proportion to their sum over it, until the rest may count as nothing."""
    log_ratios = torch.zeros(2, 4, 1, dtype=torch.float64)
    left = torch.tensor([1.0, 2**-8, 2**-12, 2**-20], dtype=torch.float64)
    weights = torch.stack([torch.ones_like(left), left - 1])[..., None]
    low, high = (end[:, 0] for end in score_range(log_ratios, 1e-7, weights, "arithmetic"))
    assert (low <= left.log()).all() and (left.log() <= high).all()
    width = high - low
    assert width[2] / width[1] == pytest.approx(16, rel=0.1)
    assert low[3] == -math.inf
    # As float32 has it in either order of the terms
    for order in (0, 1), (1, 0):
        terms = weights[..., 0].float()
        assert_within((terms[order[0]] + terms[order[1]]).log(), Range(low, high))


def test_draw_is_of_a_token_whose_share_may_hold_the_uniform():
    masses = torch.tensor([[0.25, 0.0, 0.5, 0.25]], dtype=torch.float64)
    at, blurred = torch.tensor([0.7501], dtype=torch.float64), Range(masses * 0.99, masses * 1.01)
    for token, of_exact, of_blurred in [(0, False, False), (1, False, False), (2, False, True), (3, True, True)]:
        for ranges, is_possible in ((Range(masses, masses), of_exact), (blurred, of_blurred)):
            if is_possible:
                assert_drawn(torch.tensor([token]), ranges, at)
            else:
                with pytest.raises(AssertionError):
                    assert_drawn(torch.tensor([token]), ranges, at)
