"""Weights found by trying: scored as `choose` scores them, resumed, and reported on items that were not tuned on."""

from __future__ import annotations

import json
import math
import os
import signal
from contextlib import nullcontext

import numpy as np
import pytest
from typer.testing import CliRunner

from full_disk import small_files
from longer import long
from mpg.app.cli.command import app
from mpg.evaluate import tune as tuning
from mpg.evaluate.choices import choose
from mpg.evaluate.held_out import SEED, estimate_gain, estimate_value
from mpg.evaluate.records import Records, read_records
from mpg.evaluate.tasks import Item, read_items
from mpg.evaluate.tune import spell, tune
from mpg.evaluate.worth import ChoiceScores, MissingScoresError, Score, TextScores
from mpg.paper.statistics import Bootstrap, Estimate

POLES = "ESTJ"
ITEMS = [Item(f"mcqa:{index}", "mcqa", "", str(index)) for index in range(4)]


def valley(items, target):
    """Scores of weights that are best at E = -1, S = 2, T = 1, J = 1."""

    def score(weights, poles):
        best = {"E": -1.0, "S": 2.0, "T": 1.0, "J": 1.0}
        of_pole = {pole: 1 / (1 + abs(weights.get(pole, 0.0) - best[pole])) for pole in poles}
        return Score(of_pole, sum(of_pole.values()) / len(of_pole), {item.id: of_pole for item in items})

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
    worth = {name: sum(scores.values()) / len(POLES) for name, scores in found.held_out.items()}
    worth |= {f"tuned less {name}": worth["tuned"] - worth[name] for name in ("start", "base")}
    for name, estimate in found.values.items():  # valley has every item alike
        assert [estimate.value, estimate.low, estimate.high] == pytest.approx([worth.pop(name)] * 3, abs=1e-5)
    assert not worth


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


CHOICES = [
    Item(f"mcqa:{dimension}{n}", "mcqa", "", stem, options=options, about={"dimension": dimension, "stem": stem})
    for dimension, options in (("EI", {"E": "go out", "I": "stay in"}), ("JP", {"P": "see what comes", "J": "plan it"}))
    for n, stem in enumerate(
        f"On a free {day} you" for day in ("Monday", "day in May", "hour", "evening", "day at home")
    )
]


def test_held_out_rows_hold_which_choices_were_right_and_those_of_an_old_history_are_scored_again(model, tmp_path):
    path, tuned_on, held_out = tmp_path / "history", CHOICES[::2], CHOICES[1::2]

    def again():
        def scores_of(side, target):
            return ChoiceScores(model, side, "EJ", target)

        return tune(path, model, "EJ", tuned_on, held_out, scores_of, about={}, trials=2, start=2.0)

    found = again()
    header, *rows = map(json.loads, path.read_text().splitlines())
    assert [row for row in rows if "items" in row] == rows[2:]  # rows of trials have none
    base, start = rows[2:4]
    for row, how in ((base, {"target": "base"}), (start, {"weights": {"E": 2.0, "J": 2.0}})):
        choices = choose(model, held_out, **how)
        wanted = {choice.item: "E" if "E" in choice.dimension else "J" for choice in choices}
        assert row["items"] == {
            choice.item: {wanted[choice.item]: float(choice.chosen == wanted[choice.item])} for choice in choices
        }
        for pole, share in row["scores"].items():
            right = [own[pole] for own in row["items"].values() if pole in own]
            assert share == pytest.approx(sum(right) / len(right), abs=1e-6) and len(right) in (2, 3)
    assert found.values["base"].value == pytest.approx(sum(base["scores"].values()) / 2, abs=1e-6)
    old = [{name: value for name, value in row.items() if name != "items"} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in (header, *old)))
    for _ in range(2):
        assert again() == found
        assert [json.loads(line) for line in path.read_text().splitlines()] == [header, *old, *rows[2:]]


def test_values_are_resampled_by_question_and_leave_out_poles_and_scores_that_a_resample_lacks():
    start = {"a": {"E": 1.0, "S": 0.2}, "b": {"E": 0.0, "S": None}, "c": {"E": 0.5}, "d": {"S": 0.9}, "e": {"E": 0.1}}
    tuned = {**start, "b": {"E": 1.0, "S": 0.6}, "d": {"S": None}}

    def shares(scores, names):
        of_pole = {pole: [s for n in names if (s := scores[n].get(pole)) is not None] for pole in "ES"}
        return {pole: np.mean(own) for pole, own in of_pole.items() if own}

    resamples = [[*"abcde"], *([*map("abcde".__getitem__, places)] for places in Bootstrap(5, SEED).resamples)]
    values, gains = [], []
    for names in resamples:
        before, after = shares(start, names), shares(tuned, names)
        values.append(np.mean([*before.values()]) if before else np.nan)
        both = before.keys() & after.keys()
        gains.append(np.mean([after[pole] - before[pole] for pole in both]) if both else np.nan)
    for found, own in ((estimate_value(start), values), (estimate_gain(tuned, start), gains)):
        spread = np.nanquantile(own[1:], [0.025, 0.975])
        assert [found.value, found.low, found.high] == pytest.approx([own[0], *spread])
        assert found.low < found.value < found.high
    assert estimate_gain(start, start) == Estimate(0.0, 0.0, 0.0)
    assert estimate_value({}) is None and estimate_gain(start, {}) is None
    with pytest.raises(ValueError, match="held_out: expected scores of the same items, got e on one side alone"):
        estimate_gain(start, {name: start[name] for name in "abcd"})


def test_nothing_is_tuned_on_that_is_reported(model, tmp_path):
    with pytest.raises(ValueError, match="held_out: expected items that are not tuned on, got mcqa:1"):
        tune(tmp_path / "history", model, POLES, ITEMS[:2], ITEMS[1:], valley, about={})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"search": "grid"}, "search: "),
        ({"trials": 0}, "trials: "),
        ({"low": 2.0}, "start: "),
        ({"high": 0.5}, "start: "),
        ({"high": -3.0}, "high: "),
    ],
)
def test_what_cannot_be_searched_is_refused_by_name(how, message, model, tmp_path):
    with pytest.raises(ValueError, match=f"^{message}"):
        search(model, tmp_path / "history", **how)
    for poles, message in (
        ("EX", "poles of different dimensions such as ESTP, got 'EX'"),
        ("IT", "an attribute for each"),
    ):
        with pytest.raises(ValueError, match=f"type: expected {message}"):
            tune(tmp_path / "history", model, poles, ITEMS[:2], ITEMS[2:], valley, about={})


def test_weights_that_a_target_refuses_are_worth_nothing(model, tmp_path):
    found = search(model, tmp_path / "history", 3, target="arithmetic", start=-1.0)
    assert found.trials[0]["value"] == 0
    assert found.trials[0]["refused"].startswith("weights: the arithmetic target needs a positive sum")
    base = found.values["base"].value
    assert found.values["start"] == Estimate(0.0, 0.0, 0.0) and found.values["tuned less base"].value == -base < 0


@pytest.mark.parametrize("weights", [{"E": -1, "S": 1, "T": 1, "J": 1}, {"E": -50, "S": 51}])  # one option, and both
def test_an_option_that_a_negative_weight_excludes_is_worth_nothing(weights, model):
    about = {"dimension": "EI", "stem": "On a free day you"}
    options = {"E": "go out and meet all of your friends in the garden", "I": "stay in"}
    scores = ChoiceScores(
        model, [Item("mcqa:1", "mcqa", "", about["stem"], options=options, about=about)], POLES, "arithmetic"
    )
    assert -math.inf in [value for batch in scores._batches for value in scores._combine(weights, *batch)]
    assert 0 <= scores(weights, POLES).value <= 1.1


class Lengths:
    """A judge that gives a text its length on one of two criteria, and the second none on the other; `asked` is what it
    was asked."""

    name, criteria, scale = "m", ("style", "thought"), (1.0, 5.0)

    def __init__(self, failures=()):
        self.asked, self.failures = [], list(failures)

    def score(self, asked, on_score):
        self.asked.append(asked)
        for index, (_, text) in enumerate(asked):
            on_score(index, {"style": len(text) / 10, "thought": None if index == 1 else 3.0}, {})
        return self.failures


QUESTIONS = [
    Item(f"16p:{word}", "16p", f"Do you like {word}?", word, about={"dimension": of})
    for of, words in (("EI", ("rain", "snow", "mud")), ("JP", ("lists", "haste", "dates")))
    for word in words
]


def test_texts_are_scored_by_a_judge_pole_by_pole_the_same_in_every_trial(model):
    judges = {"E": Lengths(), "P": Lengths()}
    score = TextScores(model, QUESTIONS, judges, max_new_tokens=4)
    once = score({"E": 1.0}, "EP")
    assert once == score({"E": 1.0}, "EP")
    for pole, items in (("E", QUESTIONS[:3]), ("P", QUESTIONS[3:])):
        first, second = judges[pole].asked
        assert first == second and [item for item, _ in first] == items
        lengths = [len(first[0][1]), len(first[2][1])]  # a text that lacks a score on a criterion counts nowhere
        assert once.of_pole[pole] == pytest.approx(sum(((n / 10 + 3) / 2 - 1) / 4 for n in lengths) / 2)
        assert [once.of_item[item.id][pole] is None for item in items] == [False, True, False]
    assert once.value == pytest.approx(sum(once.of_pole.values()) / 2)
    with pytest.raises(ValueError, match="data: expected questions of SN on both sides, got none on one"):
        TextScores(model, QUESTIONS, {"E": Lengths(), "S": Lengths()})


def test_a_classifier_reads_all_texts_for_every_pole(model, own_judge):
    from mpg.evaluate.judges import judge_of

    judges = {pole: judge_of(f"classifier:{own_judge}", "mbti", (pole,)) for pole in "ES"}
    of_pole = TextScores(model, QUESTIONS, judges, max_new_tokens=4)({"E": 1.0}, "ES").of_pole
    texts = model.generate(
        [item.prompt for item in QUESTIONS], weights="E=1", sampler="direct", seed=0, max_new_tokens=4
    )
    for pole, dimension in (("E", "EI"), ("S", "SN")):
        told = judges[pole].scorer.score([result.text for result in texts])[dimension].mean()
        assert of_pole[pole] == pytest.approx(told, abs=1e-5)


def test_texts_without_a_reply_end_a_trial_and_are_no_score(model):
    score = TextScores(model, QUESTIONS, {"E": Lengths(["503", "504"])}, max_new_tokens=4)
    with pytest.raises(ValueError, match="judge: 2 texts got no reply of m, at last: 504; the same command") as told:
        score({"E": 1.0}, "E")
    assert not isinstance(told.value, MissingScoresError)
    odd = Lengths()
    odd.scale, odd.criteria = (0.0, 1.0), ("style", "thought", "another")
    with pytest.raises(MissingScoresError, match="judge: no reply of m on E has a score on every criterion"):
        TextScores(model, QUESTIONS, {"E": odd}, max_new_tokens=4)({"E": 1.0}, "E")


@pytest.mark.parametrize("name", ["iterative", "optuna"])
def test_a_trial_whose_scores_are_missing_is_neither_0_nor_chosen_and_the_search_goes_on(name, model, tmp_path):
    if name == "optuna":
        pytest.importorskip("optuna", reason="needs mpg[tune]")
    calls = []

    def gaps(items, target):
        def score(weights, poles):
            calls.append(weights)
            if len(calls) in missing:
                raise MissingScoresError("judge: no reply")
            return valley(items, target)(weights, poles)

        return score

    missing = {1, 3}
    found = search(model, tmp_path / "history", 8, gaps, search=name)
    assert [row["trial"] for row in found.trials if row["value"] is None] == [0, 2]
    assert found.trials[0]["scores"] == dict.fromkeys(POLES) and found.trials[0]["missing"] == "judge: no reply"
    assert not found.trials[0]["is_best"] and found.trials[1]["is_best"]
    assert found.values["base"] and found.values["tuned"]
    assert search(model, tmp_path / "history", 8, gaps, search=name) == found  # resumed
    missing = set(range(100))
    with pytest.raises(ValueError, match=r"^judge: no reply$"):
        search(model, tmp_path / "none", 3, gaps, search=name)


SIXTEEN = [f"Would you go to place {number}?" for number in range(12)]
MBTI = '{"style": 4, "thought": 3, "behaviour": 2, "naturalness": 3}'


@pytest.fixture
def tune_by(data, tmp_path):
    """`mpg tune --judge JUDGE` for the pole J on questions of its dimension."""
    file = data / "mbti/questions/16personalities.json"
    rows = {str(n): {"rewritten_en": text, "dimension": "J/P", "category": "J"} for n, text in enumerate(SIXTEEN)}
    file.write_text(json.dumps(rows))

    def tune_by(judge, *more):
        places = ["--data", str(data), "--out", str(tmp_path / "history.jsonl")]
        how = ["--judge", judge, "--max-new-tokens", "9", "--limit", "3", "--trials", "2"]
        how += ["--concurrency", "1"] if judge.startswith("http") else []
        return CliRunner().invoke(app, ["tune", "--models", "demo", "--type", "J", *places, *how, *more])

    return tune_by


def test_the_command_tunes_by_an_endpoint_and_goes_on_where_it_failed(tune_by, endpoint, tmp_path):
    server = endpoint(MBTI, MBTI, MBTI, (401, '{"error": {"message": "no such key"}}'))
    done = tune_by(f"{server.url}#m", "--key-env", "MY_KEY")
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"mpg: judge: m at {server.url} refused the key in MY_KEY: AuthenticationError" in done.stderr
    history = tmp_path / "history.jsonl"
    before = history.read_bytes()
    assert b'"trial": 0' in before
    server.replies = ["I cannot", "I cannot", MBTI]  # one of them for what is still on its way
    done = tune_by(f"{server.url}#m")
    assert done.exit_code == 0, done.stderr
    assert history.read_bytes().startswith(before)
    asked = [request["messages"][0]["content"] for request in server.requests]
    assert len(asked) <= len(set(asked)) + 2  # the one that was refused, and one that was on its way then
    header, rows = read_records(history)
    assert (header["by"][0]["judge"], header["by"][0]["poles"]) == ("m", ["J"])
    assert [row["scores"] for row in rows if "trial" in row] == [{"J": 0.5}] * 2  # a mean of 3 from 1 to 5
    assert "held out, base: J 0.500" in done.stderr and "held out, tuned: J 0.500" in done.stderr
    assert "held out, mean over poles, tuned less base: 0.000 [0.000, 0.000]" in done.stderr
    assert "by a paired bootstrap over 3 questions: few, fewer than 12 give intervals too narrow" in done.stderr
    [replies] = (tmp_path / "history.replies").iterdir()
    assert "I cannot" in {row["reply"] for row in read_records(replies)[1]}
    again = tune_by(f"{server.url}#m")
    assert (again.stdout, len(server.requests)) == (done.stdout, len(asked))
    told = tune_by(f"{server.url}#n")
    assert told.exit_code == 2 and "history.jsonl holds another job: by is" in told.stderr


def test_the_command_says_what_a_judge_did_not(tune_by, endpoint, tmp_path):
    server = endpoint("I cannot")
    done = tune_by(f"{server.url}#m")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "0: J=1: J missing" in done.stderr and "J 0.0" not in done.stderr
    assert "mpg: judge: no reply of m on J has a score on every criterion" in done.stderr
    assert [row["value"] for row in read_records(tmp_path / "history.jsonl")[1]] == [None, None]


def test_the_command_says_which_poles_no_choice_is_about(data, tmp_path):
    places = ["--data", str(data), "--out", str(tmp_path / "history.jsonl"), "--trials", "1"]
    done = CliRunner().invoke(app, ["tune", "--models", "demo", "--type", "TJ", *places])
    assert done.exit_code == 0, done.stderr
    assert "data: no question about T to tune on; a larger --limit may have some" in done.stderr
    assert "data: no question about J held out; a larger" in done.stderr


@long  # trains a judge, draws
def test_the_command_tunes_by_a_classifier(tune_by, own_judge, tmp_path):
    done = tune_by(f"classifier:{own_judge}", "--plot", str(tmp_path / "history.png"))
    assert done.exit_code == 0, done.stderr
    rows = read_records(tmp_path / "history.jsonl")[1]
    assert all(0 < row["scores"]["J"] < 1 for row in rows) and not (tmp_path / "history.replies").exists()
    assert (tmp_path / "history.png").stat().st_size > 10_000
    done = tune_by("classifier:nowhere")
    assert done.exit_code == 2 and "judge: expected a file that can be read, got nowhere/judge.json" in done.stderr


@pytest.mark.parametrize("cut", ["full disk", "Ctrl-C"])
def test_a_command_that_is_cut_off_keeps_its_trials_and_goes_on(cut, data, monkeypatch, tmp_path):
    rows = {str(n): {"question": f"On day {n} you:\nA.plan it\nB.see", "A": "J", "B": "P"} for n in range(8)}
    (data / "mbti/questions/mcqa.json").write_text(json.dumps(rows))
    command = ["tune", "--models", "demo", "--type", "J", "--data", str(data), "--trials", "3", "--out"]
    whole = CliRunner().invoke(app, [*command, str(tmp_path / "whole")])
    history, lines = tmp_path / "history", (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    size, append = len(b"".join(lines[:3])), Records.append

    def append_and_interrupt(records, row):
        append(records, row)
        if history.stat().st_size >= size:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched, small_files(size + 9) if cut == "full disk" else nullcontext():
        if cut == "Ctrl-C":
            patched.setattr(Records, "append", append_and_interrupt)
        done = CliRunner().invoke(app, [*command, str(history)])
    assert (done.exit_code, done.stdout) == (2 if cut == "full disk" else 130, "")
    if cut == "full disk":
        assert f"mpg: out: expected a file that can be written, got {history}: File too large" in done.stderr
    assert history.read_bytes() == b"".join(lines[:3])
    done = CliRunner().invoke(app, [*command, str(history)])
    assert (done.exit_code, done.stdout, history.read_bytes()) == (0, whole.stdout, b"".join(lines))


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
    assert "search: ended" not in done.stderr
    for _ in range(2):  # the second from its file
        done = CliRunner().invoke(app, [*arguments, "--trials", "200"])
        num_tried = sum(b'"trial"' in line for line in (tmp_path / "history").read_bytes().splitlines())
        assert 3 < num_tried < 200 and f"search: ended after {num_tried} of 200 trials: no step of 1 to" in done.stderr
    done = CliRunner().invoke(app, [*arguments, "--limit", "2"])
    assert done.exit_code == 2 and done.stderr.endswith(
        "holds another job: its items are others (limit is None, asked is 2)\n"
    )
