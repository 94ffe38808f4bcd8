"""The command as a process: how soon it answers, what Ctrl-C does, and output that is full or closed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec

import pytest

import mpg
from longer import IS_LONG, thinned
from mpg.demo import MODELS

HEAVY = "{'torch', 'transformers', 'peft', 'numpy', 'mpg_ext', 'mpg.model'}"
SHORT = ["--weights", "E=1", "--max-new-tokens", "2"]
COMMANDS = [
    ["--version"], ["--help"], ["generate", "--help"], ["--show-completion", "bash"], ["info"], ["info", "--json"],
    ["info", "--methods"], ["generate", *SHORT, "--prompt", "a"], ["generate", *SHORT, "--prompt", "a", "--json"],
    ["generate", *SHORT, "--prompt", "a", "--prompt", "b"],
    ["demo", "--models", "demo", "--questions", "1", "--held-out", "2"],
    ["check", *SHORT, "--seeds", "1", "--prompts", "PROMPTS"],
    ["check", *SHORT, "--seeds", "1", "--prompts", "PROMPTS", "--json"], ["chat"],
    ["train", "--base", "demo", "--data", "PAIRS", "--out", "ADAPTER", "--epochs", "1", "--held-out", "2"],
]  # fmt: skip
# Ctrl-C comes in the middle of it
MANY = [word for index in range(60) for word in ("--prompt", f"Question {index}?")]
MANY = ["generate", *MANY, "--weights", "E=1", "--seed", "0", "--batch-size", "1", "--max-new-tokens", "60", "--json"]
IN_PROCESS = """
import os, sys
from mpg.__main__ import main
out = os.dup(1)
for arguments in {commands}:
    sys.__stdout__ = sys.stdout = None  # what the last one could not write goes where that went
    os.dup2(out if arguments == {last} else {descriptor}, 1)
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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("where", thinned(["full", "closed pipe"]))
def test_output_that_cannot_be_written_is_one_line_and_ctrl_c_leaves_what_was_done(where, start, tmp_path):
    """In one process, as it takes seconds to start."""
    (tmp_path / "PROMPTS").write_text("One?\nTwo?\n")
    pair = {"chosen": "Yes.", "rejected": "No."}
    (tmp_path / "PAIRS").write_text("\n".join(json.dumps(pair | {"prompt": f"{n}?"}) for n in range(4)))
    chosen = [command for command in COMMANDS if command[0] != "train" or find_spec("trl")]
    if not IS_LONG:  # a command each that prints rows, texts and a table
        chosen = chosen[:10:3] if where == "full" else chosen[1:8:3]
    commands = [
        [str(tmp_path / word) if word in ("PROMPTS", "PAIRS", "ADAPTER") else word for word in command]
        for command in chosen
    ]
    reader, writer = os.pipe()
    os.close(reader)
    descriptor = os.open("/dev/full", os.O_WRONLY) if where == "full" else writer
    code = IN_PROCESS.format(commands=[*commands, MANY], last=MANY, descriptor=descriptor)
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # no shell may have started it
    process = start(code=f"exec({code!r})", pass_fds=[descriptor], env=environment)
    first = process.stdout.readline()  # of many answers, of which the others are not done yet
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    notes = [line for line in err.splitlines() if not line.startswith(("status", "mpg: "))]
    assert not any("Traceback" in note or "Exception" in note for note in notes), err
    why = "No space left on device" if where == "full" else "Broken pipe"
    told = [line for line in err.splitlines() if line.startswith(("status", "mpg: "))]
    assert told == [*[f"mpg: standard output: {why}", "status 1"] * len(commands), "status 130"], err
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
