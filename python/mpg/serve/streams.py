"""Answers as they are sent: JSON in one piece, or server-sent events. Knows nothing of what is in them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import Response

from mpg.serve.desk import ClientGone
from mpg.serve.errors import ApiError

DONE = b"data: [DONE]\n\n"
CLIENT_CLOSED = 499  # the status of an answer that nobody gets


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
            scope["state"]["error"] = error  # for the log
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
