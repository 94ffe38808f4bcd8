"""A job: which input, models and options an output folder belongs to, what of it is left, and who does that."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mpg
from mpg.batch.rows import Chunk
from mpg.batch.worker import Done, Task, Worker
from mpg.files import hash_files
from mpg.recipe import Recipe


def describe(task: Task, recipe: Recipe, how: Mapping[str, Any]) -> dict[str, Any]:
    """What makes the texts of a job what they are, as JSON has it. how: what else the models are loaded with"""
    sources = {"base": recipe.base, "anchor": recipe.anchor, "draft": recipe.draft, "tokenizer": recipe.tokenizer}
    sources |= {f"attributes.{name}": source for name, source in (recipe.attributes or {}).items()}
    models = {name: _identify(source) for name, source in sources.items() if source is not None}
    own = {"weights": recipe.weights, "presets": recipe.presets, "options": recipe.options}
    return _plain({
        "mpg": mpg.__version__,
        "input": {"rows": task.rows.num_rows, "files": task.rows.digests},
        "models": {**models, **own, **how},
        "weights": task.weights, "contexts": task.contexts, "options": task.options, "raw": task.raw,
        "seed": task.seed, "format": task.output.form,
    })  # fmt: skip


def begin(task: Task, told: dict[str, Any]) -> list[Chunk]:
    """The chunks that are left to do; the output folder then knows its job.

    Raises ValueError, with every difference, where it is another's.
    """
    found = task.output.read_job()
    if found is None:
        task.output.write_job(told)
    elif differences := _differences(found, told):
        if all(name.startswith("input") for name, *_ in differences):
            wanted = "the rows that this job began with"
            raise ValueError(f"input: expected {wanted}, got others: {_words(differences)}; take another output folder")
        raise ValueError(f"output: {task.output.name!r} holds another job: {_words(differences)}")
    written = task.output.written()
    return [chunk for chunk in task.rows.chunks if chunk.number not in written]


def run_local(task: Task, chunks: Sequence[Chunk], on_done: Callable[[Done], None]) -> None:
    """Run chunks in this process."""
    worker = Worker(task)

    async def run(chunk: Chunk) -> None:
        on_done(await worker.run(chunk))

    async def run_all() -> None:
        await asyncio.gather(*map(run, chunks))  # some at once, in their order: the worker sees to it

    try:
        asyncio.run(run_all())
    finally:
        worker.close()


def _identify(source: Any) -> Any:
    """A model's folder by a digest of what lies in it, wherever that is; a name of the hub as it is."""
    if isinstance(source, Mapping):
        return {key: _identify(part) if key == "source" else part for key, part in source.items()}
    path = Path(str(source))
    if not path.exists():
        return str(source)
    files = sorted(part for part in path.iterdir() if part.is_file()) if path.is_dir() else [path]
    return {"source": str(path.absolute()), "sha256": hash_files(files)}


def _plain(value: Any) -> Any:
    """A value as it comes back from JSON."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _differences(found: Any, wanted: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Where two descriptions differ, by the names of entries, and what each has there. mpg's version may differ, and
    where models of the same files lie."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        free = {"source"} if "sha256" in wanted and "sha256" in found else set() if name else {"mpg"}
        names = [part for part in {**wanted, **found} if part not in free]
        parts = [(f"{name}.{part}".strip("."), found.get(part), wanted.get(part)) for part in names]
        return [different for part, a, b in parts for different in _differences(a, b, part)]
    return [] if found == wanted else [(name, found, wanted)]


def _words(differences: Sequence[tuple[str, Any, Any]]) -> str:
    return "; ".join(f"{name}: {found!r} there, {wanted!r} here" for name, found, wanted in differences)
