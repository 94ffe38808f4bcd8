"""What the ops return, uncomputed: shapes, dtypes and devices, for FakeTensor and device="meta"."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _empty_acc(logits: Tensor, *shape: int) -> Tensor:
    return logits.new_empty(shape, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)


FAKES: dict[str, Callable[..., Tensor | tuple[Tensor, ...] | None]] = {
    "gather_logprobs": lambda logits, tokens, **_options: _empty_acc(logits, *tokens.shape),
    "score_prefixes": lambda attribute_logprobs, anchor_logprobs, weights, **_options: (
        attribute_logprobs.new_empty(attribute_logprobs.shape),
        anchor_logprobs.new_empty(anchor_logprobs.shape),
    ),
    "accept_prefixes": lambda scores, log_bound, uniforms, lengths: lengths.new_empty(lengths.shape),
    "update_bound_": lambda *_state, **_options: None,
    "verify_chunks": lambda anchor_logits, attribute_logits, tokens, lengths, *_state, **_options: (
        _empty_acc(anchor_logits, *attribute_logits.shape[:3]),
        _empty_acc(anchor_logits, *tokens.shape),
        lengths.new_empty(lengths.shape),
    ),
    "draw_fallback": lambda anchor_logits, *_inputs, **_options: (
        anchor_logits.new_empty(anchor_logits.shape[0], dtype=torch.int64),
        _empty_acc(anchor_logits, anchor_logits.shape[0]),
        _empty_acc(anchor_logits, anchor_logits.shape[0]),
    ),
    "draw_uniforms": lambda seeds, rounds, *, count, **_options: seeds.new_empty(
        (seeds.shape[0], count), dtype=torch.float64
    ),
    "combine_rows": lambda attribute_logits, *_inputs, **_options: (
        _empty_acc(attribute_logits, *attribute_logits.shape[1:]),
        _empty_acc(attribute_logits, *attribute_logits.shape[1:3]),
    ),
    "warp_rows": lambda log_rows, **_options: log_rows.new_empty(log_rows.shape),
    "draw_tokens": lambda probs, uniforms: uniforms.new_empty(uniforms.shape, dtype=torch.int64),
    "verify_block": lambda target_probs, draft_probs, tokens, lengths, uniforms: (
        lengths.new_empty(lengths.shape),
        target_probs.new_empty(lengths.shape),
    ),
    "draw_residual": lambda target_probs, draft_probs, tokens, lengths, *_state: lengths.new_empty(lengths.shape),
    "count_usable_": lambda rows, lengths, *_state: lengths.new_empty(lengths.shape),
    "commit_block_": lambda rows, limits, eos_token_ids, chunk, *_state: chunk.new_empty(
        (chunk.shape[0], 4 + chunk.shape[1] + 1)
    ),
    "lora_shrink": lambda x, down, groups: x.new_empty((*x.shape[:2], down.shape[1])),
    "lora_expand_": lambda *_inputs, **_options: None,
    "attend_rows": lambda query, key, value, positions, **_options: query.new_empty(
        (*positions.shape, query.shape[1], value.shape[3])
    ),
    "linear_panels": lambda x, panels, *_inputs, out_features=None, **_options: x.new_empty(
        (*x.shape[:-1], panels.shape[0] * panels.shape[2] if out_features is None else out_features)
    ),
    "rms_norm": lambda x, *_inputs, **_options: x.new_empty(x.shape),
}
for _name, _fake in FAKES.items():
    torch.library.register_fake(f"mpg::{_name}", _fake)
