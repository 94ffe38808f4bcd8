"""Requests that enter and leave a running batch, on the demo models: nobody's text depends on who else is there."""

from __future__ import annotations

import pytest

from mpg.decode import run
from mpg.demo.corpus import DEMO_QUESTIONS, HELD_OUT_QUESTIONS

QUESTIONS = [*DEMO_QUESTIONS[:3], *(question.text for question in HELD_OUT_QUESTIONS[:4])]
WEIGHTS = [{"E": 1}, {"T": 0.5, "J": 1}, {"E": 1, "T": 1}, {"S": 1}, {"E": -0.5, "T": 1}, {"J": 1}, {"E": 2}]
WAYS = [
    {"sampler": "direct", "target": "geometric", "trace": True},
    {"sampler": "exact", "target": "geometric", "trace": True},
    {"sampler": "exact", "target": "geometric", "draft": "merged"},
    {"sampler": "exact", "target": "geometric", "draft": "lookup", "adaptive": True},
    {"sampler": "exact", "target": "arithmetic", "mixture_span": 3},
    {"sampler": "scr", "target": "geometric", "trace": True},
    {"sampler": "token-rs", "target": "geometric"},
    {"sampler": "seq-rs", "target": "geometric", "tries": 3},
]
DEPENDS_ON_COMPANY = {"tokens_per_second", "time_to_first_token"}


def answers(model, **options):
    weights = WEIGHTS if options["target"] == "geometric" else [{"E": 1, "T": 0.5 + i} for i in range(7)]
    return model.generate(QUESTIONS, weights=weights, seed=11, max_new_tokens=72, **options)


def counts(result, way):
    left_out = DEPENDS_ON_COMPANY | ({"positions_per_token"} if way.get("adaptive") else set())  # the longest chunk's
    return {name: value for name, value in result.stats.items() if name not in left_out}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(map(str, way.values())))
def test_late_arrivals_write_what_they_write_when_all_begin_together(model, way):
    together, in_two_rows = answers(model, **way), answers(model, **way, batch_size=2)
    assert len({len(result.tokens) for result in together}) > 1  # rows become free at different rounds
    for one, other in zip(together, in_two_rows, strict=True):
        assert one.tokens == other.tokens
        assert one.text == other.text
        assert one.finish_reason == other.finish_reason
        assert counts(one, way) == pytest.approx(counts(other, way), rel=1e-4, abs=1e-4)
        assert (one.log_ratios is None) == (other.log_ratios is None)
        for ratios, wanted in zip(one.log_ratios or (), other.log_ratios or (), strict=True):
            assert ratios == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(map(str, way.values())))
@pytest.mark.parametrize("batch_size", [2, 32])
def test_rounds_read_late_give_the_same_texts_and_statistics(model, way, batch_size, monkeypatch):
    at_once = answers(model, **way, batch_size=batch_size)
    monkeypatch.setitem(run.ROUNDS_AHEAD, model.models.device.type, 2)
    pieces = []
    late = answers(model, **way, batch_size=batch_size, on_token=pieces.append)
    for index, (one, other) in enumerate(zip(at_once, late, strict=True)):
        assert one.tokens == other.tokens == tuple(piece.id for piece in pieces if piece.request == index)
        assert counts(one, way) == pytest.approx(counts(other, way), rel=1e-4, abs=1e-4)


def test_first_to_end_makes_room_for_the_next_before_the_others_have_ended(model):
    started = []
    model.generate(
        QUESTIONS[:3], weights={"E": 1}, seed=0, batch_size=2, max_new_tokens=128, sampler="direct",
        on_token=lambda token: started.append(token.request),
    )  # fmt: skip
    assert started.index(2) < max(i for i, request in enumerate(started) if request < 2)
    assert {request for request in started[: started.index(2)]} == {0, 1}
