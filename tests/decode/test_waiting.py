"""Long prompts are read in parts, between rounds of the requests that run, and change nobody's text."""

from __future__ import annotations

import pytest

import mpg
from longer import thinned
from mpg.decode.request import Request
from mpg.decode.run import Scheduler
from mpg.demo import MODELS
from mpg.models import beginnings
from mpg.models.ahead import Ahead
from mpg.models.kept import Kept
from mpg.models.runner import ModelRunner
from mpg.options import Options

PART = 8
PROMPTS = [list(range(10, 15)), list(range(20, 90)), [*range(20, 60), *range(200, 240)], list(range(30, 36)), [7] * 50]
WEIGHTS = [{"E": 1.0}, {"E": 0.5, "T": 1.0}, {"T": 1.0}, {"E": 1.0, "T": 1.0}, {"E": 1.0}]


@pytest.fixture(scope="module")
def model():
    """In double precision, in which what was read in other parts gives the same text."""
    return mpg.load(MODELS, device="cpu", dtype="float64")


def request_of(model, index, max_new_tokens):
    weights = WEIGHTS[index]
    alpha = tuple(weights.get(name, 0.0) for name in model.models.attribute_names)
    return Request(PROMPTS[index], alpha, weights, max_new_tokens, seed=index)


def open_scheduler(model, sampler, part, num_rows=3):
    return Scheduler(
        model.models, Options(sampler=sampler), (), num_rows=num_rows, capacity=128, attributes=("E", "T"),
        rounds_ahead=0, part=part,
    )  # fmt: skip


@pytest.fixture
def fed(monkeypatch):
    """Of every forward that reads prompts the positions, of all its rows together."""
    positions, forward = [], ModelRunner.forward

    def watched(self, rows, layout, tokens, *args, **kwargs):
        if "logits_to_keep" in kwargs:
            positions.append(sum(count for _, count in layout.runs) * tokens.shape[1])
        return forward(self, rows, layout, tokens, *args, **kwargs)

    monkeypatch.setattr(ModelRunner, "forward", watched)
    return positions


@pytest.mark.parametrize("min_shared", [16, 1000], ids=["shared", "not shared"])
@pytest.mark.parametrize("sampler", thinned(["direct", "scr", "exact"]))
def test_running_requests_go_on_while_a_long_prompt_is_read(sampler, min_shared, model, fed, monkeypatch):
    monkeypatch.setattr(beginnings, "MIN_SHARED", min_shared)
    model.models.kept.clear()
    scheduler = open_scheduler(model, sampler, PART)
    entries = [scheduler.add(request_of(model, 0, 110))]
    scheduler.step()
    entries += [scheduler.add(request_of(model, index, 6)) for index in range(1, len(PROMPTS))]
    read = []  # in a step while the first request ran
    while scheduler.has_work:
        fed.clear()
        news = scheduler.step()
        if not entries[0].is_over:
            assert entries[0] in [entry for entry, tokens in news]
            read.append(sum(fed))
    scheduler.close()
    assert max(read) <= PART
    assert sum(of_step == PART for of_step in read) >= 15
    results = [entry.result for entry in entries]
    model.models.kept.clear()
    alone = open_scheduler(model, sampler, None)
    for index, result in enumerate(results):
        entry = alone.add(request_of(model, index, 110 if index == 0 else 6))
        while scheduler_runs(alone):
            pass
        assert entry.result.tokens == result.tokens
    alone.close()


def scheduler_runs(scheduler):
    scheduler.step()
    return scheduler.has_work


@pytest.mark.parametrize(
    ("part", "begin"), [(12, [1, 1, 1]), (16, [2, 1]), (28, [3]), (27, [2, 1]), (3, [0, 1, 0, 0, 0, 0, 1])]
)
def test_prompts_that_begin_together_are_no_more_than_a_part(part, begin, model, fed):
    """Of four tokens but the last, each under one model or three."""
    model.models.kept.clear()
    scheduler = open_scheduler(model, "direct", part, num_rows=4)
    scheduler.add(request_of(model, 0, 40))
    while not scheduler.rows:
        scheduler.step()
    for index, weights in enumerate([{"E": 1.0}, {"E": 0.5, "T": 1.0}, {"E": 1.0, "T": 1.0}]):
        alpha = tuple(weights.get(name, 0.0) for name in model.models.attribute_names)
        scheduler.add(Request([10 + index] * 5, alpha, weights, 20, seed=0))
    for num_begun in begin:
        fed.clear()
        before = len(scheduler.rows)
        scheduler.step()
        assert sum(fed) <= part
        assert len(scheduler.rows) == before + num_begun
    scheduler.close()


def test_what_was_read_of_a_request_that_is_given_up_is_forgotten(model):
    model.models.kept.clear()
    scheduler = open_scheduler(model, "direct", PART)
    first, second = (scheduler.add(request_of(model, index, 4)) for index in (1, 4))
    for _ in range(3):
        scheduler.step()
    scheduler.cancel(first)
    while scheduler_runs(scheduler):
        pass
    scheduler.close()
    assert second.result is not None and first.result is None and len(model.models.kept) == 0


@pytest.mark.parametrize("is_planted", [False, True], ids=["as it is", "looked up when it begins"])
def test_what_a_prompt_begins_with_is_looked_up_when_it_is_copied(is_planted, model, monkeypatch):
    """The row that it begins in moves to where another request has ended, while one model reads it and two have not."""
    monkeypatch.setattr(beginnings, "MIN_SHARED", 16)
    if is_planted:
        unread = Ahead._unread
        monkeypatch.setattr(Ahead, "_unread", lambda self, *args: [*unread(self, *args)])
    monkeypatch.setattr(model.models, "kept", Kept(max_bytes=0))
    both, opening = {"E": 1.0, "T": 1.0}, list(range(20, 60))
    prompts = [[7] * 50, [8] * 50, [9] * 50, [*opening, 3, 4, 5, 6], [6] * 50]

    def request(prompt, max_new_tokens):
        alpha = tuple(both.get(name, 0.0) for name in model.models.attribute_names)
        return Request(prompt, alpha, both, max_new_tokens, seed=0)

    long = request([*opening, *range(100, 130)], 12)
    scheduler = open_scheduler(model, "direct", None, num_rows=6)
    for prompt, size in zip(prompts, (2, 40, 40, 40, 40), strict=True):
        scheduler.add(request(prompt, size))
    scheduler.step()
    scheduler.waiting.part = PART
    late = scheduler.add(long)
    while scheduler_runs(scheduler):
        pass
    scheduler.close()
    alone = open_scheduler(model, "direct", None)
    wanted = alone.add(long)
    while scheduler_runs(alone):
        pass
    alone.close()
    assert (late.result.tokens == wanted.result.tokens) != is_planted


def test_a_row_that_a_new_request_takes_is_not_what_another_begins_in(model, fed, monkeypatch):
    """They begin together, nothing is kept, and the second begins as what the row had before."""
    monkeypatch.setattr(beginnings, "MIN_SHARED", 16)
    monkeypatch.setattr(model.models, "kept", Kept(max_bytes=0))
    prompt, part = list(range(20, 60)), 64
    scheduler = open_scheduler(model, "direct", None, num_rows=3)
    for tokens, size in ((prompt, 2), ([7, 8], 40)):
        scheduler.add(Request(tokens, (1.0, 0.0, 0.0, 0.0), {"E": 1.0}, size, seed=0))
    while not any(entry.is_over for entry in scheduler.rows):
        scheduler.step()
    scheduler.waiting.part = part
    for tokens in ([9] * 40, [*prompt, 1, 2]):
        scheduler.add(Request(tokens, (1.0, 0.0, 0.0, 0.0), {"E": 1.0}, 4, seed=0))
    read = []
    while scheduler.has_work:
        fed.clear()
        scheduler.step()
        read.append(sum(fed))
    scheduler.close()
    assert 0 < max(read) <= part


def test_what_cannot_be_read_in_parts_is_read_at_once(model):
    """By a draft that is a sum of adapters, once all else of the prompt has been read ahead."""
    options, texts = Options(sampler="exact", draft="merged", chunk_size=3), []
    for part in (PART, None):
        model.models.kept.clear()
        scheduler = Scheduler(
            model.models, options, (), num_rows=2, capacity=128, attributes=("E", "T"), rounds_ahead=0, part=part
        )
        entries = [scheduler.add(request_of(model, index, 12)) for index in (0, 1, 2)]
        steps = iter(range(200))
        while scheduler_runs(scheduler):
            next(steps)
        scheduler.close()
        texts.append([entry.result.tokens for entry in entries])
    assert texts[0] == texts[1]
