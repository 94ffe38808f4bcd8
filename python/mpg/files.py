"""Files that are written whole or not at all, and whether one can be, before the work that fills it; and what to say of
one that cannot be read or parsed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PROBE_BYTES = 2**18  # more than a picture or a table takes
ENDS = 2**20  # bytes at either end of a large file that a hash of it is of


@contextmanager
def refuse_unreadable_text(argument: str, name: str | Path) -> Iterator[None]:
    """Turn what reading a text raises into a ValueError that names the argument and the file."""
    try:
        yield
    except OSError as error:
        wanted = "a file that can be read"
        raise ValueError(f"{argument}: expected {wanted}, got {name}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{argument}: expected text in UTF-8, got {name}: {error}") from error


def parse_json(text: str) -> Any:
    """What a text of JSON holds. Raises JSONDecodeError, also for lists in lists without end and for a name that comes
    twice in an object, of which readers would take the last."""

    def take(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for place, (name, _) in enumerate(pairs) if name in dict(pairs[:place]))
            raise json.JSONDecodeError(f"The name {twice!r} comes twice", text, max(text.find(json.dumps(twice)), 0))
        return found

    try:
        return json.loads(text, object_pairs_hook=take)
    except RecursionError:
        raise json.JSONDecodeError("Nested too deeply", text, 0) from None


def hash_files(files: Iterable[Path]) -> str:
    """A hash of the names, sizes and ends of files, which may be a model's."""
    found = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            found.update(f"{file.name} {size}".encode() + stream.read(ENDS))
            stream.seek(max(0, size - ENDS))
            found.update(stream.read())
    return found.hexdigest()


@contextmanager
def whole_file(argument: str, path: str | Path) -> Iterator[Path]:
    """A path to write to, whose file takes the place of `path` at the end; nothing of it stays where that fails.

    Raises ValueError, naming the argument, where the file cannot be written.
    """
    with _beside(argument, path) as beside:
        yield beside
        os.replace(beside, Path(path).resolve())


def check_writable(argument: str, path: str | Path) -> None:
    """Raises ValueError as `whole_file` does, from a file like it that is written and taken away again."""
    with _beside(argument, path) as beside:
        beside.write_bytes(bytes(PROBE_BYTES))


@contextmanager
def _beside(argument: str, path: str | Path) -> Iterator[Path]:
    place = Path(path).resolve()  # what a link means, not the link
    if place.is_dir():
        raise ValueError(f"{argument}: expected a file, got the folder {str(path)!r}")
    beside = place.with_name(f".{os.getpid()}-{place.name}")  # of the same suffix, which writers go by
    try:
        yield beside
    except OSError as error:
        wanted = "a file that can be written"
        raise ValueError(f"{argument}: expected {wanted}, got {str(path)!r}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            beside.unlink()
