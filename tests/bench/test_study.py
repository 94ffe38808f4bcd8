"""The study's page and pictures come from its committed scores alone, and are the same bytes every time."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="needs mpg[evaluate]")

import matplotlib
from PIL import Image

import claims
import figures
import first_tokens
import judge
import mpg
import negative
import next_token
import pairs
import reproduction
import scores
import study_tables
from layout import Column, Table
from longer import IS_LONG
from mpg.demo import MODELS
from mpg.paper.check import score_texts
from mpg.paper.methods import METHODS


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Of a picture's pixels, by more than 8 of 255: a last bit of the scores moves none, 1 % of one of them 1e-3
FEW = 1e-4


def share_differing(picture, other):
    """The share of pixels that differ; 1 where the sizes do."""
    one, two = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), int) for png in (picture, other))
    return float((abs(one - two).max(2) > 8).mean()) if one.shape == two.shape else 1.0


def test_the_report_is_written_twice_to_the_same_bytes_and_is_the_page_that_is_committed(tmp_path):
    names = ("one", "other") if IS_LONG else ("one",)
    for name in names:
        (tmp_path / name).mkdir()
        reproduction.main(tmp_path / name)
    written = files(tmp_path / "one")
    assert all(files(tmp_path / name) == written for name in names)
    assert written["reproduction.md"] == (reproduction.DOCS / "reproduction.md").read_bytes()
    assert written["reproduction/tables.json"] == (reproduction.DOCS / "reproduction/tables.json").read_bytes()
    drawn = {name: png for name, png in files(reproduction.DOCS / "reproduction").items() if name.endswith(".png")}
    assert {name for name in written if name.endswith(".png")} == {f"reproduction/{name}" for name in drawn}
    # another matplotlib sets its letters otherwise: 2 to 5 % of the pixels between 3.10 and 3.11
    if f"version{matplotlib.__version__}," in Image.open(io.BytesIO(drawn["bound.png"])).info["Software"]:
        assert {name for name in drawn if share_differing(drawn[name], written[f"reproduction/{name}"]) > FEW} == set()
    assert written["reproduction.md"].count(b"<!--") == 1  # what is said of the commands


def test_a_picture_of_changed_scores_is_told_from_the_one_before(monkeypatch):
    read = scores.read

    def draw(factor):
        def scaled(name):
            header, runs = read(name)
            if name == "laws-ESTPINFJ":
                changed = [{**row, "N=5 k=4 M=2": [row["N=5 k=4 M=2"][0] * factor, row["N=5 k=4 M=2"][1]]}
                           for row in runs["rounds"]]  # fmt: skip
                runs = {**runs, "rounds": changed}
            return header, runs

        monkeypatch.setattr(scores, "read", scaled)
        figures.PICTURES["attributes"]().savefig(png := io.BytesIO(), dpi=figures.DPI)
        return png.getvalue()

    assert share_differing(draw(1), draw(1 + 1e-12)) <= FEW < share_differing(draw(1), draw(1.01))


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.1, 0.3, "confirmed"), (-0.1, 0.3, "not confirmed at this scale"), (-0.3, -0.1, "refuted")],
)
def test_a_verdict_follows_from_the_interval_alone(low, high, said):
    assert claims.verdict(scores.Estimate((low + high) / 2, low, high)) == said
    assert claims.verdict(None) == "not run"


def test_tables_have_each_of_the_papers_columns_and_what_was_not_run_is_null():
    tables = json.loads((reproduction.DOCS / "reproduction/tables.json").read_text())
    by_judge = [f"{task}: {name}" for task in ("QA", "MCQA", "16P") for name in ("Sty", "Tho", "Beh", "Nat", "Avg")]
    wanted = {"table1": [*by_judge, "Overall"], "table2": ["PR", "RM", "HI", "Avg", "BERTScore"], "table4": ["Overall"]}
    for name, columns in wanted.items():
        for row in tables[name]:
            assert [key for key, value in row.items() if value is None] == columns
    for name in ("table1", "table2"):
        assert {row["Method"] for row in tables[name]} == set(METHODS)


def test_a_cell_is_shown_as_its_column_says():
    columns = [
        Column("a, b", parts=("a", "b")),
        Column("with", ".1f"),
        Column("brief", ".2f", brief=True),
        Column("text"),
    ]
    estimate = scores.Estimate(1.25, 1.0, 1.5)
    table = Table("row", columns, {"x": [None, estimate, estimate, "said"], "y": [None, None, 2.0, ""]}, {"x": "X"})
    assert table.markdown().splitlines()[2:] == [
        "| X | not run | 1.2 [1.0, 1.5] | 1.25 | said |", "| y | not run | not run | 2.00 |  |"
    ]  # fmt: skip
    as_json = {"value": 1.25, "low": 1.0, "high": 1.5}
    assert table.as_json() == [
        {"row": "x", "a": None, "b": None, "with": as_json, "brief": as_json, "text": "said"},
        {"row": "y", "a": None, "b": None, "with": None, "brief": 2.0},
    ]


def test_methods_are_compared_on_the_same_resamples(monkeypatch):
    def texts(factor, more=0.0):
        return [{"prompt": n, "tokens": n + 1.0, "log_ratio": factor * n**2 + more * (n + 1)} for n in range(9)]

    seconds, tokens = (lambda row: row["log_ratio"]), (lambda row: row["tokens"])
    twice = scores.times(texts(2.0), texts(1.0), seconds, tokens)
    assert [twice.value, twice.low, twice.high] == pytest.approx([1, 1, 1])
    monkeypatch.setattr(scores, "read", lambda name: ({}, {"base": texts(1), scores.TARGET_TEXTS: texts(1, 0.4)}))
    half = texts(1, 0.2)  # of the target's shift, whatever the prompts
    for estimate, wanted in ((scores.beyond_share(half, 0.5), 0), (scores.share_in_texts(half), 0.5)):
        assert [estimate.value, estimate.low, estimate.high] == pytest.approx([wanted] * 3, abs=1e-9)


def test_what_tuning_gains_is_resampled_over_questions_and_of_a_history_without_them_not_run(monkeypatch, tmp_path):
    poles = "ESTP"
    right = {"base": 0, "E=1": 6, "E=2": 8}  # of the 10 questions of each pole
    rows = [
        {
            "held_out": weights,
            "scores": dict.fromkeys(poles, count / 10),
            "items": {f"mcqa:{pole}{n}": {pole: float(n < count)} for pole in poles for n in range(10)},
        }
        for weights, count in right.items()
    ]
    monkeypatch.setattr(scores, "RESULTS", tmp_path)

    def told(rows):
        lines = [{"what": "tuning"}, {"trial": 0}, *rows]
        (tmp_path / "tune-ESTP-iterative.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return claims._tuned_gain("ESTP"), study_tables.tuning().rows, reproduction.number_held_out()

    gain, table, number = told(rows)
    assert gain.value == pytest.approx(0.2) and 0.05 < gain.low < 0.12 and 0.28 < gain.high < 0.4
    base, start, tuned = table.values()
    assert [base[1].value, base[2].value] == pytest.approx([0, -0.6])
    assert [start[1].value, start[2]] == [pytest.approx(0.6), ""]
    assert [tuned[0], tuned[2]] == ["E 0.80, S 0.80, T 0.80, P 0.80", gain]
    assert number == "40 questions, 10 of EI, 10 of JP, 10 of SN, 10 of TF"
    for row in rows:
        del row["items"]
    gain, table, number = told(rows)
    assert (gain, number) == (None, "not run") and "not run" in Table(
        "", study_tables.tuning().columns, table
    ).markdown()


def test_scores_hold_no_texts():
    words = (word for path in scores.RESULTS.glob("*.jsonl") for word in path.read_text().split('"'))
    assert max(map(len, words)) < 80


def test_a_judge_is_measured_on_the_openings_of_answers():
    class Endings:
        def score(self, texts):
            return {"EI": np.array([text.endswith("loud") for text in texts], float)}

    answers = ["it is never loud", "it is always quiet"], [True, False]
    assert [judge.share_told(Endings(), "EI", answers, words) for words in (4, 3)] == [1, 0.5]


def test_a_question_is_on_one_side_however_it_is_spaced():
    sides = [pairs.side_of(f"What about day {index}?") for index in range(400)]
    for name, share in pairs.SHARES.items():
        assert abs(sides.count(name) / 400 - share) < 0.08
    assert pairs.side_of("What  ABOUT day 3? ") == sides[3]


def test_pairs_lose_their_personas_and_identical_sides(tmp_path):
    preamble = (
        "Extraversion (E) - Introversion (I), Sensing (S) - Intuition (N). you are the '{}' person. "
        "Please answer the questions:{}"
    )
    rows = [
        {"prompt": preamble.format(pole, f"Question {index}?"), "chosen": own, "rejected": other}
        for index, (pole, own, other) in enumerate([("E", "out", "in"), ("I", "in", "out"), ("E", "same", "same")] * 20)
    ]
    folder = tmp_path / "mbti/preferences"
    folder.mkdir(parents=True)
    for name, part in (("e_i_test", rows[:30]), ("e_i_train", rows[30:])):
        (folder / f"{name}.json").write_text(json.dumps(part))
    found = [pair for side in pairs.SHARES for pair in pairs.mbti_pairs(tmp_path, "EI", side)]
    assert len(found) == 40
    assert {(pair.chosen, pair.rejected) for pair in found} == {("out", "in")}
    assert all(pair.question.startswith("Question ") for pair in found)


def test_the_page_names_its_scale_in_its_title():
    assert "135 M parameters" in Path(reproduction.__file__).with_name("reproduction.md").read_text().splitlines()[0]


def test_scr_has_its_targets_law_where_a_chunk_is_one_token_and_no_score_is_above_the_bound():
    model = mpg.load(MODELS, device="cpu")
    told = next_token.law_of(model, "ESTJ", model.encode("How was your day?"))
    base, target = (told[f"{of} arithmetic N=4"] for of in ("base", "target"))
    assert told["arithmetic N=4 k=1 M=10"] == target
    shares = [told[f"arithmetic N=4 k={k} M=2"] for k in (4, 2, 1)]
    assert base < shares[0] < shares[1] < shares[2] == target


def test_the_exact_law_of_the_next_token_is_that_of_every_chunk_one_by_one(monkeypatch):
    monkeypatch.setattr(first_tokens, "LONGEST", 3)
    monkeypatch.setattr(next_token, "MOST", 3)
    monkeypatch.setattr(next_token, "CHUNKS_OF_LAW", 300)
    model = mpg.load(MODELS, device="cpu")
    context = model.tokenizer("I")["input_ids"]
    told = first_tokens.laws_of(model, "ESTJ", context)
    assert told["k=1 M=10"] == told["target"] == [told["target"][0], 0]
    assert told["k=1 M=1"][1] > 0.001 < told["base"][1]  # a bound below scores clips them
    levels = first_tokens.chunks(model, "ESTJ", context)
    going = [1, *(int((~level.has_ended).sum()) for level in levels[:-1])]
    assert [float(level.probs.sum()) for level in levels] == pytest.approx(going)
    for row in (0, len(levels[2].paths) // 2):  # a chunk's scores, read as one text
        ids = levels[2].paths[row].tolist()
        wanted = score_texts(model.models, tuple("ESTJ"), [context], [ids])[0]
        assert levels[2].log_ratios[:, row].tolist() == pytest.approx(wanted.tolist(), abs=1e-4)
    drawn = next_token.law_of(model, "ESTJ", context)
    shares = [told[f"k={k} M=2"][0] for k in (3, 2, 1)]
    assert told["base"][0] < shares[0] < shares[1] < shares[2] == told["target"][0]
    asked = told["target"][0] - told["base"][0]
    for k in (1, 2, 3):
        assert told[f"k={k} M=2"][0] == pytest.approx(drawn[f"arithmetic N=4 k={k} M=2"], abs=0.1 * asked)


def test_a_round_of_two_tokens_shifts_what_their_enumeration_says(monkeypatch):
    monkeypatch.setattr(next_token, "MOST", 2)
    monkeypatch.setattr(next_token, "CHUNKS_OF_ROUND", 500)
    model, roles = mpg.load(MODELS, device="cpu"), ("base", *"ESTJ")
    context = model.encode("How was your day?")

    def row_behind(ids):
        """The draft (V,), the log-ratios (4, V), the draft's mean log-ratio, and the target's less it."""
        session = model.models.open([ids], roles, len(ids))
        fed, position = torch.tensor([[ids[-1]]]), torch.tensor([len(ids) - 1])
        logits = session.forward(roles, fed, position, kv_length=len(ids))[:, 0, -1].double()
        session.close()
        draft, logprobs = next_token.warped(logits[0]), logits.log_softmax(-1)
        ratios = logprobs[1:] - logprobs[0]
        wanted = draft * ratios.exp().mean(0)
        mean = draft @ ratios.mean(0)
        return draft, ratios, mean, wanted @ ratios.mean(0) / wanted.sum() - mean

    first, ratios, mean, asked = row_behind(context)
    fallback = first * (ratios.exp().mean(0) / 2).clamp_max(1)
    of_fallback = fallback @ ratios.mean(0) / fallback.sum() - mean
    shift = due = 0.0
    for token in first.nonzero()[:, 0].tolist():
        second, more, mean_behind, asked_behind = row_behind([*context, token])
        passes = (ratios[:, token].exp().mean() / 2).clamp_max(1)
        pass_both = ((ratios[:, [token]] + more).exp().mean(0) / 2).clamp_max(1)
        pass_both = pass_both * (token not in model.models.eos_token_ids)
        keeps = 1 - (1 - passes) * (1 - pass_both)
        own = keeps * (ratios[:, token].mean() - mean) + (1 - keeps) * of_fallback
        shift += first[token] * (second @ (own + pass_both * (more.mean(0) - mean_behind)))
        due += first[token] * (second @ (asked + pass_both * asked_behind))
    told = next_token.round_of(model, "ESTJ", context)
    assert told["N=4 k=2 M=2"][0] / told["N=4 k=2 M=2"][1] == pytest.approx(float(shift / due), abs=0.01)
    law = next_token.law_of(model, "ESTJ", context)
    for bound in (1, 2):  # where a chunk is one token, a round is its first token
        base, target = (law[f"{of} arithmetic N=4"] for of in ("base", "target"))
        one = [law[f"arithmetic N=4 k=1 M={bound}"] - base, target - base]
        assert told[f"N=4 k=1 M={bound}"] == pytest.approx(one, abs=2e-6)


def test_rows_are_empty_where_no_token_has_a_positive_score():
    model, prompts = mpg.load(MODELS, device="cpu"), ["How was your day?"]
    text = model.generate(prompts[0], target="base", max_new_tokens=6, seed=1).tokens
    [whole], [none] = (negative.empty_rows(model, prompts, [text], {"E": weight}) for weight in (1.0, -1.0))
    assert (whole["empty"], whole["empty_nucleus"], none["empty"]) == (0, 0, len(text))
    assert whole["left_mass"] > 0.999 * len(text) and none["left_mass"] == 0


def test_times_are_of_one_number_of_attributes_and_shares_of_shared_contexts(monkeypatch):
    def texts(method, seconds):
        return [{"method": method, "prompt": n, "tokens": 8, "calls": seconds, "seconds": seconds} for n in range(4)]

    runs = {
        "N=2 run 0": texts("scr", 1.0) + texts("mod", 1.5),
        "N=2 run 1": texts("scr", 1.0) + texts("mod", 2.5),
        "N=4 run 0": texts("scr", 2.0) + texts("mod", 6.0),
    }
    names = ("base arithmetic N=4", "target arithmetic N=4", "arithmetic N=4 k=4 M=2")
    laws = [
        {"prompt": 0, "prefix": prefix, **dict(zip(names, (0.0, 1.0, own), strict=True))}
        for prefix, own in ((0, 0.6), (12, 9.0))
    ]
    exact = [
        {"prompt": 0, "prefix": 0, "chunks": [1] * 4, "base": [0.0, 0.3], "target": [1.0, 0.0], "k=4 M=2": [0.5, 0.2]},
        {"prompt": 0, "prefix": 1, "chunks": [1] * 4, "base": [0.0, 0.3], "target": [1.0, 0.0], "k=4 M=2": [9.0, 0.4]},
        {"prompt": 1, "prefix": 0, "chunks": [1] * 3, "base": [0.0, 0.3], "target": [1.0, 0.0]},
    ]
    files = {"speeds": runs, "laws-ESTP": {"laws": laws}, "first-tokens": {"laws": exact}}
    monkeypatch.setattr(scores, "read", lambda name: ({}, files[name]))
    monkeypatch.setattr(claims, "timed", scores.timed)
    assert [claims.slower("mod", run).value for run in ("N=2", "N=2 run 1", "N=4")] == pytest.approx([1, 1.5, 2])
    assert claims.growth("mod").value == 6 - 2
    shares = scores.exact_and_drawn_share(4, 2.0)
    assert [share.value for share in shares] == pytest.approx([0.5, 0.6])
    assert scores.exact_and_drawn_share(5, 2.0) is None
    assert scores.distance("k=4 M=2").value == pytest.approx(0.3)


def test_rows_of_other_prompts_are_not_compared():
    rows = [{"prompt": n, "tokens": 1} for n in range(3)]
    with pytest.raises(AssertionError):
        scores.difference(rows, rows[:2], lambda row: row["tokens"])
