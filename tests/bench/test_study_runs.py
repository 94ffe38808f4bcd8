"""The commands of the study run as its page says, on the tiny set and two of everything: the adapters of train.sh, all
scores twice, and the page of them with its pictures.
"""

from __future__ import annotations

import importlib
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
from mpg.demo import MODELS

for package in ("matplotlib", "sacrebleu", "sklearn"):
    pytest.importorskip(package, reason="needs mpg[evaluate]")

STUDY = Path(__file__).parents[2] / "bench/study"
RESULTS, DOCS = STUDY.parent / "results/study", STUDY.parents[1] / "docs"
PAGE = (STUDY / "reproduction.md").read_text()
COMMANDS = [line.split() for line in re.findall(r"^python bench/study/(.*)$", PAGE, re.MULTILINE)]


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


def test_every_script_imports():
    for path in STUDY.glob("*.py"):
        importlib.import_module(path.stem)


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
