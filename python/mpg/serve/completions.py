"""/v1/completions, with prompts as they are: text, token ids, or lists of these, echoed and scored where asked for."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from mpg import __version__
from mpg.serve.chat import usage
from mpg.serve.choices import Choice, scored
from mpg.serve.desk import Desk
from mpg.serve.errors import ApiError
from mpg.serve.messages import Begun, Scored
from mpg.serve.protocol import CompletionRequest
from mpg.serve.streams import as_json, as_stream


async def answer_completion(desk: Desk, asked: CompletionRequest, request: Request, request_id: str) -> Response:
    if asked.max_tokens == 0 and not asked.echo:
        raise ApiError(400, "max_tokens: expected 1 at least where the prompt is not echoed, got 0", "max_tokens")
    if asked.stream and asked.echo and asked.logprobs is not None:
        raise ApiError(400, "stream: expected false where the prompt is echoed with logprobs, got true", "stream")
    events = desk.ask(asked, request)
    begun: Begun = await anext(events)
    choices = [Choice(asked.stops, dict(begun.spelled)) for _ in range(begun.num_choices)]
    head = {"id": f"cmpl-{request_id}", "object": "text_completion", "created": int(time.time()), "model": asked.model}
    head["system_fingerprint"] = f"mpg-{__version__}"
    if asked.stream:
        return await as_stream(_chunks(asked, events, begun, choices, head), request_id)
    of_prompts: dict[int, Scored] = {}
    async for number, event in events:
        if number >= len(choices):
            of_prompts[number - len(choices)] = event
        else:
            choices[number].take(event)
    n = asked.n or 1
    told = []
    for number, choice in enumerate(choices):
        index = number // n
        logprobs = None
        if asked.logprobs is not None:
            tokens = _scored_prompt(begun.prompts[index], of_prompts.get(index), choice) if asked.echo else []
            logprobs = choice.completion_logprobs([*tokens, *scored(choice.tokens)])
        told.append({
            "index": number,
            "text": begun.echoes[index] + choice.shown,
            "logprobs": logprobs,
            "finish_reason": choice.end.finish_reason if choice.end else "length",
            "mpg": choice.own(choice.tokens, bool(asked.trace)),
        })  # fmt: skip
    return as_json({**head, "choices": told, "usage": usage(begun, choices)})


async def _chunks(
    asked: CompletionRequest, events: AsyncIterator[Any], begun: Begun, choices: list[Choice], head: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """One chunk a round and choice at most, the echoed prompt with the first."""
    has_usage, n = asked.stream_options is not None and asked.stream_options.include_usage, asked.n or 1
    shown: set[int] = set()

    def chunk(number: int, text: str, tokens: Sequence[Any], finish_reason: str | None) -> dict[str, Any]:
        choice = choices[number]
        text = text if number in shown else begun.echoes[number // n] + text
        shown.add(number)
        told: dict[str, Any] = {"index": number, "text": text, "finish_reason": finish_reason}
        is_told = asked.logprobs is not None and tokens
        told["logprobs"] = choice.completion_logprobs(scored(tokens)) if is_told else None
        if own := choice.own(tokens, bool(asked.trace)):
            told["mpg"] = own
        return {**head, "choices": [told], **({"usage": None} if has_usage else {})}

    async for number, event in events:
        yield chunk(number, *choices[number].take(event))
    if asked.max_tokens == 0:
        for number in range(len(choices)):
            yield chunk(number, "", (), "length")
    if has_usage:
        yield {**head, "choices": [], "usage": usage(begun, choices)}


def _scored_prompt(prompt: Sequence[tuple[int, int]], found: Scored | None, choice: Choice) -> list[Any]:
    """A prompt's tokens with their log-probabilities, of which the first has none. The choice gets what spells them."""
    of_tokens = [(None, ())]
    if found is not None:
        choice.spelled |= found.spelled
        of_tokens += found.tokens
    return [(id, *of_token, size) for (id, size), of_token in zip(prompt, of_tokens, strict=True)]
