"""What is of the long form of the suite alone, which `make check` runs by MPG_LONG=1: `make test` takes minutes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import pytest

IS_LONG = "MPG_LONG" in os.environ
long = pytest.mark.skipif(not IS_LONG, reason="make check sets MPG_LONG")

Value = TypeVar("Value")


def thinned(values: Sequence[Value], step: int = 2, first: int = 0) -> Sequence[Value]:
    """All of these values in the long form, every second or so in the short one."""
    return values if IS_LONG else values[first::step]
