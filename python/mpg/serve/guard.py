"""What stands before every route: request ids, host names, keys, sizes of bodies, the log and the counts. No model."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import anyio

from mpg.serve.errors import ApiError
from mpg.serve.metrics import Metrics
from mpg.serve.settings import Settings
from mpg.serve.streams import CLIENT_CLOSED, as_json

OPEN_PATHS = ("/", "/health")  # "/" is a page that knows nothing
ADMIN_PATHS = "/v1/attributes"
BODY_SECONDS = 30  # that a body may take to come
PORT = re.compile(r":\d*$")
REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")

logger = logging.getLogger("mpg.serve")


class Guard:
    """An ASGI application around another one."""

    def __init__(self, app: Any, settings: Settings, metrics: Metrics):
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun_at, status = perf_counter(), 500
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        asked_id = headers.get("x-request-id", "")
        request_id = asked_id if REQUEST_ID.fullmatch(asked_id) else secrets.token_hex(8)
        scope.setdefault("state", {})["id"] = request_id

        async def tell(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self._check_host([value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"host"])
            self._check_key(scope["path"], headers)
            body = await self._read(headers, receive)
            if self.settings.log_prompts and body:
                scope["state"]["body"] = body.decode("utf-8", "replace")
            await self.app(scope, _again(body, receive), tell)
        except ApiError as error:
            scope["state"]["error"] = error
            await as_json(error.body(request_id), error.status, error.headers)(scope, receive, tell)
        finally:
            seconds = perf_counter() - begun_at
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.answered(route, status, seconds)
            line = {"id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            line["seconds"] = round(seconds, 4)
            if (refused := scope["state"].get("error")) is not None:
                line |= refused.told()
            if "body" in scope["state"]:
                line["body"] = scope["state"]["body"]
            logger.info("request", extra={"fields": line})

    def _check_host(self, given: Sequence[str]) -> None:
        """Refuse a name that somebody else's may be: a page from there is let in by browsers as this server's own."""
        hosts = self.settings.hosts
        if hosts and (len(given) != 1 or PORT.sub("", given[0]).lower() not in hosts):
            wanted = f"the name of this server, {', '.join(hosts)}"
            raise ApiError(403, f"host: expected {wanted}, got {', '.join(given)[:100] or 'none'}", "host")

    def _check_key(self, path: str, headers: dict[str, str]) -> None:
        if path in OPEN_PATHS:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
        if path.startswith(ADMIN_PATHS):
            if self.settings.admin_key is None:
                raise ApiError(403, "this server was started without --admin-key, nothing can be changed")
            _check(given, [self.settings.admin_key])
        elif self.settings.api_keys:
            _check(given, self.settings.api_keys)

    async def _read(self, headers: dict[str, str], receive: Any) -> bytes:
        """The whole body. Raises ApiError where it is too long, or too slow in coming."""
        most, body = self.settings.max_body, bytearray()
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > most:
            raise ApiError(413, f"expected a body of at most {most} bytes, got {length}", code="body_too_large")
        try:
            with anyio.fail_after(BODY_SECONDS):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise ApiError(413, f"expected a body of at most {most} bytes, got more", code="body_too_large")
                    if message["type"] == "http.disconnect":
                        raise ApiError(CLIENT_CLOSED, "the client went before its request had come")
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, f"expected the body within {BODY_SECONDS} s") from None


def _check(given: bytes, keys: Sequence[str]) -> None:
    """Compare in a time that tells nothing of the keys. Raises ApiError."""
    found = [secrets.compare_digest(given, key.encode()) for key in keys]
    if not any(found):
        raise ApiError(401, "expected 'Authorization: Bearer KEY' with a key of this server", code="invalid_api_key")


def _again(body: bytes, receive: Any) -> Any:
    """A receive that gives a body that has been read, and then what else comes."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return messages.pop() if messages else await receive()

    return again
