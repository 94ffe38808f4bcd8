"""The application: its routes, and the process that serves it. What routes do is in the files beside this one."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from ipaddress import ip_address
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from mpg import pages
from mpg.options import SAMPLERS, TARGETS
from mpg.serve.chat import answer_chat
from mpg.serve.completions import answer_completion
from mpg.serve.connections import Connection
from mpg.serve.desk import ClientGone, Desk
from mpg.serve.errors import ApiError
from mpg.serve.guard import Guard
from mpg.serve.metrics import Metrics
from mpg.serve.protocol import AttributeRequest, ChatRequest, CompletionRequest, Kind, parse
from mpg.serve.settings import Settings
from mpg.serve.streams import CLIENT_CLOSED, as_json

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")  # names of it
END_SECONDS = 5  # beyond the grace, for answers that are cut off to be told so


def make_app(settings: Settings, desk: Desk) -> FastAPI:
    """The application in front of the models that a desk knows the way to."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await desk.open()
        yield
        await desk.close()

    app = FastAPI(title="mpg", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.desk, app.router.redirect_slashes = desk, False
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    _handle_errors(app)

    get = partial(app.api_route, methods=["GET", "HEAD"])

    @get("/")
    async def playground() -> Response:
        samplers = [name for name in SAMPLERS if name != "auto"]
        page = pages.fill("playground.html", {"samplers": samplers, "targets": [t for t in TARGETS if t != "base"]})
        return Response(page, media_type="text/html")

    @get("/health")
    async def health() -> Response:
        state, failure = await desk.call("health")
        return as_json({"status": state, "reason": failure or None}, 200 if state == "ready" else 503)

    @get("/metrics")
    async def measure() -> Response:
        return Response(metrics.text() + await desk.call("measure"), media_type="text/plain; version=0.0.4")

    @get("/v1/models")
    async def models() -> Response:
        known = await desk.call("models")
        return as_json({"object": "list", "data": [_describe(name, mpg=own) for name, own in known.items()]})

    @get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return as_json(_describe(name, mpg=await desk.call("model", name)))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer_chat(desk, await _read(ChatRequest, request), request, request.state.id)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer_completion(desk, await _read(CompletionRequest, request), request, request.state.id)

    @app.post("/v1/attributes")
    async def add(request: Request) -> Response:
        asked = await _read(AttributeRequest, request)
        await desk.call("add", asked.name, asked.source)
        return as_json(_describe(asked.name), 201)

    @app.delete("/v1/attributes/{name}")
    async def remove(name: str) -> Response:
        await desk.call("remove", name)
        return as_json({"id": name, "object": "model", "deleted": True})

    return app


async def _read(kind: type[Kind], request: Request) -> Kind:
    return parse(kind, request.headers.get("content-type", ""), await request.body())


def _describe(name: str, **own: Any) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "mpg", **own}


def _handle_errors(app: FastAPI) -> None:
    """Let every error have the API's shape."""

    def show(request: Request, error: ApiError) -> Response:
        request.state.error = error  # for the log
        return as_json(error.body(request.state.id), error.status, error.headers)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return show(request, error)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        answer = show(request, ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_CLOSED)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return show(request, ApiError(500, "internal error"))


def check_host(host: str, has_key: bool, allow_open: bool) -> tuple[str, ...]:
    """The names that requests may call a server by which listens there: on loopback its own, beyond it any.

    Raises ValueError for a host beyond loopback without a key, unless that is what is wanted.
    """
    try:
        is_loopback = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not (is_loopback or has_key or allow_open):
        raise ValueError(
            f"host: expected a loopback address without api_key, got {host!r}; --allow-open serves it openly"
        )
    own = f"[{host}]" if ":" in host else host
    return tuple(dict.fromkeys((*LOOPBACK, own))) if is_loopback else ()


def check_address(host: str, port: int) -> None:
    """Raise ValueError where nothing can listen, before minutes of loading: no such address here, or a port in use."""
    argument = "host"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        argument = "host, port"
        for family, kind, protocol, _, place in found:
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(place)
    except (OSError, UnicodeError) as error:
        wanted = "an address of this machine" + " and a port that is free" * (argument != "host")
        got = f"{host!r}" if argument == "host" else f"{host!r}, {port}"
        raise ValueError(f"{argument}: expected {wanted}, got {got}: {error}") from None


def address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Tells the models' side when the process is to end, and cuts off after the grace what has not ended by itself."""

    def __init__(self, config: uvicorn.Config, desk: Desk, grace: float, on_ready: Callable[[str], None]):
        super().__init__(config)
        self.desk, self.grace, self.on_ready = desk, grace, on_ready

    def handle_exit(self, sig: int, frame: Any) -> None:
        if sig != signal.SIGINT:  # which every process of a terminal gets
            super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self.on_ready(address(host, port))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.desk.send("drain")

        async def cut() -> None:
            await asyncio.sleep(self.grace)
            await self.desk.call("stop")

        cutting = asyncio.create_task(cut())
        await super().shutdown(sockets)
        cutting.cancel()


def make_config(app: FastAPI, **own: Any) -> uvicorn.Config:
    """How uvicorn is to serve the application."""
    return uvicorn.Config(
        app, http=Connection, ws="none", log_config=None, access_log=False, server_header=False, **own
    )


def run(app: FastAPI, settings: Settings, host: str, port: int, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM; what runs then is finished, or cut off after the grace."""
    config = make_config(app, host=host, port=port, timeout_graceful_shutdown=int(settings.grace) + END_SECONDS)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again, when all is done
    _Server(config, app.state.desk, settings.grace, on_ready).run()
