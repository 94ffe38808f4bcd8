"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from mpg import __version__
from mpg.serve.choices import Choice
from mpg.serve.desk import Desk
from mpg.serve.errors import ApiError
from mpg.serve.messages import Begun
from mpg.serve.protocol import ChatRequest
from mpg.serve.streams import as_json, as_stream


async def answer_chat(desk: Desk, asked: ChatRequest, request: Request, request_id: str) -> Response:
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs: expected logprobs to be true beside it", "top_logprobs")
    if 0 in (asked.max_tokens, asked.max_completion_tokens):
        raise ApiError(400, "max_tokens: expected 1 at least, got 0", "max_tokens")
    events = desk.ask(asked, request)
    begun: Begun = await anext(events)
    choices = [Choice(asked.stops) for _ in range(begun.num_choices)]
    head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": asked.model}
    head["system_fingerprint"] = f"mpg-{__version__}"
    if asked.stream:
        return await as_stream(_chunks(asked, events, begun, choices, head), request_id)
    async for number, event in events:
        choices[number].take(event)
    told = []
    for number, choice in enumerate(choices):
        message = {"role": "assistant", "content": choice.shown, "refusal": None}
        logprobs = choice.chat_logprobs(choice.tokens) if asked.logprobs else None
        own = choice.own(choice.tokens, bool(asked.trace))
        told.append(
            {
                "index": number,
                "message": message,
                "logprobs": logprobs,
                "finish_reason": choice.end and choice.end.finish_reason,
                "mpg": own,
            }
        )
    return as_json({**head, "object": "chat.completion", "choices": told, "usage": usage(begun, choices)})


async def _chunks(
    asked: ChatRequest, events: AsyncIterator[Any], begun: Begun, choices: list[Choice], head: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """One chunk a round and choice at most, the role with the first."""
    head = {**head, "object": "chat.completion.chunk"}
    has_usage = asked.stream_options is not None and asked.stream_options.include_usage
    shown: set[int] = set()

    def chunk(number: int, text: str, tokens: Sequence[Any], finish_reason: str | None) -> dict[str, Any]:
        delta: dict[str, Any] = {} if number in shown else {"role": "assistant"}
        shown.add(number)
        choice = choices[number]
        if text or not finish_reason:
            delta["content"] = text
        told: dict[str, Any] = {"index": number, "delta": delta, "finish_reason": finish_reason}
        told["logprobs"] = choice.chat_logprobs(tokens) if asked.logprobs and tokens else None
        if own := choice.own(tokens, bool(asked.trace)):
            told["mpg"] = own
        return {**head, "choices": [told], **({"usage": None} if has_usage else {})}

    async for number, event in events:
        yield chunk(number, *choices[number].take(event))
    if has_usage:
        yield {**head, "choices": [], "usage": usage(begun, choices)}


def usage(begun: Begun, choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens of the prompts, each once, and of all answers."""
    new = sum(choice.num_tokens for choice in choices)
    total = begun.prompt_tokens + new
    return {"prompt_tokens": begun.prompt_tokens, "completion_tokens": new, "total_tokens": total}
