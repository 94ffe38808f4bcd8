"""The rows of a job as they lie in files: JSON Lines or Parquet, on any filesystem that pyarrow knows.

Knows columns, ids and places in files; nothing of models. An input is scanned as a whole once, and read by the chunk.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa
from pyarrow import fs
from pyarrow import parquet as pq

from mpg.files import parse_json
from mpg.frontend.hf_generate import HONOURED
from mpg.options import OPTIONS

JSON_LINES, PARQUET = (".jsonl", ".ndjson"), (".parquet",)
PROMPTS = ("prompt", "messages")
ASKED = {*PROMPTS, "weights", "contexts", "seed", "continue_final_message", *OPTIONS, *HONOURED}
TOLD = ("text", "finish_reason", "tokens", "stats", "error")  # beside the id and the seed
FEWEST, MOST = 16, 256  # rows of a chunk
CHUNKS = 32  # that an input has at least, where it has rows enough
READ_AT_ONCE = 1024  # rows of Parquet, or kilobytes of a file
Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """Rows that are read, answered and written together.

    offset  in its file: bytes of JSON Lines, rows of Parquet
    first   the number of its first row in the input
    """

    number: int
    file: str
    offset: int
    first: int
    count: int


@dataclass(frozen=True)
class Input:
    """An input that has been scanned.

    digests  of its files, by name
    has_ids  whether rows bring ids; else each one's is its number
    columns  that are kept, by name: "bool", "int", "float", "text", or "json" for all others
    """

    filesystem: fs.FileSystem
    chunks: tuple[Chunk, ...]
    num_rows: int
    digests: dict[str, str]
    has_ids: bool
    has_text_ids: bool
    columns: dict[str, str]

    def read(self, chunk: Chunk) -> list[Row]:
        """The rows of a chunk, each with its id. Raises ValueError where there are fewer by now."""
        read = _read_parquet if chunk.file.endswith(PARQUET) else _read_json
        with refuse_unreadable(chunk.file), self.filesystem.open_input_file(chunk.file) as file:
            rows = read(file, chunk)
        if len(rows) != chunk.count:
            raise ValueError(f"input: expected {chunk.file} as it was when the job began, got fewer rows")
        return rows if self.has_ids else [{**row, "id": chunk.first + index} for index, row in enumerate(rows)]


def split(row: Row) -> tuple[Row, Row]:
    """What a row asks for, and what of it is kept as it is, the id included."""
    asked = {name: value for name, value in row.items() if name in ASKED and value is not None}
    return asked, {name: value for name, value in row.items() if name not in ASKED}


def seed_of(row_id: int | str, seed: int) -> int:
    """The seed of a row that brings none, from the job's and the row's id alone. out: in 0..2**63 - 1"""
    digest = hashlib.blake2b(json.dumps([seed, row_id]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def scan(name: str, on_rows: Callable[[int], None] = lambda count: None) -> Input:
    """Look at every row of a file, or of the files in a folder in the order of their names.

    name     a path, or a URI of a filesystem that pyarrow knows (s3://, gs://, hdfs://, ...)
    on_rows  called with how many rows have been seen, now and then

    Raises ValueError that says where: for what cannot be read or parsed, columns of types that nothing can be made of,
    ids that are missing or come twice, and rows of which none has a prompt.
    """
    with refuse_unreadable(name):
        filesystem, path = filesystem_of(name)
        files = _files(filesystem, path)
    if not files:
        wanted = f"a file, or a folder of files, whose name ends in {' or '.join(JSON_LINES + PARQUET)}"
        raise ValueError(f"input: expected {wanted}, got {name}")
    look, digests, places = _Look(on_rows), dict[str, str](), list[tuple[str, Sequence[int]]]()
    for file in files:
        with refuse_unreadable(file), filesystem.open_input_file(file) as stream:
            scanned = _scan_parquet(stream, file, look) if file.endswith(PARQUET) else _scan_json(stream, file, look)
        places.append((file, scanned[0]))
        digests[file.rpartition("/")[2]] = scanned[1]
    columns = look.columns()
    size = min(MOST, max(FEWEST, look.num_rows // CHUNKS))
    chunks, first = list[Chunk](), 0
    for file, offsets in places:
        for start in range(0, len(offsets), size):
            count = min(size, len(offsets) - start)
            chunks.append(Chunk(len(chunks), file, offsets[start], first, count))
            first += count
    return Input(filesystem, tuple(chunks), first, digests, bool(look.has_ids), look.id_type is str, columns)


def filesystem_of(name: str) -> tuple[fs.FileSystem, str]:
    """The filesystem that a path or URI means, and the path there."""
    return fs.FileSystem.from_uri(name) if "://" in name else (fs.LocalFileSystem(), os.path.abspath(name))


@contextmanager
def refuse_unreadable(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"input: expected files that can be read, got {name}: {reason}") from error


def _files(filesystem: fs.FileSystem, path: str) -> list[str]:
    found = filesystem.get_file_info(path)
    if found.type == fs.FileType.NotFound:
        raise FileNotFoundError(2, "No such file or folder")
    inside = filesystem.get_file_info(fs.FileSelector(path)) if found.type == fs.FileType.Directory else [found]
    names = [info.path for info in inside if info.type == fs.FileType.File]
    return sorted(path for path in names if path.endswith(JSON_LINES + PARQUET))


class _Look:
    """What the rows have been seen to be so far."""

    def __init__(self, on_rows: Callable[[int], None]) -> None:
        self.on_rows = on_rows
        self.num_rows, self.has_prompts = 0, False
        self.has_ids: bool | None = None
        self.id_type: type | None = None
        self._digests: set[bytes] = set()  # of ids: a million of them take 100 MB, whatever their lengths
        self._kinds: dict[str, set[str]] = {}
        self._names: dict[str, None] = {}

    def take(self, row_id: Any, place: str) -> None:
        """See a row's id, None where it has none."""
        self.num_rows += 1
        if self.num_rows % READ_AT_ONCE == 0:
            self.on_rows(self.num_rows)
        if self.has_ids is None:
            self.has_ids = row_id is not None
        if (row_id is not None) != self.has_ids:
            raise ValueError(f"input: {place}: expected an id in every row or in none, got {row_id!r}")
        if row_id is None:
            return
        if row_id == "" or _kind(row_id) not in ("int", "text"):
            raise ValueError(f"input: {place}: id: expected text or an integer of 64 bits, got {row_id!r}")
        self.id_type = self.id_type or type(row_id)
        if type(row_id) is not self.id_type:
            raise ValueError(f"input: {place}: id: expected {self.id_type.__name__} as before it, got {row_id!r}")
        digest = hashlib.blake2b(json.dumps(row_id).encode(), digest_size=16).digest()
        if digest in self._digests:
            raise ValueError(f"input: {place}: id: expected another one in every row, got {row_id!r} again")
        self._digests.add(digest)

    def see(self, name: str, kind: str) -> None:
        """See a column with a value of some kind; "" for none."""
        self._names[name] = None
        self.has_prompts |= name in PROMPTS and kind != ""
        if name not in ASKED and name != "id":
            self._kinds.setdefault(name, set()).add(kind)

    def columns(self) -> dict[str, str]:
        """What is kept. Raises ValueError where there is no row or prompt, and for names that the output has."""
        if not self.num_rows:
            raise ValueError("input: expected rows, got none")
        if not self.has_prompts:
            wanted = f"{' or '.join(PROMPTS)} in its rows"
            raise ValueError(f"input: expected {wanted}, got the columns {', '.join(self._names) or 'none'}")
        if taken := [name for name in TOLD if name in self._kinds]:
            raise ValueError(f"input: column {taken[0]!r}: expected another name, as the output has one of this name")
        columns = {}
        for name, kinds in self._kinds.items():
            kinds = kinds - {""}
            columns[name] = "float" if kinds == {"int", "float"} else kinds.pop() if len(kinds) == 1 else "json"
        return columns


def _scan_json(stream: Any, file: str, look: _Look) -> tuple[array[int], str]:
    """Offsets of the rows of a file, and its digest."""
    offsets, digest, offset = array("q"), hashlib.blake2b(digest_size=16), 0
    for number, line in enumerate(io.BufferedReader(stream, READ_AT_ONCE * 1024), 1):
        digest.update(line)
        if line.strip():
            place = f"{file}, line {number}"
            row = _parse(line, place)
            look.take(row.get("id"), place)
            for name, value in row.items():
                look.see(name, _kind(value))
            offsets.append(offset)
        offset += len(line)
    return offsets, digest.hexdigest()


def _parse(line: bytes, place: str) -> Row:
    try:
        row = parse_json(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"input: {place}: expected JSON; {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"input: {place}: expected text in UTF-8: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"input: {place}: expected a JSON object, got {row!r}")
    return row


def _kind(value: Any) -> str:
    kinds = {bool: "bool", int: "int", float: "float", str: "text", type(None): ""}
    kind = kinds.get(type(value), "json")
    is_beyond_parquet = (kind == "int" and not -(2**63) <= value < 2**63) or (
        kind == "text" and any("\ud800" <= character <= "\udfff" for character in value)
    )
    return "json" if is_beyond_parquet else kind


def _read_json(stream: Any, chunk: Chunk) -> list[Row]:
    stream.seek(chunk.offset)
    rows: list[Row] = []
    for line in io.BufferedReader(stream, READ_AT_ONCE * 1024):
        if line.strip():
            rows.append(_parse(line, f"{chunk.file}, behind byte {chunk.offset}"))
            if len(rows) == chunk.count:
                break
    return rows


def _scan_parquet(stream: Any, file: str, look: _Look) -> tuple[range, str]:
    """Numbers of the rows of a file, and its digest."""
    digest = hashlib.blake2b(digest_size=16)
    while piece := stream.read(READ_AT_ONCE * 1024):
        digest.update(piece)
    parquet = pq.ParquetFile(stream)
    for column in parquet.schema_arrow:
        look.see(column.name, _arrow_kind(file, column))
    number = 0
    if "id" in parquet.schema_arrow.names:
        for batch in parquet.iter_batches(READ_AT_ONCE, columns=["id"]):
            for row_id in batch.column(0).to_pylist():
                number += 1
                look.take(row_id, f"{file}, row {number}")
    else:
        for number in range(parquet.metadata.num_rows):
            look.take(None, f"{file}, row {number + 1}")
    return range(parquet.metadata.num_rows), digest.hexdigest()


def _arrow_kind(file: str, column: pa.Field) -> str:
    """The kind of a column of Parquet. Raises ValueError for types of which neither a prompt nor JSON can be made."""
    types, kind = pa.types, column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if types.is_null(kind):
        return ""
    is_text = types.is_string(kind) or types.is_large_string(kind)
    is_list = types.is_list(kind) or types.is_large_list(kind)
    fits, wanted = _is_plain(kind), "text, numbers, truths, or lists and structs of them"
    if column.name == "prompt":
        fits, wanted = is_text or (is_list and types.is_integer(kind.value_type)), "text or a list of token ids"
    elif column.name == "messages":
        fits, wanted = is_list and types.is_struct(kind.value_type), "a list of structs"
    if not fits:
        raise ValueError(f"input: {file}: column {column.name!r}: expected {wanted}, got {column.type}")
    if types.is_integer(kind) and not types.is_uint64(kind):
        return "int"
    kinds = {"bool": types.is_boolean(kind), "float": types.is_floating(kind), "text": is_text}
    return next((name for name, is_so in kinds.items() if is_so), "json")


def _is_plain(kind: pa.DataType) -> bool:
    """Whether JSON has such values."""
    types = pa.types
    if types.is_map(kind):
        return types.is_string(kind.key_type) and _is_plain(kind.item_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        return all(_is_plain(part.type) for part in kind)
    plain = (types.is_boolean, types.is_integer, types.is_floating, types.is_string, types.is_large_string)
    return any(is_so(kind) for is_so in (*plain, types.is_null))


def _read_parquet(stream: Any, chunk: Chunk) -> list[Row]:
    parquet, groups, start, end = pq.ParquetFile(stream), [], chunk.offset, chunk.offset + chunk.count
    first = skipped = 0
    for group in range(parquet.num_row_groups):
        last = first + parquet.metadata.row_group(group).num_rows
        if first < end and last > start:
            groups.append(group)
        skipped = last if last <= start else skipped
        first = last
    rows: list[Row] = []
    for batch in parquet.iter_batches(READ_AT_ONCE, row_groups=groups):
        inside = batch.slice(max(start - skipped, 0), end - max(start, skipped))
        rows += [{name: _plain(value) for name, value in row.items()} for row in inside.to_pylist()]
        skipped += batch.num_rows
        if skipped >= end:
            break
    return rows


def _plain(value: Any) -> Any:
    """A value as JSON would have it: what a struct or map has not is left out, and what is no number is None."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        is_map = bool(value) and all(isinstance(part, tuple) for part in value)
        return _plain(dict(value)) if is_map else [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
