"""Token ids of what a caller gives: text, conversations, ids, and the padded tensors that a tokenizer returns.

Knows a tokenizer and nothing of models.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jinja2 import TemplateError
from torch import Tensor

from mpg.options import check_truth

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages: TypeAlias = Sequence[Mapping[str, Any]]
Prompt: TypeAlias = str | Messages | Sequence[int]
# Of a message where the chat template names no others: a template that prints any role would print a misspelt one.
ROLES = ("system", "developer", "user", "assistant", "tool")
# What tokenizers' apply_chat_template takes beside the template's own words, and mpg gives or has no use for.
TEMPLATED = frozenset(
    ("conversation", "add_generation_prompt", "continue_final_message", "tokenize", "return_tensors", "return_dict",
     "tokenizer_kwargs", "padding", "truncation", "max_length", "return_assistant_tokens_mask")
)  # fmt: skip
_QUIET = {"verbose": False}  # no warning of its own about a long prompt, which is refused where the model is known


def as_list(prompt: Any) -> tuple[list[Prompt], bool]:
    """The prompts of a call, and whether they were given as a list of them."""
    if isinstance(prompt, str):
        return [prompt], False
    if isinstance(prompt, (list, tuple)) and prompt:
        if _is_all(prompt, Mapping) or _is_all(prompt, numbers.Integral):
            return [prompt], False
        if all(isinstance(part, str) or _is_all(part, Mapping) or _is_all(part, numbers.Integral) for part in prompt):
            return list(prompt), True
    raise ValueError(f"prompt: expected text, messages, token ids, or a list of one of these, got {prompt!r}")


def encode(
    prompt: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    *,
    raw: bool = False,
    continue_final_message: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    name: str = "prompt",
) -> list[int]:
    """Token ids of one prompt, as `Model.generate` takes it. name: what the caller knows it by

    Text that begins with the tokenizer's BOS is templated already: no special tokens are added to it.
    """
    check_truth("raw", raw)
    if continue_final_message is not None:
        check_truth("continue_final_message", continue_final_message)
    if not isinstance(chat_template_kwargs, Mapping | None):
        raise ValueError(f"chat_template_kwargs: expected a mapping, got {chat_template_kwargs!r}")
    if unknown := [name for name in chat_template_kwargs or () if not isinstance(name, str)]:
        raise ValueError(f"chat_template_kwargs: expected text as names, got {unknown[0]!r}")
    if own := TEMPLATED.intersection(chat_template_kwargs or ()):
        wanted = "none of what mpg itself tells the chat template"
        raise ValueError(f"chat_template_kwargs: expected {wanted}, got {min(own)!r}")
    if not prompt:
        raise ValueError(f"{name}: expected text, messages or token ids, not empty, got {prompt!r}")
    is_text, is_ids = isinstance(prompt, str), isinstance(prompt[0], numbers.Integral)
    if continue_final_message and (is_text or is_ids):
        raise ValueError(f"continue_final_message: expected messages to go on with, got {name} {prompt!r}")
    if is_text and any("\ud800" <= c <= "\udfff" for c in prompt):
        raise ValueError(f"{name}: expected text that UTF-8 can hold, got {prompt!r}")
    token_ids: Any
    if is_ids:
        token_ids = [int(token) for token in prompt]
    elif tokenizer is None:
        wanted = "token ids, or a model loaded with tokenizer=..."
        raise ValueError(f"{name}: this model has no tokenizer, expected {wanted}, got {prompt!r}")
    elif is_text and (raw or not tokenizer.chat_template):
        is_templated = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
        token_ids = tokenizer(prompt, add_special_tokens=not is_templated, **_QUIET)["input_ids"]
    elif not tokenizer.chat_template:
        raise ValueError(f"{name}: this model has no chat template, expected a string, got {prompt!r}")
    else:
        messages = (
            [{"role": "user", "content": prompt}]
            if is_text
            else read_messages(prompt, name, str(tokenizer.chat_template))
        )
        if continue_final_message is None and messages[-1]["role"] == "assistant":
            wanted = "continue_final_message=True to go on with it, or False for a turn of its own"
            raise ValueError(f"{name}: the last message is the assistant's, expected {wanted}, got neither")
        try:
            token_ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=not continue_final_message, tokenize=True, return_tensors=None,
                continue_final_message=bool(continue_final_message), return_dict=False, tokenizer_kwargs=_QUIET,
                **chat_template_kwargs or {},
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError) as error:  # a role that it refuses; text that UTF-8 cannot hold
            wanted = "messages that the chat template takes"
            raise ValueError(f"{name}: expected {wanted}, got {prompt!r}: {error}") from error
    for token in token_ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name}: expected token ids in 0..{vocab_size - 1}, got {token}")
    return token_ids


def read_messages(messages: Messages, name: str, template: str) -> list[dict[str, Any]]:
    """The messages with their contents as text, everything else in them left to the chat template.

    Raises ValueError, with the name, for one without text, and for a role that neither the template nor anyone names.
    """
    read = []
    for index, message in enumerate(messages):
        role, content, place = message.get("role"), message.get("content"), f"{name}: message {index}"
        if not isinstance(role, str) or not role:
            raise ValueError(f"{place}: expected a role, got {role!r}")
        if role not in ROLES and f"'{role}'" not in template and f'"{role}"' not in template:
            wanted = f"a role that the chat template names, or one of {', '.join(ROLES)}"
            raise ValueError(f"{place}: expected {wanted}, got {role!r}")
        if isinstance(content, (list, tuple)):
            content = "".join(_read_part(part, place) for part in content)
        if content is not None and not isinstance(content, str):
            raise ValueError(f"{place}: expected text or a list of text parts as content, got {content!r}")
        if not content and not message.get("tool_calls"):
            raise ValueError(f"{place}: expected some text, got {message.get('content')!r}")
        read.append({**message, "content": content} if "content" in message else dict(message))
    return read


def _read_part(part: Any, place: str) -> str:
    kind, text = (part.get("type"), part.get("text")) if isinstance(part, Mapping) else (None, None)
    if kind == "text" and isinstance(text, str):
        return text
    got = repr(part) if kind is None else "one without text" if kind == "text" else f"one of type {kind!r}"
    raise ValueError(f"{place}: expected parts of type 'text', got {got}")


def unpad(input_ids: Any, attention_mask: Any, pad_token_id: int | None) -> tuple[list[Any], bool, list[int]]:
    """The tokens of each row that are no padding, whichever side that is on.

    input_ids:      integers (B, L) or (L,), as a tensor or as the lists that a tokenizer returns
    attention_mask: of the same shape, 0 at padding; without one `pad_token_id` is padding in a tensor

    out: B lists of token ids; whether there was a dimension B; the length of each row with its padding

    Raises ValueError for other tensors, for a mask of another shape, and where padding lies between tokens.
    """
    if isinstance(input_ids, Tensor):
        if input_ids.ndim not in (1, 2) or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            got = f"{tuple(input_ids.shape)} of {input_ids.dtype}"
            raise ValueError(f"input_ids: expected integers (B, L) or (L,), got {got}")
        if attention_mask is None and pad_token_id is not None:
            attention_mask = input_ids != pad_token_id
        input_ids = input_ids.tolist()
    if not isinstance(input_ids, (list, tuple)):
        raise ValueError(f"input_ids: expected a tensor or lists of token ids, got {input_ids!r}")
    rows, is_list = as_list(input_ids)
    widths = [len(row) for row in rows]
    if attention_mask is not None:
        mask = attention_mask.tolist() if isinstance(attention_mask, Tensor) else attention_mask
        mask = mask if is_list else [mask]
        if not isinstance(mask, (list, tuple)) or len(mask) != len(rows):
            raise ValueError(f"attention_mask: expected {len(rows)} rows as in input_ids, got {attention_mask!r}")
        rows = [_unpad_row(ids, of_row) for ids, of_row in zip(rows, mask, strict=True)]
    return rows, is_list, widths


def _unpad_row(ids: Any, mask: Any) -> Any:
    if not isinstance(mask, (list, tuple)) or len(mask) != len(ids):
        raise ValueError(f"attention_mask: expected {len(ids)} entries as in a row of input_ids, got {mask!r}")
    kept = [index for index, is_token in enumerate(mask) if is_token]
    if kept and kept[-1] - kept[0] + 1 != len(kept):
        raise ValueError(f"attention_mask: expected padding before or behind a row's tokens, got some between: {mask}")
    return ids[kept[0] : kept[-1] + 1] if kept else []


def _is_all(parts: Any, kind: type) -> bool:
    return isinstance(parts, (list, tuple)) and all(isinstance(p, kind) and not isinstance(p, bool) for p in parts)
