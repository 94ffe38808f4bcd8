"""The events of one request's jobs as its handler reads them, while somebody looks whether the client is still there.

Knows the engine's events and the connection; nothing of answers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from mpg.results import Result
from mpg.serve.engine import Engine
from mpg.serve.errors import ApiError, of_job
from mpg.serve.jobs import Event, Job, Refused

DONE = "data: [DONE]\n\n"
CLIENT_CLOSED = 499  # the status of an answer that nobody gets


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Events:
    """What comes of the jobs of one request, in the order in which it comes."""

    def __init__(self, engine: Engine, request: Request):
        self.engine, self.request = engine, request
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def take(self, number: int, event: Event) -> None:
        self._queue.put_nowait((number, event))

    async def of(self, jobs: Sequence[Job]) -> AsyncIterator[tuple[int, Event]]:
        """(number of the choice, event) until every job is over. Gives the jobs up when it is left, and at once when
        the client goes.

        Raises ApiError where one of them fails or is refused, ClientGone.
        """
        try:
            self.engine.submit(jobs)
        except Refused as error:
            raise of_job(error) from None
        watcher = asyncio.create_task(self._watch(jobs))
        try:
            left = len(jobs)
            while left:
                number, event = await self._queue.get()
                if isinstance(event, ClientGone):
                    raise event
                if isinstance(event, Exception):
                    raise of_job(event)
                if isinstance(event, Result):
                    self.engine.metrics.finished(event)
                left -= isinstance(event, Result) or is_scored(event)
                yield number, event
        finally:
            watcher.cancel()
            self.engine.cancel(jobs)

    async def _watch(self, jobs: Sequence[Job]) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.engine.cancel(jobs)
        self.take(0, ClientGone())


def is_scored(event: Event) -> bool:
    """Whether an event is the score of a prompt."""
    return isinstance(event, list) and (not event or isinstance(event[0], tuple))


def as_json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer. In ASCII: a message may hold what UTF-8 cannot."""
    return Response(json.dumps(body), status, headers, "application/json")


async def as_stream(chunks: AsyncIterator[dict[str, Any]], request_id: str) -> Response:
    """Server-sent events of chunks; what fails before the first of them fails with a status of its own."""
    try:
        first = await anext(chunks)
    except StopAsyncIteration:
        first = None

    async def lines() -> AsyncIterator[str]:
        try:
            if first is not None:
                yield _line(first)
            async for chunk in chunks:
                yield _line(chunk)
        except ApiError as error:
            yield _line(error.body(request_id))
        except ClientGone:
            return
        yield DONE

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _line(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"
