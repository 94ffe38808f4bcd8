"""Combined rows against their definition in probabilities, and what invalid rows make of them."""

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
from twins import Range, U, assert_within, in_float64, logprob_error, normalized_range, ratio_error, score_range

INF, NAN = math.inf, math.nan
KINDS = [("arithmetic", False), ("arithmetic", True), ("geometric", True)]  # target, with base and anchor


def case(N: int, B: int, P: int, V: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """attribute_logits, weights, base_logits, anchor_logits; the base excludes tokens, weights have both signs."""
    generator = seeded(N * 1000 + B * 100 + P * 10 + V)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    anchor = torch.randn(B, P, V, generator=generator) * 2
    base = anchor + torch.randn(B, P, V, generator=generator) * 0.5
    base[..., 1::7] = -INF
    attributes = anchor + torch.randn(N, B, P, V, generator=generator) * 0.3
    weights = torch.rand(B, P, N, generator=generator) + 0.5
    weights[..., 1::2] *= -0.3
    weights[..., 2::3] = 0
    return [
        tensor.to(device, kind)
        for tensor, kind in ((attributes, dtype), (weights, acc), (base, dtype), (anchor, dtype))
    ]


def combine(
    inputs: list[Tensor], target: str, has_anchor: bool, ops=mpg_ext, temperature: float | None = None
) -> tuple[Tensor, Tensor]:
    attributes, weights, base, anchor = inputs
    references = (base, anchor) if has_anchor else (None, None)
    return ops.combine_rows(attributes, weights, *references, target=target, temperature=temperature)


def expected(inputs: list[Tensor], target: str, has_anchor: bool) -> tuple[Range, Range]:
    """Where rounding may take the rows and their totals."""
    attributes, weights, base, anchor = in_float64(inputs)
    V = anchor.shape[-1]
    attributes, base, anchor = (logits.log_softmax(-1) for logits in (attributes, base, anchor))
    ratios, errors = attributes, logprob_error(attributes, V)
    if has_anchor:
        ratios, errors = attributes - anchor, ratio_error(attributes, anchor, V)
    weights = weights.permute(2, 0, 1)[..., None, None]
    masses = score_range(ratios[..., None], errors[..., None], weights, target).map(lambda end: end[..., 0])
    if has_anchor:
        masses = masses.map(lambda end: (base + end).where(base != -INF, -INF))
        masses = masses.widened(lambda end: logprob_error(base, V) + U * end.abs())
    return normalized_range(masses)


@cases_of("combine_rows")
def test_rows_are_exact_to_rounding(device, V, K, N, B, dtype, layout, target):
    inputs = case(N, B, K, V, dtype, device)
    inputs[0], inputs[2], inputs[3] = (laid_out(inputs[i], layout) for i in (0, 2, 3))
    kind = ("arithmetic", False) if target == "mixture" else (target, True)
    with nothing_else_written(inputs):
        out = combine(inputs, *kind)
    assert [tensor.dtype for tensor in out] == [torch.float32] * 2
    for tensor, wanted in zip(out, expected(inputs, *kind), strict=True):
        assert_within(tensor, wanted)


@pytest.mark.parametrize("temperature", [0.25, 0.9, 1.0, 5.0])
@pytest.mark.parametrize(("target", "has_anchor"), KINDS)
def test_rows_with_a_temperature_are_those_that_a_warp_makes_of_them(device, target, has_anchor, temperature):
    """For rows that are empty and rows that are NaN too."""
    inputs = case(3, 5, 2, 9001, torch.float32, device)
    inputs[0][0, 3, 1, 5], inputs[1][2, 0] = NAN, 0
    base = inputs[2] if has_anchor else inputs[0][:, 4]
    base[..., 4 if has_anchor else 0, :1, :] = -INF
    log_rows, log_totals = combine(inputs, target, has_anchor)
    rows, totals = combine(inputs, target, has_anchor, temperature=temperature)
    wanted = mpg_ext.warp_rows(log_rows.flatten(0, 1), temperature=temperature)
    torch.testing.assert_close(rows.flatten(0, 1), wanted, rtol=1e-4, atol=1e-7, equal_nan=True)
    assert torch.equal(totals.isnan(), log_totals.isnan()) and totals.isnan().any()
    assert torch.equal(totals == -INF, log_totals == -INF)
    exact = combine(in_float64(inputs), target, has_anchor, reference)
    scaled = ((exact[0] + exact[1][..., None]) / temperature).logsumexp(-1)
    torch.testing.assert_close(totals.double(), scaled, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("temperature", [None, 0.7])
@pytest.mark.parametrize(("target", "has_anchor"), KINDS)
def test_float64_rows_equal_the_twin(target, has_anchor, temperature):
    inputs = case(5, 3, 4, 200, torch.float64, torch.device("cpu"))
    out, wanted = (combine(inputs, target, has_anchor, ops, temperature) for ops in (mpg_ext, reference))
    for tensor, twin in zip(out, wanted, strict=True):
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(tensor, twin, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("target", "has_anchor"), KINDS)
def test_rows_are_the_definition_in_probabilities(device, target, has_anchor):
    inputs = case(3, 2, 3, 50, torch.float32, device)
    attributes, base, anchor = (inputs[i].double().softmax(-1) for i in (0, 2, 3))
    alpha = inputs[1].double().permute(2, 0, 1)[..., None]
    if target == "geometric":
        v = base * (alpha * (attributes / anchor).log()).sum(0).exp()
    elif has_anchor:
        v = base * (alpha * attributes / anchor).sum(0).clamp(min=0)
    else:
        v = (alpha * attributes).sum(0).clamp(min=0)
    log_rows, log_totals = combine(inputs, target, has_anchor)
    torch.testing.assert_close(log_totals.double().exp(), v.sum(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log_rows.double().exp(), v / v.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)


def single(
    device: torch.device,
    attributes: list[list[float]],
    weights: list[float],
    base: list[float] | None = None,
    anchor: list[float] | None = None,
    *,
    target: str = "arithmetic",
) -> tuple[list[float], float]:
    """One row from probabilities (or NaN, or +inf): out as probabilities and the total in logs."""
    rows = [None if row is None else torch.tensor(row, device=device).log()[None, None] for row in (base, anchor)]
    log_rows, log_totals = mpg_ext.combine_rows(
        torch.tensor(attributes, device=device).log()[:, None, None],
        torch.tensor([[weights]], device=device),
        *rows,
        target=target,
    )
    return log_rows[0, 0].exp().tolist(), log_totals.item()


def test_mixture_by_hand(device):
    row, total = single(device, [[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], [1.0, 1.0])
    assert (row, total) == (pytest.approx([0.3, 0.175, 0.525], rel=1e-5), pytest.approx(math.log(2), rel=1e-5))


def test_negative_mass_is_clipped_by_hand(device):
    row, total = single(device, [[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], [1.0, -1.0])
    assert (row, total) == (pytest.approx([8 / 11, 3 / 11, 0], rel=1e-5), pytest.approx(math.log(0.55), rel=1e-5))


def test_ratio_to_the_anchor_by_hand(device):
    row, total = single(device, [[0.5, 0.5]], [2.0], base=[0.5, 0.5], anchor=[0.25, 0.75])
    assert (row, total) == (pytest.approx([0.75, 0.25], rel=1e-5), pytest.approx(math.log(8 / 3), rel=1e-5))


def test_geometric_by_hand(device):
    row, total = single(device, [[0.5, 0.5]], [2.0], base=[0.5, 0.5], anchor=[0.25, 0.75], target="geometric")
    assert (row, total) == (pytest.approx([0.9, 0.1], rel=1e-5), pytest.approx(math.log(2 + 2 / 9), rel=1e-5))


def test_one_model_is_itself(device):
    assert single(device, [[0.5, 0.3, 0.2]], [1.0])[0] == pytest.approx([0.5, 0.3, 0.2], rel=1e-5)


def test_nothing_left_is_an_empty_row(device):
    assert single(device, [[0.5, 0.5], [0.5, 0.5]], [1.0, -1.0]) == ([0, 0], -INF)
    assert single(device, [[0.5, 0.5]], [0.0]) == ([0, 0], -INF)
    assert single(device, [[1.0, 0.0]], [1.0], base=[0.0, 1.0], anchor=[0.5, 0.5]) == ([0, 0], -INF)


def test_token_excluded_by_the_base_stays_excluded_whatever_its_ratios(device):
    for target in ("arithmetic", "geometric"):
        for weight in (1.0, -1.0):
            out = single(
                device,
                [[0.5, 0.5]],
                [
                    weight,
                ],
                base=[1.0, 0.0],
                anchor=[1.0, 0.0],
                target=target,
            )
            assert out[0] == ([0, 0] if (target, weight) == ("arithmetic", -1.0) else [1, 0])


def test_token_that_both_models_exclude_has_ratio_one(device):
    row, _ = single(device, [[1.0, 0.0]], [1.0], base=[0.5, 0.5], anchor=[1.0, 0.0])
    assert row == pytest.approx([0.5, 0.5], rel=1e-5)


def test_impossible_token_under_a_negative_geometric_weight_counts_as_minus_eighty(device):
    attributes, base, anchor = [[1.0, 0.0]], [0.5, 0.5], [0.5, 0.5]
    _, total = single(device, attributes, [-0.5], base, anchor, target="geometric")
    assert total == pytest.approx(40 + math.log(0.5), rel=1e-5)
    assert single(device, attributes, [0.5], base, anchor, target="geometric")[0] == [1, 0]


def test_token_that_only_the_attribute_allows_is_invalid_where_the_base_allows_it(device):
    for target in ("arithmetic", "geometric"):
        row, total = single(device, [[0.5, 0.5]], [1.0], base=[0.5, 0.5], anchor=[1.0, 0.0], target=target)
        assert all(map(math.isnan, [*row, total]))


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("where", ["attribute", "base", "anchor"])
def test_invalid_logits_make_their_row_nan_and_no_other(device, where, poison):
    inputs = case(2, 2, 2, 20, torch.float32, device)
    clean = combine(inputs, "geometric", True)[0]
    tensor = {"attribute": inputs[0][1], "base": inputs[2], "anchor": inputs[3]}[where]
    tensor[1, 0, 3] = poison
    log_rows, log_totals = combine(inputs, "geometric", True)
    assert log_rows[1, 0].isnan().all() and log_totals[1, 0].isnan()
    log_rows[1, 0] = clean[1, 0]
    assert torch.equal(log_rows, clean)


def test_invalid_anchor_makes_its_row_nan_even_where_no_weight_asks_for_it(device):
    for target in ("arithmetic", "geometric"):
        row, total = single(device, [[0.5, 0.5]], [0.0], base=[0.5, 0.5], anchor=[NAN, 1.0], target=target)
        assert all(map(math.isnan, [*row, total]))


@pytest.mark.parametrize(("target", "has_anchor"), KINDS)
def test_model_of_weight_zero_may_be_invalid(device, target, has_anchor):
    inputs = case(3, 2, 2, 20, torch.float32, device)  # the third has weight 0
    wanted = combine(inputs, target, has_anchor)
    inputs[0][2] = NAN
    for tensor, expected in zip(combine(inputs, target, has_anchor), wanted, strict=True):
        assert torch.equal(tensor, expected)


def test_base_and_anchor_may_be_one_tensor(device):
    inputs = case(2, 2, 3, 40, torch.float32, device)
    inputs[2] = inputs[3].clone()
    for target in ("arithmetic", "geometric"):
        wanted = combine(inputs, target, True)
        out = combine([*inputs[:2], inputs[3], inputs[3]], target, True)
        for tensor, expected in zip(out, wanted, strict=True):
            torch.testing.assert_close(tensor, expected)
