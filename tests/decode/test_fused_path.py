"""The fused ops decide as the composed path does, and no key decides twice."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from composed import Composed
from fakes import NUM_ROWS, FakeModels, rounds_of, row_numbers
from longer import IS_LONG
from mpg.decode import SAMPLERS
from mpg.decode.batch import Batch
from mpg.decode.direct import Direct
from mpg.decode.drafts import ROLES
from mpg.decode.exact import Exact
from mpg.decode.rng import Decisions, Purpose
from mpg.decode.scr import SCR
from mpg.options import Options
from replaying import Recording, RecordingComposed

PROMPTS = [[1, 0], [3], [0, 2, 1, 1, 3], [1, 1, 1]]  # ragged
SCR_OPTIONS = {
    "as published": {},
    "geometric score": {"target": "geometric"},
    "small window": {"window": 3, "tau": 0.3, "chunk_size": 3},
    "long chunks": {"chunk_size": 7, "initial_bound": 4.0},
    "clipping bound": {"initial_bound": 1.05},
    "base where empty": {"empty": "base", "top_p": 0.3},
    "observed": {"observed": True, "window": 5},
}
EXACT_OPTIONS = {
    "reference draft": {"draft": "reference"},
    "small model": {"draft": "model", "chunk_size": 3},
    "long chunks": {"draft": "model", "chunk_size": 9, "target": "arithmetic"},
    "lookup": {"draft": "lookup", "chunk_size": 2},
    "adapted": {"draft": "model", "adaptive": True},
    "spans": {"draft": "model", "target": "arithmetic", "mixture_span": 3},
    "anchored": {"draft": "model", "target": "anchored"},
    "warped": {"draft": "model", "temperature": 0.8, "top_p": 0.9, "top_k": 4, "min_p": 0.05},
    "greedy": {"draft": "model", "temperature": 0},
    "by token": {"draft": "model", "verify": "token"},
}
DRAFTING = {"draft", "chunk_size", "adaptive", "verify"}  # options that `direct` has not
UNDRAFTED = [name for name, options in EXACT_OPTIONS.items() if options.keys() - DRAFTING]


def decode(models, sampler, weights, seeds, options, decisions=Decisions, limit=40 if IS_LONG else 24):
    """Texts, sampler, the texts' log-ratios where traced, and what decided, after decoding one request per seed."""
    prompts = [PROMPTS[seed % len(PROMPTS)] for seed in seeds]
    alpha = torch.tensor([weights] * len(seeds), dtype=torch.float64)
    batch = Batch(
        prompts,
        [limit - seed % 5 for seed in seeds],
        alpha,
        torch.tensor(seeds),
        models.eos_token_ids,
    )
    batch.is_traced = sampler.options.trace
    decide = decisions(batch.seeds, batch.rounds)
    sampler.start(models.open(prompts, sampler.roles, batch.capacity), batch, decide)
    traced = [[] for _ in seeds]
    for done in rounds_of(sampler, batch):
        for row, log_ratios in enumerate(done.log_ratios or []):
            traced[row] += log_ratios[: done.counts[row]]
    assert not batch.unusable.any()
    assert not batch.empty.any()
    rows = zip(batch.tokens.tolist(), prompts, batch.lengths.tolist(), strict=True)
    return [row[len(prompt) : length] for row, prompt, length in rows], sampler, traced, decide


@pytest.mark.parametrize("same", [("anchor",), ()], ids=["anchor is base", "own anchor"])
@pytest.mark.parametrize("name", SCR_OPTIONS)
def test_fused_scr_decides_as_composed_scr(name, same):
    weights = [1.0, -0.6] if "base" in name else [1.0, 0.4]
    models = FakeModels(6, same=same, eos_token_ids=[5], seed=1)
    options = Options(sampler="scr", trace=True, **SCR_OPTIONS[name])
    runs = []
    for decisions in (Decisions, Composed):
        sampler = SCR(models, ("E", "T"), options)
        runs.append(decode(models, sampler, weights, list(range(64)), options, decisions))
    (fused_texts, fused, fused_traced, _), (texts, composed, traced, _) = runs
    assert fused_texts == texts
    assert sum(len(text) for text in texts) > 200
    for ratios, wanted in zip(fused_traced, traced, strict=True):
        torch.testing.assert_close(torch.tensor(ratios), torch.tensor(wanted))
    for statistic, value in composed.statistics().items():
        torch.testing.assert_close(fused.statistics()[statistic], value, msg=statistic)


@pytest.mark.parametrize("same", [("anchor",), ()], ids=["anchor is base", "own anchor"])
@pytest.mark.parametrize(
    ("sampler", "name"), [*product(["exact"], EXACT_OPTIONS), *product(["direct"], ["reference draft", *UNDRAFTED])]
)
def test_fused_target_samplers_decide_as_composed_ones(sampler, name, same):
    chosen = dict(EXACT_OPTIONS[name])
    if not same and "mixture_span" in chosen:
        pytest.skip("a span needs the anchor to be the base")
    if sampler == "direct":
        chosen = {key: value for key, value in chosen.items() if key not in DRAFTING}
    models = FakeModels(6, same=same, others={"draft": 0.5}, eos_token_ids=[5], seed=1)
    options = Options(sampler=sampler, trace=True, **chosen)
    runs = []
    for decisions in (Decisions, Composed):
        one = SAMPLERS[sampler](models, ("E", "T"), options)
        runs.append(decode(models, one, [0.8, 0.5], list(range(64)), options, decisions))
    (fused_texts, fused, fused_traced, _), (texts, composed, traced, _) = runs
    assert fused_texts == texts
    assert sum(len(text) for text in texts) > 200
    for ratios, wanted in zip(fused_traced, traced, strict=True):
        torch.testing.assert_close(torch.tensor(ratios), torch.tensor(wanted))
    for statistic, value in composed.statistics().items():
        torch.testing.assert_close(fused.statistics()[statistic], value, msg=statistic)


KEY_OPTIONS = {
    "scr": Options(sampler="scr"),
    "scr that falls to the base": Options(sampler="scr", empty="base", top_p=0.3),
    "direct": Options(sampler="direct"),
    "exact": Options(sampler="exact"),
    "exact by token": Options(sampler="exact", verify="token"),
    "exact by lookup": Options(sampler="exact", draft="lookup"),
}


@pytest.mark.parametrize("decisions", [Recording, RecordingComposed], ids=["fused", "composed"])
@pytest.mark.parametrize("name", KEY_OPTIONS)
def test_no_key_is_used_twice(name, decisions):
    models, options = FakeModels(6, eos_token_ids=[5]), KEY_OPTIONS[name]
    sampler = SAMPLERS[options.sampler](models, ("E", "T"), options)
    weights = [1.0, -0.9] if options.empty == "base" else [1.0, 1.0]
    texts, _, _, decide = decode(models, sampler, weights, list(range(16)), options, decisions)
    assert len(decide.keys) > sum(len(text) for text in texts) / 2  # the recorder has seen them all, and none twice
    if options.empty == "base":
        assert any(purpose == Purpose.EMPTY for _, _, purpose, _ in decide.keys)


def test_recorder_notices_a_key_used_twice():
    decide = Recording(torch.tensor([3, 4]), torch.tensor([0, 0]))
    one, other = torch.tensor([True, False]), torch.tensor([False, True])
    probs = torch.tensor([0.5, 0.5])
    decide.bernoulli(probs, 1, 0, lambda: one)
    decide.bernoulli(probs, 1, 0, lambda: other)
    decide.bernoulli(probs, 1, 1, lambda: one)
    with pytest.raises(AssertionError, match="used twice"):
        decide.bernoulli(probs, 1, 0, lambda: one)


@pytest.mark.parametrize("sampler", [SCR, Direct, Exact])
def test_a_request_draws_the_same_alone_and_in_any_batch(sampler):
    models = FakeModels(6, others={"draft": 0.5}, eos_token_ids=[5])
    options = Options(sampler=sampler.__name__.lower())

    def texts(seeds):
        return decode(models, sampler(models, ("E", "T"), options), [1.0, 1.0], seeds, options)[0]

    together = texts([8, 3, 11, 6])
    assert together == [texts([seed])[0] for seed in (8, 3, 11, 6)]
    assert len({tuple(text) for text in together}) > 1


@pytest.mark.parametrize("verify", ["block", "token"])
def test_draft_that_is_the_target_is_always_accepted(verify):
    models = FakeModels(6, same=("anchor", "E"), eos_token_ids=[5])
    options = Options(sampler="exact", verify=verify, target="arithmetic")
    _, sampler, _, _ = decode(models, Exact(models, ("E",), options), [1.0], list(range(16)), options)
    assert sampler.statistics()["accept_rate"].eq(1).all()


EMPTY_DRAFTS = [
    *({"sampler": "exact", "draft": draft, "verify": verify} for draft in ROLES for verify in ("block", "token")),
    {"sampler": "scr"},
    {"sampler": "seq-rs"},
]


class TestUnusableModels:
    """What a model returns for one sequence must not reach the others, and must not pass for a text."""

    @pytest.mark.parametrize("decisions", [Decisions, Composed], ids=["fused", "composed"])
    @pytest.mark.parametrize("sampler", ["exact", "direct", "scr"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("span", ["token", 3])
    def test_attribute_that_weighs_nothing_in_a_row_cannot_fail_it(self, span, sampler, value, decisions):
        if span != "token" and sampler == "scr":
            pytest.skip("scr has no spans")
        models = FakeModels(6)
        models.logits["T"] = models.logits["T"].clone()
        models.logits["T"][:, 3] = value
        options = (
            Options(sampler=sampler)
            if span == "token"
            else Options(sampler=sampler, target="arithmetic", mixture_span=span)
        )
        alpha = torch.tensor([[1.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
        batch = Batch([[1], [1]], [8, 8], alpha, torch.tensor([0, 1]), [])
        one = SAMPLERS[sampler](models, ("E", "T"), options)
        one.start(models.open([[1], [1]], one.roles, batch.capacity), batch, decisions(batch.seeds, batch.rounds))
        for _ in rounds_of(one, batch):
            pass
        assert batch.unusable.tolist() == [False, True]
        assert batch.lengths.tolist() == [9, 1]

    @pytest.mark.parametrize("decisions", [Decisions, Composed], ids=["fused", "composed"])
    @pytest.mark.parametrize("options", EMPTY_DRAFTS, ids=lambda options: " ".join(options.values()))
    @pytest.mark.parametrize("value", [-math.inf, math.nan])
    @pytest.mark.parametrize("limit", [1, 6])
    def test_a_draft_that_leaves_no_token_fails_the_sequence_that_meets_it(self, limit, value, options, decisions):
        """The draft's rows are bad behind every token but the prompt's: a chunk of one token never sees it."""
        prompts, same = [[1, 0]] * 8, ("anchor",) if options["sampler"] == "exact" else ()
        models = FakeModels(4, same=same, others={"draft": 0.5, "merged": 0.5}, seed=1)
        whole = models.logits[ROLES[options.get("draft", "reference")]]
        is_bad = torch.arange(NUM_ROWS) != row_numbers(torch.tensor(prompts[:1]))[0, -1]
        broken = whole.masked_fill(is_bad[:, None], value)
        models.logits = {role: broken if rows is whole else rows for role, rows in models.logits.items()}
        checked = Options.of({"target": "arithmetic"} | options)
        alpha = torch.tensor([[0.5, 0.5]] * 8, dtype=torch.float64)
        batch = Batch(prompts, [limit] * 8, alpha, torch.arange(8), [])
        one = SAMPLERS[checked.sampler](models, ("E", "T"), checked)
        one.start(models.open(prompts, one.roles, batch.capacity), batch, decisions(batch.seeds, batch.rounds))
        for _ in rounds_of(one, batch):
            pass
        assert batch.unusable.tolist() == [limit > 1] * 8
        assert batch.num_new_tokens().tolist() == [int(limit == 1)] * 8
