"""A last word for a process that may end without one. Knows no job and no cluster."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

# What reads to the end of its input without a line tells its argument
WAIT = 'read -r over || printf "%s\\n" "$0" >&2'


@contextmanager
def told_if_killed(line: str) -> Iterator[None]:
    """Have a line on stderr where this process ends inside at once: by kill -9, for want of memory, or by Ray, which
    ends a process that has lost its Ray here. A shell beside it waits for its end, in a session of its own, as Ctrl-C
    is for the process alone."""
    shell = subprocess.Popen(
        ["sh", "-c", WAIT, line], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield
    finally:
        shell.communicate(b"over\n")
