"""From what a caller gives to token ids: text, conversations, ids, and the padded tensors that a tokenizer returns.

Knows a tokenizer and nothing of models.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jinja2 import TemplateError
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages: TypeAlias = Sequence[Mapping[str, str]]
Prompt: TypeAlias = str | Messages | Sequence[int]
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


def encode(prompt: Any, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, *, raw: bool) -> list[int]:
    """Token ids of one prompt. raw: take a string verbatim, not as a user message through the chat template"""
    token_ids: Any
    if not isinstance(raw, bool):
        raise ValueError(f"raw: expected True or False, got {raw!r}")
    if not prompt:
        raise ValueError(f"prompt: expected at least one token, got {prompt!r}")
    if isinstance(prompt, str) and any("\ud800" <= c <= "\udfff" for c in prompt):
        raise ValueError(f"prompt: expected text that UTF-8 can hold, got {prompt!r}")
    if not isinstance(prompt, str) and isinstance(prompt[0], numbers.Integral):
        token_ids = [int(token) for token in prompt]
    elif tokenizer is None:
        raise ValueError(f"prompt: this model has no tokenizer, expected token ids, got {prompt!r}")
    elif isinstance(prompt, str) and (raw or not tokenizer.chat_template):
        token_ids = tokenizer(prompt, **_QUIET)["input_ids"]
    elif not tokenizer.chat_template:
        raise ValueError(f"prompt: this model has no chat template, expected a string, got {prompt!r}")
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if not all(message.get("role") and message.get("content") for message in messages):
            raise ValueError(f"prompt: expected a role and some text in every message, got {prompt!r}")
        try:
            token_ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False, tokenizer_kwargs=_QUIET
            )
        except (TemplateError, TypeError) as error:  # a role that it refuses; text that UTF-8 cannot hold
            wanted = "messages that the chat template takes"
            raise ValueError(f"prompt: expected {wanted}, got {prompt!r}: {error}") from error
    for token in token_ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"prompt: expected token ids in 0..{vocab_size - 1}, got {token}")
    return token_ids


def unpad(input_ids: Any, attention_mask: Any, pad_token_id: int | None) -> Any:
    """The tokens of each row that are no padding, whichever side that is on.

    input_ids:      integers (B, L) or (L,), as a tensor or as the lists that a tokenizer returns
    attention_mask: of the same shape, 0 at padding; without one `pad_token_id` is padding in a tensor

    out: B lists, or one, of token ids

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
    if attention_mask is None:
        return input_ids
    mask = attention_mask.tolist() if isinstance(attention_mask, Tensor) else attention_mask
    if _is_all(input_ids, numbers.Integral):
        return _unpad_row(input_ids, mask)
    if not isinstance(mask, (list, tuple)) or len(mask) != len(input_ids):
        raise ValueError(f"attention_mask: expected {len(input_ids)} rows as in input_ids, got {attention_mask!r}")
    return [_unpad_row(ids, of_row) for ids, of_row in zip(input_ids, mask, strict=True)]


def _unpad_row(ids: Any, mask: Any) -> Any:
    if not isinstance(mask, (list, tuple)) or len(mask) != len(ids):
        raise ValueError(f"attention_mask: expected {len(ids)} entries as in a row of input_ids, got {mask!r}")
    kept = [index for index, is_token in enumerate(mask) if is_token]
    if kept and kept[-1] - kept[0] + 1 != len(kept):
        raise ValueError(f"attention_mask: expected padding before or behind a row's tokens, got some between: {mask}")
    return ids[kept[0] : kept[-1] + 1] if kept else []


def _is_all(parts: Any, kind: type) -> bool:
    return isinstance(parts, (list, tuple)) and all(isinstance(p, kind) and not isinstance(p, bool) for p in parts)
