"""What `mpg check` measures, and what it refuses to claim."""

from __future__ import annotations

import numpy as np
import pytest

import mpg
from longer import IS_LONG
from mpg.demo.corpus import HELD_OUT_QUESTIONS
from mpg.frontend.prompts import encode
from mpg.paper import check as checks
from mpg.paper.check import check, score_texts
from mpg.paper.report import plot, render
from mpg.paper.statistics import Bootstrap, Estimate

PROMPTS = [question.text for question in HELD_OUT_QUESTIONS[:6]]
BOTH = {"E": 1.0, "T": 1.0}
COSTS = ("tokens_per_round", "model_calls_per_token", "depth_per_token", "positions_per_token", "tokens_per_second")


@pytest.fixture(scope="module")
def report(model):
    return check(model, BOTH, PROMPTS, max_new_tokens=24 if IS_LONG else 14, num_seeds=2, batch_size=5)


def test_scores_of_texts_are_those_of_their_generation(model):
    """One pass over finished texts, some longer than a slice, finds the log-ratios that decoding traced."""
    tokenizer, vocab_size = model.models.tokenizer, model.models.vocab_size
    prompts = [encode(prompt, tokenizer, vocab_size, raw=False) for prompt in ("Hello?", *PROMPTS)]
    results = model.generate(prompts, weights={"E": 1, "J": -0.5}, sampler="direct", trace=True, seed=0)
    assert max(len(result.tokens) for result in results) > 32
    traced = [[sum(ratios[name] for ratios in result.log_ratios) for name in ("E", "J")] for result in results]
    scores = score_texts(model.models, ("E", "J"), prompts, [result.tokens for result in results])
    np.testing.assert_allclose(scores.numpy(), traced, atol=1e-3)


def test_every_sampler_stands_beside_exact_at_its_own_target(report):
    asked, arithmetic, geometric = report.sections
    assert (asked.target, asked.weights) == ("geometric", BOTH)
    drafts = [f"exact, {draft} draft" for draft in ("reference", "lookup", "merged")]
    assert {row.sampler for row in asked.rows} == {"base", "direct", *drafts}
    for section, score in ((arithmetic, "arithmetic"), (geometric, "geometric")):
        assert (section.target, section.weights) == (score, {"E": 0.5, "T": 0.5})
        assert [row.sampler for row in section.rows] == ["base", "exact, reference draft", "scr"]


def test_base_delivers_nothing_and_exact_everything_by_definition(report):
    section = report.sections[0]
    assert section.is_resolved
    shares = {row.sampler: row.delivered for row in section.rows}
    assert shares["base"] == Estimate(0, 0, 0)
    assert shares["exact, reference draft"] == Estimate(1, 1, 1)
    assert shares["direct"].low < shares["direct"].value < shares["direct"].high


def test_every_row_that_ran_has_every_cost(report):
    for row in (row for section in report.sections for row in section.rows):
        assert row.skipped is None
        assert all(getattr(row, cost) > 0 for cost in COSTS)


def test_scr_joins_the_target_asked_for_where_they_are_one(model):
    for weights, target in (({"E": 0.25, "T": 0.75}, "geometric"), ({"E": 2, "T": 2}, "arithmetic")):
        report = check(model, weights, PROMPTS[:2], target=target, max_new_tokens=2)
        assert report.sections[0].rows[-1].sampler == "scr"
        assert len(report.sections) == 2


def test_scr_as_published_is_left_out_where_its_weights_have_no_positive_sum(model):
    report = check(model, {"E": 1, "T": -1}, PROMPTS[:2], max_new_tokens=2)
    assert [section.target for section in report.sections] == ["geometric"]
    assert "needs weights of a positive sum" in report.notes[0]
    assert "2 prompts are few" in report.notes[1]


def test_sampler_that_cannot_run_is_a_reason_in_its_row(model, monkeypatch):
    generate = mpg.Model.generate

    def without_lookup(self, prompts, **options):
        if options.get("draft") == "lookup":
            raise ValueError("draft: not today")
        return generate(self, prompts, **options)

    monkeypatch.setattr(mpg.Model, "generate", without_lookup)
    report = check(model, BOTH, PROMPTS[:2], max_new_tokens=2)
    rows = {row.sampler: row for row in report.sections[0].rows}
    assert rows["exact, lookup draft"].skipped == "draft: not today"
    assert rows["direct"].skipped is None
    assert render(report)


def test_no_two_texts_share_a_seed(model, monkeypatch):
    seeds, generate = [], mpg.Model.generate

    def record(self, prompts, **options):
        if options["max_new_tokens"] == 2:
            seeds.extend(range(options["seed"], options["seed"] + len(prompts)))
        return generate(self, prompts, **options)

    monkeypatch.setattr(mpg.Model, "generate", record)
    check(model, BOTH, PROMPTS[:3], max_new_tokens=2, num_seeds=2, batch_size=4, seed=7)
    assert len(seeds) == len(set(seeds)) == 6 * 9
    assert min(seeds) == 7


def section_of(base, half, exact):
    """The section of three samplers from their log-ratios (P,) of texts of two tokens."""
    texts = {
        name: checks._Texts(
            np.array(values, dtype=float)[:, None], np.full(len(values), 2.0), dict.fromkeys(COSTS, 1.0)
        )
        for name, values in (("base", base), ("half", half), ("exact, reference draft", exact))
    }
    return checks._compare(checks._Plan("geometric", {"E": 0.5}, []), texts, Bootstrap(len(base), seed=0))


def test_delivered_is_the_place_between_base_and_exact():
    section = section_of([-1, 0, 1, 0], [1, 2, 3, 2], [3, 4, 5, 4])
    assert section.intended.value == pytest.approx(0.5 * 4 / 2)  # alpha times 4 nats over 2 tokens
    share = section.rows[1].delivered
    assert (share.value, share.low, share.high) == pytest.approx((0.5, 0.5, 0.5))


def test_shift_that_could_be_chance_is_not_divided_by():
    section = section_of([-1, 0, 1, 0], [1, 2, 3, 2], [3, -3, 3, -2.9])
    assert not section.is_resolved
    assert all(row.delivered is None and row.shift is not None for row in section.rows)


def test_plot_is_a_picture(report, tmp_path):
    pytest.importorskip("matplotlib")
    plot(report, tmp_path / "check.png")
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["check.png"]


def test_weights_that_scr_cannot_divide_by_their_sum_leave_only_scr_out(model):
    report = check(model, {"E": 1, "T": -0.9999}, PROMPTS[:2], max_new_tokens=2)
    assert [section.target for section in report.sections] == ["geometric"]
    assert sum("was left out: it divides the weights by their sum, 0.0001" in note for note in report.notes) == 2
