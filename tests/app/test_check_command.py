"""`mpg check`: its prompts, its output, and files that are looked at before anything runs."""

from __future__ import annotations

import json
import os

import pytest

from full_disk import small_files
from mpg.demo import MODELS
from mpg.demo.corpus import HELD_OUT_QUESTIONS

SHORT = ["check", "--weights", "E=1,T=1", "--max-new-tokens", 2, "--seeds", 1]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(question.text for question in HELD_OUT_QUESTIONS[:2]))
    return path


def test_command_prints_one_json_object_or_tables(prompts, run):
    done = run(*SHORT, "--prompts", prompts, "--json")
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["num_prompts"] == 2
    assert {row["sampler"] for row in printed["sections"][1]["rows"]} >= {"base", "scr"}
    weighed = ["--context", "calm=Be calm.", "--weights", "E=1,calm=-0.5"]  # the last weights count
    done = run(*SHORT, "--prompts", prompts, *weighed)
    assert done.exit_code == 0, done.stderr
    assert "intended shift" in done.stdout
    assert "calm=-0.5" in done.stdout


def test_models_without_questions_of_their_own_are_asked_neutral_ones(run, monkeypatch):
    def refuse(model, weights, prompts, **how):
        raise ValueError(f"prompts: {len(prompts)} from {prompts[0]!r}")

    monkeypatch.setattr("mpg.paper.check.check", refuse)
    for models, said in ((MODELS, "24 from 'How was your weekend?'"), ("demo", repr(HELD_OUT_QUESTIONS[0].text))):
        done = run(*SHORT, "--models", models)
        assert said in done.stderr


@pytest.mark.parametrize("name", ["none/check.png", "check.xyz", "check", "/proc/check.png", "folder.png"])
def test_file_that_cannot_be_drawn_is_refused_before_anything_runs(name, tmp_path, run):
    pytest.importorskip("matplotlib")
    (tmp_path / "folder.png").mkdir()
    done = run("check", "--weights", "E=1", "--plot", tmp_path / name)
    assert done.exit_code == 2
    assert done.stderr.startswith("mpg: plot: expected a file")
    assert done.stdout == ""
    assert os.listdir(tmp_path) == ["folder.png"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no limit on the size of files")
def test_a_full_disk_is_noticed_before_anything_runs(run, tmp_path):
    pytest.importorskip("matplotlib")
    with small_files(1000):
        done = run("check", "--weights", "E=1", "--plot", tmp_path / "check.png")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("mpg: plot: expected a file that can be written, got ")
    assert "File too large" in done.stderr
    assert os.listdir(tmp_path) == []
