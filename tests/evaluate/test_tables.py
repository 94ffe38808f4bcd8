"""Tables: means, intervals and differences from scores that are known, and what is missing or was not run."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mpg.evaluate.judges.endpoint import CRITERIA
from mpg.evaluate.tables import (
    COST_COLUMNS,
    METRIC_COLUMNS,
    Column,
    Score,
    Section,
    agreement,
    cost_of,
    judge_columns,
    judged,
    not_run,
    overall,
    render,
    render_overall,
    tabulate,
    tabulate_section,
)

STYLE = [Column("Sty", (("qa", ("style",)),))]


def scores(values, task="qa", shift=0.0, name="style"):
    """One score a prompt and seed of values (prompts, seeds)."""
    return [
        Score(f"{task} {prompt}", task, seed, {name: None if value is None else value + shift})
        for prompt, row in enumerate(values)
        for seed, value in enumerate(row)
    ]


def section(methods, columns=STYLE):
    return Section("s", columns, methods, columns[-1].label)


def cells(section, reference="base"):
    return {row["method"]: row["cells"] for row in tabulate_section(section, reference)["rows"]}


def test_columns_are_those_of_the_papers_tables():
    labels = [column.label for column in judge_columns(["qa", "mcqa", "16p"], CRITERIA["mbti"])]
    per_task = ["Sty", "Tho", "Beh", "Nat", "Avg"]
    assert labels == [f"{task} {name}" for task in ("QA", "MCQA", "16P") for name in per_task] + ["Overall"]
    assert [column.label for column in judge_columns(["roleplay"], CRITERIA["roleplay"])] == ["PR", "PM", "HI", "Avg"]
    assert [column.label for column in METRIC_COLUMNS][:4] == ["BLEU", "ROUGE-1", "BERTScore", "PPL"]
    assert [column.label for column in COST_COLUMNS] == ["tok/s", "s/sequence", "forwards/token", "reject rate"]


def test_costs_are_of_all_tokens_and_latency_is_of_a_text():
    stats = {"model_calls_per_token": 2.0, "tokens_per_second": 5.0, "rounds": 3}
    short = {"tokens": 10, "stats": stats}
    long = {"tokens": 30, "stats": {**stats, "tokens_per_second": 10.0, "model_calls_per_token": 4.0}}
    rejects = [{**short, "stats": {**stats, "reject_rate": 1.0}}, {**long, "stats": {**stats, "reject_rate": 0.0}}]
    tries = {**short, "stats": {**stats, "reject_rate": 0.5, "num_tries": 40}}
    methods = {"base": [short, long], "scr": rejects, "token-rs": [tries], "mod": "it cannot"}
    told = {
        name: rows if isinstance(rows, str) else [Score(str(n), "qa", 0, cost_of(row)) for n, row in enumerate(rows)]
        for name, rows in methods.items()
    }
    costs = Section("Efficiency", COST_COLUMNS, told, "s/sequence", absent="-")
    found = {name: {label: cell["value"] for label, cell in own.items()} for name, own in cells(costs).items()}
    assert found["base"] == {"tok/s": 8.0, "s/sequence": 2.5, "forwards/token": 3.5}
    assert (found["scr"]["reject rate"], found["token-rs"]["reject rate"], found["mod"]) == (0.5, 0.5, {})
    lines = render(tabulate("t", [costs], "base")).splitlines()
    assert lines[4].startswith("| method | tok/s | s/sequence | forwards/token | reject rate | s/sequence, 95 % |")
    assert "| base | 8.000 | 2.500 | 3.500 | - | 2.500 [2.000, 3.000] |  |" in lines
    assert any(line.startswith("| mod | not run | not run | not run | not run | not run |") for line in lines)


def test_a_mean_has_the_interval_of_resampled_prompts_and_seeds():
    values = np.random.default_rng(0).normal(3, 1, (40, 3)) + np.arange(40)[:, None] / 10
    cell = cells(section({"base": scores(values)}))["base"]["Sty"]
    assert cell["value"] == pytest.approx(values.mean(), abs=1e-6)
    # of resampled prompts, and of seeds within each: the variances add up
    error = math.sqrt(values.mean(1).var() / 40 + values.var(1).mean() / 120)
    assert cell["high"] - cell["low"] == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert cell["difference"] is None


def test_a_difference_is_paired():
    values = np.random.default_rng(1).normal(3, 1, (20, 2))
    methods = {"base": scores(values), "scr": scores(values, shift=0.25)}
    cell = cells(section(methods))["scr"]["Sty"]
    assert cell["difference"] == {"value": 0.25, "low": 0.25, "high": 0.25}
    assert cell["low"] < cell["value"] < cell["high"]


def test_what_is_missing_counts_nowhere_and_is_never_0():
    methods = {
        "base": scores([[2, None], [None, None], [4, 4]]),
        "scr": scores([[None, None]] * 3),
        "mod": [],
        "pp": "it lacks something",
    }
    table = tabulate("t", [section(methods)], "base")
    rows = {row["method"]: row for row in table["sections"][0]["rows"]}
    assert rows["base"]["cells"]["Sty"]["value"] == pytest.approx(10 / 3, abs=1e-6)
    assert rows["scr"]["cells"] == rows["mod"]["cells"] == rows["pp"]["cells"] == {}
    lines = render(table).splitlines()
    assert "| scr | missing | missing |  |" in lines and "| mod | missing | missing |  |" in lines
    assert "| pp | not run | not run |  |" in lines and "- pp: not run: it lacks something" in lines


def test_a_text_that_lacks_one_criterion_is_not_in_the_mean_of_all():
    columns = judge_columns(["qa"], ("style", "thought"))
    both = [Score("a", "qa", 0, {"style": 1, "thought": 5}), Score("b", "qa", 0, {"style": 2, "thought": None})]
    found = cells(section({"base": both}, columns))["base"]
    assert {label: cell["value"] for label, cell in found.items()} == {"Sty": 1.5, "Tho": 5, "Avg": 3}


def test_texts_of_single_attributes_count_as_one():
    texts = [Score("a", "qa", 0, {"style": 1}), Score("a", "qa", 0, {"style": 3}), Score("b", "qa", 0, {"style": 5})]
    assert cells(section({"dpo-single": texts}))["dpo-single"]["Sty"]["value"] == 3.5


def test_overall_is_the_mean_of_the_tasks_not_of_the_texts():
    columns = judge_columns(["qa", "16p"], ("style",))
    whole = scores([[1]] * 9) + scores([[4]], task="16p")
    assert cells(section({"base": whole}, columns))["base"]["Overall"]["value"] == 2.5
    assert "Overall" not in cells(section({"base": scores([[1]] * 9)}, columns))["base"]


def test_perplexity_is_of_all_tokens():
    texts = [
        Score("a", "qa", 0, {"nll": 10.0, "nll_tokens": 10.0}),
        Score("b", "16p", 0, {"nll": 2.0, "nll_tokens": 1.0}),
        Score("c", "qa", 0, {"nll": None, "nll_tokens": None}),
    ]
    found = cells(section({"base": texts}, METRIC_COLUMNS))["base"]["PPL"]
    assert found["value"] == pytest.approx(math.exp(12 / 11), abs=1e-5)
    assert math.e - 1e-5 <= found["low"] <= found["value"] <= found["high"] <= math.exp(2) + 1e-5


def test_agreement_is_over_what_both_judges_scored():
    one = {key: {"style": value} for key, value in zip("abcde", (1, 2, 3, 4, None), strict=True)}
    other = {key: {"style": value, "HI": 1} for key, value in zip("bcdef", (3, 5, 4, 5, 5), strict=True)}
    [row] = agreement({"m": one, "n": other})
    assert row["judges"] == ["m", "n"] and row["criterion"] == "style" and row["texts"] == 3
    assert row["spearman"] == pytest.approx(0.5) and row["mean_absolute_difference"] == 1
    [row] = agreement({"m": {"a": {"style": 1}}, "n": {"a": {"style": 2}}})
    assert row["spearman"] is None
    assert agreement({"m": one}) == []


def test_a_table_is_rendered_from_its_json_with_every_section():
    sections = [
        judged("GPT", ["qa"], ["style"], {"base": scores([[1], [1]]), "scr": scores([[2], [2]])}, ["a note"]),
        not_run("roleplay", ["roleplay"], ["base"]),
        Section("Measured", [Column("B", ((None, ("b",)),)), *STYLE], {"base": scores([[1]])}, "B", (), ("B",)),
    ]
    told = agreement({"m": {1: {"style": 1}, 2: {"style": 2}}, "n": {1: {"style": 2}, 2: {"style": 4}}})
    table = tabulate("Title", sections, "base", told)
    assert render(json.loads(json.dumps(table))) == render(table)
    assert (
        render(table)
        == """\
# Title

## Evaluated by GPT

| method | Sty | Avg | Avg, 95 % | Avg: - base |
|---|---|---|---|---|
| base | 1.000 | 1.000 | 1.000 [1.000, 1.000] |  |
| scr | 2.000 | 2.000 | 2.000 [2.000, 2.000] | +1.000 [+1.000, +1.000] |

- a note

## Evaluated by an endpoint

| method | PR | PM | HI | Avg | Avg, 95 % | Avg: - base |
|---|---|---|---|---|---|---|
| base | not run | not run | not run | not run | not run |  |

## Measured

| method | B | Sty | B, 95 % | B: - base |
|---|---|---|---|---|
| base | not run | 1.000 | not run |  |

## Agreement between judges

| judges | criterion | texts | Spearman | mean difference |
|---|---|---|---|---|
| m and n | Sty | 2 | 1.000 | 1.500 |
"""
    )
    tables = {"MBTI": table, "Role-Play": tabulate("r", sections[:1], "base")}
    assert (
        render_overall(overall(tables))
        == """\
| method | MBTI, evaluated by GPT | MBTI, evaluated by an endpoint | Role-Play, evaluated by GPT |
|---|---|---|---|
| base | 1.000 [1.000, 1.000] | not run | 1.000 [1.000, 1.000] |
| scr | 2.000 [2.000, 2.000] | not run | 2.000 [2.000, 2.000] |
"""
    )
    assert overall(tables)[0]["cells"]["MBTI, evaluated by GPT"] == {
        "value": 1.0,
        "low": 1.0,
        "high": 1.0,
        "difference": None,
    }
    assert render_overall(overall(tables, ["scr", "mod"])).splitlines()[2:] == [
        "| scr | 2.000 [2.000, 2.000] | not run | 2.000 [2.000, 2.000] |",
        "| mod | not run | not run | not run |",
    ]
