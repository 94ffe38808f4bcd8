"""Token ids of what an attribute with a context reads, made from the prompt that the base reads.

Knows a tokenizer and nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpg.context import Context
from mpg.frontend.prompts import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def of_prompts(loaded: Mapping[str, Context], given: Any, num_prompts: int) -> list[dict[str, Context]]:
    """The contexts of every prompt of a call, by name: those of its models, and before them those that the call gives.

    given  {name: Context, text for a system message, or a mapping}, or a list of such a mapping per prompt

    Raises ValueError that begins with contexts for what is none of these.
    """
    per_prompt = given if isinstance(given, (list, tuple)) else [given] * num_prompts
    if len(per_prompt) != num_prompts:
        raise ValueError(f"contexts: expected one mapping, or one per prompt ({num_prompts}), got {len(per_prompt)}")
    return [{**loaded, **contexts_of(of_prompt)} for of_prompt in per_prompt]


def contexts_of(given: Any) -> dict[str, Context]:
    """The contexts that a caller means by a mapping, or by None."""
    if not isinstance(given, Mapping | None):
        raise ValueError(f"contexts: expected a mapping from names to contexts, got {given!r}")
    for name, text in (given or {}).items():
        if isinstance(text, list | tuple):
            wanted = "one text for all prompts, or contexts=[{...}, ...] with a mapping per prompt"
            raise ValueError(f"contexts[{name!r}]: expected {wanted}, got {text!r}")
    return {name: Context.of(f"contexts[{name!r}]", text) for name, text in (given or {}).items()}


def contexts_beside(
    loaded: Mapping[str, Context], per_prompt: Sequence[Mapping[str, Context]]
) -> list[dict[str, Context]]:
    """The contexts of every prompt that are not the loaded ones."""
    return [{name: own for name, own in of.items() if loaded.get(name) is not own} for of in per_prompt]


def read_context(
    context: Context,
    name: str,
    prompt: Any,
    token_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    *,
    raw: bool = False,
    **how: Any,
) -> list[int]:
    """Token ids of what the attribute reads.

    name       what it is called, for messages
    prompt     what the caller gave, and `token_ids` what the base reads of it
    raw, how   as `frontend.prompts.encode` has them

    Raises ValueError, with `name`, where there is no tokenizer, where a prompt has no place for a system message,
    and where the chat template refuses or drops one.
    """
    if context.prompt is not None:
        if not isinstance(context.prompt[0], Mapping):  # nothing that could be gone on with
            how["continue_final_message"] = None
        return encode(context.prompt, tokenizer, vocab_size, raw=raw, name=f"{name}: prompt", **how)
    if tokenizer is None:
        raise ValueError(f"{name}: this model has no tokenizer, expected prompt= as token ids, got text")
    if context.prefix is not None:
        bos = [tokenizer.bos_token_id] if token_ids[:1] == [tokenizer.bos_token_id] else []
        return [*bos, *tokenizer(context.prefix, add_special_tokens=False)["input_ids"], *token_ids[len(bos) :]]
    way_out = "expected prefix=, which any model reads"
    is_text = isinstance(prompt, str)
    if not tokenizer.chat_template or (raw and is_text) or not (is_text or isinstance(prompt[0], Mapping)):
        what = "prompts as they are" if tokenizer.chat_template else "no chat template"
        raise ValueError(f"{name}: this call has {what} and no place for a system message; {way_out}")
    messages = [{"role": "user", "content": prompt}] if is_text else list(prompt)
    messages = messages[messages[0].get("role") == "system" :]
    try:
        read = encode([{"role": "system", "content": context.system}, *messages], tokenizer, vocab_size, **how)
    except ValueError as error:
        raise ValueError(f"{name}: {way_out}, as the chat template refuses a system message: {error}") from error
    if messages and read == encode(messages, tokenizer, vocab_size, **how):
        raise ValueError(f"{name}: {way_out}, as the chat template drops the system message")
    return read
