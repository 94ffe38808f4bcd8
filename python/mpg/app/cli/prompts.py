"""Prompts from files and from standard input, with the weights and options that a line gives for its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpg.files import parse_json, refuse_unreadable_text


@dataclass
class Line:
    """A prompt as `Model.generate` takes it, and what it alone is asked with.

    place  its file and line, or ""
    """

    prompt: Any
    weights: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    place: str = ""
    contexts: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def locate_errors(self) -> Iterator[None]:
        """Put file and line before a ValueError about this prompt."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"prompts: {self.place}: {error}" if self.place else str(error)) from None

    def words(self) -> str:
        """What the user said last."""
        if isinstance(self.prompt, str):
            return self.prompt
        said = [part.get("content") for part in self.prompt if isinstance(part, dict) and part.get("role") == "user"]
        return str(said[-1] if said else self.prompt)


def read_text(argument: str, path: str) -> str:
    """The text of a file, or of standard input where the path is "-". Raises ValueError naming the argument."""
    with refuse_unreadable_text(argument, _name(path)):
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    if not text.strip():
        raise ValueError(f"{argument}: expected text, got nothing in {_name(path)}")
    return text


def read_prompts(path: str) -> list[Line]:
    """Prompts from a file: one a line; or JSON Lines, whose objects have prompt or messages, and may have weights, seed
    and any other option; or a JSON list of strings or such objects. Empty lines do not count.

    Raises ValueError with the number of a line that does not parse.
    """
    text = read_text("prompts", path)
    if text.lstrip().startswith("["):
        try:
            entries = parse_json(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"prompts: {_name(path)}, line {error.lineno}: expected a JSON list; {error.msg}"
            ) from None
        return [_read_entry(entry, f"{_name(path)}, entry {number}") for number, entry in enumerate(entries, 1)]
    is_json = path.endswith(".jsonl") or text.lstrip().startswith("{")
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{_name(path)}, line {number}"
            try:
                lines.append(_read_entry(parse_json(line), place) if is_json else Line(line.strip("\r"), place=place))
            except json.JSONDecodeError as error:
                raise ValueError(f"prompts: {place}: expected JSON; {error.msg} at column {error.colno}") from None
    return lines


def _read_entry(entry: Any, place: str) -> Line:
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, dict):
        raise ValueError(f"prompts: {place}: expected a JSON object or string, got {entry!r}")
    options = dict(entry)
    given = {name: options.pop(name) for name in ("prompt", "messages") if name in options}
    if len(given) != 1:
        raise ValueError(f"prompts: {place}: expected one of prompt and messages, got {', '.join(entry) or 'neither'}")
    [(name, prompt)] = given.items()
    if not isinstance(prompt, (str, list)) or not prompt:
        raise ValueError(f"prompts: {place}: {name}: expected text or a list, not empty, got {prompt!r}")
    contexts = options.pop("contexts", {})
    if not isinstance(contexts, dict):
        raise ValueError(f"prompts: {place}: contexts: expected an object of texts by name, got {contexts!r}")
    return Line(prompt, options.pop("weights", None), options, place, contexts)


def _name(path: str) -> str:
    return "standard input" if path == "-" else path
