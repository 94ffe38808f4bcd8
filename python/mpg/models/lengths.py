"""Attention by lengths in place of a mask: on a GPU its kernel splits the keys of few rows over all multiprocessors.

Knows torch's kernel and when it is right and faster; nothing of the cache that the lengths are of.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# Queries of one row that are timed, and up to how many these stand for. Prompts are read by the mask.
QUERIES = {1: 1, 5: 32}
TIMED_ROWS, TIMED_KEYS, TURNS = (1, 16), 2048, 20


class Lengths(NamedTuple):
    """What stands in the mask's place for R rows of q queries each that attend to all that is held before them.

    used:    (R,) int32, keys up to a row's last query; of one that runs past the end of its row they lie behind that
    queries: (R + 1,) int32, where each row's queries begin and the last one's end
    keys:    (R + 1,) int32, where each row's keys begin, likewise
    spacing: keys from one row's first to the next one's, at least q more than it holds
    """

    used: Tensor
    queries: Tensor
    keys: Tensor
    spacing: int

    @classmethod
    def of(cls, start: Tensor, num_queries: int, kv_length: int, spacing: int) -> Lengths:
        """start: (R,) int64, position of each row's first query"""
        used = (start.clamp_max(kv_length) + num_queries).int()
        queries, keys = (
            torch.arange(0, len(start) * step + 1, step, dtype=torch.int32, device=start.device)
            for step in (num_queries, spacing)
        )
        return cls(used, queries, keys, spacing)


def attend_by_lengths(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, scaling: float | None) -> Tensor:
    """Causal attention with grouped heads.

    query: (R, H * G, q, D); key, value: (R, H, kv, D), views of what lies (R, spacing, H, D)

    out: (R, q, H * G, D)
    """
    rows, num_heads, num_queries, size = query.shape
    out = varlen_attn(
        query.transpose(1, 2).reshape(-1, num_heads, size),
        _all_rows(key, lengths),
        _all_rows(value, lengths),
        lengths.queries,
        lengths.keys,
        num_queries,
        key.shape[2] + num_queries,
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=num_heads != key.shape[1],
        seqused_k=lengths.used,
    )
    assert isinstance(out, Tensor)
    return out.view(rows, num_queries, num_heads, -1)


def _all_rows(held: Tensor, lengths: Lengths) -> Tensor:
    """Keys or values (R, H, kv, D) of the cache one after another, (R * spacing, H, D), with what lies between rows."""
    (rows, num_heads, _, size), (row, head, position, one) = held.shape, held.stride()
    assert row == lengths.spacing * position and one == 1, "the model attends to other keys than the cache holds"
    return held.as_strided((rows * lengths.spacing, num_heads, size), (position, head, 1))


def most_queries(attend: Callable[..., object], query_heads: int, keys: Tensor) -> int:
    """Up to how many queries of a row attention is faster by lengths than by a mask: 0, 1 or 32.

    attend: as transformers calls attention, by a mask or lengths
    keys:   (any, any, H, D), of the cache of any layer
    """
    found = 0
    for num_queries, most in QUERIES.items():
        totals = [0.0, 0.0]  # by the mask, by lengths
        for rows in TIMED_ROWS:
            query = keys.new_zeros(rows, query_heads, num_queries, keys.shape[3])
            spacing = TIMED_KEYS + num_queries
            held = keys.new_zeros(rows, spacing, *keys.shape[2:]).transpose(1, 2)[:, :, :TIMED_KEYS]
            start = torch.full((rows,), TIMED_KEYS - num_queries, device=keys.device)
            mask = keys.new_zeros(rows, 1, num_queries, TIMED_KEYS)
            ways = mask, Lengths.of(start, num_queries, TIMED_KEYS, spacing)
            times = _time([partial(attend, query, held, held, way) for way in ways])
            totals = [total + time for total, time in zip(totals, times, strict=True)]
        if totals[1] >= totals[0]:
            break
        found = most
    return found


def _time(calls: list[Callable[[], object]]) -> list[float]:
    """Milliseconds of calls on a GPU, the least of some turns each."""
    least = [float("inf")] * len(calls)
    for _ in range(TURNS):
        for place, call in enumerate(calls):
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            call()
            ended.record()
            ended.synchronize()
            least[place] = min(least[place], begun.elapsed_time(ended))
    return least
