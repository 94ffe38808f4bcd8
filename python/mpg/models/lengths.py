"""Attention by lengths in place of a mask: on a GPU its kernel splits the keys of few rows over all multiprocessors.

Knows torch's kernel and when it is right and faster; nothing of the cache that the lengths are of.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

# What `torch.nn.attention.varlen` is made of, which has no lengths before torch 2.13.
flash_attention = torch.ops.aten._flash_attention_forward

# Queries of one row that are timed, and up to how many these stand for. Prompts are read by the mask.
QUERIES = {1: 1, 5: 8, 17: 32}
TIMED_ROWS, TIMED_KEYS, TURNS = (1, 16), 2048, 20
SLEEP = 10**6  # cycles of a GPU, half a millisecond, in which the host launches all that is timed
MAX_DIFFERENCE = 0.02  # of what rows attend to, by its size: rounding is half a percent of it


class Lengths(NamedTuple):
    """What stands in the mask's place for R rows of q queries each that attend to all that is held before them.

    To the kernel each query is a text of its own, whose keys begin where its row's do: of texts with one query it
    splits the keys, of longer ones it does not.

    used:    (R * q,) int32, keys up to a query's own
    queries: (R * q + 1,) int32, where each query begins and the last one ends: 0, 1, ...
    keys:    (R * q + 1,) int32, where the keys of each query's row begin
    spacing: keys from one row's first to the next one's
    """

    used: Tensor
    queries: Tensor
    keys: Tensor
    spacing: int

    @classmethod
    def of(cls, positions: Tensor, spacing: int) -> Lengths:
        """positions: (R, q) int64, of each query"""
        queries = torch.arange(positions.numel() + 1, dtype=torch.int32, device=positions.device)
        return cls((positions.flatten() + 1).int(), queries, queries // positions.shape[1] * spacing, spacing)

    def mask(self, num_rows: int, kv_length: int, dtype: torch.dtype) -> Tensor:
        """The mask that says the same, (R, 1, q, kv)."""
        is_behind = torch.arange(kv_length, device=self.used.device) >= self.used.view(num_rows, 1, -1, 1)
        return torch.zeros(is_behind.shape, dtype=dtype, device=is_behind.device).masked_fill_(is_behind, -torch.inf)


def attend_by_lengths(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, scaling: float | None) -> Tensor:
    """Causal attention with grouped heads.

    query: (R, H * G, q, D); key, value: (R, H, kv, D), views of what lies (R, spacing, H, D)

    out: (R, q, H * G, D)
    """
    rows, num_heads, num_queries, size = query.shape
    dropout, is_causal, wants_mask = 0.0, False, False
    out: Tensor
    out, *_ = flash_attention(
        query.transpose(1, 2).reshape(-1, num_heads, size),
        _all_rows(key, lengths),
        _all_rows(value, lengths),
        lengths.queries,
        lengths.keys,
        1,
        key.shape[2],
        dropout,
        is_causal,
        wants_mask,
        scale=scaling,
        seqused_k=lengths.used,
    )
    return out.view(rows, num_queries, num_heads, -1)


def _all_rows(held: Tensor, lengths: Lengths) -> Tensor:
    """Keys or values (R, H, kv, D) of the cache one after another, (R * spacing, H, D), with what lies between rows."""
    (rows, num_heads, _, size), (row, head, position, one) = held.shape, held.stride()
    assert row == lengths.spacing * position and one == 1, "the model attends to other keys than the cache holds"
    return held.as_strided((rows * lengths.spacing, num_heads, size), (position, head, 1))


def most_queries(attend: Callable[..., tuple[Tensor, None]], query_heads: int, keys: Tensor) -> int:
    """The most queries of a row for which attention is faster by lengths than by a mask, and gives the same: 0, or a
    value of QUERIES.

    attend: as transformers calls attention, by a mask or lengths
    keys:   (any, H, any, D), of the cache of any layer
    """
    found = 0
    for num_queries, most in QUERIES.items():
        totals = [0.0, 0.0]  # by the mask, by lengths
        for rows in TIMED_ROWS:
            calls = both_ways(attend, rows, num_queries, TIMED_KEYS, query_heads, keys)
            if difference(*calls) > MAX_DIFFERENCE:
                return found
            with torch.cuda.device(keys.get_device()):  # whose streams events are recorded on
                times = _time(calls)
            totals = [total + time for total, time in zip(totals, times, strict=True)]
        if totals[1] >= totals[0]:
            break
        found = most
    return found


def both_ways(
    attend: Callable[..., tuple[Tensor, None]],
    num_rows: int,
    num_queries: int,
    kv_length: int,
    query_heads: int,
    keys: Tensor,
) -> list[Callable[[], tuple[Tensor, None]]]:
    """Calls of `attend` by a mask and by lengths, for random rows of which the first is `kv_length` positions long, and
    the others shorter. `keys`: as in `most_queries`"""
    num_heads, size = keys.shape[1], keys.shape[3]
    query = torch.randn_like(keys.new_empty(num_rows, query_heads, num_queries, size))
    held = torch.randn_like(keys.new_empty(2, num_rows, kv_length, num_heads, size)).transpose(2, 3)
    ends = torch.linspace(kv_length, num_queries, num_rows, device=keys.device).long()
    positions = ends[:, None] - num_queries + torch.arange(num_queries, device=keys.device)
    lengths = Lengths.of(positions, kv_length)
    return [partial(attend, query, *held, way) for way in (lengths.mask(num_rows, kv_length, keys.dtype), lengths)]


def difference(by_mask: Callable[[], tuple[Tensor, None]], by_lengths: Callable[[], tuple[Tensor, None]]) -> float:
    """That of what the two calls give, in the row where it is the largest share of the row's size."""
    expected, own = (call()[0].float().flatten(1) for call in (by_mask, by_lengths))
    return ((own - expected).norm(dim=1) / expected.norm(dim=1)).nan_to_num(nan=torch.inf).amax().item()


def _time(calls: list[Callable[[], tuple[Tensor, None]]]) -> list[float]:
    """Milliseconds that a GPU takes for calls, the least of some turns each, and not the host to launch them."""
    least = [float("inf")] * len(calls)
    for _ in range(TURNS):
        for place, call in enumerate(calls):
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(SLEEP)
            begun.record()
            call()
            ended.record()
            ended.synchronize()
            least[place] = min(least[place], begun.elapsed_time(ended))
    return least
