"""The events of one request's jobs as its handler reads them, while somebody looks whether the client is still there.

Knows the engine's events and the connection; nothing of answers.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import anyio
from fastapi import Request
from fastapi.responses import Response

from mpg.results import Result
from mpg.serve.engine import Engine
from mpg.serve.errors import ApiError, of_job
from mpg.serve.jobs import Event, Job, Refused

DONE = b"data: [DONE]\n\n"
SHORT = 2048  # bytes of a request: a prompt is read in .7 ms, and a thread is another .4 of everybody's
CLIENT_CLOSED = 499  # the status of an answer that nobody gets

Read = TypeVar("Read")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def beside(request: Request, read: Callable[[], Read]) -> Read:
    """Read a request: in a thread where that may take so long that others would wait."""
    return read() if len(await request.body()) <= SHORT else await anyio.to_thread.run_sync(read)


class Events:
    """What comes of the jobs of one request, in the order in which it comes."""

    def __init__(self, engine: Engine, request: Request):
        self.engine, self.request = engine, request
        self._new: deque[tuple[int, Event]] = deque()
        self._has_new = asyncio.Event()

    def take(self, number: int, event: Event) -> None:
        self._new.append((number, event))
        self._has_new.set()

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
                if not self._new:
                    self._has_new.clear()
                    await self._has_new.wait()
                number, event = self._new.popleft()
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


class EventStream(Response):
    """Server-sent events of chunks, each sent as soon as it is there. That the client goes, the chunks tell."""

    def __init__(self, first: dict[str, Any] | None, chunks: AsyncIterator[dict[str, Any]], request_id: str):
        super().__init__(headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self.first, self.chunks, self.request_id = first, chunks, request_id

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            if self.first is not None:
                await send({"type": "http.response.body", "body": as_event(self.first), "more_body": True})
            async for chunk in self.chunks:
                await send({"type": "http.response.body", "body": as_event(chunk), "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": as_event(error.body(self.request_id)), "more_body": True})
        except ClientGone:
            return
        await send({"type": "http.response.body", "body": DONE})


async def as_stream(chunks: AsyncIterator[dict[str, Any]], request_id: str) -> EventStream:
    """An answer of chunks; what fails before the first of them fails with a status of its own."""
    return EventStream(await anext(chunks, None), chunks, request_id)


def as_event(chunk: dict[str, Any]) -> bytes:
    """The bytes of one server-sent event."""
    return f"data: {json.dumps(chunk)}\n\n".encode()
