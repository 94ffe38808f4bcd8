"""Key/value cache whose rows have their own lengths.

Knows nothing of tokens, adapters or decoding: a forward says where its rows start; rollback is starting earlier.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple
from weakref import proxy

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from mpg.models.lengths import Lengths
from mpg.models.upload import Numbers

NAMES = ("cache", "past_key_values")  # of the argument that is a forward's cache, since transformers 5.24 and before


def as_argument(model: nn.Module, cache: Cache) -> dict[str, Cache]:
    """A cache by the name that the forward of this model has for it."""
    return {_name_of(type(model).forward): cache}


@lru_cache
def _name_of(forward: Callable[..., Any]) -> str:
    names = inspect.signature(forward).parameters
    return next((name for name in NAMES if name in names), NAMES[-1])


class Reach(NamedTuple):
    """What stands in the mask's place where rows attend by `mpg_ext.attend_rows`: how far each query does.

    positions: (R, q) int64, of the queries
    offset:    what stands there for other masks than causal ones, which are made from it
    """

    positions: Tensor
    offset: int | Tensor


class RaggedCache(Cache):
    """Keys and values of R rows with room for `capacity` positions each.

    `place` says which rows the next forward runs and where each of them starts. Entries beyond a row's end may be
    stale: the mask, or a query's reach, hides what lies behind it, and a position is written again before a query can
    see it.

    by_lengths: up to how many queries of a row attend by lengths, not by a mask
    by_rows:    up to how many do by mpg's own op
    """

    def __init__(self, num_layers: int, num_rows: int, capacity: int, by_lengths: int = 0, *, by_rows: int = 0) -> None:
        super().__init__(layers=[_RaggedLayer(self) for _ in range(num_layers)])
        self.num_rows = num_rows
        self.capacity = capacity
        self.by_lengths, self.by_rows = by_lengths, by_rows
        self.query_offset: int | Tensor | Lengths | Reach = 0
        self.current: _RaggedLayer | None = None  # the layer that a compiled forward is in, whichever it says it is

    def place(
        self, rows: slice | Tensor, start: Tensor, num_tokens: int, kv_length: int, start_at: int | None = None
    ) -> Tensor:
        """Aim the next forward at some rows; returns the positions of its tokens.

        rows:       neighbours as a slice, or any R of them as numbers (R,) int64, which copies what they hold
        start:      (R,) int64, position of each row's first token
        num_tokens: q, the tokens fed to every row
        kv_length:  host upper bound on every row's end; positions from there on are neither read nor attended
        start_at:   where all rows, which are neighbours, start behind their first token and end within kv_length, if
                    the host knows: what is written is then one block, and a mask may hide nothing

        out: (R, q) int64, clamped to kv_length - 1: a row that runs past its end computes garbage and harms no other

        Raises ValueError if kv_length exceeds the capacity.
        """
        if not 0 < kv_length <= self.capacity:
            raise ValueError(f"kv_length: expected 1 to the capacity {self.capacity}, got {kv_length}")
        self.first_row: int = rows.start if isinstance(rows, slice) else 0
        self.rows: Tensor | None = None if isinstance(rows, slice) else rows
        self.start_at = start_at
        self.kv_length = kv_length
        offset: int | Tensor
        if start_at is None:
            offset, positions = start, start[:, None] + torch.arange(num_tokens, device=start.device)
            positions = positions.clamp_max(kv_length - 1)
        else:
            offset, positions = start_at, torch.arange(start_at, start_at + num_tokens, device=start.device)
            positions = positions.expand(len(start), -1)
        self.query_offset = Reach(positions.contiguous(), offset) if num_tokens <= self.by_rows else offset
        if start_at is not None:
            return positions
        numbers = torch.arange(rows.start, rows.stop, device=start.device) if isinstance(rows, slice) else rows
        self.places = numbers[:, None], positions
        if num_tokens <= self.by_lengths:
            # of rows by number copies are read
            self.query_offset = Lengths.of(positions, self.capacity if self.rows is None else kv_length)
        return positions

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self.current or self.layers[layer_idx]
        return layer.update(key_states, value_states)

    def copy(self, moves: Numbers, num_positions: int, other: RaggedCache | None = None) -> None:
        """Let the first positions of some rows be those that others had, of this cache or of another one.

        moves: (2, R), the others' numbers, and theirs
        """
        for buffer, of_other in self._beside(other or self) if moves.shape.numel() and num_positions else ():
            of_sources, of_targets = moves.on(buffer.device)
            copied = of_other[:, :, :num_positions].index_select(0, of_sources)
            buffer[:, :, :num_positions].index_copy_(0, of_targets, copied)

    def take(self, rows: range, num_positions: int, other: RaggedCache) -> None:
        """Let the first positions of the first rows be those of some neighbours of another cache."""
        for buffer, of_other in self._beside(other):
            buffer[: len(rows), :, :num_positions] = of_other[rows.start : rows.stop, :, :num_positions]

    def excerpt(self, row: int, num_positions: int) -> RaggedCache:
        """A cache of one row, which holds the first positions of a row of this one."""
        own = RaggedCache(len(self.layers), 1, num_positions)
        for layer, source in zip(own.layers, self.layers, strict=True):
            if source.is_initialized:
                layer.keys, layer.values = (
                    buffer[row : row + 1, :, :num_positions].clone() for buffer in (source.keys, source.values)
                )
                layer.is_initialized = True
        return own

    def _beside(self, other: RaggedCache) -> Iterator[tuple[Tensor, Tensor]]:
        """Every buffer, with that of another cache, whose layers have been written to."""
        for own, its in zip(self.layers, other.layers, strict=True):
            assert isinstance(own, _RaggedLayer) and isinstance(its, _RaggedLayer)
            if its.is_initialized and not own.is_initialized:
                own.lazy_initialization(its.keys, its.values)
            yield from ((own.keys, its.keys), (own.values, its.values)) if its.is_initialized else ()

    def resize(self, num_rows: int, capacity: int, num_positions: int) -> None:
        """Have room for so many rows and positions, of which the first `num_positions` keep what they hold, as far as
        there are as many. One buffer after another, so that none but one is there twice."""
        for layer in self.layers:
            if isinstance(layer, _RaggedLayer) and layer.is_initialized:
                for name in ("keys", "values"):
                    old = getattr(layer, name)
                    new = self.zeros(num_rows, capacity, old)
                    rows, kept = min(num_rows, len(old)), min(capacity, num_positions)
                    new[:rows, :, :kept] = old[:rows, :, :kept]
                    setattr(layer, name, new)
                    del old
        self.num_rows, self.capacity = num_rows, capacity

    def zeros(self, num_rows: int, capacity: int, states: Tensor) -> Tensor:
        """A buffer (num_rows, H, capacity, D) for keys or values like these, (any, H, any, D).

        The positions of a head lie next to each other, as they are read: on a CPU many long texts then take two
        thirds of the time. Attention by lengths wants the heads of a position next to each other.
        """
        # Not empty: a masked NaN would still poison the weighted sum of the values.
        num_heads, size = states.shape[1], states.shape[3]
        if self.by_lengths:
            return states.new_zeros(num_rows, capacity, num_heads, size).transpose(1, 2)
        return states.new_zeros(num_rows, num_heads, capacity, size)

    def clear(self, rows: Sequence[int]) -> None:
        """Forget what some rows hold: a NaN would reach their later forwards, though the mask hides it."""
        for buffer, row in product(self._buffers(), rows):
            buffer[row].zero_()

    def any_keys(self) -> Tensor:
        """(rows, H, capacity, D), of a layer that has been written to."""
        return self._buffers()[0]

    def bytes_per_position(self) -> int:
        """What one position of one row takes in all layers that have been written to."""
        return sum(buffer[0, :, 0].numel() * buffer.element_size() for buffer in self._buffers())

    def _buffers(self) -> list[Tensor]:
        written = [layer for layer in self.layers if isinstance(layer, _RaggedLayer) and layer.is_initialized]
        return [buffer for layer in written for buffer in (layer.keys, layer.values)]

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.query_offset


class _RaggedLayer(CacheLayerMixin):
    is_compileable = True
    is_sliding = False  # windows are the mask's business: a layer that kept only its window could not roll back

    def __init__(self, cache: RaggedCache) -> None:
        super().__init__()
        self.cache = proxy(cache)  # a cycle would keep the memory until the garbage collector comes by

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        room = self.cache.num_rows, self.cache.capacity
        self.keys: Tensor = self.cache.zeros(*room, key_states)
        self.values: Tensor = self.cache.zeros(*room, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._write_and_read(self.keys, key_states), self._write_and_read(self.values, value_states)

    def _write_and_read(self, buffer: Tensor, states: Tensor) -> Tensor:
        cache, device = self.cache, buffer.device
        (num_rows, num_heads, num_tokens, size), strides = states.shape, buffer.stride()
        first = cache.first_row * strides[0]
        if cache.start_at is not None:
            at = first + cache.start_at * strides[2]
            buffer.as_strided((num_rows, num_heads, num_tokens, size), strides, at).copy_(states)
        else:
            # A model that is split over devices has some of its layers elsewhere than its input.
            numbers, positions = (index.to(device) for index in cache.places)
            buffer.transpose(1, 2).index_put_((numbers, positions), states.transpose(1, 2))
        if cache.rows is not None:
            return buffer[cache.rows.to(device), :, : cache.kv_length]
        # buffer[first_row :][:num_rows, :, :kv_length] in one call: there are two a layer
        return buffer.as_strided((num_rows, num_heads, cache.kv_length, size), strides, first)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.kv_length, 0

    def get_seq_length(self) -> int:
        return self.cache.kv_length  # never used as a position: position_ids are always given

    def get_max_length(self) -> int:
        return self.cache.capacity
