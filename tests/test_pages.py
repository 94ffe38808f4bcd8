"""What the pages show runs: every block of every page, in the order of the page, in one folder, on the tiny set.

A comment in the line before a block says what is special about it:

not run: REASON    it is not, for the reason given: a GPU, a network, a test of its own
file: NAME         it is the file NAME for the blocks after it
raises             it fails with the message that the heading above it has, "..." standing for anything; of commands,
                   which then run in this process, it is the last that fails

A diff changes a copy of this checkout, in which the commands after it run. make and pip are never run: `make check` is
the first, and there is no network for the second. Python blocks that need nothing of the shell run in the short form.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from longer import long
from mpg.app.cli.command import app
from mpg.demo import MODELS

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))
}
BLOCK = re.compile(r"^(?:<!-- ([^\n]*) -->\n)?```(\w*)\n(.*?)^```$|^#+ ([^\n]*)$", re.DOTALL | re.MULTILINE)
SHELLS = ("sh", "bash")
ADDRESS = "127.0.0.1:8000"
READY_SECONDS = 600
NEEDS_SHELL = re.compile(ADDRESS + r"|\bopenai\b")


@dataclass(frozen=True)
class Block:
    note: str
    language: str
    body: str
    heading: str

    @property
    def is_run(self) -> bool:
        return self.language in ("python", "diff", *SHELLS) and not self.note.startswith("not run: ")


def blocks(page: str) -> Iterator[Block]:
    heading = ""
    for note, language, body, title in BLOCK.findall(PAGES[page].read_text()):
        heading = title or heading
        if not title:
            yield Block(note, language, body, heading)


def on_tiny_models(text: str) -> str:
    """A block with a tiny set of as many attributes and presets in the place of SmolLM2."""
    return re.sub(r"\bsmollm2\b", "tiny", text)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a page's blocks run: the names that the pages use are there, as files of the tiny set."""
    shutil.copytree(MODELS, tmp_path / "PATH")
    shutil.copytree(MODELS / "adapters" / "T", tmp_path / "PATH" / "more" / "mine")
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "base").symlink_to(MODELS)
    for name in "et":
        (tmp_path / "path" / "to" / f"adapter_{name}").symlink_to(MODELS / "adapters" / name.upper())
    (tmp_path / "base").symlink_to(MODELS)
    (tmp_path / "adapters").symlink_to(MODELS / "adapters")
    (tmp_path / "FILE").write_text("How was your day?\nWhat now?\n")
    pairs = (
        {"prompt": f"How was day {day}?", "chosen": f"Fine {day}.", "rejected": f"Bad {day}."} for day in range(60)
    )
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    rows = ({"prompt": f"How was day {day}?", "weights": {"E": 1}, "max_new_tokens": 8} for day in range(3))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "DATA" / "mbti" / "questions").mkdir(parents=True)
    choices = {
        str(index): {"question": f"On day {index} you:\nA.plan {index}\nB.see {index}", "A": first, "B": second}
        for index, (first, second) in enumerate(["EI", "SN", "TF", "JP"] * 6)
    }
    (tmp_path / "DATA" / "mbti" / "questions" / "mcqa.json").write_text(json.dumps(choices))
    recipe = yaml.safe_load((MODELS.parent / "smollm2" / "mpg.yaml").read_text())
    recipe["base"] = str(MODELS)
    poles = dict(zip("EISNTFJP", "EESSTTJJ", strict=True))
    recipe["attributes"] |= {name: str(MODELS / "adapters" / own) for name, own in poles.items()}
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "mpg.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Shell:
    """Runs a page's commands. `mpg serve` goes on beside those after it, until the next or the end of the page."""

    def __init__(self, folder: Path):
        programs = folder / "bin"
        programs.mkdir()
        (programs / "mpg").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mpg "$@"\n')
        (programs / "mpg").chmod(0o755)
        (programs / "python").symlink_to(sys.executable)
        self.environment = os.environ | {
            "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        self.place, self.paths = folder, [str(ROOT / "python"), str(ROOT), *sys.path]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.server: subprocess.Popen[str] | None = None

    def address(self, text: str) -> str:
        return text.replace(ADDRESS, f"127.0.0.1:{self.port}")

    def patch(self, diff: str) -> None:
        """Applies a change to a copy of this checkout, in which commands run from then on."""
        if self.place.name != "checkout":
            self.place = self.place / "checkout"
            ignored = shutil.ignore_patterns(".venv*", ".git", "build", "__pycache__", ".*_cache")
            shutil.copytree(ROOT, self.place, ignore=ignored, symlinks=True)
            self.paths = [str(self.place / "python"), str(self.place), *sys.path]
        subprocess.run(["git", "apply", "-"], cwd=self.place, input=diff, text=True, check=True)

    def run(self, block: str) -> None:
        for command in re.sub(r"\\\n", "", block).splitlines():
            command = re.sub(r"\s#.*", "", self.address(command))
            program = command.split()[:2]
            if program[:1] in ([], ["make"], ["pip"]):
                continue
            if program == ["mpg", "serve"]:
                self.serve(command)
                continue
            if program == ["mpg", "demo"] and "--models" not in command:
                command += " --models demo"
            if program == ["mpg", "check"]:
                command += " --seeds 1 --max-new-tokens 8"
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command], cwd=self.place,
                env=self.environment | {"PYTHONPATH": os.pathsep.join(self.paths)}, stdin=subprocess.DEVNULL,
                capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"

    def serve(self, command: str) -> None:
        self.close()
        self.server = subprocess.Popen(
            ["bash", "-c", f"exec {command} --port {self.port}"], cwd=self.place,
            env=self.environment | {"PYTHONPATH": os.pathsep.join(self.paths)}, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        for _ in range(10 * READY_SECONDS):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health"):
                return
            assert self.server.poll() is None, f"{command}\n{self.server.stderr.read()[-4000:]}"
            time.sleep(0.1)
        raise AssertionError(f"{command}: not ready")

    def close(self) -> None:
        if self.server is not None:
            self.server.terminate()
            self.server.communicate(timeout=READY_SECONDS)
            self.server = None


def run_python(page: str, block: Block, text: str, names: dict[str, Any]) -> None:
    code = compile(text, page, "exec")
    with contextlib.redirect_stdout(io.StringIO()):
        if block.note != "raises":
            exec(code, names)
            return
        with pytest.raises(Exception) as raised:  # noqa: PT011
            exec(code, names)
    check_message(block, str(raised.value))


def run_refused(block: Block, text: str) -> None:
    *before, last = (CliRunner().invoke(app, shlex.split(line)[1:]) for line in text.splitlines())
    assert [(done.exit_code, done.stderr) for done in before if done.exit_code] == []
    assert last.exit_code == 2 and last.stderr.startswith("mpg: "), last.stderr
    check_message(block, last.stderr)


def check_message(block: Block, message: str) -> None:
    wanted = ".*".join(re.escape(part) for part in block.heading.strip("`").split("..."))
    assert re.search(wanted, message, re.DOTALL), f"{block.heading}: {message}"


def shown(page: str, *, in_short_form: bool) -> list[Block]:
    """The blocks that run. Those of the short form need no shell, and neither does what they rest on."""
    wanted = [block for block in blocks(page) if block.is_run or block.note.startswith("file: ")]
    if in_short_form:
        is_alone = [block.note == "raises" or block.language not in ("diff", *SHELLS) for block in wanted]
        wanted = [b for b, alone in zip(wanted, is_alone, strict=True) if alone and not NEEDS_SHELL.search(b.body)]
    return wanted


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.is_run for b in shown(page, in_short_form=True))])
def test_python_of_a_page_runs(page, folder):
    run_page(page, folder, in_short_form=True)


@long  # runs every command
@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language in SHELLS for b in blocks(page))])
def test_whole_page_runs(page, folder):
    if any("--search optuna" in block.body for block in blocks(page)):
        pytest.importorskip("optuna", reason="needs mpg[tune]")
    run_page(page, folder, in_short_form=False)


def run_page(page: str, folder: Path, *, in_short_form: bool) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.closing(Shell(folder)) as shell:
        for block in shown(page, in_short_form=in_short_form):
            text = on_tiny_models(block.body)
            if block.note.startswith("file: "):
                (folder / block.note.removeprefix("file: ")).write_text(text)
            elif block.language == "python":
                run_python(page, block, shell.address(text), names)
            elif block.note == "raises":
                run_refused(block, text)
            elif block.language == "diff":
                shell.patch(text)
            else:
                shell.run(text)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_a_page_are_of_a_kind_that_is_run_or_say_why_not(page):
    kinds = ("not run: ", "file: ", "raises")
    notes = re.findall(rf"^<!-- (?:{'|'.join(kinds)})", PAGES[page].read_text(), re.MULTILINE)
    assert len(notes) == sum(block.note.startswith(kinds) for block in blocks(page))  # a note stands right before one
    for block in blocks(page):
        if block.language in ("json", "yaml"):
            assert json.loads(block.body) if block.language == "json" else yaml.safe_load(block.body)
        else:
            assert block.language in ("", "text", "python", "diff", *SHELLS)
        is_told = block.note.startswith(kinds) or block.language != ""
        assert is_told or not re.search(r"^(mpg|pip|python|make) ", block.body, re.MULTILINE)
        assert not (
            block.is_run and re.search(r"\b(bench|docs)/\S+\.(py|sh)\b", block.body)
        )  # not where blocks are run


def test_every_page_is_in_the_navigation_of_the_site():
    text = (ROOT / "mkdocs.yml").read_text()
    pages = {path.removeprefix("docs/") for path in PAGES if path.startswith("docs/")}
    named = set(re.findall(r"[\w/-]+\.md\b", re.sub(r"#.*", "", text[text.index("\nnav:") :])))
    roots = {"index.md", "contributing.md", "changelog.md", "security.md"}  # README.md and the like, see docs/links.py
    assert named - roots == pages


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s#]+)[#)]", re.sub(r"```.*?```", "", PAGES[page].read_text(), flags=re.DOTALL)):
        assert link.startswith("https://") or (PAGES[page].parent / link).exists(), link
