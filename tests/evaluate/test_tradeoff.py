"""Trait against naturalness: which scores make a point, with which intervals, and a picture of them."""

from __future__ import annotations

import numpy as np
import pytest

from longer import thinned
from mpg.evaluate import tradeoff
from mpg.evaluate.tables import METRIC_COLUMNS, PERPLEXITY, Score, Section, judged, not_run, tabulate_section

METHODS = ("base", "scr")
MBTI = ("style", "thought", "naturalness")


def texts(criteria, task, seed):
    """Scores of twelve prompts under both methods, by criterion."""
    values = np.random.default_rng(seed).uniform(1, 5, (len(METHODS), 12, len(criteria)))
    return {
        method: [
            Score(f"{task}:{prompt}", task, 0, dict(zip(criteria, row, strict=True))) for prompt, row in enumerate(own)
        ]
        for method, own in zip(METHODS, values.tolist(), strict=True)
    }


def section(judge, criteria, seed=0, tasks=("qa", "16p")):
    both = [texts(criteria, task, seed + place) for place, task in enumerate(tasks)]
    return judged(judge, tasks, criteria, {method: [*both[0][method], *both[-1][method]] for method in METHODS})


MEASURED = Section("Measured", METRIC_COLUMNS, texts(("nll", "nll_tokens"), "qa", 7), "PPL")


def values_of(section, *criteria):
    """Over tasks the mean of the mean of some criteria, by method."""
    return {
        method: np.mean([np.mean([score.values[name] for name in criteria]) for score in scores])
        for method, scores in section.methods.items()
    }


def test_a_point_is_the_mean_of_traits_against_naturalness_by_the_same_judge():
    one, other = section("m", MBTI), section("n", MBTI, 5)
    shown = tradeoff.panels([one, other], MEASURED, "b", "base")
    assert [panel["judge"] for panel in shown] == ["m", "n"]
    assert (shown[0]["trait"], shown[0]["against"]) == ("mean of style, thought by m", "naturalness by m")
    for panel, of in zip(shown, (one, other), strict=True):
        trait, natural = values_of(of, "style", "thought"), values_of(of, "naturalness")
        for point in panel["points"]:
            for name, expected in (("trait", trait), ("against", natural)):
                assert point[name]["value"] == pytest.approx(expected[point["method"]], abs=1e-6)
                assert point[name]["low"] < point[name]["value"] < point[name]["high"]


def test_a_classifier_is_shown_against_the_naturalness_of_an_endpoint():
    shown = tradeoff.panels([section("own", ("EI", "TF")), section("m", MBTI)], MEASURED, "b", "base")
    assert [panel["against"] for panel in shown] == ["naturalness by m"] * 2
    assert [p["against"] for p in shown[0]["points"]] == [p["against"] for p in shown[1]["points"]]


def test_where_no_endpoint_scored_perplexity_takes_the_place_of_naturalness_and_says_so():
    sections = [section("own", ("EI", "TF")), not_run("mbti", ["qa", "16p"], METHODS)]
    [panel] = tradeoff.panels(sections, MEASURED, "smollm2", "base")
    assert panel["against"] == "perplexity under smollm2 (naturalness: not run)"
    assert (panel["trait"], panel["scale"]) == ("mean of EI, TF by own", "log")
    expected = {row["method"]: row["cells"]["PPL"] for row in tabulate_section(MEASURED, "base")["rows"]}
    for point in panel["points"]:
        assert {name: expected[point["method"]][name] for name in point["against"]} == point["against"]
    assert PERPLEXITY.label == "PPL"


def test_humanlikeness_is_the_naturalness_of_role_play():
    of = section("m", ("profile_relevance", "persona_match", "humanlikeness"), tasks=("roleplay",))
    [panel] = tradeoff.panels([of], MEASURED, "b", "base")
    assert panel["trait"] == "mean of profile relevance, persona match by m"
    assert panel["against"] == "humanlikeness by m"


def test_what_lacks_a_score_or_was_not_run_is_no_point():
    of = section("m", MBTI)
    blind = [Score(s.prompt, s.task, 0, {**s.values, "naturalness": None}) for s in of.methods["scr"]]
    of = judged("m", ["qa", "16p"], MBTI, {"base": of.methods["base"], "scr": blind, "mod": "it lacks something"})
    [panel] = tradeoff.panels([of], MEASURED, "b", "base")
    assert [point["method"] for point in panel["points"]] == ["base"]


def test_the_picture_has_a_panel_for_each_judge_and_always_the_same_bytes(tmp_path):
    pytest.importorskip("matplotlib", reason="needs mpg[evaluate]")
    tables = {"MBTI": {"tradeoff": tradeoff.panels([section("m", MBTI), section("n", MBTI, 3)], MEASURED, "b", "base")}}
    for suffix in thinned(("svg", "png")):
        for name in ("one", "other"):
            tradeoff.plot(tables, tmp_path / f"{name}.{suffix}")
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"other.{suffix}").read_bytes()
    told = (tmp_path / "one.svg").read_text()
    for text in ("naturalness by m", "naturalness by n", "mean of style, thought by n", *METHODS):
        assert f"<!-- {text} -->" in told
    with pytest.raises(ValueError, match="plot: expected scores of a judge, got tables that nobody judged"):
        tradeoff.plot({"MBTI": {"tradeoff": []}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
