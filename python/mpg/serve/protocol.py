"""What requests may say, as pydantic checks it: OpenAI's fields that mpg honours, mpg's own, and nothing else.

Knows the API's words; what they mean to the models is `asks`'s business.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mpg.serve.errors import ApiError

# Fields of the API that are refused by name, unless they ask for nothing: beside each what does.
REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
    "prediction": (), "web_search_options": (), "reasoning_effort": ("none",), "verbosity": (), "moderation": (),
    "logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,), "best_of": (1,), "suffix": ("",),
    "store": (False,), "service_tier": ("auto", "default"), "prompt_cache_retention": (),
}  # fmt: skip
# Fields that say who asks, which no text depends on
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")
MAX_SEED = 2**63 - 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Part(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: None = None


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Context(_Strict):
    system: str | None = None
    prefix: str | None = None
    prompt: str | list[int] | list[Message] | None = None
    source: str | None = None


class Asked(_Strict):
    """What both ways of asking have. Weights and what follows them are mpg's own."""

    model: str
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stop: str | list[str] | None = None
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

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, given: Any) -> Any:
        """Leave out what asks for nothing. Raises ApiError for what asks for something that mpg has not."""
        if not isinstance(given, dict):
            return given
        kept = {}
        for name, value in given.items():
            if name not in REFUSED and name not in IGNORED:
                kept[name] = value
            elif name in REFUSED and value is not None and value not in REFUSED[name]:
                raise ApiError(
                    400, f"{name}: this server does not support it, got {value!r}", name, "unsupported_parameter"
                )
        return kept


class ChatRequest(Asked):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    continue_final_message: bool | None = None


class CompletionRequest(Asked):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None


class AttributeRequest(_Strict):
    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")
    source: str = Field(min_length=1, max_length=1024)
