"""`mpg serve` on one machine: the models in this process and HTTP in another, so that neither waits for the other's
interpreter. Each ends when the other is gone."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from threading import Lock
from typing import TYPE_CHECKING, Any

from mpg.serve.desk import Desk
from mpg.serve.logs import log_to
from mpg.serve.server import make_app, run
from mpg.serve.settings import Settings

if TYPE_CHECKING:
    from mpg.model import Model
    from mpg.models.ensemble import Ensemble
    from mpg.recipe import Recipe


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

    here, there = Pipe()
    http = get_context("spawn").Process(target=_serve_http, args=(there, settings, host, port), daemon=True)
    service = Service(settings, load, reload, partial(_send, here, Lock()))
    is_ending = False

    def end(number: int, frame: Any) -> None:
        nonlocal is_ending
        if is_ending and number == signal.SIGINT:
            http.kill()
        else:
            is_ending = True
            http.terminate()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, which all its processes get: this one tells the other
    http.start()
    there.close()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    service.start()
    try:
        while True:
            name, args = pickle.loads(here.recv_bytes())
            getattr(service, name)(*args)
    except (EOFError, ConnectionError):  # the other process has ended
        service.stop()
    http.join()
    if http.exitcode:
        raise ChildProcessError(f"the process that serves HTTP has ended with status {http.exitcode}")


def _serve_http(connection: Connection, settings: Settings, host: str, port: int) -> None:
    """What the other process runs."""
    log_to(sys.stderr)
    run(make_app(settings, _Remote(connection)), settings, host, port, say)


def say(address: str) -> None:
    """Say where clients may ask."""
    print(f"mpg: serving at {address}/v1", file=sys.stderr, flush=True)


class _Remote(Desk):
    """Of a service at the other end of a connection."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    async def open(self) -> None:
        asyncio.get_running_loop().add_reader(self._connection.fileno(), self._receive)

    def send(self, name: str, *args: Any) -> None:
        self._connection.send_bytes(pickle.dumps((name, args), pickle.HIGHEST_PROTOCOL))

    def _receive(self) -> None:
        try:
            messages = pickle.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError):  # killed: nothing can be answered any more
            os._exit(1)
        self.take(messages)


def _send(connection: Connection, lock: Lock, messages: list[tuple[int, Any]]) -> None:
    """Tell the other process, from any thread."""
    with lock, suppress(ConnectionError):  # it has ended, which whoever receives sees
        connection.send_bytes(pickle.dumps(messages, pickle.HIGHEST_PROTOCOL))
