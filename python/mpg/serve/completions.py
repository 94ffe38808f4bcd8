"""/v1/completions, with prompts as they are: text, token ids, or lists of these, echoed and scored where asked for."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from mpg import __version__
from mpg.serve.asks import Jobs, prompts_of, read, seeds
from mpg.serve.chat import usage
from mpg.serve.choices import Choice, scored
from mpg.serve.engine import Engine
from mpg.serve.errors import ApiError
from mpg.serve.jobs import Job
from mpg.serve.protocol import CompletionRequest
from mpg.serve.streams import Events, as_json, as_stream, beside


async def answer_completion(engine: Engine, asked: CompletionRequest, request: Request, request_id: str) -> Response:
    if asked.max_tokens == 0 and not asked.echo:
        raise ApiError(400, "max_tokens: expected 1 at least where the prompt is not echoed, got 0", "max_tokens")
    if asked.stream and asked.echo and asked.logprobs is not None:
        raise ApiError(400, "stream: expected false where the prompt is echoed with logprobs, got true", "stream")
    model, prompts = engine.model, prompts_of(asked, engine.settings.max_prompts)
    every_seed = seeds(asked, len(prompts))
    calls = await beside(
        request,
        lambda: [
            read(asked, model, prompt, engine.settings, seed, raw=True)
            for prompt, seed in zip(prompts, every_seed, strict=True)
        ],
    )
    events = Events(engine, request)
    makes = Jobs(engine, model, request_id, events.take, is_streamed=bool(asked.stream))
    n = asked.n or 1
    jobs = [
        job
        for index, call in enumerate(calls)
        for job in makes.of(call, index * n, asked.logprobs, asked.max_tokens is not None)
    ]
    scoring = []
    if asked.echo and asked.logprobs is not None:  # numbered behind the choices
        long = [index for index, call in enumerate(calls) if len(call.requests[0].token_ids) > 1]
        scoring = [makes.scoring(calls[index], len(jobs) + index, asked.logprobs) for index in long]
    stops = asked.stops
    choices = [Choice(model.tokenizer, stops) for _ in jobs]
    head = {"id": f"cmpl-{request_id}", "object": "text_completion", "created": int(time.time()), "model": asked.model}
    head["system_fingerprint"] = f"mpg-{__version__}"
    echoed = [_echo(asked, model.tokenizer, prompt, call) for prompt, call in zip(prompts, calls, strict=True)]
    if asked.stream:
        return await as_stream(_chunks(asked, events, jobs, choices, head, echoed), request_id)
    of_prompts: dict[int, list[Any]] = {}
    running = [] if asked.max_tokens == 0 else jobs
    async for number, event in events.of([*running, *scoring]):
        if number >= len(jobs):
            assert isinstance(event, list)
            of_prompts[number - len(jobs)] = event
        else:
            choices[number].take(event)
    told = []
    for number, (choice, job) in enumerate(zip(choices, jobs, strict=True)):
        index = number // n
        logprobs = None
        if asked.logprobs is not None:
            tokens = _scored_prompt(job.request.token_ids, of_prompts.get(index, [])) if asked.echo else []
            logprobs = choice.completion_logprobs([*tokens, *scored(choice.tokens)])
        told.append({
            "index": number,
            "text": echoed[index] + choice.shown,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason if choice.result else "length",
            "mpg": choice.own(choice.tokens, bool(asked.trace)),
        })  # fmt: skip
    return as_json({**head, "choices": told, "usage": usage(jobs, choices, len(prompts))})


async def _chunks(
    asked: CompletionRequest,
    events: Events,
    jobs: list[Job],
    choices: list[Choice],
    head: dict[str, Any],
    echoed: Sequence[str],
) -> AsyncIterator[dict[str, Any]]:
    """One chunk a round and choice at most, the echoed prompt with the first."""
    has_usage, n = asked.stream_options is not None and asked.stream_options.include_usage, asked.n or 1
    begun: set[int] = set()

    def chunk(number: int, text: str, tokens: list[Any], finish_reason: str | None) -> dict[str, Any]:
        choice = choices[number]
        text = text if number in begun else echoed[number // n] + text
        begun.add(number)
        told: dict[str, Any] = {"index": number, "text": text, "finish_reason": finish_reason}
        is_told = asked.logprobs is not None and tokens
        told["logprobs"] = choice.completion_logprobs(scored(tokens)) if is_told else None
        if own := choice.own(tokens, bool(asked.trace)):
            told["mpg"] = own
        return {**head, "choices": [told], **({"usage": None} if has_usage else {})}

    if asked.max_tokens != 0:
        async for number, event in events.of(jobs):
            yield chunk(number, *choices[number].take(event))
    else:
        for number in range(len(choices)):
            yield chunk(number, "", [], "length")
    if has_usage:
        yield {**head, "choices": [], "usage": usage(jobs, choices, len(echoed))}


def _echo(asked: CompletionRequest, tokenizer: Any, prompt: Any, call: Any) -> str:
    """The prompt before the answer, where it is wanted: as it came, or what its token ids spell."""
    if not asked.echo or isinstance(prompt, str):
        return prompt if asked.echo else ""
    return "" if tokenizer is None else tokenizer.decode(call.requests[0].token_ids)


def _scored_prompt(token_ids: Sequence[int], of_tokens: Sequence[Any]) -> list[Any]:
    """A prompt's tokens with their log-probabilities, of which the first has none."""
    first = [(token_ids[0], None, ())]
    return first + [(token_id, *of_token) for token_id, of_token in zip(token_ids[1:], of_tokens, strict=True)]
