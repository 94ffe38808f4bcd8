"""The `mpg` command, in this process and in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from mpg.app.cli.command import app


@pytest.fixture
def run():
    """`mpg command ...` on the device of the suite, unless the arguments name one."""

    def run(command, *arguments, **how):
        device = ["--device", os.environ.get("MPG_DEVICE", "cpu")]
        return CliRunner().invoke(app, [command, *device, *map(str, arguments)], **how)

    return run


@pytest.fixture
def start():
    """The command in a process of its own, whose Ctrl-C is not ignored as it is in a shell's background."""

    def start(*arguments, code="from mpg.__main__ import main; sys.exit(main())", **how):
        unignore = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
        command = [sys.executable, "-c", f"{unignore}; {code}", *map(str, arguments)]
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **how}
        return subprocess.Popen(command, **how)

    return start
