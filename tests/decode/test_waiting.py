"""Long prompts are read in parts, between rounds of the requests that run, and change nobody's text."""

from __future__ import annotations

import pytest

import mpg
from longer import thinned
from mpg.decode.request import Request
from mpg.decode.run import Scheduler
from mpg.demo import MODELS
from mpg.models import beginnings
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


def open_scheduler(model, sampler, part):
    return Scheduler(
        model.models, Options(sampler=sampler), (), num_rows=3, capacity=128, attributes=("E", "T"), rounds_ahead=0,
        part=part,
    )  # fmt: skip


@pytest.mark.parametrize("sampler", thinned(["direct", "scr", "exact"]))
def test_running_requests_go_on_while_a_long_prompt_is_read(sampler, model, monkeypatch):
    monkeypatch.setattr(beginnings, "MIN_SHARED", 16)
    model.models.kept.clear()
    fed, forward = [], ModelRunner.forward

    def watched(self, rows, layout, tokens, start, *args, **kwargs):
        fed.append(tokens.shape[1])
        return forward(self, rows, layout, tokens, start, *args, **kwargs)

    monkeypatch.setattr(ModelRunner, "forward", watched)
    scheduler = open_scheduler(model, sampler, PART)
    entries = [scheduler.add(request_of(model, 0, 60))]
    scheduler.step()
    entries += [scheduler.add(request_of(model, index, 6)) for index in range(1, len(PROMPTS))]
    longest = []  # forward of a step while the first request ran
    while scheduler.has_work:
        fed.clear()
        news = scheduler.step()
        if not entries[0].is_over:
            assert entries[0] in [entry for entry, tokens in news]
            longest.append(max(fed))
    scheduler.close()
    assert len(longest) > 10 and max(longest) <= PART + 1
    # the second is read by three models in nine parts each, and the third begins as it does
    assert sum(length == PART for length in longest) >= 9
    results = [entry.result for entry in entries]
    model.models.kept.clear()
    alone = open_scheduler(model, sampler, None)
    for index, result in enumerate(results):
        entry = alone.add(request_of(model, index, 60 if index == 0 else 6))
        while scheduler_runs(alone):
            pass
        assert entry.result.tokens == result.tokens
    alone.close()


def scheduler_runs(scheduler):
    scheduler.step()
    return scheduler.has_work


def test_prompts_that_begin_together_are_no_more_than_a_part(model):
    scheduler = open_scheduler(model, "direct", PART)
    for _ in range(3):
        scheduler.add(request_of(model, 0, 4))  # of four tokens but the last
    scheduler.step()
    assert len(scheduler.rows) == 2 and len(scheduler.waiting) == 1
    scheduler.step()
    assert len(scheduler.rows) == 3
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
