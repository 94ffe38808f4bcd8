"""Attention over rows that have their own lengths, and which models can be run on it.

Knows masks, and what each kind of model would get wrong; nothing of adapters or decoding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import causal_mask_function

import mpg_ext
from mpg.models.cache import RaggedCache, Reach, as_argument
from mpg.models.lengths import Lengths, attend_by_lengths, most_queries

DEVICE_OF_LENGTHS = "cuda"
ATTENTION = "mpg"  # the name under which transformers finds the two functions at the end of this file
CACHED_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
ALIBI_MODEL_TYPES = {"bloom", "mpt"}
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
# How far logits may be from an uncached forward's, as a share of their spread over the vocabulary. What goes wrong is
# off by 18 % of it or more; rounding is 1e-6 of it in float32, and in bfloat16 2 % over 24 layers.
MAX_DEVIATION = {64: 0.01, 32: 0.01, 16: 0.15}  # by the bits of the dtype


def own_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Keeps a caller's torch.autocast out: what is cached, packed and stacked has the model's own type."""
    usable = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if usable else nullcontext()


def use_ragged_attention(model: PreTrainedModel, argument: str) -> None:
    """Make `model` attend through this file, or refuse it by name where it would go wrong (some would silently).

    argument: what the caller named the model, for the message

    Raises ValueError for encoder-decoders, recurrent layers, ALiBi, length-dependent RoPE, and models that do not call
    the attention interface.
    """
    config = model.config.get_text_config()
    if reason := _unsupported(model, config):
        raise _refusal(argument, config, reason)
    model.set_attn_implementation(ATTENTION)


@torch.no_grad()
def verify_ragged_attention(model: PreTrainedModel, argument: str) -> int:
    """Refuse a model whose logits on ragged rows are not those of its own uncached forward.

    `use_ragged_attention` refuses what is known to go wrong; this is for all the others. Two rows of 4 and 3 tokens,
    one of which has a token rejected, and the other its last one read again where the host knows its place, against one
    plain forward: four forwards of 17 positions in all, once, the time of four to seven decoded tokens. It cannot see
    what only long texts show.

    argument: what the caller named the model, for the message

    out: bytes that the cache takes for one position of one row

    Raises ValueError if a forward fails, or if a position deviates by more than MAX_DEVIATION; in 16 bits both
    positions of a row must, as a router may send one token elsewhere. Logits that are not finite are not judged.
    """
    config = model.config.get_text_config()
    rows = _two_rows(model)
    cache = RaggedCache(config.num_hidden_layers, 2, capacity=4)
    try:
        with own_precision(model.device):
            model.set_attn_implementation("eager")
            plain = model(input_ids=rows, use_cache=False).logits
            model.set_attn_implementation(ATTENTION)
            ragged = _feed_ragged(model, cache, rows)
            positions = cache.place(slice(0, 1), rows.new_tensor([3]), num_tokens=1, kv_length=4, start_at=3)
            placed = _forward(model, rows[:1, 3:], positions, cache)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the forward of an unknown model raises
        raise _refusal(argument, config, f"its forward raises {type(error).__name__}: {error}") from error
    ragged = torch.cat([ragged, torch.cat([placed, ragged[1:, 1:]])], 1)
    expected = torch.stack([plain[0, [2, 3, 3]], plain[1, [1, 2, 2]]]).float()
    if (expected == expected[..., :1]).all():
        raise _refusal(argument, config, "its logits are the same for every token, as of a head of zeros")
    deviation, bits = _deviation(ragged, expected), torch.finfo(model.dtype).bits
    if deviation > MAX_DEVIATION[bits]:
        reason = (
            f"on short ragged rows its logits deviate from an uncached forward's by {deviation:.0%} of their spread"
        )
        raise _refusal(argument, config, reason)
    return cache.bytes_per_position()


@torch.no_grad()
def most_by_rows(model: PreTrainedModel) -> int:
    """Up to how many queries of a row `model` attends by mpg's own op: on the CPU one, in more than 16 bits any number,
    unless its logits then deviate from those by a mask.

    Not timed: of one query nothing is left of a product that a library could be faster at, and the op reads each row's
    own keys and needs no mask. Of many it takes .7 to 1.4 of the time, and gives a row what it gives it alone.
    """
    if model.device.type != "cpu":
        return 0
    bits = torch.finfo(model.dtype).bits
    most = 1 if bits == 16 else sys.maxsize
    rows, logits = _two_rows(model), []
    last, start = torch.stack([rows[0, 3:], rows[1, 2:3]]), rows.new_tensor([3, 2])
    try:
        with own_precision(model.device):
            for by_rows in (0, most):
                cache = RaggedCache(model.config.get_text_config().num_hidden_layers, 2, capacity=4, by_rows=by_rows)
                _forward(model, rows[:, :3], cache.place(slice(0, 2), torch.zeros_like(start), 3, kv_length=4), cache)
                logits.append(_forward(model, last, cache.place(slice(0, 2), start, 1, kv_length=4), cache))
    except Exception:  # whatever a model raises whose attention takes nothing but a mask
        return 0
    return most if _deviation(logits[1], logits[0].float()) <= MAX_DEVIATION[bits] else 0


@torch.no_grad()
def choose_lengths(model: PreTrainedModel) -> int:
    """Up to how many queries of a row `model` attends by lengths: 0 for none, wherever its device or dtype has no such
    kernel, its logits on ragged rows then deviate from those by a mask, or this machine is not faster so."""
    bits = torch.finfo(model.dtype).bits
    if model.device.type != DEVICE_OF_LENGTHS or bits != 16:
        return 0
    config, logits = model.config.get_text_config(), []
    try:
        with own_precision(model.device):
            for by_lengths in (0, 2):
                cache = RaggedCache(config.num_hidden_layers, 2, 4, by_lengths)
                logits.append(_feed_ragged(model, cache, _two_rows(model)))
            if _deviation(logits[1], logits[0].float()) > MAX_DEVIATION[bits]:
                return 0
            return most_queries(partial(ragged_attention, model), config.num_attention_heads, cache.any_keys())
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model raises whose attention lengths do not describe
        return 0


def _two_rows(model: PreTrainedModel) -> Tensor:
    """Tokens (2, 4) from all over the vocabulary."""
    return (torch.arange(1, 9, device=model.device) * model.config.get_text_config().vocab_size // 9).view(2, 4)


def _feed_ragged(model: PreTrainedModel, cache: RaggedCache, rows: Tensor) -> Tensor:
    """Feed two rows of which the second is a token shorter, as it has one rejected. out: the last two logits of each"""
    before, after = rows[:, :2].clone(), torch.stack([rows[0, 2:], rows[1, 1:3]])
    before[1, 1] = rows[0, 0]  # row 1 is one token long: this one is rejected
    for tokens, start in ((before, [0, 0]), (after, [2, 1])):
        positions = cache.place(slice(0, 2), rows.new_tensor(start), num_tokens=2, kv_length=4)
        logits = _forward(model, tokens, positions, cache)
    return logits


def _forward(model: PreTrainedModel, tokens: Tensor, positions: Tensor, cache: RaggedCache) -> Tensor:
    output = model(input_ids=tokens, position_ids=positions, use_cache=True, **as_argument(model, cache))
    return output.logits


def _deviation(logits: Tensor, expected: Tensor) -> float:
    """The largest of any row (rows, positions, V), in 16 bits that of its better position, as a share of the spread."""
    deviations = (logits.float() - expected).square().mean(-1).sqrt() / expected.std(-1)
    return (deviations.amin(-1) if torch.finfo(logits.dtype).bits == 16 else deviations).amax().item()


def _refusal(argument: str, config: PreTrainedConfig, reason: str) -> ValueError:
    wanted = "a model that can run on a ragged cache"
    return ValueError(f"{argument}: expected {wanted}, got {config.model_type}: {reason}")


def _unsupported(model: PreTrainedModel, config: PreTrainedConfig) -> str | None:
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder, not a decoder-only model"
    if model.get_output_embeddings() is None:
        return f"{type(model).__name__} has no language-model head, so it is no causal language model"
    other_layers = set(getattr(config, "layer_types", None) or ()) - CACHED_LAYER_TYPES
    if model._is_stateful or other_layers:
        names = ", ".join(sorted(other_layers)) or "recurrent"
        return f"{names} layers keep a state that cannot be rolled back when drafted tokens are rejected"
    if config.model_type in ALIBI_MODEL_TYPES or getattr(config, "alibi", False):
        return "ALiBi position biases do not pass through the attention interface"
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):  # one dict, or one per layer type
        if isinstance(parameters, dict) and parameters.get("rope_type") in LENGTH_DEPENDENT_ROPE:
            return f"RoPE type {parameters['rope_type']!r} changes with the longest row, so cached keys would go stale"
    if getattr(config, "attn_temperature_tuning", False):  # Llama 4
        return (
            "attn_temperature_tuning takes the positions of all rows from one length; set it to False in the "
            "configuration, which changes nothing below floor_scale positions"
        )
    if not model._supports_attention_backend:
        return "it does not declare that its attention goes through transformers' attention interface"
    return None


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Lengths | Reach | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with grouped heads, optionally with capped scores (Gemma 2) or sinks (GPT-OSS).

    query: (R, H * G, q, D); key, value: (R, H, kv, D); attention_mask: of `ragged_mask`
    s_aux: (H * G,) sink logits, or None

    out: (R, q, H * G, D)
    """
    if isinstance(attention_mask, Lengths | Reach):
        if softcap is not None or s_aux is not None:
            raise ValueError("attention without a mask: expected no softcap and no s_aux")
        if isinstance(attention_mask, Reach):
            return mpg_ext.attend_rows(query, key, value, attention_mask.positions, scale=scaling), None
        return attend_by_lengths(query, key, value, attention_mask, scaling), None
    rows, num_heads, num_queries, head_dim = query.shape
    groups = num_heads // key.shape[1]
    # The G query heads of one key head become G times the queries. Unlike enable_gqa, this lets a fused kernel run with
    # a mask on CUDA too; the fallback there would repeat keys and values G times.
    query = query.reshape(rows, key.shape[1], groups * num_queries, head_dim)
    mask = None if attention_mask is None else attention_mask.to(query.dtype)
    if mask is not None and groups > 1 and num_queries > 1:  # of one query it is the same for all
        mask = mask[:, :, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)
    if softcap is None and s_aux is None:
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    else:
        scores = (query @ key.transpose(2, 3)).float() * (head_dim**-0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores + mask
        if s_aux is not None:
            sinks = s_aux.float().view(1, key.shape[1], groups, 1, 1).expand(rows, -1, -1, num_queries, -1)
            scores = torch.cat([scores, sinks.flatten(2, 3)], dim=-1)
        out = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype) @ value
    return out.reshape(rows, num_heads, num_queries, -1).transpose(1, 2).contiguous(), None


def ragged_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor | Lengths | Reach = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Tensor | Lengths | Reach | None:
    """The model's own mask function (causal, sliding, chunked) evaluated at every row's own query positions.

    q_offset: from RaggedCache: (R,) int64, or where all rows start, behind their first token; or lengths or reach

    out: (R, 1, q, kv) in `dtype`, to be added to scores: 0 = attend, -inf = do not. Made once a forward; of a bool mask
    every layer would make it anew, as it copies this one for the heads of a group where there are several queries. None
    where a single query attends to all that is held; the lengths or reach, if there are any, where each does to all
    before it
    """
    assert not isinstance(q_offset, int) or q_offset > 0, "the model attends without its cache"
    assert mask_function is not None
    if isinstance(q_offset, Lengths | Reach) and mask_function is causal_mask_function:
        return q_offset
    if isinstance(q_offset, Reach):
        q_offset = q_offset.offset
    if isinstance(q_offset, Lengths):
        q_offset = q_offset.used.view(batch_size, q_length)[:, 0] - 1
    if isinstance(q_offset, Tensor):
        queries = q_offset[:, None] + torch.arange(q_length, device=device)
        queries = queries.clamp_max(kv_length - 1)  # as in place(): a row past its end would see nothing and turn NaN
    elif q_offset + 1 == kv_length and mask_function is causal_mask_function:
        return None
    else:
        queries = torch.arange(q_offset, q_offset + q_length, device=device)[None]
    rows = torch.arange(batch_size, device=device)
    mask = mask_function(
        rows[:, None, None, None],
        torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device),
        queries[:, None, :, None],
        torch.arange(kv_length, device=device)[None, None, None, :],
    )
    scores = torch.full(mask.shape, -torch.inf, dtype=dtype, device=device).masked_fill_(mask, 0)
    return scores.expand(batch_size, 1, q_length, kv_length)


AttentionInterface.register(ATTENTION, ragged_attention)
AttentionMaskInterface.register(ATTENTION, ragged_mask)
