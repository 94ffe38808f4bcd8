"""What Ray Serve runs: replicas, each with the models and an engine, behind fronts that have neither.

Clients reach a front through Ray's proxies. It refuses what any server refuses before a request is read, and hands the
rest to the replica of the conversation, whose application answers as that of `mpg serve`. Knows of a request only what
tells one conversation from another.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.requests import Request
from starlette.responses import Response

from mpg.model import Model
from mpg.model import load as load_models
from mpg.models import loading
from mpg.models.ensemble import Ensemble
from mpg.recipe import Recipe
from mpg.serve.desk import LocalDesk
from mpg.serve.errors import ApiError, of_job
from mpg.serve.guard import Guard
from mpg.serve.jobs import Refused
from mpg.serve.logs import log_to
from mpg.serve.metrics import Metrics
from mpg.serve.server import make_app
from mpg.serve.settings import Settings
from mpg.serve.streams import DONE, as_event

SESSION_HEADER = b"x-session-id"  # by which a client may name its conversation itself
ID_HEADER = b"x-request-id"
BEGINNING = 256  # characters or tokens of a prompt without messages that tell a conversation
LOADING_CHECK = 0.05  # seconds
TOLD = ("type", "http_version", "method", "path", "query_string", "scheme")  # of a request's scope
Message = dict[str, Any]  # of ASGI


class Replica:
    """One engine and its application, without a socket.

    Raises RuntimeError where the models cannot be loaded: Ray then says so, and tries again.
    """

    def __init__(self, models: str, load: Mapping[str, Any], options: Mapping[str, Any], settings: Settings) -> None:
        def first() -> Model:
            model = load_models(models, **load)
            return Model(model.models, replace(model.recipe, options={**model.recipe.options, **options}))

        desk = LocalDesk(settings, first, self._reload)
        self.load, self.app, self.engine = load, make_app(settings, desk), desk.service.engine
        desk.service.start()
        while self.engine.state == "loading":
            time.sleep(LOADING_CHECK)
        self.check_health()
        self.recipe: Recipe = self.engine.model.recipe

    def __del__(self) -> None:
        self.engine.stop()

    def _reload(self, recipe: Recipe, beside: Ensemble) -> Model:
        how: dict[str, Any] = {name: self.load[name] for name in ("dtype", "device", "graphs") if name in self.load}
        return Model(loading.load(recipe, beside=beside, **how), recipe)

    def check_health(self) -> None:
        if self.engine.state == "failed":
            raise RuntimeError(f"the engine has failed: {self.engine.failure}")

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Have other attributes beside those of the models. Requests that run keep what they began with."""
        if config.keys() - {"attributes"}:
            raise ValueError(f"user_config: expected attributes alone, got {', '.join(config)}")
        more = config.get("attributes") or {}
        recipe = replace(self.recipe, attributes={**(self.recipe.attributes or {}), **more}) if more else self.recipe
        if recipe.attributes != self.engine.model.recipe.attributes:
            beside = self.engine.model.models
            self.engine.replace(await asyncio.to_thread(self._reload, recipe, beside))

    async def answer(self, scope: Mapping[str, Any], body: bytes) -> AsyncIterator[list[Message]]:
        """The messages that answer a request, as many at a time as there are."""
        sent: asyncio.Queue[Any] = asyncio.Queue()  # messages, and None at the end
        asked = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not asked:
                await asyncio.Event().wait()  # a client that goes ends the call instead
            return asked.pop()

        running = asyncio.create_task(self.app(dict(scope), receive, sent.put))
        running.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            is_over = False
            while not is_over:
                new = [await sent.get(), *(sent.get_nowait() for _ in range(sent.qsize()))]
                is_over = new[-1] is None
                yield [message for message in new if message is not None]
        finally:
            running.cancel()


class Front:
    """What Ray's proxies call: checks keys, hosts and sizes, and chooses the replica by the conversation."""

    def __init__(self, settings: Settings, replicas: Any) -> None:
        log_to(sys.stderr)
        self.replicas = replicas
        self.guard = Guard(self._forward, settings, Metrics())

    async def __call__(self, request: Request) -> Response:
        return _Answer(self.guard)

    async def _forward(self, scope: Any, receive: Any, send: Any) -> None:
        """Send what a replica answers. Where it dies before it has said anything, that is 503, and clients try again;
        where it dies in the middle, the stream ends with this error."""
        body, request_id = (await receive())["body"], scope["state"]["id"]
        named = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == SESSION_HEADER]
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != ID_HEADER]
        asked = {**{name: scope[name] for name in TOLD}, "headers": [*headers, (ID_HEADER, request_id.encode())]}
        way = self.replicas.options(stream=True, session_id=named[0] if named else session_of(body))
        answer = way.answer.remote(asked, body)
        failure = ApiError(503, "the replica has ended without an answer", code="replica_gone")
        head: Message = {}
        has_begun = is_over = False
        try:
            async for messages in answer:
                for message in messages:
                    if message["type"] == "http.response.start":  # kept until there is more of an answer
                        told = [(name, value) for name, value in message["headers"] if name != ID_HEADER]
                        head = {**message, "headers": told}
                        continue
                    if not has_begun:
                        await send(head)
                    has_begun, is_over = True, not message.get("more_body", False)
                    await send(message)
        except asyncio.CancelledError:  # the client has gone
            answer.cancel()
            raise
        except BackPressureError:
            failure = of_job(Refused("full"))
        except RayError as error:
            failure = ApiError(503, f"the replica has ended: {error}", code="replica_gone")
        except RayServeException as error:
            failure = ApiError(503, str(error), code="replica_gone")
        if not has_begun:
            raise failure
        if not is_over:
            await send({"type": "http.response.body", "body": as_event(failure.body(request_id)) + DONE})


class _Answer(Response):
    """An answer that an application is yet to make."""

    def __init__(self, app: Any) -> None:
        super().__init__()
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


def session_of(body: bytes) -> str:
    """What the requests of one conversation have in common, and those of others not: a digest of its messages up to the
    user's first, or of how its prompt begins. Empty where there is neither: any replica may answer."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    asked = asked if isinstance(asked, dict) else {}
    messages, prompt = asked.get("messages"), asked.get("prompt")
    first: Any = None
    if isinstance(messages, list):
        roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
        first = messages[: roles.index("user") + 1 if "user" in roles else None]
    else:
        while isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):  # the first of several
            prompt = prompt[0]
        first = prompt[:BEGINNING] if isinstance(prompt, (str, list)) else None
    return hashlib.sha256(json.dumps(first).encode()).hexdigest() if first else ""
