"""One process that answers rows: its models, and an engine that is kept full across the chunks of rows it is given."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from mpg.batch.parts import Output
from mpg.batch.rows import PROMPTS, Chunk, Input, Row, seed_of, split
from mpg.frontend.requests import Call
from mpg.model import Model
from mpg.results import Result
from mpg.serve.engine import Engine
from mpg.serve.jobs import Event, Job, Tell
from mpg.serve.metrics import EngineMetrics
from mpg.serve.settings import Settings

# Chunks that a worker has begun: while the longest texts of one end, the rows of the next ones fill the scheduler.
AT_ONCE = 3
MOST = 2**31  # of what a job does not limit
PREFILL = 2048  # tokens of prompts between two rounds: nobody watches these grow
TRIES = 2  # of a chunk beside others before its rows are tried one by one, and of such a row
# What asks for nothing, and what is wanted instead of anything else
REFUSED: dict[str, tuple[Any, str]] = {
    "num_return_sequences": (1, "one text a row; repeat the row under other ids"),
    "trace": (False, "no trace in a job; mpg generate has one"),
    "max_time": (None, "a limit in tokens, as texts must not depend on the time"),
}


@dataclass(frozen=True)
class Task:
    """What is done with every row of an input.

    load        makes the models; called in every worker
    max_rows    that a worker decodes at once
    max_memory  bytes that their cache rows may take, default a quarter of the device's
    seed        that the seeds of rows follow from, beside their ids
    options, weights, contexts, raw: as `Model.generate` takes them, where a row is silent
    """

    rows: Input
    output: Output
    load: Callable[[], Model]
    weights: Any = None
    contexts: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    raw: bool = False
    seed: int = 0
    max_rows: int = 32
    max_memory: int | None = None


@dataclass(frozen=True)
class Done:
    """A chunk that has been written: how many rows, of them with an error, and new tokens."""

    rows: int
    errors: int = 0
    tokens: int = 0


class Worker:
    """Models that have been loaded for a task, and what runs them. Raises what loading does, and ValueError where the
    task's own weights or options do not fit the models."""

    def __init__(self, task: Task) -> None:
        self.task, self.model = task, task.load()
        threads = torch.get_num_threads()  # of this thread alone
        if task.weights is not None:
            self._call([0], {}, 0)
        settings = Settings(
            max_rows=task.max_rows, max_memory=task.max_memory, max_queue=MOST, max_length=MOST, prefill_tokens=PREFILL
        )
        self.engine = Engine(settings, EngineMetrics())

        def begin() -> Model:
            torch.set_num_threads(threads)
            return self.model

        self._turns, self._lock = asyncio.Semaphore(AT_ONCE), asyncio.Lock()
        self.engine.start(begin)
        while self.engine.state == "loading":
            time.sleep(0.001)

    async def run(self, chunk: Chunk) -> Done:
        """Answer the rows of a chunk and write them. Raises ValueError where they cannot be read or written."""
        async with self._turns:
            return self._write(chunk, await self._answer(self.task.rows.read(chunk)))

    async def run_again(self, chunk: Chunk) -> Done:
        """What `run` does, for a chunk that other workers may have written, or may have died of: where several did, its
        rows are answered one by one, and one with which a worker dies that has no other gets that for an error.

        A file beside the parts tells the worker to come how often the chunk and its next row were begun, and what was
        told of the rows before that.
        """
        output = self.task.output
        if output.has(chunk.number):
            return Done(chunk.count)
        begun = output.read_begun(chunk.number) or {"times": 0, "told": [], "row_times": 0}
        begun["times"] += 1
        output.write_begun(chunk.number, begun)
        if begun["times"] <= TRIES:
            done = await self.run(chunk)
        else:
            async with self._alone():
                done = self._write(chunk, await self._answer_one_by_one(chunk, begun))
        output.remove_begun(chunk.number)
        return done

    async def _answer_one_by_one(self, chunk: Chunk, begun: dict[str, Any]) -> list[Row]:
        told: list[Row] = begun["told"]
        for row in self.task.rows.read(chunk)[len(told) :]:
            if begun["row_times"] == TRIES:
                told.append(_tell(row, f"the worker died {TRIES} times while it had no other row"))
            else:
                begun["row_times"] += 1
                self.task.output.write_begun(chunk.number, begun)
                told += await self._answer([row])
            begun["row_times"] = 0
        return told

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """A block during which no other chunk runs."""
        async with self._lock:
            for _ in range(AT_ONCE):
                await self._turns.acquire()
        try:
            yield
        finally:
            for _ in range(AT_ONCE):
                self._turns.release()

    async def _answer(self, rows: Sequence[Row]) -> list[Row]:
        """The rows of the output that these make."""
        loop = asyncio.get_running_loop()
        answers: list[asyncio.Future[Event]] = [loop.create_future() for _ in rows]

        def take(events: Sequence[tuple[Job, Event]]) -> None:
            for job, event in events:
                if not isinstance(event, list):
                    answers[job.number].set_result(event)

        def tell(events: Sequence[tuple[Job, Event]]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(take, events)

        jobs = []
        for number, row in enumerate(rows):
            try:
                jobs.append(self._job(row, number, tell))
            except ValueError as error:
                answers[number].set_result(error)
        # the longest first: those that share rounds are then alike, and none of them is left alone at the end
        self.engine.submit(sorted(jobs, key=lambda job: -job.request.num_positions))
        told = [_tell(row, result) for row, result in zip(rows, await asyncio.gather(*answers), strict=True)]
        if self.engine.state == "failed":
            raise RuntimeError(self.engine.failure)
        return told

    def _write(self, chunk: Chunk, told: list[Row]) -> Done:
        self.task.output.write(chunk.number, told)
        errors = sum(row["error"] is not None for row in told)
        return Done(len(told), errors, sum(len(row["tokens"]) for row in told))

    def close(self) -> None:
        self.engine.stop()

    def _job(self, row: Row, number: int, tell: Tell) -> Job:
        asked, _ = split(row)
        given = [name for name in PROMPTS if name in asked]
        if len(given) != 1:
            raise ValueError(f"prompt: expected one of prompt and messages, got {' and '.join(given) or 'neither'}")
        prompt = asked.pop(given[0])
        if not isinstance(prompt, str | list) or not prompt:
            raise ValueError(f"{given[0]}: expected text or a list, not empty, got {prompt!r}")
        seed = asked.pop("seed", None)
        call = self._call(prompt, asked, seed_of(row["id"], self.task.seed) if seed is None else seed)

        return Job(
            id=row["id"], model=self.model, call=call, request=call.requests[0], tell=tell, deadline=math.inf,
            number=number,
        )  # fmt: skip

    def _call(self, prompt: Any, asked: Row, seed: Any) -> Call:
        options = {**self.task.options, **asked}
        weights, contexts = options.pop("weights", self.task.weights), options.pop("contexts", {})
        if not isinstance(contexts, Mapping):
            raise ValueError(f"contexts: expected texts by name, got {contexts!r}")
        call = self.model.read(
            prompt, weights=weights, contexts={**self.task.contexts, **contexts} or None, raw=self.task.raw, seed=seed,
            **options,
        )  # fmt: skip
        check({**options, **vars(call.options)})
        return call


def _tell(row: Row, answer: Event | str) -> Row:
    """A row of the output."""
    _, kept = split(row)
    told = {"id": kept.pop("id"), **kept}
    if isinstance(answer, Result):
        text, reason, tokens = answer.text, answer.finish_reason, list(answer.tokens)
        return {**told, "text": text, "finish_reason": reason, "tokens": tokens, "seed": answer.seed,
                "stats": answer.stats, "error": None}  # fmt: skip
    return {**told, **dict.fromkeys(("text", "finish_reason")), "tokens": [], "seed": None, "stats": {},
            "error": str(answer)}  # fmt: skip


def check(options: Mapping[str, Any]) -> None:
    """Raises ValueError for options that a row cannot have."""
    if options.get("sampler") == "auto":
        wanted = "exact, direct, scr, token-rs or seq-rs, as what 'auto' picks may differ between workers"
        raise ValueError(f"sampler: expected {wanted}, and with it the texts")
    for name, (neutral, wanted) in REFUSED.items():
        if options.get(name) not in (None, neutral):
            raise ValueError(f"{name}: expected {wanted}, got {options[name]!r}")
