"""Files of JSON Lines that a header begins and that grow row by row, which no kill and no full disk undoes.

Knows nothing of what the rows mean.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mpg.files import parse_json, refuse_unreadable_text

NOT_COMPARED = ("versions", "chosen_by")  # of a header: they may differ between a start and its end
# Hashes of a header: where one differs, so do the items, and what of `chosen_by` differs is told too.
ITEMS = ("items", "tuned_on", "held_out")


class RecordsError(ValueError):
    """A file that cannot be written, is another job's, or does not parse."""


class Records:
    """An open file: the rows that were there, and a place for more.

    rows  those that were in the file when it was opened, and those appended since
    """

    def __init__(self, path: Path, descriptor: int, rows: list[dict[str, Any]]) -> None:
        self.path, self.rows, self._descriptor = path, rows, descriptor

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row to its end. Raises RecordsError, with nothing of the row in the file, where it cannot be."""
        self._write(row)
        self.rows.append(dict(row))

    def _write(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._descriptor, end)
            stays = "the rows that are there are whole, and the same call goes on from them"
            wanted = "a file that can be written"
            raise RecordsError(f"out: expected {wanted}, got {self.path}: {error.strerror}; {stays}") from error


@contextmanager
def open_records(path: str | Path, header: Mapping[str, Any]) -> Iterator[Records]:
    """The file of a job, begun with its header, or as far as it got: a last line that was torn is cut off.

    header  what the job is: compared entry by entry with that of a file that is there, but for `NOT_COMPARED`

    Raises RecordsError for a file that cannot be written or that another process writes, for one of another job (naming
    what differs) and for a line before the last that does not parse.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise RecordsError(f"out: expected a file that can be written, got {path}: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise RecordsError(f"out: expected a file of its own, got {path}, which is none")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecordsError(f"out: expected a file of its own, but {path} is being written now") from None
        found, rows, size = _read(path)
        records = Records(path, descriptor, rows)
        if found is None:
            if os.pread(descriptor, 1, 0) not in (b"", b"{"):
                raise RecordsError(f"out: expected a file of its own, but {path} holds something else")
            os.ftruncate(descriptor, 0)  # of a header that was torn
            records._write(header)
        else:
            if differs := difference(found, header):
                raise RecordsError(f"out: expected a file of its own, but {path} holds another job: {differs}")
            os.ftruncate(descriptor, size)
        try:
            yield records
        except BaseException:
            if found is None and not records.rows:  # of a job that cannot be done nothing stays
                path.unlink()
            raise
    finally:
        os.close(descriptor)


def read_records(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the rows of a file; a last line that was torn does not count.

    Raises ValueError for a file that cannot be read, RecordsError for one without a header or with a line that does
    not parse.
    """
    header, rows, _ = _read(Path(path))
    if header is None:
        raise RecordsError(f"out: expected a header and rows, got the empty file {path}")
    return header, rows


def difference(found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """What one header says otherwise than another, in words; "" where they are one job's."""
    differs = _told(found, asked, [name for name in {**found, **asked} if name not in (*NOT_COMPARED, *ITEMS)])
    if any(found.get(name) != asked.get(name) for name in ITEMS):
        was, now = (_chosen_by(header) for header in (found, asked))
        told = "; ".join(_told(was, now, [name for name in now if name in was]))
        differs.append(f"its items are others ({told})" if told else "its items are others")
    return "; ".join(differs)


def _chosen_by(header: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the items were chosen by; nothing where a file that someone else wrote holds no mapping there."""
    found = header.get("chosen_by")
    return found if isinstance(found, Mapping) else {}


def _told(found: Mapping[str, Any], asked: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    differs = [name for name in names if found.get(name) != _as_read(asked.get(name))]
    return [f"{name} is {found.get(name)!r}, asked is {asked.get(name)!r}" for name in differs]


def _as_read(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _read(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]], int]:
    """Header, rows, and the bytes that they take: without a last line that has no end."""
    with refuse_unreadable_text("out", path):
        data = path.read_bytes()
        size = data.rfind(b"\n") + 1
        lines = data[:size].decode().split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            place = f"{path}, line {number}"
            raise RecordsError(f"out: {place}: expected JSON; {error.msg} at column {error.colno}") from None
        if not isinstance(row, dict):
            raise RecordsError(f"out: {path}, line {number}: expected a JSON object, got {row!r:.60}")
        rows.append(row)
    return (rows[0], rows[1:], size) if rows else (None, [], size)
