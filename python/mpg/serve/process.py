"""`mpg serve` on one machine: the models in this process and HTTP in another, so that neither waits for the other's
interpreter. Each ends when the other is gone."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from select import select
from socket import MSG_DONTWAIT, socket, socketpair
from threading import Condition, Thread
from typing import TYPE_CHECKING, Any

from mpg.serve.desk import Desk
from mpg.serve.logs import log_to
from mpg.serve.server import make_app, run
from mpg.serve.settings import Settings

if TYPE_CHECKING:
    from mpg.model import Model
    from mpg.models.ensemble import Ensemble
    from mpg.recipe import Recipe
    from mpg.serve.service import Service

HEAD = struct.Struct("!Q")  # bytes that follow
INTERRUPTED = 130  # the status of a command that Ctrl-C has ended


def serve(
    settings: Settings,
    host: str,
    port: int,
    load: Callable[[], Model],
    reload: Callable[[Recipe, Ensemble], Model],
) -> None:
    """Serve until SIGTERM or SIGINT; what runs then is finished, or cut off after the grace. A second SIGINT ends it at
    once.

    load, reload: as `Service` has them

    Raises ChildProcessError where the process that serves HTTP has failed, or was killed.
    """
    from mpg.serve.service import Service  # which the other process need not import

    here, there = socketpair()
    http = get_context("spawn").Process(target=_serve_http, args=(there, settings, host, port), daemon=True)
    is_ending = False

    def end(number: int, frame: Any) -> None:
        nonlocal is_ending
        if is_ending and number == signal.SIGINT:
            http.kill()
            os._exit(INTERRUPTED)
        is_ending = True
        http.terminate()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, which all its processes get: this one tells the other
    http.start()
    there.close()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    service = Service(settings, load, reload, Teller(here).tell)
    service.start()
    attend(here, service)
    http.join()
    if is_ending or service.engine.state != "loading":
        service.stop()
    if not is_ending:
        raise ChildProcessError(f"the process that serves HTTP has ended with status {http.exitcode}")


def say(address: str) -> None:
    """Say where clients may ask, and browsers look."""
    print(f"mpg: serving at {address}/v1, and a playground at {address}/", file=sys.stderr, flush=True)


def attend(connection: socket, service: Service) -> None:
    """Let a service do what the other end of a connection asks, until that is gone. Waits for nothing else: nobody
    else reads what the other end writes."""
    with connection.makefile("rb") as incoming:

        def read(size: int) -> bytes:
            with suppress(ConnectionError):
                if len(found := incoming.read(size)) == size:
                    return found
            return b""

        while (head := read(HEAD.size)) and (message := read(*HEAD.unpack(head))):
            name, args = pickle.loads(message)
            getattr(service, name)(*args)


class Teller:
    """Tells the other end of a connection what any thread has to tell, which does not wait for it: what the connection
    does not take at once is sent by a thread of its own."""

    def __init__(self, connection: socket) -> None:
        self._connection = connection
        self._left = bytearray()
        self._has_left = Condition()
        Thread(target=self._send_left, name="mpg-teller", daemon=True).start()

    def tell(self, messages: list[tuple[int, Any]]) -> None:
        frame = _frame(messages)
        with self._has_left:
            if not self._left:
                frame = frame[self._send(frame) :]
            if frame:
                self._left += frame
                self._has_left.notify()

    def _send_left(self) -> None:
        while True:
            with self._has_left:
                while not self._left:
                    self._has_left.wait()
            select([], [self._connection], [])
            with self._has_left:
                del self._left[: self._send(self._left)]

    def _send(self, data: bytes | bytearray) -> int:
        """Send as much as the connection takes; the number of bytes."""
        try:
            return self._connection.send(data, MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except ConnectionError:  # the other end is gone, which whoever attends to it sees
            return len(data)


class Remote(Desk):
    """The desk of a service at the other end of a connection.

    on_gone  called once that is gone
    """

    def __init__(self, connection: socket, on_gone: Callable[[], None]) -> None:
        super().__init__()
        self._connection, self._on_gone = connection, on_gone

    async def open(self) -> None:
        reader, self._writer = await asyncio.open_unix_connection(sock=self._connection)
        self._receiving = asyncio.create_task(self._receive(reader))

    async def close(self) -> None:
        await super().close()
        self._receiving.cancel()
        self._writer.close()

    def send(self, name: str, *args: Any) -> None:
        self._writer.write(_frame((name, args)))

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readexactly(HEAD.size)
                self.take(pickle.loads(await reader.readexactly(*HEAD.unpack(head))))
        self._on_gone()


def _frame(message: Any) -> bytes:
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return HEAD.pack(len(body)) + body


def _serve_http(connection: socket, settings: Settings, host: str, port: int) -> None:
    """What the other process runs. Without models nothing can be answered, nor what is under way."""
    log_to(sys.stderr)
    run(make_app(settings, Remote(connection, lambda: os._exit(1))), settings, host, port, say)
