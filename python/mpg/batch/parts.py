"""The folder of a job's output: its file, and the parts that have been written, each whole or not at all.

Knows rows and files; nothing of models.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import fs
from pyarrow import parquet as pq

from mpg.batch.rows import Input, Row, filesystem_of
from mpg.files import parse_json

JOB = "job.json"
FORMATS = ("jsonl", "parquet")
UNFINISHED = ".unfinished-"  # what the names of files begin with that are being written
TYPES = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "text": pa.string(), "json": pa.string()}


@dataclass(frozen=True)
class Output:
    """A folder, there or yet to be made.

    name     as it was given
    columns  that are kept of the rows, as `Input` has them
    """

    name: str
    filesystem: fs.FileSystem
    path: str
    form: str
    columns: dict[str, str]
    has_text_ids: bool

    @classmethod
    def of(cls, name: str, form: str, rows: Input) -> Output:
        with _refuse(name):
            filesystem, path = filesystem_of(name)
        return cls(name, filesystem, path, form, rows.columns, rows.has_text_ids)

    def read_job(self) -> dict[str, Any] | None:
        """What the folder says of its job, None where it is empty or not there.

        Raises ValueError where it holds something else.
        """
        with _refuse(self.name):
            found = self.filesystem.get_file_info(self.path)
            if found.type == fs.FileType.NotFound:
                return None
            if found.type != fs.FileType.Directory:
                raise ValueError(f"output: expected a folder, got the file {self.name!r}")
            names = self._names()
            if JOB in names:
                with self.filesystem.open_input_stream(f"{self.path}/{JOB}") as stream:
                    return self._parse_job(stream.read())
        if others := [name for name in names if not name.startswith(UNFINISHED)]:
            wanted = "a new or empty folder, or this job's"
            raise ValueError(f"output: expected {wanted}, got {self.name!r}, which holds {others[0]!r}")
        return None

    def write_job(self, told: dict[str, Any]) -> None:
        with _refuse(self.name):
            self.filesystem.create_dir(self.path, recursive=True)
        with self._whole(JOB) as stream:
            stream.write(json.dumps(told, indent=1).encode())

    def forget_job(self) -> None:
        """Remove what is left of a job without a part, so that a command may begin anew with other words."""
        if not self.written():
            with _refuse(self.name):
                self.filesystem.delete_file(f"{self.path}/{JOB}")
                if not self._names():
                    self.filesystem.delete_dir(self.path)

    def clear(self) -> list[str]:
        """Remove what was begun and never ended. out: the names of all else"""
        with _refuse(self.name):
            names = self._names()
        for name in names:
            if name.startswith(UNFINISHED):
                with suppress(OSError):
                    self.filesystem.delete_file(f"{self.path}/{name}")
        return [name for name in names if not name.startswith(UNFINISHED)]

    def written(self) -> set[int]:
        """The numbers of the parts that are there. What was begun and never ended is removed."""
        names = self.clear()
        found = (re.fullmatch(rf"part-(\d+)\.{self.form}", name) for name in names)
        return {int(match[1]) for match in found if match}

    def has(self, number: int) -> bool:
        """Whether a part is there."""
        with _refuse(self.name):
            found = self.filesystem.get_file_info(f"{self.path}/{self._part(number)}")
        return bool(found.type == fs.FileType.File)

    def write(self, number: int, rows: Sequence[Row]) -> None:
        """Write a part, or the same rows once more in its place. Raises ValueError where it cannot be written."""
        with self._whole(self._part(number)) as stream:
            if self.form == "jsonl":
                for row in rows:
                    stream.write(json.dumps(row).encode() + b"\n")  # in ASCII: rows may hold what UTF-8 cannot
            else:
                pq.write_table(pa.Table.from_pylist(list(map(self._as_arrow, rows)), self._schema()), stream)

    def read_begun(self, what: int | str) -> dict[str, Any] | None:
        """What `write_begun` wrote last of something: of a part, by its number, or of what else takes time."""
        with _refuse(self.name), suppress(FileNotFoundError):
            with self.filesystem.open_input_stream(f"{self.path}/{UNFINISHED}{what}") as stream:
                begun: dict[str, Any] = json.loads(stream.read())
            return begun
        return None

    def write_begun(self, what: int | str, begun: dict[str, Any]) -> None:
        with self._whole(f"{UNFINISHED}{what}") as stream:
            stream.write(json.dumps(begun).encode())

    def remove_begun(self, what: int | str) -> None:
        with _refuse(self.name), suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self.path}/{UNFINISHED}{what}")

    def _part(self, number: int) -> str:
        return f"part-{number:06}.{self.form}"

    def _parse_job(self, text: bytes) -> dict[str, Any]:
        try:
            told = parse_json(text.decode())
        except ValueError:  # JSONDecodeError and UnicodeDecodeError are of it
            told = None
        if not isinstance(told, dict):
            raise ValueError(f"output: expected a job in {JOB} of {self.name!r}, got {text[:40]!r}")
        return told

    def _names(self) -> list[str]:
        return [info.base_name for info in self.filesystem.get_file_info(fs.FileSelector(self.path))]

    def _schema(self) -> pa.Schema:
        return pa.schema({
            "id": pa.string() if self.has_text_ids else pa.int64(),
            **{name: TYPES[kind] for name, kind in self.columns.items()},
            "text": pa.string(), "finish_reason": pa.string(), "tokens": pa.list_(pa.int32()), "seed": pa.int64(),
            "stats": pa.map_(pa.string(), pa.float64()), "error": pa.string(),
        }.items())  # fmt: skip

    def _as_arrow(self, row: Row) -> Row:
        row = {**row, "stats": list(row["stats"].items())}
        for name, kind in self.columns.items():
            if kind == "json" and row.get(name) is not None:
                row[name] = json.dumps(row[name])
        return row

    @contextmanager
    def _whole(self, name: str) -> Iterator[Any]:
        """A stream to a file that takes its name at the end; nothing of it stays where that fails."""
        beside = f"{self.path}/{UNFINISHED}{secrets.token_hex(8)}"
        with _refuse(self.name):
            try:
                with self.filesystem.open_output_stream(beside) as stream:
                    yield stream
                if isinstance(self.filesystem, fs.LocalFileSystem):  # a power cut may else leave a name without rows
                    with open(beside, "rb") as file:
                        os.fsync(file.fileno())
                self.filesystem.move(beside, f"{self.path}/{name}")
            except BaseException:
                with suppress(OSError):
                    self.filesystem.delete_file(beside)
                raise


@contextmanager
def _refuse(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"output: expected a folder that can be written, got {name!r}: {reason}") from error
