"""The line that a process leaves that ends at once; and none where it ends as others do."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mpg.batch import watch

LINE = r"it is \over"


@pytest.mark.parametrize(
    ("end", "status", "told"),
    [
        ("os._exit(1)", 1, LINE + "\n"),
        ("os.kill(os.getpid(), 9)", -9, LINE + "\n"),
        ("pass", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("os.killpg(0, 2); time.sleep(60)", 130, ""),
    ],
)
def test_a_process_that_ends_at_once_leaves_a_line(end, status, told):
    code = f"import os, runpy, sys, time; told_if_killed = runpy.run_path({watch.__file__!r})['told_if_killed']"
    code += f"\ntry:\n with told_if_killed({LINE!r}): {end}\nexcept KeyboardInterrupt: sys.exit(130)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", told)
