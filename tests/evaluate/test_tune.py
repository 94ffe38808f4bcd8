"""Weights found by trying: scored as `choose` scores them, resumed, and reported on items that were not tuned on."""

from __future__ import annotations

import json
import math

import pytest
from typer.testing import CliRunner

from mpg.app.cli.command import app
from mpg.evaluate import tune as tuning
from mpg.evaluate.choices import choose
from mpg.evaluate.tasks import Item, read_items
from mpg.evaluate.tune import ChoiceScores, Score, TraitScores, spell, tune

POLES = "ESTJ"
ITEMS = [Item(f"mcqa:{index}", "mcqa", "", str(index)) for index in range(4)]


def valley(items, target):
    """Scores of weights that are best at E = -1, S = 2, T = 1, J = 1."""

    def score(weights, poles):
        best = {"E": -1.0, "S": 2.0, "T": 1.0, "J": 1.0}
        of_pole = {pole: 1 / (1 + abs(weights.get(pole, 0.0) - best[pole])) for pole in poles}
        return Score(of_pole, sum(of_pole.values()) / len(of_pole))

    return score


def search(model, path, trials=40, scores_of=valley, **how):
    return tune(path, model, POLES, ITEMS[:2], ITEMS[2:], scores_of, about={}, trials=trials, **how)


@pytest.mark.parametrize("target", ["geometric", "anchored", "arithmetic"])
def test_kept_logits_give_choices_the_log_probabilities_that_choose_gives_them(target, model, data):
    items = read_items(data, ["mcqa"], on_problem=pytest.fail)
    scores, weights = ChoiceScores(model, items, POLES, target, batch_size=3), {"E": 1.0, "S": -0.5, "J": 0.7}
    expected = [value for item in choose(model, items, weights, target=target) for value in item.logprobs.values()]
    kept = [value for batch in scores._batches for value in scores._combine(weights, *batch)]
    assert kept == pytest.approx(expected, abs=1e-4)


def test_the_iterative_search_goes_below_zero_where_that_is_better_and_tries_nothing_twice(model, tmp_path):
    found = search(model, tmp_path / "history")
    assert found.weights == "E=-1,S=2,T=1,J=1"
    tried = [row["weights"] for row in found.trials]
    assert len({spell(weights) for weights in tried}) == len(tried)
    assert found.held_out["tuned"] == dict.fromkeys(POLES, 1.0) != found.held_out["start"] != found.held_out["base"]


@pytest.mark.parametrize("name", ["iterative", "optuna"])
def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(name, model, tmp_path):
    if name == "optuna":
        pytest.importorskip("optuna", reason="needs mpg[tune]")
    whole = search(model, tmp_path / "whole", 9, search=name)
    lines = (tmp_path / "whole").read_text().splitlines(keepends=True)
    (tmp_path / "torn").write_text("".join(lines[:5]) + lines[5][:20])
    seen = []
    torn = search(model, tmp_path / "torn", 9, search=name, on_trial=lambda row: seen.append(row["trial"]))
    assert torn == whole
    assert seen == [4, 5, 6, 7, 8]
    assert search(model, tmp_path / "torn", 12, search=name).trials[:9] == whole.trials
    with pytest.raises(ValueError, match=r"out: .*search is"):
        search(model, tmp_path / "torn", search="optuna" if name == "iterative" else "iterative")


def test_nothing_is_tuned_on_that_is_reported(model, tmp_path):
    with pytest.raises(ValueError, match="held_out: expected items that are not tuned on, got mcqa:1"):
        tune(tmp_path / "history", model, POLES, ITEMS[:2], ITEMS[1:], valley, about={})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"search": "grid"}, "search: "),
        ({"trials": 0}, "trials: "),
        ({"low": 2.0}, "start: "),
        ({"high": 0.5}, "high: "),
    ],
)
def test_what_cannot_be_searched_is_refused_by_name(how, message, model, tmp_path):
    with pytest.raises(ValueError, match=f"^{message}"):
        search(model, tmp_path / "history", **how)
    with pytest.raises(ValueError, match="type: expected an attribute for each of E, X"):
        tune(tmp_path / "history", model, "EX", ITEMS[:2], ITEMS[2:], valley, about={})


def test_weights_that_a_target_refuses_are_worth_nothing(model, tmp_path):
    found = search(model, tmp_path / "history", 3, target="arithmetic", start=-1.0)
    assert found.trials[0]["value"] == 0
    assert found.trials[0]["refused"].startswith("weights: the arithmetic target needs a positive sum")


@pytest.mark.parametrize("weights", [{"E": -1, "S": 1, "T": 1, "J": 1}, {"E": -50, "S": 51}])  # one option, and both
def test_an_option_that_a_negative_weight_excludes_is_worth_nothing(weights, model):
    about = {"dimension": "EI", "stem": "On a free day you"}
    options = {"E": "go out and meet all of your friends in the garden", "I": "stay in"}
    scores = ChoiceScores(
        model, [Item("mcqa:1", "mcqa", "", about["stem"], options=options, about=about)], POLES, "arithmetic"
    )
    assert -math.inf in [value for batch in scores._batches for value in scores._combine(weights, *batch)]
    assert 0 <= scores(weights, POLES).value <= 1.1


def test_texts_are_scored_by_a_judge_of_traits_the_same_in_every_trial(model):
    class Lengths:
        accuracy = dict.fromkeys(("EI", "SN", "TF", "JP"), 1.0)

        def score(self, texts):
            import numpy as np

            return {of: np.array([len(text) / 1000 for text in texts]) for of in self.accuracy}

    items = [Item(f"16p:{index}", "16p", f"Do you like {word}?", word) for index, word in enumerate(("rain", "snow"))]
    score = TraitScores(model, items, Lengths(), max_new_tokens=4)
    once = score({"E": 1.0}, "EP")
    assert once == score({"E": 1.0}, "EP")
    assert once.of_pole["P"] == 1 - score({"E": 1.0}, "EJ").of_pole["J"]


def test_the_command_prints_weights_that_every_command_takes(data, tmp_path):
    mcqa = data / "mbti/questions/mcqa.json"
    rows = {str(n): {"question": f"On day {n} you:\\nA.plan it\\nB.see", "A": "J", "B": "P"} for n in range(8)}
    mcqa.write_text(json.dumps(rows | {"bad": {"question": "no options", "A": "J", "B": "P"}}))
    arguments = ["tune", "--models", "demo", "--type", "J", "--data", str(data), "--out", str(tmp_path / "history")]
    done = CliRunner().invoke(app, [*arguments, "--trials", "3", "--plot", str(tmp_path / "history.png")])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip().split("=")[0] in ("J", "")
    assert "entry bad" in done.stderr
    assert "held out, tuned: J" in done.stderr
    assert (tmp_path / "history.png").stat().st_size > 1000
    assert tuning.SEARCHES[0] in (tmp_path / "history").read_text()
