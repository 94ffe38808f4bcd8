"""One connection's bytes: the head of a request has to come within a time and a size, and what is written together goes
together. Knows nothing of what is asked."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mpg.serve.errors import ApiError

HEAD_SECONDS = 30  # that a head may take to come
MAX_HEAD = 32 * 2**10  # bytes of it
REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}


class Corked:
    """A transport that sends at once what is written in one turn of the loop: a head with the first event, an answer's
    last events with its end. Each call to send is a system call, and a client's turn to read."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._written: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._written:
            self._loop.call_soon(self._send)
        self._written.append(data)

    def close(self) -> None:
        self._send()
        self._transport.close()

    def _send(self) -> None:
        written, self._written = self._written, []
        if written and not self._transport.is_closing():  # as when a client goes meanwhile
            self._transport.write(b"".join(written))


class Connection(HttpToolsProtocol):
    """A connection whose heads are bounded: one that is late or too long is told so, and the connection ends."""

    head_size = 0  # bytes of a head that has not ended
    is_in_head = True
    late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(Corked(transport, self.loop))  # type: ignore[arg-type]
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        room = MAX_HEAD - self.head_size if self.is_in_head else len(data)
        fitting, rest = data[:room], data[room:]
        self.head_size += len(fitting) if self.is_in_head else 0
        if fitting:
            super().data_received(fitting)
        if rest and self.is_in_head:
            self._refuse(431, f"expected a head of at most {MAX_HEAD} bytes, got more")
        elif rest and not self.transport.is_closing():
            super().data_received(rest)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self.late is None:  # of another request than the first
            self._wait_for_head()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.is_in_head, self.head_size = True, 0

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _wait_for_head(self) -> None:
        reason = f"expected the head of a request within {HEAD_SECONDS} s"
        self.late = self.loop.call_later(HEAD_SECONDS, self._refuse, 408, reason)

    def _end_head(self) -> None:
        self.is_in_head = False
        if self.late is not None:
            self.late.cancel()
            self.late = None

    def _refuse(self, status: int, message: str) -> None:
        """End the connection, with an answer where none is on its way."""
        self._end_head()
        if self.cycle is None or self.cycle.response_complete:
            body = json.dumps(ApiError(status, message).body("")).encode()
            head = f"HTTP/1.1 {status} {REASONS[status]}\r\ncontent-type: application/json\r\nconnection: close\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
