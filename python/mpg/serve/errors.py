"""What goes wrong, in the shape and with the status codes that OpenAI's API has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mpg.serve.jobs import Refused, TooLarge

LONGEST = 1000  # characters of a message, which may quote what was sent
LONGEST_NAME = 64  # of a field, in a log
RETRY_AFTER = 1  # seconds that a client is asked to wait
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# What the library calls otherwise than the API
FIELDS = {"max_new_tokens": "max_tokens", "stop_strings": "stop", "prompt": "prompt", "num_return_sequences": "n"}


class ApiError(Exception):
    """An answer that is none.

    param  the field that it is about, if it is about one
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(status, message, param, code)
        self.status, self.message, self.param, self.code = status, message, param, code

    def __str__(self) -> str:
        return self.message

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(RETRY_AFTER)} if self.status in (429, 503) else {}

    @property
    def kind(self) -> str:
        return TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def told(self) -> dict[str, str]:
        """What a log may say of it: the message may quote what was sent, a field is named by its first characters."""
        told = {"error": self.code or self.kind}
        return told if self.param is None else {**told, "param": self.param[:LONGEST_NAME]}

    def body(self, request_id: str) -> dict[str, Any]:
        message = self.message if len(self.message) <= LONGEST else f"{self.message[:LONGEST]} ..."
        message += f" (request {request_id})" if self.status >= 500 else ""
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}


def of_library(error: ValueError, names: Mapping[str, str] | None = None) -> ApiError:
    """What the library refuses, by the field of the API. names: other fields than `FIELDS` has, by arguments"""
    message, renamed = str(error), {**FIELDS, **(names or {})}
    found = re.match(
        r"([a-z_]+)(?=[:\[,]| ')", message
    )  # as in "draft: ...", "contexts['a']: ...", "draft 'merged': ..."
    argument = found.group() if found else None
    param = renamed.get(argument, argument) if argument else None
    if argument and param != argument:
        message = f"{param}{message[len(argument) :]}"
    is_long = "positions" in message and param in ("max_tokens", "prompt", "messages")
    return ApiError(400, message, param, "context_length_exceeded" if is_long else None)


def of_job(error: Exception) -> ApiError:
    """Why a job has no result."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Refused):
        if str(error) == "full":
            return ApiError(429, "the queue is full, try again later", code="queue_full")
        return ApiError(503, f"the server is {error}", code=str(error))
    if isinstance(error, TimeoutError):
        return ApiError(504, f"the request was ended: {error}", code="timeout")
    if isinstance(error, TooLarge):
        return ApiError(400, str(error), "max_tokens", "request_too_large")
    if isinstance(error, MemoryError):
        return ApiError(500, f"out of memory: {error}", code="out_of_memory")
    is_asked_for = isinstance(error, ValueError) and re.match(
        r"(weights|logits_processor|contexts|draft|mixture_span)\b", str(error)
    )
    if is_asked_for and isinstance(error, ValueError):
        return of_library(error)
    return ApiError(500, f"the models failed: {error}", code="engine_error")
