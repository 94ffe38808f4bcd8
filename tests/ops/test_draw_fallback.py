"""The closed-form fallback draw against its own definition, summed out by hand."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

import mpg_ext
import reference
from covering import cases_of
from memory import laid_out, nothing_else_written
from seeds import seeded
from twins import Range, U, accepted_range, assert_drawn, assert_within, in_float64, ratio_error, score_range

INF, NAN = math.inf, math.nan


def case(N: int, B: int, V: int, logits_dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Inputs of draw_fallback with a draft that excludes some tokens, as a top-p warp does."""
    generator = seeded(N * 100 + B * 10 + V)
    acc = torch.float64 if logits_dtype == torch.float64 else torch.float32
    anchor = torch.randn(B, V, generator=generator) * 2
    draft = torch.softmax(torch.randn(B, V, generator=generator), -1)
    draft = draft * (torch.rand(B, V, generator=generator) < 0.5)
    draft[:, -1] = 0.1
    inputs = [
        anchor.to(logits_dtype),
        (anchor + torch.randn(N, B, V, generator=generator)).to(logits_dtype),
        (draft / draft.sum(-1, keepdim=True)).to(acc),
        torch.randn(B, N, generator=generator).round(decimals=1).to(acc).where(torch.arange(N) > 0, 1.0),
        (torch.rand(B, generator=generator) - 0.5).to(acc),
        torch.rand(B, dtype=torch.float64, generator=generator),
        torch.rand(B, generator=generator) < 0.8,
    ]
    return [tensor.to(device) for tensor in inputs]


def expected(inputs: list[Tensor], score: str) -> tuple[Range, Range]:
    """Where rounding may take the masses and the scores of all tokens."""
    anchor, attributes, draft_probs, weights, log_bound = in_float64(inputs)
    anchor, attributes = anchor.log_softmax(-1), attributes.log_softmax(-1)
    errors = ratio_error(attributes, anchor, anchor.shape[-1])[..., None]
    scores = score_range((attributes - anchor)[..., None], errors, weights.T[:, :, None, None], score)
    scores = scores.map(lambda end: end[..., 0])
    return accepted_range(draft_probs, scores, log_bound[:, None]), scores


@cases_of("draw_fallback")
def test_op_draws_from_the_masses_of_the_twin(device, V, N, B, dtype, layout, score):
    inputs = case(N, B, V, dtype, device)
    inputs[0], inputs[1] = laid_out(inputs[0], layout), laid_out(inputs[1], layout)
    active = inputs[6]
    with nothing_else_written(inputs):
        tokens, scores, accept_probs = mpg_ext.draw_fallback(*inputs, score=score)
    masses, token_scores = expected(inputs[:5], score)
    totals = masses.map(lambda end: end.sum(-1).where(active, 0))
    assert_within(accept_probs, Range(totals.low * (1 - U), totals.high * (1 + U)))
    is_drawn = accept_probs > 0
    assert (tokens[~is_drawn] == -1).all() and (scores[~is_drawn] == -INF).all()
    assert_drawn(tokens[is_drawn], masses.map(lambda end: end[is_drawn]), inputs[5][is_drawn])
    assert_within(scores[is_drawn], token_scores.map(lambda end: end[is_drawn.nonzero()[:, 0], tokens[is_drawn]]))


@pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
def test_float64_draws_what_the_twin_draws(kind):
    inputs = case(3, 50, 200, torch.float64, torch.device("cpu"))
    for seed in range(20):
        inputs[5] = torch.rand(50, dtype=torch.float64, generator=seeded(seed))
        out, twin = mpg_ext.draw_fallback(*inputs, score=kind), reference.draw_fallback(*inputs, score=kind)
        assert torch.equal(out[0], twin[0])
        for tensor, wanted in zip(out[1:], twin[1:], strict=True):
            torch.testing.assert_close(tensor, wanted, rtol=1e-11, atol=1e-11)


def by_hand(uniform: float, device: torch.device, log_bound: float = math.log(2)) -> tuple[int, float, float]:
    """Anchor (.5, .25, .25), attribute (.25, .25, .5), draft (.5, .3, .2): ratios .5, 1, 2."""
    tokens, scores, probs = mpg_ext.draw_fallback(
        torch.tensor([[0.5, 0.25, 0.25]], device=device).log(),
        torch.tensor([[[0.25, 0.25, 0.5]]], device=device).log(),
        torch.tensor([[0.5, 0.3, 0.2]], device=device),
        torch.ones(1, 1, device=device),
        torch.tensor([log_bound], device=device),
        torch.tensor([uniform], dtype=torch.float64, device=device),
        torch.ones(1, dtype=torch.bool, device=device),
        score="arithmetic",
    )
    return tokens.item(), scores.item(), probs.item()


def test_masses_by_hand(device):
    # At M = 2 the masses are .125, .15, .2: total .475, edges at .263 and .579.
    assert [by_hand(u, device)[0] for u in (0.0, 0.26, 0.27, 0.57, 0.59, 0.999999)] == [0, 0, 1, 1, 2, 2]
    token, score, prob = by_hand(0.9, device)
    assert (token, score, prob) == (2, pytest.approx(math.log(2), rel=1e-6), pytest.approx(0.475, rel=1e-6))


def test_acceptance_is_clipped_at_one(device):
    assert by_hand(0.5, device, log_bound=-9.0)[2] == pytest.approx(1.0, rel=1e-6)


def single(device: torch.device, ops: ModuleType = mpg_ext, **changes: Tensor) -> tuple[int, float, float]:
    """One sequence, one attribute model, three tokens; uniform draft; arguments replaced by name."""
    inputs = {
        "anchor_logits": torch.zeros(1, 3),
        "attribute_logits": torch.zeros(1, 1, 3),
        "draft_probs": torch.full((1, 3), 1 / 3),
        "weights": torch.ones(1, 1),
        "log_bound": torch.zeros(1),
        "uniforms": torch.full((1,), 0.5, dtype=torch.float64),
        "active": torch.ones(1, dtype=torch.bool),
    } | changes
    out = ops.draw_fallback(**{name: tensor.to(device) for name, tensor in inputs.items()}, score="arithmetic")
    return tuple(tensor.item() for tensor in out)


def test_token_of_zero_mass_is_never_drawn_even_at_the_edges(device):
    draft = torch.tensor([[0.0, 1.0, 0.0]])
    for uniform in (0.0, 1 - 2**-53):
        assert single(device, draft_probs=draft, uniforms=torch.tensor([uniform], dtype=torch.float64))[0] == 1


def test_nothing_left_gives_token_minus_one(device):
    assert single(device, draft_probs=torch.zeros(1, 3)) == (-1, -INF, 0.0)
    excluded = torch.tensor([[[0.0, -INF, -INF]]])
    assert single(device, attribute_logits=excluded, draft_probs=torch.tensor([[0.0, 0.5, 0.5]])) == (-1, -INF, 0.0)


def test_inactive_sequence_draws_nothing_even_from_invalid_rows(device):
    out = single(device, active=torch.zeros(1, dtype=torch.bool), anchor_logits=torch.full((1, 3), NAN))
    assert out == (-1, -INF, 0.0)


@pytest.mark.parametrize("poison", [NAN, INF])
def test_invalid_logits_give_token_minus_two(device, poison):
    token, score, prob = single(device, attribute_logits=torch.tensor([[[0.0, poison, 0.0]]]))
    assert token == -2
    assert math.isnan(score)
    assert math.isnan(prob)


@pytest.mark.parametrize("ops", [mpg_ext, reference], ids=["op", "twin"])
def test_invalid_draft_gives_token_minus_two_even_for_a_token_that_no_score_accepts(device, ops):
    """V = 40: on the CPU a draft of one token is scored by itself, a draft of all in lanes."""
    for probs in (torch.zeros(1, 40), torch.full((1, 40), 1 / 40)):
        probs[0, 1] = NAN
        attribute = torch.zeros(1, 1, 40)
        attribute[0, 0, 1] = -INF
        logits = {"anchor_logits": torch.zeros(1, 40), "attribute_logits": attribute}
        assert single(device, ops, **logits, draft_probs=probs)[0] == -2


def test_attribute_with_weight_zero_may_be_invalid(device):
    logits = torch.zeros(2, 1, 3)
    logits[1] = NAN
    assert single(device, attribute_logits=logits, weights=torch.tensor([[1.0, 0.0]]))[0] == 1


def test_token_that_only_the_attribute_allows_matters_only_where_the_draft_proposes_it(device):
    anchor = torch.tensor([[0.0, 0.0, -INF]])
    assert single(device, anchor_logits=anchor, draft_probs=torch.tensor([[0.2, 0.8, 0.0]]))[0] == 1
    assert single(device, anchor_logits=anchor)[0] == -2


def test_draws_follow_the_law_of_the_rejection_loop(device):
    """Evenly spaced uniforms visit every token in proportion to its mass, to within one draw."""
    n = 1000
    one = case(2, 1, 12, torch.float32, device)[:5]
    one[3].clamp_(min=-0.5)  # under which some token has mass
    inputs = [
        tensor.expand(*shape) for tensor, shape in zip(one, [(n, 12), (2, n, 12), (n, 12), (n, 2), (n,)], strict=True)
    ]
    uniforms = ((torch.arange(n, dtype=torch.float64) + 0.5) / n).to(device)
    active = torch.ones(n, dtype=torch.bool, device=device)
    tokens, _, _ = mpg_ext.draw_fallback(*inputs, uniforms, active, score="arithmetic")
    anchor, attributes = inputs[0][0].double().softmax(-1), inputs[1][:, 0].double().softmax(-1)
    ratio = (inputs[3][0].double() @ (attributes / anchor)).clamp(min=0)
    mass = inputs[2][0].double() * (ratio / inputs[4][0].double().exp()).clamp(max=1)
    counts = torch.bincount(tokens, minlength=12).double()
    assert (counts - n * mass / mass.sum()).abs().max() <= 1.01
