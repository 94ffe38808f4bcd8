"""What a checked request means: the jobs that it takes, by what `Model.read` makes of it.

Knows the names of models and the server's limits; no HTTP.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import inf
from time import monotonic
from typing import Any

import mpg.options
from mpg.decode.request import Request
from mpg.frontend.requests import Call
from mpg.model import Model
from mpg.results import Transcript
from mpg.serve.engine import Engine
from mpg.serve.errors import ApiError, of_library
from mpg.serve.jobs import Job, Tell
from mpg.serve.messages import Begun
from mpg.serve.protocol import Asked, ChatRequest, CompletionRequest

BASE = "base"
OPTIONS = (
    "target", "sampler", "draft", "chunk_size", "verify", "adaptive", "mixture_span", "top_k", "min_p", "temperature",
    "top_p", "repetition_penalty", "trace",
)  # fmt: skip
SAMPLERS = tuple(name for name in mpg.options.SAMPLERS if name != "auto")  # for whose trial a server has no time
ROW_SAMPLERS = tuple(name for name in mpg.options.ROW_SAMPLERS if name in SAMPLERS)


def describe_models(model: Model, name: str) -> dict[str, dict[str, Any]]:
    """What `model=` may be, with its kind and weights: the combination, the base, every attribute, every preset."""
    kinds: dict[str, dict[str, Any]] = {name: {"kind": "combination", "weights": model.recipe.weights or {}}}
    kinds.setdefault(BASE, {"kind": "base", "weights": {}})
    for attribute in model.models.attribute_names:
        kinds.setdefault(attribute, {"kind": "attribute", "weights": {attribute: 1.0}})
    for preset, weights in model.recipe.presets.items():
        kinds.setdefault(preset, {"kind": "preset", "weights": dict(weights)})
    return kinds


def describe_model(model: Model, name: str, asked: str) -> dict[str, Any]:
    """Kind and weights of one name that `model=` may be, weights that are a name among them.

    Raises ApiError for a name that there is not, and for weights that no request may have.
    """
    known = describe_models(model, name)
    if asked in known:
        return known[asked]
    if "=" not in asked:
        raise _unknown(asked, known)
    try:
        weights = mpg.options.parse_weights(asked)
        mpg.options.check_weights(weights, model.models.attribute_names, "geometric")
    except ValueError as error:
        raise of_library(error, {"weights": "model"}) from error
    return {"kind": "weights", "weights": weights}


def _unknown(asked: str, known: Iterable[str]) -> ApiError:
    message = f"model: expected {', '.join(known)} or weights such as 'E=1,T=0.5', got {asked!r}"
    return ApiError(404, message + mpg.options.suggest(asked, list(known)), "model", "model_not_found")


def weights_of(asked: Asked, model: Model, name: str) -> tuple[Any, str | None]:
    """Weights and target that a request asks for by its model's name, its own weights going with the combination's.

    Raises ApiError for a name that there is not, for weights beside one that says them already, and for none beside a
    combination that has none.
    """
    if asked.model == name:
        target = asked.target or model.recipe.options.get("target")
        if asked.weights is None and not model.recipe.weights and target != "base":
            wanted = f"expected some beside model {name!r}, whose recipe has none"
            raise ApiError(400, f"weights: {wanted}, got none; model {BASE!r} is the base alone", "weights")
        return asked.weights, asked.target
    known = describe_models(model, name)
    if asked.model not in known and "=" not in asked.model:
        raise _unknown(asked.model, known)
    if asked.weights is not None:
        wanted = f"none beside model {asked.model!r}, which says them; model {name!r} takes them"
        raise ApiError(400, f"weights: expected {wanted}", "weights")
    if asked.model == BASE:
        if asked.target not in (None, "base"):
            raise ApiError(400, f"target: expected none beside model {BASE!r}, got {asked.target!r}", "target")
        return None, "base"
    if asked.model not in model.models.attribute_names:
        return asked.model, asked.target
    return {asked.model: 1.0}, asked.target


def read(asked: Asked, model: Model, prompt: Any, limits: Any, seed: int, **how: Any) -> Call:
    """What one prompt is asked with: a call whose requests are its choices.

    Raises ApiError that names the field.
    """
    weights, target = weights_of(asked, model, limits.name)
    stops = asked.stops
    if len(stops) > limits.max_stops or any(len(stop) > limits.max_stop_length for stop in stops):
        wanted = f"at most {limits.max_stops} of at most {limits.max_stop_length} characters"
        raise ApiError(400, f"stop: expected {wanted}, got {len(stops)}", "stop")
    n = asked.n or 1
    if n > limits.max_n:
        raise ApiError(400, f"n: expected at most {limits.max_n}, got {n}", "n")
    options = {name: getattr(asked, name) for name in OPTIONS} | {"target": target}
    if asked.sampler == "auto":
        wanted = f"one of {', '.join(SAMPLERS)}, as a server has no time for the trial of 'auto'"
        raise ApiError(400, f"sampler: expected {wanted}", "sampler")
    contexts = {
        name: context if isinstance(context, str) else context.model_dump(exclude_none=True)
        for name, context in (asked.contexts or {}).items()
    }
    max_tokens = asked.max_tokens
    if isinstance(asked, ChatRequest) and asked.max_completion_tokens is not None:
        if max_tokens not in (None, asked.max_completion_tokens):
            raise ApiError(
                400, "max_completion_tokens: expected one of it and max_tokens, got both", "max_completion_tokens"
            )
        max_tokens = asked.max_completion_tokens
    names = {"prompt": "messages" if isinstance(asked, ChatRequest) else "prompt"}
    names |= {"weights": "model"} if "=" in asked.model else {}
    temperature = model.recipe.options.get("temperature") if asked.temperature is None else asked.temperature
    # where nothing is drawn the library makes no copies: they are as many calls
    copies, firsts = (n, [seed]) if temperature != 0 else (1, [(seed + index) % 2**63 for index in range(n)])
    try:
        calls = [
            model.read(
                prompt, weights=weights, contexts=contexts or None, num_return_sequences=copies,
                stop_strings=stops or None, max_new_tokens=max_tokens or (1 if max_tokens == 0 else None), seed=first,
                **options, **how,
            )
            for first in firsts
        ]  # fmt: skip
    except ValueError as error:
        raise of_library(error, names) from error
    return replace(calls[0], requests=[request for call in calls for request in call.requests])


def read_request(
    asked: ChatRequest | CompletionRequest, engine: Engine, id: int, tell: Tell
) -> tuple[Begun, list[Job]]:
    """The jobs of a request, and what is to be known of it before they begin. Raises ApiError that names the field."""
    makes = Jobs(engine, engine.model, id, tell, is_streamed=bool(asked.stream))
    begun, jobs = _read_chat(asked, makes) if isinstance(asked, ChatRequest) else _read_completion(asked, makes)
    if len(jobs) > (most := engine.settings.max_queue):  # which no time would let in
        wanted = f"at most {most} choices and scored prompts of one request (--max-queue)"
        raise ApiError(400, f"n: expected {wanted}, got {len(jobs)}", "n", "request_too_large")
    return begun, jobs


def _read_chat(asked: ChatRequest, makes: Jobs) -> tuple[Begun, list[Job]]:
    [seed], how = seeds(asked, 1), {"continue_final_message": asked.continue_final_message}
    call = read(asked, makes.model, messages_of(asked), makes.engine.settings, seed, **how)
    num_top = (asked.top_logprobs or 0) if asked.logprobs else None
    jobs = makes.of(call, 0, num_top, asked.max_tokens is not None or asked.max_completion_tokens is not None)
    return Begun(len(jobs), len(jobs), len(call.requests[0].token_ids)), jobs


def _read_completion(asked: CompletionRequest, makes: Jobs) -> tuple[Begun, list[Job]]:
    settings, tokenizer = makes.engine.settings, makes.model.tokenizer
    prompts = prompts_of(asked, settings.max_prompts)
    calls = [
        read(asked, makes.model, prompt, settings, seed, raw=True)
        for prompt, seed in zip(prompts, seeds(asked, len(prompts)), strict=True)
    ]
    every_ids, n = [call.requests[0].token_ids for call in calls], asked.n or 1
    jobs = [
        job
        for index, call in enumerate(calls)
        for job in makes.of(call, index * n, asked.logprobs, asked.max_tokens is not None)
    ]
    echoes = [_echo(asked, tokenizer, prompt, ids) for prompt, ids in zip(prompts, every_ids, strict=True)]
    begun = Begun(0, len(jobs), sum(map(len, every_ids)), echoes)
    running = [] if asked.max_tokens == 0 else jobs
    if asked.echo and asked.logprobs is not None:  # numbered behind the choices
        spelled = spell(tokenizer, (id for ids in every_ids for id in ids))
        begun = begun._replace(prompts=[_sizes(tokenizer, ids) for ids in every_ids], spelled=spelled)
        long = [index for index, ids in enumerate(every_ids) if len(ids) > 1]
        running = running + [makes.scoring(calls[index], len(jobs) + index, asked.logprobs) for index in long]
    return begun._replace(num_jobs=len(running)), running


def _echo(asked: CompletionRequest, tokenizer: Any, prompt: Any, token_ids: Sequence[int]) -> str:
    """The prompt before the answer, where it is wanted: as it came, or what its token ids but special ones spell."""
    if not asked.echo or isinstance(prompt, str):
        return prompt if asked.echo else ""
    return "" if tokenizer is None else str(tokenizer.decode(token_ids, skip_special_tokens=True))


def _sizes(tokenizer: Any, token_ids: Sequence[int]) -> list[tuple[int, int]]:
    """Tokens by id, with the number of characters that each completes of their text."""
    tokens = Transcript(tokenizer, (), 0, 0).extend(list(token_ids), None, is_last=True)
    return [(token.id, len(token.text)) for token in tokens]


def spell(tokenizer: Any, token_ids: Iterable[int]) -> dict[int, str]:
    """Each token id by itself as text."""
    return {id: "" if tokenizer is None else tokenizer.decode([id]) for id in set(token_ids)}


class Jobs:
    """Makes the jobs of one request, whose `id` and `tell` these are. Where it is streamed, tokens come as they do."""

    def __init__(self, engine: Engine, model: Model, id: int, tell: Tell, *, is_streamed: bool):
        self.engine, self.model, self.id, self.tell = engine, model, id, tell
        self.deadline = monotonic() + engine.settings.max_seconds
        self.interval = engine.settings.stream_interval if is_streamed else inf

    def of(self, call: Call, first: int, num_top: int | None, is_limited: bool) -> list[Job]:
        """The jobs of one prompt's choices, numbered from `first` on. is_limited: whether the request says how long
        they may be"""
        if num_top is not None and call.options.sampler not in ROW_SAMPLERS:
            wanted = f"sampler {' or '.join(ROW_SAMPLERS)}, which have combined rows"
            raise ApiError(400, f"logprobs: expected {wanted}, got {call.options.sampler!r}", "logprobs")
        jobs = []
        for index, request in enumerate(call.requests):
            room = self.engine.max_length - request.longest_prompt
            if room < 1 or (is_limited and request.max_new_tokens > room):
                message = (
                    f"max_tokens: this server takes {self.engine.max_length} tokens of prompt and answer, expected at "
                    f"most {max(room, 0)} beside this prompt, got {request.max_new_tokens}"
                )
                raise ApiError(400, message, "max_tokens", "context_length_exceeded")
            fitting = replace(request, num_top=num_top, max_new_tokens=min(request.max_new_tokens, room))
            jobs.append(self._job(call, fitting, first + index))
        return jobs

    def scoring(self, call: Call, number: int, num_top: int) -> Job:
        """The job that scores a prompt's own tokens."""
        request = call.requests[0]
        if call.options.span != 1:
            wanted = "'token' beside echo with logprobs"
            raise ApiError(400, f"mixture_span: expected {wanted}, got {call.options.mixture_span!r}", "mixture_span")
        for name, ids in request.contexts.items():
            if ids[len(ids) - len(request.token_ids) + 1 :] != request.token_ids[1:]:
                raise ApiError(
                    400,
                    f"echo: the context {name!r} does not end with the prompt, expected logprobs of new tokens alone",
                    "echo",
                )
        return self._job(call, replace(request, num_top=num_top), number, scores_prompt=True)

    def _job(self, call: Call, request: Request, number: int, scores_prompt: bool = False) -> Job:
        return Job(
            id=self.id,
            model=self.model,
            call=call,
            request=request,
            tell=self.tell,
            number=number,
            deadline=self.deadline,
            interval=self.interval,
            scores_prompt=scores_prompt,
        )


def seeds(asked: Asked, num_prompts: int) -> list[int]:
    """The seed of every prompt's first choice: they count up through all choices."""
    first = secrets.randbits(32) if asked.seed is None else asked.seed
    return [(first + index * (asked.n or 1)) % 2**63 for index in range(num_prompts)]


def prompts_of(asked: CompletionRequest, max_prompts: int) -> list[Any]:
    """The prompts of a request, each as text or token ids."""
    given = asked.prompt
    prompts: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    if not prompts or not all(prompts):
        raise ApiError(400, f"prompt: expected text or token ids, not empty, got {given!r}", "prompt")
    if len(prompts) > max_prompts:
        raise ApiError(400, f"prompt: expected at most {max_prompts} prompts, got {len(prompts)}", "prompt")
    return prompts


def messages_of(asked: ChatRequest) -> list[Mapping[str, Any]]:
    """The conversation as `Model.read` takes it."""
    return [message.model_dump(exclude_none=True) for message in asked.messages]
