"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from mpg import __version__
from mpg.serve.asks import Jobs, messages_of, read, seeds
from mpg.serve.choices import Choice
from mpg.serve.engine import Engine
from mpg.serve.errors import ApiError
from mpg.serve.jobs import Job
from mpg.serve.protocol import ChatRequest
from mpg.serve.streams import Events, as_json, as_stream, beside


async def answer_chat(engine: Engine, asked: ChatRequest, request: Request, request_id: str) -> Response:
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs: expected logprobs to be true beside it", "top_logprobs")
    if 0 in (asked.max_tokens, asked.max_completion_tokens):
        raise ApiError(400, "max_tokens: expected 1 at least, got 0", "max_tokens")
    model, [seed] = engine.model, seeds(asked, 1)
    how = {"continue_final_message": asked.continue_final_message}
    call = await beside(request, lambda: read(asked, model, messages_of(asked), engine.settings, seed, **how))
    events = Events(engine, request)
    num_top = (asked.top_logprobs or 0) if asked.logprobs else None
    is_limited = asked.max_tokens is not None or asked.max_completion_tokens is not None
    makes = Jobs(engine, model, request_id, events.take, is_streamed=bool(asked.stream))
    jobs = makes.of(call, 0, num_top, is_limited)
    stops = asked.stops
    choices = [Choice(model.tokenizer, stops) for _ in jobs]
    head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": asked.model}
    head["system_fingerprint"] = f"mpg-{__version__}"
    if asked.stream:
        return await as_stream(_chunks(asked, events, jobs, choices, head), request_id)
    async for number, event in events.of(jobs):
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
                "finish_reason": choice.finish_reason,
                "mpg": own,
            }
        )
    return as_json({**head, "object": "chat.completion", "choices": told, "usage": usage(jobs, choices, 1)})


async def _chunks(
    asked: ChatRequest, events: Events, jobs: list[Job], choices: list[Choice], head: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """One chunk a round and choice at most, the role with the first."""
    head = {**head, "object": "chat.completion.chunk"}
    has_usage = asked.stream_options is not None and asked.stream_options.include_usage
    begun: set[int] = set()

    def chunk(number: int, text: str, tokens: list[Any], finish_reason: str | None) -> dict[str, Any]:
        delta: dict[str, Any] = {} if number in begun else {"role": "assistant"}
        begun.add(number)
        choice = choices[number]
        if text or not finish_reason:
            delta["content"] = text
        told: dict[str, Any] = {"index": number, "delta": delta, "finish_reason": finish_reason}
        told["logprobs"] = choice.chat_logprobs(tokens) if asked.logprobs and tokens else None
        if own := choice.own(tokens, bool(asked.trace)):
            told["mpg"] = own
        return {**head, "choices": [told], **({"usage": None} if has_usage else {})}

    async for number, event in events.of(jobs):
        yield chunk(number, *choices[number].take(event))
    if has_usage:
        yield {**head, "choices": [], "usage": usage(jobs, choices, 1)}


def usage(jobs: list[Job], choices: list[Choice], num_prompts: int) -> dict[str, Any]:
    """Tokens of the prompts, each once, and of all answers."""
    read = [len(job.request.token_ids) for job in jobs[:: max(len(jobs) // num_prompts, 1)]]
    new = sum(len(choice.tokens) for choice in choices)
    return {"prompt_tokens": sum(read), "completion_tokens": new, "total_tokens": sum(read) + new}
