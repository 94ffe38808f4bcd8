"""Requests that enter and leave a running batch, on the demo models: nobody's text depends on who else is there."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from itertools import product
from math import inf

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

import mpg
from longer import IS_LONG, thinned
from mpg.decode import run
from mpg.decode.call import finish
from mpg.decode.request import Request
from mpg.decode.run import Scheduler
from mpg.demo import MODELS
from mpg.demo.corpus import DEMO_QUESTIONS, HELD_OUT_QUESTIONS
from mpg.models.ensemble import Session
from mpg.options import Options

QUESTIONS = [*DEMO_QUESTIONS[:3], *(question.text for question in HELD_OUT_QUESTIONS[:4])]
WEIGHTS = [{"E": 1}, {"T": 0.5, "J": 1}, {"E": 1, "T": 1}, {"S": 1}, {"E": -0.5, "T": 1}, {"J": 1}, {"E": 2}]
POSITIVE = [{"E": 1, "T": 0.5 + i} for i in range(7)]
GEOMETRIC = {"target": "geometric"}
WAYS = [
    {"sampler": "direct", **GEOMETRIC, "trace": True},
    {"sampler": "exact", **GEOMETRIC, "trace": True},
    {"sampler": "exact", **GEOMETRIC, "draft": "merged"},
    {"sampler": "exact", **GEOMETRIC, "draft": "lookup", "adaptive": True},
    {"sampler": "exact", "target": "arithmetic", "mixture_span": 3},
    {"sampler": "scr", **GEOMETRIC, "trace": True},
    {"sampler": "token-rs", **GEOMETRIC},
    {"sampler": "seq-rs", **GEOMETRIC, "tries": 3},
]


def with_rounds_ahead(ways, late, step=1):
    """Ways, of which every `step` in the short form, by how many rounds go before the host; one of the two in turn
    there, both in the long form."""
    return [
        pytest.param(way, ahead, id=f"{' '.join(map(str, way.values()))} {ahead}")
        for i, way in enumerate(thinned(ways, step))
        for j, ahead in enumerate((0, late))
        if IS_LONG or (i + j) % 2 == 0
    ]


# Of drafts, verifications and fixed or adapted lengths every two meet; in the long form all.
DRAFTED = [
    (draft, verify, adaptive)
    for (i, draft), (j, verify), adaptive in product(
        enumerate(("model", "reference", "lookup", "merged")), enumerate(("block", "token")), (False, True)
    )
    if IS_LONG or (i + j + adaptive) % 2 == 0
]
EVERY_WAY = [
    {"sampler": "direct", **GEOMETRIC, "trace": True},
    {"sampler": "direct", "target": "arithmetic", "mixture_span": "sequence"},
    {"sampler": "direct", "target": "anchored", "top_p": 0.9},
    {"sampler": "direct", "target": "base"},
    *(
        {"sampler": "exact", **GEOMETRIC, "draft": draft, "verify": verify, "adaptive": adaptive}
        for draft, verify, adaptive in DRAFTED
    ),
    {"sampler": "exact", "target": "arithmetic", "mixture_span": 3, "adaptive": True, "trace": True},
    {"sampler": "scr", **GEOMETRIC, "window": 2, "tau": 0.5, "trace": True},
    {"sampler": "scr", "target": "arithmetic", "window": 3, "observed": True},
    {"sampler": "token-rs", **GEOMETRIC, "window": 2, "tau": 0.5},
    {"sampler": "token-rs", "target": "arithmetic"},
    {"sampler": "seq-rs", **GEOMETRIC, "tries": 3, "window": 2},
    {"sampler": "seq-rs", "target": "arithmetic", "tries": 2, "trace": True},
]
TIMES = {"tokens_per_second", "time_to_first_token"}


@pytest.fixture(scope="module")
def precise_model():
    """In double precision, where a draw beside a boundary is as good as impossible."""
    return mpg.load(MODELS, device=os.environ.get("MPG_DEVICE", "cpu"), dtype="float64")


def weights_for(way):
    if way["target"] == "base":
        return [None] * len(QUESTIONS)
    if way["target"] != "geometric" or way["sampler"] in ("token-rs", "seq-rs"):
        return POSITIVE
    return WEIGHTS


def answers(model, **options):
    weights = WEIGHTS if options["target"] == "geometric" else POSITIVE
    return model.generate(QUESTIONS[:4], weights=weights[:4], seed=11, max_new_tokens=20, **options)


def counts(result):
    return {name: value for name, value in result.stats.items() if name not in TIMES}


def assert_same(one, other, tolerance):
    assert (one.tokens, one.text, one.finish_reason) == (other.tokens, other.text, other.finish_reason)
    assert counts(one) == pytest.approx(counts(other), rel=tolerance, abs=tolerance)
    assert (one.log_ratios is None) == (other.log_ratios is None)
    for ratios, wanted in zip(one.log_ratios or (), other.log_ratios or (), strict=True):
        assert ratios == pytest.approx(wanted, abs=tolerance)


@pytest.mark.parametrize("way", thinned(EVERY_WAY), ids=lambda way: " ".join(map(str, way.values())))
def test_text_and_statistics_are_those_of_the_request_alone(precise_model, way):
    """Whatever runs beside it or has left it its row; ended by its limit, an end-of-sequence token or a stop string."""
    ids = precise_model.models.tokenizer.convert_tokens_to_ids
    end = {"eos_token_id": [*precise_model.models.eos_token_ids, ids(",")], "stop_strings": ["."], "max_new_tokens": 20}
    if way.get("adaptive"):  # what is accepted seldom lets lengths fall, as a newcomer must not notice
        end = {"stop_strings": ["my", "it"], "max_new_tokens": 24, "temperature": 2.0}
    number = 5 if IS_LONG else 4
    questions, weights = QUESTIONS[:number], weights_for(way)[:number]
    alone = [
        precise_model.generate(question, weights=own, seed=11 + i, **end, **way)
        for i, (question, own) in enumerate(zip(questions, weights, strict=True))
    ]
    assert len({len(result.tokens) for result in alone}) > 1  # rows become free at different rounds
    for batch_size in (2, len(questions)) if IS_LONG else (2,):
        together = precise_model.generate(questions, weights=weights, seed=11, batch_size=batch_size, **end, **way)
        for one, other in zip(alone, together, strict=True):
            assert_same(one, other, 1e-9)


@pytest.mark.parametrize("way", thinned(WAYS, 3), ids=lambda way: " ".join(map(str, way.values())))
@pytest.mark.parametrize("batch_size", [2, 32] if IS_LONG else [2])
def test_rounds_read_late_give_the_same_texts_and_statistics(model, way, batch_size, monkeypatch):
    at_once = answers(model, **way, batch_size=batch_size)
    monkeypatch.setitem(run.ROUNDS_AHEAD, model.models.device.type, 2)
    pieces = []
    late = answers(model, **way, batch_size=batch_size, on_token=pieces.append)
    for index, (one, other) in enumerate(zip(at_once, late, strict=True)):
        assert one.tokens == other.tokens == tuple(piece.id for piece in pieces if piece.request == index)
        assert counts(one) == pytest.approx(counts(other), rel=1e-4, abs=1e-4)


def test_first_to_end_makes_room_for_the_next_before_the_others_have_ended(model):
    started = []
    model.generate(
        QUESTIONS[:3], weights={"E": 1}, seed=0, batch_size=2, max_new_tokens=128, sampler="direct",
        on_token=lambda token: started.append(token.request),
    )  # fmt: skip
    assert started.index(2) < max(i for i, request in enumerate(started) if request < 2)
    assert {request for request in started[: started.index(2)]} == {0, 1}


def test_costs_are_those_of_the_forwards_that_a_request_alone_runs(precise_model, monkeypatch):
    """Counted at the models themselves; every way, as each says by itself what its rounds feed. A first pass that was
    read with the prompt counts, as it does in other company."""
    seen = []
    forward = Session.forward

    def forward_anew(self, *args, **kwargs):
        self._first = {}
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Session, "forward", forward_anew)

    def count(module, args, kwargs):
        if "logits_to_keep" not in kwargs:  # of a prompt
            seen.append(kwargs["input_ids"].shape)

    hooks = [loaded.model.register_forward_pre_hook(count, with_kwargs=True) for loaded in precise_model.models._models]
    try:
        for way in EVERY_WAY:
            seen.clear()
            weights = None if way["target"] == "base" else {"E": 1, "T": 1}
            result = precise_model.generate(QUESTIONS[0], weights=weights, seed=3, max_new_tokens=9, **way)
            stats, num_tokens = result.stats, len(result.tokens)
            assert stats["depth_per_token"] * num_tokens == pytest.approx(len(seen)), way
            assert stats["model_calls_per_token"] * num_tokens == pytest.approx(sum(rows for rows, _ in seen)), way
            positions = sum(rows * width for rows, width in seen)
            assert stats["positions_per_token"] * num_tokens == pytest.approx(positions), way
    finally:
        for hook in hooks:
            hook.remove()


def open_scheduler(model, way, **sizes):
    sizes = {"num_rows": 2, "capacity": 60, "attributes": model.models.attribute_names, "rounds_ahead": 0, **sizes}
    return Scheduler(model.models, Options(**way), model.models.eos_token_ids, **sizes)


def request_for(model, i, way, **given):
    alpha = [(weights_for(way)[i] or {}).get(name, 0.0) for name in model.models.attribute_names]
    return Request(model.encode(QUESTIONS[i]), tuple(alpha), {}, 8 + i, 20 + i, **given)


def generated_alone(model, i, way):
    return _generated_alone(model, i, tuple(way.items()))


@cache
def _generated_alone(model, i, way):
    way = dict(way)
    return model.generate(QUESTIONS[i], weights=weights_for(way)[i], max_new_tokens=8 + i, seed=20 + i, **way)


def raise_at(count, error):
    """Counts its calls, and raises in the last of so many."""
    calls = iter(range(1, count + 1))

    def check(*args):
        if next(calls) == count:
            raise error
        return args[1] if len(args) > 1 else False

    return check


@pytest.mark.parametrize(("way", "rounds_ahead"), with_rounds_ahead(WAYS[1:] + WAYS[:1], 2, 2))
def test_requests_of_any_arrival_get_the_results_that_they_get_alone(precise_model, way, rounds_ahead):
    """In a scheduler that was opened for none of them, with room for more, and more attributes."""
    scheduler = open_scheduler(precise_model, way, num_rows=3, capacity=90, rounds_ahead=rounds_ahead)
    assert not scheduler.has_work
    entries, streamed = [], {}
    for i in range(5):
        entries.append(scheduler.add(request_for(precise_model, i, way)))
        for _ in range(3):
            for entry, tokens in scheduler.step():
                streamed.setdefault(id(entry), []).extend(token.id for token in tokens)
    while scheduler.has_work:
        for entry, tokens in scheduler.step():
            streamed.setdefault(id(entry), []).extend(token.id for token in tokens)
    assert scheduler.step() == []
    scheduler.close()
    for i, entry in enumerate(entries):
        assert entry.error is None
        assert streamed[id(entry)] == list(entry.result.tokens)
        assert_same(generated_alone(precise_model, i, way), entry.result, 1e-9)


MIXED = [
    {},
    {"temperature": 0.6, "top_k": 5, "trace": True},
    {"temperature": 0},
    {"temperature": 1.4, "contexts": {"calm": "Be calm.", "loud": {"system": "Shout.", "source": "T"}}},
    {"temperature": 0.6, "contexts": {"calm": {"system": "Be brief.", "source": "J"}}, "trace": True},
    {"top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.3},
    {"temperature": 1.4, "repetition_penalty": 1.3},
]


COMBINED = [
    {"sampler": "direct", **GEOMETRIC},
    {"sampler": "exact", **GEOMETRIC},
    {"sampler": "exact", **GEOMETRIC, "draft": "lookup"},
    {"sampler": "exact", **GEOMETRIC, "draft": "merged", "verify": "token"},
    {"sampler": "exact", "target": "anchored", "adaptive": True},
]


@pytest.mark.parametrize(("way", "rounds_ahead"), with_rounds_ahead(COMBINED, 1))
def test_temperatures_cuts_contexts_and_traces_of_each_requests_own_share_rounds(precise_model, way, rounds_ahead):
    """And log-probabilities of the combined row; a request that is given up leaves the others alone."""
    options = {**way, "max_new_tokens": 8}
    weights = [own | dict.fromkeys(asked.get("contexts", ()), 0.5) for own, asked in zip(WEIGHTS, MIXED, strict=True)]
    asked = [
        {**options, **own, "weights": of, "seed": i} for i, (own, of) in enumerate(zip(MIXED, weights, strict=True))
    ]
    alone = [precise_model.generate(QUESTIONS[i], **own) for i, own in enumerate(asked)]
    scheduler = open_scheduler(precise_model, way, num_rows=4, capacity=120, most=6, rounds_ahead=rounds_ahead)
    entries, given_up = [], []
    for i, own in enumerate(asked):
        call = precise_model.read(QUESTIONS[i], **own)
        request = replace(call.requests[0], options=call.options, num_top=i % 3 or None)
        if i % 2:
            given_up.append(scheduler.add(replace(request, seed=99), contexts=call.contexts[0]))
        entries.append(scheduler.add(request, contexts=call.contexts[0]))
    tokens, num_rounds = {}, 0
    while scheduler.has_work:
        num_rounds += 1
        for entry, new in scheduler.step():
            tokens.setdefault(id(entry), []).extend(new)
        for entry in given_up if num_rounds == 1 else ():
            scheduler.cancel(entry)
    scheduler.close()
    assert all(entry.error is not None and entry.result is None for entry in given_up)
    for i, (one, entry) in enumerate(zip(alone, entries, strict=True)):
        assert entry.error is None
        assert_same(one, entry.result, 1e-9)
        for token in tokens[id(entry)]:
            assert len(token.top_logprobs) == i % 3
            assert (token.logprob is not None) == bool(i % 3)
            if i % 3 and MIXED[i].get("temperature") == 0:
                assert token.top_logprobs[0] == (token.id, pytest.approx(token.logprob))


@pytest.fixture(scope="module")
def mixed_model():
    """A whole model among the adapters, and an adapter that drafts for all and is an attribute of some."""
    whole = AutoModelForCausalLM.from_pretrained(MODELS, dtype=torch.float64)
    whole.lm_head.weight.data *= 1.2
    attributes = {name: MODELS / "adapters" / name for name in ("E", "T", "J")}
    device = os.environ.get("MPG_DEVICE", "cpu")
    return mpg.load(MODELS, {"W": whole, **attributes}, draft="J", device=device, dtype="float64")


OF_THREE_SAMPLERS = [
    {"sampler": "direct", **GEOMETRIC, "trace": True},
    {"sampler": "exact", "target": "arithmetic", "draft": "model", "trace": True},
    {"sampler": "scr", **GEOMETRIC, "window": 2},
]


@pytest.mark.parametrize(("way", "rounds_ahead"), with_rounds_ahead(OF_THREE_SAMPLERS, 1))
def test_whole_models_and_adapters_of_each_requests_own_give_the_results_that_it_gets_alone(
    mixed_model, way, rounds_ahead
):
    models = mixed_model.models
    weights = [{"E": 1}, {"W": 0.5, "J": 1}, {"W": 1}, {"J": 1, "E": 0.5, "T": 0.25}, {"E": 0.5, "W": 1}]
    alphas = [tuple(own.get(name, 0.0) for name in models.attribute_names) for own in weights]
    requests = [Request(mixed_model.encode(QUESTIONS[i]), alpha, {}, 8, i) for i, alpha in enumerate(alphas)]
    scheduler = open_scheduler(mixed_model, way, num_rows=3, capacity=90, rounds_ahead=rounds_ahead)
    entries = []
    for request in requests:
        entries.append(scheduler.add(request))
        scheduler.step()
    while scheduler.has_work:
        scheduler.step()
    scheduler.close()
    for i, entry in enumerate(entries):
        options = {"max_new_tokens": 8, "seed": i, **way}
        assert_same(mixed_model.generate(QUESTIONS[i], weights=weights[i], **options), entry.result, 1e-9)


def test_a_round_runs_the_base_and_what_each_running_request_weighs_and_nothing_else(precise_model):
    fed = []

    def count(module, args, kwargs):
        if "logits_to_keep" not in kwargs:  # of a prompt
            fed.append(len(kwargs["input_ids"]))

    scheduler = open_scheduler(precise_model, WAYS[0], num_rows=4, capacity=90)
    hook = precise_model.models._models[0].model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        ends = [3, 1, 5, 4]  # tokens until each ends
        for i, length in enumerate(ends):
            stop = {"ends": lambda tokens, length=length: len(tokens) == length}
            scheduler.add(request_for(precise_model, i, WAYS[0], **stop))
        while scheduler.has_work:
            scheduler.step()
        own = [1 + len(WEIGHTS[i]) for i in range(4)]
        assert fed == [sum(rows for rows, end in zip(own, ends, strict=True) if end > t) for t in range(5)]
        assert fed[-1] == 3
        fed.clear()
        scheduler.add(request_for(precise_model, 4, WAYS[0]))
        for _ in range(2):  # the first reads a token with the prompt
            scheduler.step()
        assert fed == [3]
    finally:
        hook.remove()
        scheduler.close()


@pytest.mark.parametrize(("way", "rounds_ahead"), with_rounds_ahead(WAYS, 1, 2))
def test_request_that_fails_carries_its_error_and_leaves_the_others_alone(precise_model, way, rounds_ahead):
    model, bad_token, boom = precise_model, precise_model.models.vocab_size - 1, RuntimeError("mine")
    scheduler = open_scheduler(model, way, capacity=90, rounds_ahead=rounds_ahead)

    def spoil(module, args, kwargs, out):
        """From a token on the model returns NaN, in its keys and values too."""
        out[kwargs.get("input", args[0]) == bad_token] = torch.nan
        return out

    failing = {
        "NaN": (request_for(model, 0, way), "NaN"),
        "stop": (request_for(model, 1, way, ends=raise_at(2, boom)), "mine"),
    }
    failing["NaN"][0].token_ids.append(bad_token)
    if way["sampler"] in ("direct", "exact"):  # the others have no row to process
        failing["processor"] = (request_for(model, 2, way, processor=raise_at(2, boom)), "mine")
        failing["no scores"] = (request_for(model, 2, way, processor=lambda ids, row: None), "got NoneType")
        failing["infinite"] = (request_for(model, 3, way, processor=lambda ids, row: row + torch.inf), r"\+inf")
        failing["empty"] = (request_for(model, 3, way, processor=lambda ids, row: row - torch.inf), "no token is left")
    embedding = model.models._models[0].model.get_input_embeddings()
    hook = embedding.register_forward_hook(spoil, with_kwargs=True)
    try:
        entries = {name: scheduler.add(request) for name, (request, _) in failing.items()}
        good = [scheduler.add(request_for(model, i, way)) for i in range(4)]
        while scheduler.has_work:
            scheduler.step()
        scheduler.close()
        for name, (_, message) in failing.items():
            assert entries[name].result is None
            with pytest.raises((ValueError, RuntimeError), match=message):
                raise entries[name].error
        for i, entry in enumerate(good):
            assert entry.error is None
            assert_same(generated_alone(model, i, way), entry.result, 1e-9)
    finally:
        hook.remove()


@pytest.mark.parametrize("rounds_ahead", [0, 1, 2])
def test_request_that_fails_where_it_has_moved_to_is_told_why(precise_model, rounds_ahead):
    """What the host reads of a round is where its requests were then: the last has taken the place of the first."""
    way, model = WAYS[0], precise_model.models._models[0].model
    scheduler = open_scheduler(precise_model, way, num_rows=3, capacity=90, rounds_ahead=rounds_ahead)
    first = scheduler.add(request_for(precise_model, 0, way, ends=lambda tokens: True))
    second = scheduler.add(request_for(precise_model, 1, way))
    third = request_for(precise_model, 2, way)
    third = scheduler.add(replace(third, token_ids=third.token_ids[:-1] * 4 + third.token_ids[-1:]))
    fed_at = third.transcript.prompt_length  # in the second round, which may be run before the first is read

    def spoil(module, args, kwargs, out):
        out.logits[kwargs["position_ids"][:, -out.logits.shape[1] :] == fed_at] = torch.nan

    hook = model.register_forward_hook(spoil, with_kwargs=True)
    try:
        while scheduler.has_work:
            scheduler.step()
        scheduler.close()
    finally:
        hook.remove()
    assert len(first.result.tokens) == 1
    with pytest.raises(ValueError, match=r"prompt 2, new token \d: the 'base' model returned NaN"):
        raise third.error
    assert_same(generated_alone(precise_model, 1, way), second.result, 1e-9)


@pytest.mark.parametrize("way", [WAYS[0], {"sampler": "exact", **GEOMETRIC}], ids=["direct", "exact"])
def test_processors_go_where_their_requests_go(precise_model, way):
    """Some rows have one and some have none, and they move as others end."""
    processors = [
        None,
        MinNewTokensLengthLogitsProcessor(0, 99, [5]),
        RepetitionPenaltyLogitsProcessor(3.0),
        None,
        None,
    ]
    ends = [1, 6, 8, 3, 8]
    requests = [
        replace(request_for(precise_model, i, way), processor=processor, ends=lambda tokens, n=n: len(tokens) == n)
        for i, (processor, n) in enumerate(zip(processors, ends, strict=True))
    ]
    scheduler = open_scheduler(precise_model, way, num_rows=4, capacity=90)
    together = finish(scheduler, requests)
    for request, result in zip(requests, together, strict=True):
        alone = open_scheduler(precise_model, way, num_rows=1, capacity=90)
        assert_same(*finish(alone, [request]), result, 1e-9)


def test_processor_that_raises_behind_the_end_of_its_text_fails_nobody(precise_model):
    """Rounds ahead of the host go on behind a stop that it has not read."""
    scheduler = open_scheduler(precise_model, WAYS[0], num_rows=1, capacity=90, rounds_ahead=2)
    own = {"ends": lambda tokens: len(tokens) == 2, "processor": raise_at(3, RuntimeError("mine"))}
    first = scheduler.add(request_for(precise_model, 0, WAYS[0], **own))
    second = scheduler.add(request_for(precise_model, 1, WAYS[0]))
    while scheduler.has_work:
        scheduler.step()
    assert first.result.tokens == generated_alone(precise_model, 0, WAYS[0]).tokens[:2]
    assert_same(generated_alone(precise_model, 1, WAYS[0]), second.result, 1e-9)


@pytest.mark.parametrize("gathers", [False, True])
def test_a_free_row_waits_a_round_for_a_request_where_the_scheduler_gathers(precise_model, gathers):
    way = {"sampler": "direct", "target": "geometric"}
    scheduler = open_scheduler(precise_model, way, num_rows=3, gather=0.0 if gathers else None)
    short, *others = requests = [request_for(precise_model, i, way) for i in range(3)]
    entries = [scheduler.add(short), *(scheduler.add(replace(other, max_new_tokens=30)) for other in others)]
    while not entries[0].is_over:
        scheduler.step()
    scheduler.step()
    assert len(scheduler.rows) == (3 if gathers else 2)
    rows = [entry.row for entry in entries[1:]]
    late = scheduler.add(requests[0])
    scheduler.step()
    assert [entry.row for entry in entries[1:]] == rows and late.row == (0 if gathers else 2)
    while not late.is_over:
        scheduler.step()
    for size in (3, 2) if gathers else (2, 2):  # it waits for one round alone
        scheduler.step()
        assert len(scheduler.rows) == size
    scheduler.close()
    assert late.result.tokens == entries[0].result.tokens == generated_alone(precise_model, 0, way).tokens


@pytest.mark.parametrize("share", [9, run.GATHERED])
def test_rows_that_nothing_waits_for_are_given_up_once_they_are_a_share_of_those_that_run(
    precise_model, monkeypatch, share
):
    """Before an interval has passed."""
    monkeypatch.setattr(run, "GATHERED", share)
    way = {"sampler": "direct", "target": "geometric"}
    scheduler = open_scheduler(precise_model, way, num_rows=3, gather=inf)
    requests = [request_for(precise_model, 0, way)]
    requests += [replace(request_for(precise_model, i, way), max_new_tokens=30) for i in (1, 2)]
    first, *_ = [scheduler.add(request) for request in requests]
    while not first.is_over:
        scheduler.step()
    sizes = [len(scheduler.step()) and len(scheduler.rows) for _ in range(2)]
    assert sizes == ([3, 3] if share == 9 else [3, 2])
    scheduler.close()


@pytest.mark.parametrize(("gather", "share"), [(0.0, 9), (inf, 9), (inf, run.GATHERED)])
def test_requests_that_come_while_others_run_begin_together(precise_model, monkeypatch, gather, share):
    """After an interval, or once they are a share of those that run, and where there are none of these."""
    monkeypatch.setattr(run, "GATHERED", share)
    way, waits = {"sampler": "direct", "target": "geometric"}, gather > 0 and share > 1
    scheduler = open_scheduler(precise_model, way, num_rows=3, gather=gather)
    requests = [request_for(precise_model, i, way) for i in range(3)]
    entries = []
    for request in requests:
        entries.append(scheduler.add(request))
        scheduler.step()
        assert len(scheduler.rows) == (1 if waits else len(entries))
    while not entries[0].is_over:
        scheduler.step()
    scheduler.step()
    assert not scheduler.waiting and len(scheduler.rows) == (2 if waits else 3)
    while scheduler.has_work:
        scheduler.step()
    for i, entry in enumerate(entries):
        assert entry.result.tokens == generated_alone(precise_model, i, way).tokens


def test_scheduler_refuses_what_it_was_not_opened_for(precise_model):
    scheduler = open_scheduler(precise_model, WAYS[0], capacity=12, attributes=("E",))
    with pytest.raises(ValueError, match=r"max_new_tokens: expected at most 12 with the prompt's, got \d+"):
        scheduler.add(request_for(precise_model, 0, WAYS[0]))
    request = Request([5, 6], (1.0, 0.0, 2.0, 0.0), {}, 4, 0)
    with pytest.raises(ValueError, match="weights: expected some of E, got 'T'"):
        scheduler.add(request)
    assert not scheduler.has_work


def test_each_result_is_handed_out_when_it_is_there_and_after_its_tokens(model):
    seen = []
    results = model.generate(
        QUESTIONS, weights=WEIGHTS, seed=11, batch_size=2, stop_strings=["."], num_return_sequences=2,
        on_token=lambda token: seen.append((token.request, None)), on_result=lambda *done: seen.append(done),
    )  # fmt: skip
    handed_out = [(index, result) for index, result in seen if result is not None]
    assert sorted(index for index, _ in handed_out) == list(range(14))
    assert all(result is results[index] for index, result in handed_out)
    for index, result in handed_out:
        place = seen.index((index, result))
        assert seen[:place].count((index, None)) == len(result.tokens)
        assert (index, None) not in seen[place:]
    first = seen.index(handed_out[0])
    assert {index for index, _ in seen[:first]} == {0, 1}  # the others have not begun


def test_result_that_is_handed_out_says_what_auto_planned(model):
    seen = []
    options = {"weights": {"E": 1}, "sampler": "auto", "max_new_tokens": 4, "seed": 0}
    result = model.generate(QUESTIONS[0], on_result=lambda *done: seen.append(done), **options)
    assert seen == [(0, result)]
    assert result.plan


def test_on_result_that_cannot_be_called_is_refused(model):
    with pytest.raises(ValueError, match="on_result: expected a callable, got 3"):
        model.generate("hi", weights={"E": 1}, on_result=3)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("callback", ["on_token", "on_result"])
def test_interrupted_call_leaves_the_model_as_it_was(model, callback, error):
    def interrupt(*args):
        raise error

    options = {"weights": {"E": 1}, "max_new_tokens": 6, "batch_size": 2}
    expected = [result.tokens for result in model.generate(QUESTIONS[:3], seed=3, **options)]
    with pytest.raises(error):
        model.generate(QUESTIONS[:3], **options, **{callback: interrupt})
    assert [result.tokens for result in model.generate(QUESTIONS[:3], seed=3, **options)] == expected
