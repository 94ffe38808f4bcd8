"""Block verification and its draws against hand-computed cases and, decision by decision, against their twins."""

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
from twins import Range, assert_drawn

INF, NAN = math.inf, math.nan


def uniforms(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=seeded(seed))


def case(
    B: int, K: int, V: int, *, has_draft: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """target_probs, draft_probs, tokens, lengths; target and draft are alike and both exclude tokens."""
    generator = seeded(B * 100 + K * 10 + V)
    logits = torch.randn(B, K + 1, V, dtype=dtype, generator=generator)
    target = logits + 0.2 * torch.randn(B, K + 1, V, dtype=dtype, generator=generator)
    excluded = torch.rand(2, B, K + 1, V, generator=generator) < 0.1
    excluded[..., 0] = False
    draft = logits.masked_fill(excluded[0], -INF)[:, :K].softmax(-1)
    target = target.masked_fill(excluded[1], -INF)
    tokens = (
        torch.multinomial(draft.reshape(-1, V), 1, generator=generator).view(B, K) if B else torch.zeros(0, K).long()
    )
    if not has_draft:  # lookup often guesses right
        target[..., :K, :].scatter_add_(-1, tokens[..., None], torch.full((B, K, 1), 3.0, dtype=dtype))
    lengths = torch.randint(0, K + 1, (B,), generator=generator)
    return target.softmax(-1), draft if has_draft else None, tokens, lengths


def to(device: torch.device, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


# ---- draw_tokens


@pytest.mark.parametrize("V", [1, 2, 31, 33, 111, 4096, 32000])
def test_float64_draws_equal_the_twin_on_both_sides_of_every_threshold(V):
    probs = torch.rand(9, V, dtype=torch.float64, generator=seeded(V))
    probs[:, 1::3] = 0
    cumulated = probs.cumsum(-1)
    for y in (0, V // 2, V - 1):
        at = cumulated[:, y] / cumulated[:, -1]
        for u in (at, at.nextafter(torch.zeros_like(at)), at.nextafter(torch.ones_like(at))):
            u = u.clamp(0, 1 - 2**-53)
            assert torch.equal(mpg_ext.draw_tokens(probs, u), reference.draw_tokens(probs, u))


@cases_of("draw_tokens")
def test_float32_draws_invert_the_cumulated_row(device, V, B, layout):
    """Every third row holds one token alone, the others no third token."""
    probs = torch.rand(B, V, generator=seeded(V))
    probs[:, 1::3] = 0
    probs[2::3] = (torch.arange(V) == V // 2).float()
    probs, u = laid_out(probs.to(device), layout), uniforms(B, seed=V).to(device)
    with nothing_else_written([probs, u]):
        tokens = mpg_ext.draw_tokens(probs, u)
    assert_drawn(tokens, Range(probs.double(), probs.double()), u)


def test_draws_by_hand(device):
    probs = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0], device=device)  # edges at 0, .25, 1
    u = torch.tensor([0.0, 0.2499, 0.25, 0.9, 1 - 2**-53], dtype=torch.float64, device=device)
    assert mpg_ext.draw_tokens(probs.expand(5, 5), u).tolist() == [1, 1, 3, 3, 3]


def test_masses_that_cancel_draw_a_token_of_the_row(device):
    """Negative ones, which no caller may have: summed in one order they leave a total, in another nothing to pick."""
    row = torch.ones(104, device=device)[64:]
    row.zero_()[[0, 1, 16]] = torch.tensor([1e17, 1.0, -1e17], device=device)
    assert 0 <= mpg_ext.draw_tokens(row[None], torch.tensor([0.5], dtype=torch.float64, device=device)).item() < 40


def test_row_without_mass_or_with_nan_draws_token_zero(device):
    probs = torch.zeros(3, 9, device=device)
    probs[1, 4], probs[2, 3], probs[2, 8] = NAN, 1, NAN
    assert mpg_ext.draw_tokens(probs, torch.full((3,), 0.9, dtype=torch.float64, device=device)).tolist() == [0, 0, 0]


# ---- verify_block

P, Q = [[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]], [[0.5, 0.5], [0.25, 0.75]]


def verify(
    u: list[float],
    device: torch.device,
    *,
    target: list[list[float]] = P,
    draft: list[list[float]] | None = Q,
    tokens: tuple[int, ...] = (0, 1),
    length: int = 2,
) -> tuple[int, float]:
    accepted, carry = mpg_ext.verify_block(
        torch.tensor([target], device=device),
        None if draft is None else torch.tensor([draft], device=device),
        torch.tensor([tokens], device=device),
        torch.tensor([length], device=device),
        torch.tensor([u], dtype=torch.float64, device=device),
    )
    return accepted.item(), carry.item()


def test_tests_by_hand(device):
    """P_1 = .25/.5 = .5; P_2 = .5 * .5/.75 = 1/3; S_1 = (.25 - .25)_+ + (.25 - .75)_+ = 0, so h_1 = 0; h_2 = 1/3."""
    assert verify([0.0, 0.333], device) == (2, pytest.approx(1 / 3, rel=1e-6))
    assert verify([0.0, 0.334], device) == (0, 1.0)


def test_a_shorter_block_tests_its_own_end(device):
    assert verify([0.499, 0.0], device, length=1) == (1, 0.5)
    assert verify([0.5, 0.0], device, length=1) == (0, 1.0)
    assert verify([0.0, 0.0], device, length=0) == (0, 1.0)


def test_residual_enters_the_inner_test(device):
    """P_1 = .5 and p_2 = (.9, .1): S_1 = (.45 - .25)_+ = .2, h_1 = .2 / (.2 + .5) = 2/7."""
    target = [[0.25, 0.75], [0.9, 0.1], [0.5, 0.5]]
    assert verify([0.285, 0.99], device, target=target) == (1, 0.5)
    assert verify([0.286, 0.99], device, target=target) == (0, 1.0)


def test_one_hot_draft_by_hand(device):
    """P_1 = .25, S_1 = .25 * .5, h_1 = .125 / .875 = 1/7; P_2 = .125 = h_2."""
    assert verify([0.0, 0.1249], device, draft=None) == (2, 0.125)
    assert verify([0.1428, 0.125], device, draft=None) == (1, 0.25)
    assert verify([0.1429, 0.125], device, draft=None) == (0, 1.0)


def test_identical_rows_accept_everything(device):
    assert verify([1 - 2**-53] * 2, device, target=[*Q, [0.5, 0.5]]) == (2, 1.0)
    # Of the block's inner test, 0 / 0 counts as 1: u_1 = 1 - 2^-53 passes although the whole block fails.
    assert verify([1 - 2**-53] * 2, device, target=[Q[0], [1.0, 0.0], [0.5, 0.5]])[0] == 1


def test_excluded_token_ends_the_block_before_what_follows_is_read(device):
    target = [[0.0, 1.0], [NAN, NAN], [NAN, NAN]]
    assert verify([0.0, 0.0], device, target=target) == (0, 1.0)


def test_token_outside_the_vocabulary_is_rejected(device):
    for token in (-1, 2, 2**40):
        for draft in (Q, None):
            assert verify([0.0, 0.0], device, tokens=(token, 0), draft=draft) == (0, 1.0)


def test_token_that_the_draft_excludes_counts_as_an_infinite_ratio(device):
    draft = [[0.0, 1.0], [0.25, 0.75]]
    assert verify([0.0, 0.666], device, draft=draft) == (2, pytest.approx(2 / 3, rel=1e-6))
    assert verify([0.0, 0.0], device, draft=draft, target=[[0.0, 1.0], *P[1:]]) == (0, 1.0)


@pytest.mark.parametrize("row", [0, 1])
def test_nan_that_matters_is_invalid(device, row):
    target = [list(p) for p in P]
    target[row] = [NAN, NAN]
    accepted, carry = verify([0.0, 0.0], device, target=target)
    assert accepted == -1 and math.isnan(carry)
    assert verify([0.0, 0.0], device, target=target, length=row)[0] >= 0


def test_tiny_probabilities_neither_overflow_nor_vanish(device):
    target, draft = [[1e-30, 1.0], [1.0, 0.0], [0.5, 0.5]], [[1e-38, 1.0], [1.0, 0.0]]
    assert verify([0.9, 0.9], device, target=target, draft=draft, tokens=(0, 0))[0] == 2
    accepted, carry = verify([0.9, 0.0], device, target=[*draft, [0.5, 0.5]], draft=target[:2], tokens=(0, 0))
    assert (accepted, carry) == (2, pytest.approx(1e-8, rel=1e-5))


SHAPES = [(1, 1, 1), (3, 2, 2), (4, 32, 31), (9, 5, 33), (0, 3, 7), (5, 8, 111), (2, 4, 4096), (1, 3, 32000)]


@pytest.mark.parametrize("has_draft", [True, False])
@pytest.mark.parametrize(("B", "K", "V"), SHAPES)
def test_float64_decides_what_the_twin_decides_on_both_sides_of_every_threshold(B, K, V, has_draft):
    inputs = case(B, K, V, has_draft=has_draft)
    h, carries = reference.block_accept_probs(*inputs)
    assert ((h >= 0) & (h <= 1)).all()
    for at in (h, h.nextafter(h * 0), h.nextafter(h * 0 + 2), uniforms(B, K, seed=V)):
        u = at.clamp(0, 1 - 2**-53)
        accepted, carry = mpg_ext.verify_block(*inputs, u)
        twin_accepted, twin_carry = reference.verify_block(*inputs, u)
        assert torch.equal(accepted, twin_accepted)
        assert torch.equal(carry, twin_carry)
        assert torch.equal(carry, carries.gather(1, accepted[:, None])[:, 0])
        for seed in range(5):
            args = (*inputs, accepted, carry, uniforms(B, seed=seed))
            assert torch.equal(mpg_ext.draw_residual(*args), reference.draw_residual(*args))


def placed(inputs: tuple[Tensor | None, ...], layout: str, device: torch.device) -> list[Tensor | None]:
    target, draft, tokens, lengths = to(device, *inputs)
    return [laid_out(target, layout), None if draft is None else laid_out(draft, layout), tokens, lengths]


@cases_of("verify_block")
def test_float32_decides_what_the_twin_decides_away_from_thresholds(device, V, K, B, layout, has_draft):
    inputs = placed(case(B, K, V, has_draft=has_draft, dtype=torch.float32), layout, device)
    h, _ = reference.block_accept_probs(*inputs)
    u = uniforms(B, K, seed=V).to(device)
    u = u.where((u - h).abs() > 1e-9, 0.5 * h)
    with nothing_else_written([*inputs, u]):
        accepted, carry = mpg_ext.verify_block(*inputs, u)
    twin_accepted, twin_carry = reference.verify_block(*inputs, u)
    assert torch.equal(accepted, twin_accepted)
    torch.testing.assert_close(carry, twin_carry)


@cases_of("draw_residual")
def test_float32_draws_from_the_rows_of_the_twin(device, V, K, B, layout, has_draft):
    inputs = placed(case(B, K, V, has_draft=has_draft, dtype=torch.float32), layout, device)
    accepted, carry = reference.verify_block(*inputs, uniforms(B, K, seed=V).to(device))
    u = uniforms(B, seed=K).to(device)
    with nothing_else_written([*inputs, accepted, carry, u]):
        tokens = mpg_ext.draw_residual(*inputs, accepted, carry, u)
    # Exact, as in the op: float64 holds a product of two float32.
    rows = reference.residual_rows(*inputs, accepted, carry)
    assert_drawn(tokens, Range(rows, rows), u)


@pytest.mark.parametrize("ops", [mpg_ext, reference], ids=["op", "twin"])
def test_lengths_are_read_as_if_clipped(device, ops):
    target, draft, tokens, _ = to(device, *case(2, 3, 9, dtype=torch.float32))
    u, u_draw = uniforms(2, 3, seed=1).to(device), uniforms(2, seed=2).to(device)
    wild, clipped = torch.tensor([-5, 99], device=device), torch.tensor([0, 3], device=device)
    out, wanted = (ops.verify_block(target, draft, tokens, lengths, u) for lengths in (wild, clipped))
    assert torch.equal(out[0], wanted[0]) and torch.equal(out[1], wanted[1])
    for accepted in (wanted[0], clipped):
        drawn, expected = (
            ops.draw_residual(target, draft, tokens, lengths, accepted, wanted[1], u_draw)
            for lengths in (wild, clipped)
        )
        assert torch.equal(drawn, expected)


# ---- draw_residual


def draw(
    u: float,
    device: torch.device,
    *,
    accepted: int,
    carry: float,
    length: int = 2,
    target: list[list[float]] = P,
    draft: list[list[float]] | None = Q,
) -> int:
    return mpg_ext.draw_residual(
        torch.tensor([target], device=device),
        None if draft is None else torch.tensor([draft], device=device),
        torch.tensor([[0, 1]], device=device),
        torch.tensor([length], device=device),
        torch.tensor([accepted], device=device),
        torch.tensor([carry], device=device),
        torch.tensor([u], dtype=torch.float64, device=device),
    ).item()


def test_draw_after_a_rejection_is_from_the_residual(device):
    assert [draw(u, device, accepted=0, carry=1.0) for u in (0.0, 0.999)] == [1, 1]  # (-.25, .25)_+
    target = [P[0], [0.5, 0.5], P[2]]
    assert [draw(u, device, accepted=1, carry=1.0, target=target) for u in (0.0, 0.999)] == [0, 0]  # (.25, -.25)_+


def test_residual_is_scaled_by_the_carry(device):
    target, draft = [P[0], [0.5, 0.5], P[2]], [Q[0], [0.1, 0.2]]  # (.15, .05) at carry .5; (.4, .3) at 1
    assert [draw(u, device, accepted=1, carry=0.5, target=target, draft=draft) for u in (0.74, 0.76)] == [0, 1]
    assert [draw(u, device, accepted=1, carry=1.0, target=target, draft=draft) for u in (0.56, 0.58)] == [0, 1]


def test_draw_after_the_whole_block_is_from_the_target(device):
    assert [draw(u, device, accepted=2, carry=0.3) for u in (0.89, 0.91)] == [0, 1]
    assert [draw(u, device, accepted=0, carry=1.0, length=0) for u in (0.24, 0.26)] == [0, 1]


def test_empty_residual_leaves_the_target(device):
    assert [draw(u, device, accepted=1, carry=0.5) for u in (0.49, 0.51)] == [0, 1]  # .5 (.5, .5) under (.25, .75)


def test_one_hot_draft_is_taken_out_of_its_row(device):
    assert [draw(u, device, accepted=0, carry=1.0, draft=None) for u in (0.0, 0.999)] == [1, 1]
    assert [draw(u, device, accepted=1, carry=0.25, draft=None) for u in (0.0, 0.999)] == [0, 0]


def test_draw_without_a_row_is_token_zero(device):
    assert draw(0.9, device, accepted=-1, carry=NAN) == 0
    for row in ([0.0, 0.0], [NAN, NAN]):
        assert draw(0.9, device, accepted=0, carry=1.0, target=[row, *P[1:]]) == 0
        assert draw(0.9, device, accepted=2, carry=1.0, target=[*P[:2], row]) == 0


def test_token_tests_by_hand():
    probs = reference.token_accept_probs(torch.tensor([P]), torch.tensor([Q]), torch.tensor([[0, 1]]))
    torch.testing.assert_close(probs, torch.tensor([[0.5, 2 / 3]], dtype=torch.float64), rtol=1e-6, atol=0)
    one_hot = reference.token_accept_probs(torch.tensor([P]), None, torch.tensor([[0, 2]]))
    assert one_hot.tolist() == [[0.25, 0.0]]
