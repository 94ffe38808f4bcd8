"""Where handlers ask the models' side, and wait for what it tells them."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

from fastapi import Request

from mpg.serve.messages import Begun, New
from mpg.serve.protocol import ChatRequest, CompletionRequest
from mpg.serve.settings import Settings

if TYPE_CHECKING:
    from mpg.model import Model
    from mpg.models.ensemble import Ensemble
    from mpg.recipe import Recipe


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Desk(ABC):
    """Knows who waits for what; a subclass knows the way to the `Service`."""

    def __init__(self) -> None:
        self._keys = count()
        self._told: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Any]]] = {}  # by question

    @abstractmethod
    def send(self, name: str, *args: Any) -> None:
        """Let the service do something."""

    @abstractmethod
    async def open(self) -> None:
        """Begin to serve."""

    async def close(self) -> None:
        """Give up what runs."""
        await self.call("stop")

    async def call(self, name: str, *args: Any) -> Any:
        """What a method of the service returns. Raises ApiError."""
        key, told = self._listen()
        try:
            self.send("call", key, name, args)
            found = await told.get()
        finally:
            del self._told[key]
        if isinstance(found, Exception):
            raise found
        return found

    async def ask(self, asked: ChatRequest | CompletionRequest, request: Request) -> AsyncIterator[Any]:
        """Have a request answered: `Begun`, and then (number of the choice, event) until all of it has ended. Gives it
        up when it is left, and at once when the client goes.

        Raises ApiError where it is refused or fails, ClientGone.
        """
        key, told = self._listen()
        watcher = asyncio.create_task(_watch(request, told))
        left = 1
        try:
            self.send("ask", key, type(asked), await request.body())
            while left:
                message = await told.get()
                if isinstance(message, Exception):
                    raise message
                if isinstance(message, Begun):
                    left = message.num_jobs
                elif not isinstance(message[1], New):
                    left -= 1
                yield message
        finally:
            watcher.cancel()
            del self._told[key]
            if left:
                self.send("cancel", key)

    def take(self, messages: Sequence[tuple[int, Any]]) -> None:
        """Hand out what the service tells."""
        for key, message in messages:
            if (waiting := self._told.get(key)) is not None:
                waiting[1].put_nowait(message)

    def _listen(self) -> tuple[int, asyncio.Queue[Any]]:
        key, told = next(self._keys), asyncio.Queue[Any]()
        self._told[key] = asyncio.get_running_loop(), told
        return key, told


async def _watch(request: Request, told: asyncio.Queue[Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    told.put_nowait(ClientGone())


class LocalDesk(Desk):
    """The desk of a service in this process."""

    def __init__(
        self, settings: Settings, load: Callable[[], Model], reload: Callable[[Recipe, Ensemble], Model]
    ) -> None:
        from mpg.serve.service import Service  # which other desks need not import

        super().__init__()
        self.service = Service(settings, load, reload, self._tell)

    def send(self, name: str, *args: Any) -> None:
        getattr(self.service, name)(*args)

    async def open(self) -> None:
        self.service.start()

    def _tell(self, messages: list[tuple[int, Any]]) -> None:
        for message in messages:
            loop, _ = self._told.get(message[0], (None, None))
            if loop is not None and not loop.is_closed():
                loop.call_soon_threadsafe(self.take, [message])
