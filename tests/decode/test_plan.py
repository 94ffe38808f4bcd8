"""Sampler "auto": what its cost model measures, and that it runs what it says it picked."""

from __future__ import annotations

import pytest
import torch

import mpg
from longer import thinned
from mpg import model as engine
from mpg.decode import SAMPLERS
from mpg.decode import plan as planning
from mpg.decode.batch import Batch
from mpg.decode.request import Request
from mpg.demo import MODELS
from mpg.demo.corpus import DEMO_QUESTIONS, HELD_OUT_QUESTIONS
from mpg.models.graphs import CAPTURES
from mpg.options import Options, check_weights
from tape import Tape

BOTH = {"E": 1, "T": 1}
QUESTIONS = [question.text for question in HELD_OUT_QUESTIONS[:6]]


def plan_for(model, weights, questions=tuple(QUESTIONS), **options):
    checked = Options(sampler="auto", seed=0, **options)
    alpha = check_weights(weights, model.models.attribute_names, checked.target)
    requests = [Request(model.encode(question), alpha, weights, 64, seed) for seed, question in enumerate(questions)]
    return planning.plan(model.models, requests, checked, model.models.eos_token_ids)


def of_draft(plan, draft, chunk_size):
    (found,) = [c for c in plan.candidates if (c.options.draft, c.options.chunk_size) == (draft, chunk_size)]
    return found


def test_candidates_are_ranked_by_the_stated_model_and_the_first_is_picked(model, monkeypatch):
    """Rounds of 1 s and 1 s more per drafted token, acceptances of .5 and .9."""
    monkeypatch.setattr(planning, "_measure_acceptance", lambda *_: {"reference": 0.5, "merged": 0.9})
    monkeypatch.setattr(planning, "_time_round", lambda models, requests, options: 1.0 + (options.chunk_size or 0) / 4)
    plan = plan_for(model, BOTH)
    costs = [candidate.seconds_per_token for candidate in plan.candidates]
    assert costs == sorted(costs)
    assert of_draft(plan, None, None).seconds_per_token == 1
    assert of_draft(plan, "reference", 2).seconds_per_token == pytest.approx(1.5 / 1.75)
    assert of_draft(plan, "merged", 16).seconds_per_token == pytest.approx(5 / sum(0.9**i for i in range(17)))
    best = min(range(1, 17), key=lambda k: (1 + k / 4) / sum(0.9**i for i in range(k + 1)))
    assert (plan.options.draft, plan.options.chunk_size) == ("merged", best) == ("merged", 6)
    assert str(plan).startswith("exact, merged draft, k = 6")
    assert "rather than direct (1e+03 ms a token)" in str(plan)


@pytest.mark.parametrize(("acceptance", "picked"), [(0.0, None), (0.0049, None), (0.0051, "lookup"), (0.1, "lookup")])
def test_a_draft_of_which_nothing_is_accepted_is_not_picked_however_fast_its_rounds_seem(
    acceptance, picked, model, monkeypatch
):
    monkeypatch.setattr(planning, "_measure_acceptance", lambda *_: {"reference": 0.0, "lookup": acceptance})
    monkeypatch.setattr(planning, "_time_round", lambda models, requests, options: 1.0 - 0.01 * bool(options.draft))
    plan = plan_for(model, BOTH)
    assert plan.options.draft == picked
    assert len(plan.candidates) == 1 + 2 * len(planning.CHUNK_SIZES) and "reference draft" in str(plan)
    assert (": 0% accepted" in str(of_draft(plan, "lookup", 1))) == (picked is None)


@pytest.mark.parametrize("own", [{"sampler": "direct"}, {"sampler": "exact", "draft": "reference", "chunk_size": 8}])
def test_rounds_are_timed_as_they_run_from_their_graphs(own, monkeypatch):
    monkeypatch.setitem(CAPTURES, "cpu", Tape)
    models, options = mpg.load(MODELS, device="cpu", dtype="float32", graphs=True).models, Options(**own)
    alpha = check_weights(BOTH, models.attribute_names, options.target)
    requests = [Request([5, 6, 7][:size], alpha, BOTH, 16, 0) for size in (1, 3)]
    num_run, before_and_after = [], []  # rounds that were not run from a graph
    round_of, sampler = SAMPLERS[options.sampler].round, SAMPLERS[options.sampler]
    monkeypatch.setattr(sampler, "round", lambda self: (num_run.append(None), round_of(self)))
    monkeypatch.setattr(planning, "perf_counter", lambda: before_and_after.append(len(num_run)) or 1.0)
    planning._time_round(models, requests, options)
    assert len(before_and_after) == 2 * planning.TIMED_ROUNDS and len(set(before_and_after)) == 1


@pytest.fixture(scope="module")
def drafting():
    return mpg.load(MODELS, draft="J", device="cpu")


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.9}, {"target": "arithmetic"}], ids=str)
@pytest.mark.parametrize("draft", thinned(["merged", "reference", "model"], 3))
def test_measured_acceptance_is_that_of_the_sampler(draft, options, drafting, monkeypatch):
    model = drafting
    monkeypatch.setattr(planning, "_time_round", lambda *_: 1.0)
    weights = {"E": 4, "T": 1.5}  # drafts that are often wrong
    texts = model.generate(
        QUESTIONS * 2, weights=weights, seed=0, sampler="exact", draft=draft, chunk_size=1, max_new_tokens=48, **options
    )
    offered = sum(text.stats["rounds"] for text in texts)
    accepted = sum(text.stats["accepted_per_round"] * text.stats["rounds"] for text in texts)
    expected = of_draft(plan_for(model, weights, **options), draft, 1).acceptance
    assert 0.2 < expected < 1
    assert accepted / offered == pytest.approx(expected, abs=0.08)


def test_draft_that_is_the_target_is_wholly_accepted():
    same = mpg.load(MODELS, {"a": MODELS}, device="cpu")
    assert of_draft(plan_for(same, {"a": 1}), "reference", 4).acceptance == pytest.approx(1, abs=1e-5)


def test_lookup_accepts_what_it_would_have_drafted():
    rows = torch.full((1, 3, 10), 0.1)
    batch = Batch([[5, 6, 7, 5]], [3], torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), ())
    lookup_rows = planning._lookup_rows([[5, 6, 7, 5]], [[6, 9, 5]], batch, rows)
    assert lookup_rows.argmax(-1).tolist()[0][:2] == [6, 7]  # after 5 came 6, after 5 6 came 7
    assert lookup_rows.sum(-1).tolist() == [[1, 1, 0]]  # 9 was never there


@pytest.mark.parametrize("picked", [{"sampler": "direct"}, {"sampler": "exact", "draft": "merged", "chunk_size": 3}])
def test_auto_writes_what_the_picked_sampler_writes_and_says_so(model, picked, monkeypatch):
    calls = []

    def fixed(models, requests, options, eos_token_ids):
        calls.append(len(requests))
        chosen = Options(**picked, temperature=options.temperature, top_p=options.top_p)
        return planning.Plan((planning.Candidate(chosen, None, 1.0, 0.001),))

    monkeypatch.setattr(engine, "plan", fixed)
    one = mpg.Model(model.models)
    options = {"weights": BOTH, "seed": 3, "temperature": 0.8, "max_new_tokens": 12}
    for _ in range(2):
        result = one.generate(DEMO_QUESTIONS[0], sampler="auto", **options)
        assert result.tokens == model.generate(DEMO_QUESTIONS[0], **picked, **options).tokens
        assert result.plan == "direct (1 ms a token)"
    assert calls == [1]  # planned once
    one.generate(DEMO_QUESTIONS[0], sampler="auto", **options | {"weights": {"E": 1}})
    one.generate(list(DEMO_QUESTIONS[:2]), sampler="auto", **options)
    assert calls == [1, 1, 2]
    monkeypatch.setattr(engine, "MAX_PLANS", 3)
    one.generate(DEMO_QUESTIONS[0], sampler="auto", **options | {"weights": {"T": 1}})  # the first plan makes room
    one.generate(DEMO_QUESTIONS[0], sampler="auto", **options | {"weights": {"E": 1}})
    one.generate(DEMO_QUESTIONS[0], sampler="auto", **options)
    assert calls == [1, 1, 2, 1, 1]


@pytest.mark.parametrize("options", [{"target": "base", "weights": None}, {"target": "arithmetic", "mixture_span": 3}])
def test_auto_runs_with_every_kind_of_target(model, options):
    result = model.generate(
        DEMO_QUESTIONS[0], **{"weights": BOTH, **options}, sampler="auto", seed=0, max_new_tokens=8, batch_size=1
    )
    assert len(result.tokens) == 8
    assert "rather than" in result.plan


def test_options_of_a_draft_are_refused_beside_auto(model):
    with pytest.raises(ValueError, match="chunk_size: not an option of sampler 'auto', got 4"):
        model.generate(DEMO_QUESTIONS[0], weights=BOTH, sampler="auto", chunk_size=4)
