"""`mpg train`: arguments, what is printed, and errors on one line."""

from __future__ import annotations

import json
import sys

import pytest

from mpg.train.settings import SETTINGS

FEW = ("--preset", "small", "--held-out", 4, "--batch-size", 10, "--max-answer", 40, "--threads", 1)


@pytest.fixture
def few(tmp_path):
    from mpg.demo import MODELS

    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join((MODELS.parent / "traits" / "tf.jsonl").read_text().splitlines()[:24]))
    return file


def test_every_setting_is_an_argument(run):
    shown = run("train", "--help", env={"COLUMNS": "200", "TERM": "dumb"}).stdout
    for name in SETTINGS:
        assert f"--{name.replace('_', '-')}" in shown


def test_a_training_prints_its_scores_and_says_what_the_preset_changes(run, few, tmp_path):
    pytest.importorskip("trl", reason="needs mpg[train]")
    out = tmp_path / "T"
    done = run("train", "--base", "demo", "--data", few, "--pole", "T", "--out", out, "--base-name", "a/b", *FEW)
    assert done.exit_code == 0, done.stderr
    assert "preset small: learning_rate 0.0003 for 5e-05" in done.stderr
    assert "max_answer 96 for none" in done.stderr
    assert "epoch 2: held out, accuracy " in done.stderr
    assert f"{out}: 20 pairs, 4 held out: accuracy " in done.stdout.replace("\n", "")
    card = json.loads((out / "training.json").read_text())
    assert card["data"]["pole"] == "T" and card["recipe"]["batch_size"] == 10
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == card["base"] == "a/b"


def test_a_line_that_does_not_parse_is_named_before_anything_starts(run, few, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpg.train.run", None)
    few.write_text(few.read_text() + '\n{"question": "Why?", "T": ')
    done = run("train", "--base", "demo", "--data", few, "--pole", "T", "--out", tmp_path / "out")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"mpg: {few}, line 25: expected JSON; Expecting value at column 27\n"


def test_without_the_extra_the_command_that_helps_is_named(run, few, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "mpg.train.run", raising=False)
    done = run("train", "--base", "demo", "--data", few, "--pole", "T", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "pip install --no-build-isolation -e '.[train]'" in done.stderr
