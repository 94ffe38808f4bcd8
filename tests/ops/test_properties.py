"""Laws of the mathematics, on rows that hypothesis makes up: ties, exclusions, extremes. Knows no twin's formula.

Tests of single ops hold laws of their own beside these. 40 examples each; thousands under the profile "fuzz".
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor
from torch.utils._pytree import tree_map_only

import mpg_ext
from calls import ON_CPU_ALONE, OPS, calls, clone, outputs_of, written_by

INF = math.inf

NUMBERS = st.floats(-20, 20, width=32) | st.sampled_from([-1.0, 0.0, 1.0])
LOGITS = NUMBERS | st.just(-INF)
MASSES = st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.25, 0.5])
WEIGHTS = st.floats(0.125, 4, width=32)
SIZES = st.integers(1, 12)


@st.composite
def tensors(draw: DrawFn, elements: st.SearchStrategy[float], *shape: int) -> Tensor:
    count = math.prod(shape)
    return torch.tensor(draw(st.lists(elements, min_size=count, max_size=count))).view(shape)


@st.composite
def rows(draw: DrawFn, elements: st.SearchStrategy[float], count: int = 1) -> Tensor:
    """(count, V) rows of one size; none is -inf or 0 throughout."""
    x = draw(tensors(elements, count, draw(SIZES)))
    assume(((x > 0) if elements is MASSES else (x > -INF)).any(-1).all())
    return x


def evenly_spaced(n: int, device: torch.device) -> Tensor:
    """Uniforms that visit every event in proportion to its probability, to within one visit."""
    return ((torch.arange(n, dtype=torch.float64) + 0.5) / n).to(device)


def assert_visits(tokens: Tensor, masses: Tensor) -> None:
    wanted = len(tokens) * masses.double() / masses.double().sum()
    counts = torch.bincount(tokens, minlength=len(masses)).double()
    assert (counts - wanted).abs().max() <= 1 + 1e-4 * len(tokens)


# ---- rows of logits


@given(row=rows(LOGITS), shift=NUMBERS)
def test_probabilities_of_a_row_sum_to_one_and_stay_where_its_logits_are_shifted(device, row, shift):
    V = row.shape[1]
    every_token = torch.arange(V, device=device)[None]
    out, shifted = (mpg_ext.gather_logprobs(x.to(device).expand(V, V)[None], every_token) for x in (row, row + shift))
    assert out.double().exp().sum().item() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(shifted, out, rtol=1e-5, atol=2e-5)


@given(row=rows(LOGITS), weight=WEIGHTS)
def test_a_model_alone_is_its_own_row_and_its_weight_only_scales_the_total(device, row, weight):
    logits, w = row.to(device)[None], torch.full((1, 1, 1), weight, device=device)
    log_rows, log_totals = mpg_ext.combine_rows(logits[None], w, None, None, target="arithmetic")
    torch.testing.assert_close(log_rows, logits.log_softmax(-1), rtol=1e-5, atol=1e-5)
    assert log_totals.item() == pytest.approx(math.log(weight), abs=1e-5)


@given(pair=rows(NUMBERS, count=3), weight=st.floats(-2, 2, width=32))
def test_geometric_weights_add_up_over_equal_models_and_equal_anchors_cancel(device, pair, weight):
    attribute, base, anchor = (row.to(device)[None, None] for row in pair)

    def combine(attributes: Tensor, weights: list[float], of: Tensor) -> Tensor:
        w = torch.tensor([[weights]], device=device)
        return mpg_ext.combine_rows(attributes, w, base, of, target="geometric")[0]

    twice = torch.stack([attribute, attribute])
    once = combine(attribute[None], [2 * weight], anchor)
    torch.testing.assert_close(combine(twice, [weight, weight], anchor), once, rtol=1e-4, atol=1e-4)
    unmoved = combine(attribute[None], [weight], attribute)
    torch.testing.assert_close(unmoved, base.log_softmax(-1), rtol=1e-4, atol=1e-4)


# ---- scores of prefixes


@st.composite
def chunks(draw: DrawFn) -> dict[str, Tensor]:
    N, K = draw(st.integers(1, 4)), draw(SIZES)
    logprobs = st.floats(-20, 0, width=32)
    return {
        "attribute_logprobs": draw(tensors(logprobs | st.just(-INF), N, 1, K)),
        "anchor_logprobs": draw(tensors(logprobs, 1, K)),
        "weights": draw(tensors(WEIGHTS, 1, N)),
    }


def score(device: torch.device, chunk: dict[str, Tensor], kind: str) -> Tensor:
    on_device = {name: tensor.to(device) for name, tensor in chunk.items()}
    return mpg_ext.score_prefixes(**on_device, score=kind)[1][0].double().cpu()


@pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
@given(chunk=chunks())
def test_score_of_a_prefix_does_not_depend_on_what_follows(device, kind, chunk):
    whole = score(device, chunk, kind)
    K = len(whole) // 2 + 1
    first = {name: tensor if name == "weights" else tensor[..., :K] for name, tensor in chunk.items()}
    assert torch.equal(score(device, first, kind), whole[:K])


@given(chunk=chunks(), factor=WEIGHTS)
def test_scaled_weights_shift_the_arithmetic_and_scale_the_geometric_score(device, chunk, factor):
    scaled = chunk | {"weights": chunk["weights"] * factor}
    arithmetic, geometric = (score(device, chunk, kind) for kind in ("arithmetic", "geometric"))
    shifted = arithmetic + math.log(factor)
    torch.testing.assert_close(score(device, scaled, "arithmetic"), shifted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(score(device, scaled, "geometric"), geometric * factor, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
@given(chunk=chunks(), rise=WEIGHTS)
def test_a_likelier_token_raises_the_score_of_no_shorter_prefix_and_lowers_none(device, kind, chunk, rise):
    likelier = {name: tensor.clone() for name, tensor in chunk.items()}
    likelier["attribute_logprobs"][0, 0, -1] += rise
    before, after = score(device, chunk, kind), score(device, likelier, kind)
    assert torch.equal(after[:-1], before[:-1])
    assert after[-1] >= before[-1] - 1e-4 * (1 + before[-1].abs().nan_to_num(posinf=0))


@given(chunk=chunks())
def test_arithmetic_score_lies_between_the_smallest_and_the_largest_ratio(device, chunk):
    ratios = (chunk["attribute_logprobs"] - chunk["anchor_logprobs"]).double().cumsum(-1)[:, 0]
    total = chunk["weights"].double().sum().log()
    scores = score(device, chunk, "arithmetic")
    assert (scores <= total + ratios.amax(0) + 1e-3).all()
    assert (scores >= total + ratios.amin(0) - 1e-3).all()


# ---- acceptance


@given(
    scores=st.lists(LOGITS, min_size=1, max_size=32),
    log_bound=NUMBERS,
    uniforms=st.lists(st.floats(0, 1, exclude_max=True), min_size=32, max_size=32),
    length=st.integers(-1, 34),
)
def test_accepted_prefix_is_the_longest_whose_uniform_is_below_its_threshold(
    device, scores, log_bound, uniforms, length
):
    def accept(log_bound: float, uniforms: list[float], length: int) -> int:
        return mpg_ext.accept_prefixes(
            torch.tensor([scores], device=device),
            torch.tensor([log_bound], device=device),
            torch.tensor([uniforms[: len(scores)]], dtype=torch.float64, device=device),
            torch.tensor([length], device=device),
        ).item()

    logs = [math.log(u) if u > 0 else -INF for u in uniforms]
    passing = [j + 1 for j, s in enumerate(scores[: max(length, 0)]) if logs[j] < s - log_bound]
    accepted = accept(log_bound, uniforms, length)
    assert accepted == max(passing, default=0)
    assert accept(log_bound + 1, uniforms, length) <= accepted
    assert accept(log_bound, [(1 + u) / 2 for u in uniforms], length) <= accepted
    assert accept(log_bound, uniforms, length - 1) <= accepted


# ---- draws


@given(masses=rows(MASSES))
def test_drawn_tokens_have_the_law_of_their_masses(device, masses):
    n = 64
    tokens = mpg_ext.draw_tokens(masses.to(device).expand(n, -1), evenly_spaced(n, device))
    assert_visits(tokens.cpu(), masses[0])


@given(pair=rows(MASSES, count=2), carry=st.floats(0.125, 1, width=32))
def test_tokens_after_a_rejection_have_the_law_of_the_residual(device, pair, carry):
    target, draft = pair
    residual = (carry * target.double() - draft.double()).clamp(min=0)
    n = 64
    tokens = mpg_ext.draw_residual(
        target.to(device).expand(n, 2, -1),
        draft.to(device).expand(n, 1, -1),
        torch.zeros(n, 1, dtype=torch.int64, device=device),
        torch.ones(n, dtype=torch.int64, device=device),
        torch.zeros(n, dtype=torch.int64, device=device),
        torch.full((n,), carry, device=device),
        evenly_spaced(n, device),
    )
    assert_visits(tokens.cpu(), residual if residual.sum() > 0 else target)


@given(pair=rows(MASSES, count=2))
def test_a_drafted_token_kept_or_redrawn_has_the_law_of_the_target(device, pair):
    """For one token: q(c) min(1, p/q) of every c that the draft may give, and the residual with what is left."""
    target, draft = (row.double() / row.double().sum() for row in pair)
    V, n = len(target), 64
    drafts = torch.arange(V, device=device)[:, None]
    block = (
        target.float().to(device).expand(V, 2, V),
        draft.float().to(device).expand(V, 1, V),
        drafts,
        torch.ones(V, dtype=torch.int64, device=device),
    )
    kept, ratio = mpg_ext.verify_block(*block, torch.zeros(V, 1, dtype=torch.float64, device=device))
    keep = ratio.double().cpu() * (kept.cpu() == 1)  # u < P accepts, so P is the probability
    law = draft * keep
    if 1 - law.sum() > 1e-6:
        repeated = (tensor[:1].expand(n, *tensor.shape[1:]) for tensor in block)
        rejected = torch.zeros(n, dtype=torch.int64, device=device), torch.ones(n, device=device)
        tokens = mpg_ext.draw_residual(*repeated, *rejected, evenly_spaced(n, device)).cpu()
        law = law + (1 - law.sum()) * torch.bincount(tokens, minlength=V).double() / n
    assert (law - target).abs().max() <= 1.1 / n


@given(logits=rows(NUMBERS, count=2), masses=rows(MASSES), log_bound=NUMBERS, weight=WEIGHTS)
def test_fallback_draws_what_the_bound_lets_through_and_less_under_a_higher_one(
    device, logits, masses, log_bound, weight
):
    V = min(logits.shape[1], masses.shape[1])
    anchor, attribute = logits[:, :V]
    draft = masses[0, :V]
    assume(draft.sum() > 0)
    n = 64

    def draw(log_bound: float) -> tuple[Tensor, Tensor, Tensor]:
        return mpg_ext.draw_fallback(
            anchor.to(device).expand(n, V),
            attribute.to(device).expand(1, n, V),
            (draft / draft.sum()).to(device).expand(n, V),
            torch.full((n, 1), weight, device=device),
            torch.full((n,), log_bound, device=device),
            evenly_spaced(n, device),
            torch.ones(n, dtype=torch.bool, device=device),
            score="arithmetic",
        )

    tokens, _, accept_probs = draw(log_bound)
    ratio = weight * (attribute.double().softmax(-1) / anchor.double().softmax(-1))
    law = draft.double() / draft.double().sum() * (ratio / math.exp(log_bound)).clamp(max=1)
    assert accept_probs[0].item() == pytest.approx(law.sum().item(), rel=1e-3)
    assert_visits(tokens.cpu(), law)
    assert draw(log_bound + 1)[2][0] <= accept_probs[0] * (1 + 1e-5)


# ---- warps

CUTS = {"top_k": st.integers(0, 13), "top_p": st.floats(0.01, 1), "min_p": st.floats(0, 1)}


@given(row=rows(LOGITS), temperature=st.floats(0.25, 4), **CUTS)
def test_warped_row_keeps_the_preferred_tokens_in_proportion(device, row, temperature, top_k, top_p, min_p):
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    out = mpg_ext.warp_rows(row.to(device), **options)[0].double().cpu()
    x = row[0].double()
    kept = out > 0
    assert out.sum().item() == pytest.approx(1, rel=1e-5)
    assert (x.max() - x[out.argmax()]) / temperature < 1e-6  # values as near as that may get one mass
    order = sorted(range(len(x)), key=lambda y: (-x[y], y))
    num_kept = int(kept.sum())
    # Tokens whose mass rounds to 0 are not told from dropped ones.
    assert set(kept.nonzero()[:, 0].tolist()) == set(order[:num_kept])
    assert num_kept <= (top_k or len(x))
    wanted = ((x - x.max()) / temperature).exp()[kept]
    torch.testing.assert_close(out[kept], wanted / wanted.sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cut", CUTS)
@given(row=rows(LOGITS), data=st.data())
def test_a_tighter_cut_keeps_a_part_of_the_tokens(device, cut, row, data):
    loose = data.draw(CUTS[cut])
    tighter = {"top_k": max(1, (loose or 14) - 1), "top_p": loose / 2, "min_p": (1 + loose) / 2}[cut]
    few, more = (mpg_ext.warp_rows(row.to(device), temperature=1.0, **{cut: at})[0] > 0 for at in (tighter, loose))
    assert not (few & ~more).any()


# ---- batches


@pytest.mark.parametrize("op", OPS)
@given(seed=st.integers(0, 2**20 - 1), b=st.integers(0, 2))
def test_a_sequence_gets_in_a_batch_what_it_gets_alone(device, op, seed, b):
    if device.type == "cuda" and op in ON_CPU_ALONE:
        pytest.skip("on the CPU alone")
    call = calls(device, seed, B=3, V=40)[op]

    def alone(name: str, value: Any) -> Any:
        if name in ("down", "up", "eos_token_ids", "panels", "bias", "weight"):  # of all sequences
            return value
        dimension = 1 if name.startswith(("attribute", "log_ratios")) else 0
        return tree_map_only(Tensor, lambda tensor: tensor.narrow(dimension, b, 1), value)

    single = {name: alone(name, value) for name, value in clone(call).items()}
    batch_out, single_out = outputs_of(getattr(mpg_ext, op)(**call)), outputs_of(getattr(mpg_ext, op)(**single))
    names = ["log_ratios", "scores", "accepted"] if op in ("score_prefixes", "verify_chunks") else [""] * 3
    pairs = [(alone(name, out), wanted) for name, out, wanted in zip(names, batch_out, single_out, strict=False)]
    pairs += zip(alone("", written_by(call)), written_by(single), strict=True)
    for tensor, wanted in pairs:
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=0, equal_nan=True)
