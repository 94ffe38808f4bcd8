"""The command as a process: how soon it answers, what Ctrl-C does, and output that is full or closed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from itertools import cycle, product

import pytest
import typer

import mpg
from longer import IS_LONG
from mpg.app.cli.command import app
from mpg.demo import MODELS

HEAVY = "{'torch', 'transformers', 'peft', 'numpy', 'mpg_ext', 'mpg.model'}"
SHORT = ["--weights", "E=1", "--max-new-tokens", "2"]
QUICK = ["--data", "IN/DATA", "--methods", "base", "--max-new-tokens", "2", "--limit", "1"]
COMMANDS = [  # of the tree of commands every one, and each way to print
    ["info", "--json"],
    ["generate", *SHORT, "--prompt", "a", "--prompt", "b"],
    ["serve", "--print-config", "kuberay", "--image", "mpg"],
    ["evaluate", "overall", "Own=IN/TABLE"],
    ["batch", "--local", *SHORT, "IN/ROWS.jsonl", "OUT/ANSWERS"],
    ["tune", "--models", "demo", "--type", "EJ", "--data", "IN/DATA", "--out", "OUT/HISTORY", "--trials", "1"],
    ["--help"],
    ["check", *SHORT, "--seeds", "1", "--prompts", "IN/PROMPTS"],
    ["demo", "--models", "demo", "--questions", "1", "--held-out", "2"],
    ["evaluate", "mbti", *QUICK, "--type", "ESTJ", "--tasks", "mcqa", "--out", "OUT/MBTI"],
    ["generate", *SHORT, "--prompt", "a", "--json"],
    ["evaluate", "roleplay", *QUICK, "--weights", "E=1", "--out", "OUT/PLAYS"],
    ["train", "--base", "demo", "--data", "IN/PAIRS", "--out", "OUT/ADAPTER", "--epochs", "1", "--held-out", "2"],
    ["chat"],
    ["--version"], ["generate", "--help"], ["evaluate", "--help"], ["--show-completion", "bash"], ["info"],
    ["info", "--methods"], ["info", "--options"], ["generate", *SHORT, "--prompt", "a"],
    ["check", *SHORT, "--seeds", "1", "--prompts", "IN/PROMPTS", "--json"], ["serve", "--print-config", "serve"],
    ["evaluate", "overall", "Own=IN/TABLE", "--json"],
]  # fmt: skip
NEEDS = {"train": "trl", "batch": "pyarrow", "serve": "uvicorn", "evaluate": "sacrebleu", "tune": "openai"}
PLACES = {"full": "No space left on device", "closed": "Broken pipe"}
# Ctrl-C comes in the middle of it
MANY = [word for index in range(60) for word in ("--prompt", f"Question {index}?")]
MANY = ["generate", *MANY, "--weights", "E=1", "--seed", "0", "--batch-size", "1", "--max-new-tokens", "60", "--json"]
IN_PROCESS = """
import os, sys
from mpg.__main__ import main
out = os.dup(1)
for arguments, descriptor in {jobs}:
    sys.__stdout__ = sys.stdout = None  # what the last one could not write goes where that went
    os.dup2(out if descriptor is None else descriptor, 1)
    sys.__stdout__ = sys.stdout = open(1, "w", closefd=False)
    sys.stdin, sys.argv = open(os.devnull), ["mpg", *arguments]
    try:
        status = main()
    except SystemExit as left:
        status = left.code
    print(f"status {{status}}", file=sys.stderr, flush=True)
sys.exit(status)
"""


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], *([name, "--help"] for name in ("generate", "check"))]
)
def test_help_and_version_import_nothing_that_takes_long(arguments, start):
    code = f"""
from mpg.__main__ import main
try:
    main()
finally:
    print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr)
"""
    out, imported = start(*arguments, code=f"exec({code!r})").communicate()
    assert imported == "[]\n"
    assert out


def test_version_is_that_of_the_package_also_as_a_module():
    done = subprocess.run([sys.executable, "-m", "mpg", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"mpg {mpg.__version__}\n")


def test_the_shell_completes_commands_and_options(start):
    environment = os.environ | {"_MPG_COMPLETE": "complete_bash", "COMP_WORDS": "mpg generate --max", "COMP_CWORD": "2"}
    code = "sys.argv[0] = 'mpg'; from mpg.__main__ import main; sys.exit(main())"
    out, _ = start(code=code, env=environment).communicate()
    assert out.split() == ["--max-new-tokens"]


@pytest.mark.parametrize(
    "reaction",
    ["raise", "raise ImportError(name)", "pass"] if IS_LONG else ["raise ImportError(name)"],
)
@pytest.mark.parametrize("module", ["typer", "torch", "mpg.paper.methods"])
def test_ctrl_c_during_imports_is_silent_and_130(module, reaction, start):
    """It comes as the module is looked for, by code that may take the exception for its own, as numpy's does."""
    code = f"""
import os
class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException:
                {reaction}
sys.meta_path.insert(0, Interrupt())
from mpg.__main__ import main
sys.exit(main())
"""
    process = start("generate", "--prompt", "a", "--weights", "E=1", code=f"exec({code!r})")
    assert process.communicate() == ("", "")
    assert process.returncode == 130


def test_every_command_is_among_those_whose_output_may_fail():
    def leaves(command, path=()):
        children = getattr(command, "commands", None)
        return (
            {path}
            if children is None
            else {leaf for name in children for leaf in leaves(children[name], (*path, name))}
        )

    tried = [[word for word in command if not word.startswith("-")] for command in COMMANDS]
    found = leaves(typer.main.get_command(app))
    assert {leaf for leaf in found if not any(tuple(words[: len(leaf)]) == leaf for words in tried)} == set()
    assert {("info",), ("evaluate", "mbti")} <= found


def _write_inputs(folder):
    """What COMMANDS read from IN."""

    def write(name, *rows):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))

    write("PROMPTS", "One?", "Two?")
    write("PAIRS", *({"chosen": "Yes.", "rejected": "No.", "prompt": f"{n}?"} for n in range(4)))
    write("ROWS.jsonl", {"id": "a", "prompt": "One?"})
    choices = {str(n): {"question": f"On day {n} you:\nA.plan it\nB.see", "A": "J", "B": "P"} for n in range(8)}
    write("DATA/mbti/questions/mcqa.json", choices)
    write("DATA/roleplay/test.jsonl", {"profile": "He bakes.", "personality": "Calm.", "reference_answer": "Hi."})
    cells = {"Overall": {"value": 3.0, "low": 2.0, "high": 4.0}}
    section = {"title": "By m", "judge": "m", "key": "Overall", "rows": [{"method": "base", "cells": cells}]}
    write("TABLE/table.json", {"sections": [section]})


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_that_cannot_be_written_is_one_line_and_ctrl_c_leaves_what_was_done(start, tmp_path):
    """In one process, as it takes seconds to start: in the short form some, by turns."""
    _write_inputs(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    descriptors = {"full": os.open("/dev/full", os.O_WRONLY), "closed": writer}
    chosen = [command for command in COMMANDS if find_spec(NEEDS.get(command[0], "mpg"))]
    tries = list(product(chosen, PLACES) if IS_LONG else zip(chosen[:6], cycle(PLACES)))
    jobs = [
        (
            [word.replace("IN/", f"{tmp_path}/").replace("OUT/", f"{tmp_path}/{place}/") for word in command],
            descriptors[place],
        )
        for command, place in tries
    ]
    for place in PLACES:
        (tmp_path / place).mkdir()
    code = IN_PROCESS.format(jobs=[*jobs, (MANY, None)])
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # no shell may have started it
    process = start(code=f"exec({code!r})", pass_fds=list(descriptors.values()), env=environment)
    first = process.stdout.readline()  # of many answers, of which the others are not done yet
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    notes = [line for line in err.splitlines() if not line.startswith(("status", "mpg: "))]
    assert not any("Traceback" in note or "Exception" in note for note in notes), err
    told = [line for line in err.splitlines() if line.startswith(("status", "mpg: "))]
    expected = [line for _, place in tries for line in (f"mpg: standard output: {PLACES[place]}", "status 1")]
    assert told == [*expected, "status 130"], err
    assert process.returncode == 130
    indices = [json.loads(line)["index"] for line in (first + out).splitlines()]
    assert indices == list(range(len(indices)))
    assert 1 <= len(indices) < 60


def test_closed_output_is_one_line(start):
    process = start("info", "--methods", preexec_fn=lambda: os.close(1))
    _, err = process.communicate()
    assert (process.returncode, err) == (1, "mpg: standard output: it is closed\n")


def test_public_names_are_imported_when_they_are_asked_for(start):
    code = f"import mpg; print({HEAVY} & set(sys.modules), set(mpg.__all__) <= set(dir(mpg)), mpg.Options.__name__)"
    assert start(code=code).communicate() == ("set() True Options\n", "")
    with pytest.raises(AttributeError, match="module 'mpg' has no attribute 'laod'"):
        mpg.laod  # noqa: B018


@pytest.mark.parametrize("command", ["generate", "chat", "check", "info"])
@pytest.mark.parametrize("option", ["allow_other_base", "merge_adapters", "allow_pickle"])
def test_every_command_takes_what_loading_is_asked_for(option, command, run, monkeypatch):
    seen = {}

    def load(place, **how):
        seen.update(how, place=place)
        raise ValueError("seen")

    monkeypatch.setattr(mpg, "load", load)
    needed = {"generate": ["--prompt", "a", "--weights", "E=1"], "check": ["--weights", "E=1"]}.get(command, [])
    assert run(command, "--models", MODELS, f"--{option.replace('_', '-')}", *needed).exit_code == 2
    assert (seen.pop(option), seen.pop("place")) == (True, str(MODELS))
    assert not seen.keys() - {"device"}


@pytest.mark.parametrize("command", ["generate", "chat", "check", "demo"])
def test_every_command_that_computes_takes_four_bits(command, run, monkeypatch):
    needed = {"generate": ["--prompt", "a"], "demo": []}.get(command, ["--weights", "E=1"])
    done = run(command, "--models", "demo", "--quantize", "int5", *needed)
    wanted = "mpg: quantize: expected 'none' or 'int4' or 'int4-draft', got 'int5'"
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (2, wanted)
