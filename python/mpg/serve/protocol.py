"""What requests may say, as pydantic checks it: OpenAI's fields that mpg honours, mpg's own, and nothing else.

Knows the API's words; what they mean to the models is `asks`'s business.
"""

from __future__ import annotations

import json
import re
from reprlib import repr as short
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator

from mpg.files import parse_json
from mpg.options import MAX_SEED
from mpg.serve.errors import ApiError
from mpg.serve.settings import MOST_ATTRIBUTES

# Fields of the API that are refused by name, unless they ask for nothing: beside each what does.
REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
    "prediction": (), "web_search_options": (), "reasoning_effort": ("none",), "verbosity": (), "moderation": (),
    "logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,), "best_of": (1,), "suffix": ("",),
    "store": (False,), "service_tier": ("auto", "default"), "prompt_cache_options": (), "prompt_cache_retention": (),
}  # fmt: skip
# Fields that say who asks, which no text depends on
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")
UNKNOWN = "value_error"  # pydantic's name for an error of a validator, of which `_Unknown` is the only one
MAX_MESSAGES = 4096  # and parts of one: checking them holds up others
BRANCH = re.compile(r"str|int|Context|(list|dict)\[.*\]")  # what pydantic calls one of several ways to read a field


class _First(FailFast):
    """A rule that tells the first of a million wrong items, and looks at no other. Hashable, as a part of a union."""

    __hash__ = object.__hash__


Item = TypeVar("Item")
List = Annotated[list[Item], _First()]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _know(cls, given: Any) -> Any:
        """Refuse what nobody knows, at the first such name."""
        return _known(given, cls)


class _Unknown(ValueError):
    """A field that there is not."""

    def __init__(self, name: str, value: Any):
        super().__init__("there is no such field")
        self.name, self.value = name, value


def _known(given: Any, kind: type[BaseModel]) -> Any:
    for name in given if isinstance(given, dict) else ():
        if name not in kind.model_fields:
            raise _Unknown(name, given[name])
    return given


class Part(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[List[Part], Field(max_length=MAX_MESSAGES)]
    # what OpenAI's client sends of an earlier answer, and mpg has no use for
    name: None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Context(_Strict):
    system: str | None = None
    prefix: str | None = None
    prompt: str | List[int] | Annotated[List[Message], Field(max_length=MAX_MESSAGES)] | None = None
    source: str | None = None


class Asked(_Strict):
    """What both ways of asking have. Weights and what follows them are mpg's own. `Options` checks what is one of its
    own; here stand the bounds of what it does not see as it was sent."""

    model: str
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stop: str | List[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    weights: dict[str, float] | str | None = None
    contexts: dict[str, str | Context] | None = None
    target: str | None = None
    sampler: str | None = None
    draft: str | None = None
    chunk_size: int | None = None
    verify: str | None = None
    adaptive: bool | None = None
    mixture_span: int | str | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    trace: bool | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @model_validator(mode="before")
    @classmethod
    def _know(cls, given: Any) -> Any:
        """Leave out what asks for nothing. Raises ApiError for what asks for something that mpg has not."""
        if not isinstance(given, dict):
            return given
        kept = {}
        for name, value in given.items():
            if name not in REFUSED and name not in IGNORED:
                kept[name] = value
            elif name in REFUSED and value is not None and value not in REFUSED[name]:
                message = f"{name}: this server does not support it, got {short(value)}"
                raise ApiError(400, message, name, "unsupported_parameter")
        for name in ("weights", "contexts"):
            if isinstance(value := kept.get(name), dict) and len(value) > MOST_ATTRIBUTES:
                raise ApiError(400, f"{name}: expected at most {MOST_ATTRIBUTES} names, got {len(value)}", name)
        return _known(kept, cls)


class ChatRequest(Asked):
    messages: List[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    continue_final_message: bool | None = None


class CompletionRequest(Asked):
    prompt: str | List[str] | List[int] | List[List[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None


class AttributeRequest(_Strict):
    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    source: str = Field(min_length=1, max_length=1024)


Kind = TypeVar("Kind", bound=_Strict)


def parse(kind: type[Kind], content_type: str, body: bytes) -> Kind:
    """What a request says. Raises ApiError that names the field."""
    if content_type.partition(";")[0].strip().lower() != "application/json":  # which pages of other sites cannot send
        message = f"content-type: expected application/json, got {content_type[:100] or 'none'}"
        raise ApiError(415, message, "content-type")
    return read_body(kind, body)


def read_body(kind: type[Kind], body: bytes) -> Kind:
    """`parse` of what is known to be JSON."""
    try:
        given = parse_json(body.decode(json.detect_encoding(body)))
    except ValueError as error:
        raise ApiError(400, f"body: expected JSON, got {short(body)}: {error}") from None
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _of_first(error.errors(include_url=False)) from None


def _of_first(errors: list[Any]) -> ApiError:
    """What is wrong with the first field of which something is. Of several ways to read it, those that came furthest
    say what was wanted."""
    of_field = [error for error in errors if error["loc"][:1] == errors[0]["loc"][:1]]
    depths = [len(error["loc"]) + (error["type"] == UNKNOWN) for error in of_field]
    furthest = [error for error, depth in zip(of_field, depths, strict=True) if depth == max(depths)]
    first = furthest[0]
    place = [str(part) for part in first["loc"] if not BRANCH.fullmatch(str(part))]
    if first["type"] == UNKNOWN:
        unknown = first["ctx"]["error"]
        message, got, code = str(unknown), unknown.value, "unknown_parameter"
        place.append(unknown.name)
    elif first["type"] == "missing":
        return ApiError(400, f"{'.'.join(place)}: expected it, got none", place[0])
    else:
        wanted = [_wanted(error) for error in furthest]
        message, got, code = f"expected {' or '.join(dict.fromkeys(wanted))}", first["input"], None
    return ApiError(400, f"{'.'.join(place) or 'body'}: {message}, got {short(got)}", place[0] if place else None, code)


def _wanted(error: Any) -> str:
    if error["type"] == "model_type":
        return "an object"
    if error["type"] in ("too_short", "too_long"):
        most, least = error["ctx"].get("max_length"), error["ctx"].get("min_length")
        return f"at most {most} items" if most else f"at least {least}"
    return str(error["msg"]).removeprefix("Input should be ")
