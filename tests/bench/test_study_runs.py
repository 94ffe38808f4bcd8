"""The commands of the study run as its page says, on the tiny set and two of everything: scores, and the page of them.

The short form copies the tiny set's adapters, and runs every script but `reproduction.py` on a part of it (PARTS).
The long form trains the adapters by train.sh, runs all commands twice, and writes the page and its pictures.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from longer import long
from mpg.demo import MODELS, SETS

for package in ("matplotlib", "sacrebleu", "sklearn"):
    pytest.importorskip(package, reason="needs mpg[evaluate]")

STUDY = Path(__file__).parents[2] / "bench/study"
RESULTS, DOCS = STUDY.parent / "results/study", STUDY.parents[1] / "docs"
PAGE = (STUDY / "reproduction.md").read_text()
COMMANDS = [line.split() for line in re.findall(r"^python bench/study/(.*)$", PAGE, re.MULTILINE)]
PARTS = {"next_token.py": ["ESTP"], "negative.py": ["rows"], "tables.py": ["roleplay"], "tuning.py": ["ESTP"]}
OF_PARTS = {"laws-ESTP", "first-tokens", "front", "rows", "table-roleplay", "speeds", "seeds", "tune-ESTP-iterative"}
COPIED = {**dict(zip("ESTPINFJ", "ESTJSJET", strict=True)), "profile": "E", "personality": "T", "reference": "S"}
COPIED |= {f"{pole}-seed{seed}": pole for pole in "ET" for seed in (1, 2)}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A folder for MPG_STUDY that is the base as well, without adapters; and the study's modules anew, which read the
    environment when they are imported."""
    folder = tmp_path / "study"
    shutil.copytree(MODELS, folder, ignore=shutil.ignore_patterns("adapters", "mpg.yaml"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))  # profiles are long
    for name, value in {"": folder, "_BASE": folder, "_RESULTS": tmp_path / "scores", "_LIMIT": 2}.items():
        monkeypatch.setenv(f"MPG_STUDY{name}", str(value))
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable), prepend=os.pathsep)
    modules = [path.stem for path in STUDY.glob("*.py")]
    before = {name: sys.modules.pop(name) for name in modules if name in sys.modules}
    yield folder
    for name in modules:
        sys.modules.pop(name, None)
    sys.modules.update(before)


def run(monkeypatch, command):
    name, *arguments = command
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(STUDY / name), run_name="__main__")


def kept(folder):
    """What a second run leaves as it is."""
    places = [*folder.parent.glob("scores/*"), *folder.glob("adapters/*/*"), *folder.glob("answers/*/*")]
    return {path: path.read_bytes() for path in places}


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def not_run(docs):
    """Columns of tables that are without a value in some row."""
    tables = json.loads((docs / "reproduction/tables.json").read_text())
    return {(name, column) for name, rows in tables.items() for row in rows for column in row if row[column] is None}


@pytest.mark.skipif("MPG_DATA" not in os.environ, reason="needs the paper's data")
def test_every_command_runs_on_a_part_of_its_work(study, monkeypatch, tmp_path):
    for name, original in COPIED.items():
        shutil.copytree(MODELS / "adapters" / original, study / "adapters" / name)
        shutil.copy(SETS["smollm2"] / "adapters/E/training.json", study / "adapters" / name)
    for name in dict.fromkeys(name for name, *_ in COMMANDS):
        run(monkeypatch, [name, *PARTS.get(name, [])])
    assert names_in(tmp_path / "scores") == {"judge.json", "adapters.json", *(f"{name}.jsonl" for name in OF_PARTS)}


@long
@pytest.mark.skipif("MPG_DATA" not in os.environ, reason="needs the paper's data")
def test_the_commands_of_the_page_write_each_score_once_and_the_whole_page(study, monkeypatch, capfd, tmp_path):
    pytest.importorskip("optuna", reason="needs mpg[tune]")

    def run_all():
        more = ["--max-answer", "80", "--batch-size", "16"]  # the tiny set's tokens are short
        subprocess.run([STUDY / "train.sh", os.environ["MPG_DATA"], study, *more], check=True)
        for command in COMMANDS:
            run(monkeypatch, command)
        return kept(study), capfd.readouterr()

    first, said = run_all()
    assert {path.name for path in first if path.parent.name == "scores"} == names_in(RESULTS)
    assert " rows, " in said.err and "margin" in said.out + said.err
    again, said = run_all()
    assert again == first
    assert " rows, " not in said.err and "margin" not in said.out + said.err

    (docs := tmp_path / "docs").mkdir()
    run(monkeypatch, ["reproduction.py", str(docs)])
    assert "Every file of scores is there." in (docs / "reproduction.md").read_text()
    assert names_in(docs / "reproduction") == names_in(DOCS / "reproduction")
    assert not_run(docs) <= not_run(DOCS)
