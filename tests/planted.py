"""Bugs planted in functions, to see that tests notice them. Knows source text; nothing of what it does."""

from __future__ import annotations

import inspect
import sys
import textwrap
from typing import Any

import pytest


def plant(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, old: str, new: str) -> None:
    """Replace some text of a method or property."""
    found = inspect.getattr_static(owner, name)
    source = textwrap.dedent(inspect.getsource(found.fget if isinstance(found, property) else found))
    assert source.count(old) == 1
    module, made = vars(sys.modules[owner.__module__]), dict[str, Any]()
    exec("from __future__ import annotations\n" + source.replace(old, new), module, made)
    monkeypatch.setattr(owner, name, made[name])
