"""How the rows of a batch are warped where each request asks for its own temperature and cuts. Knows no models."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from mpg.options import Options


class Warps:
    """What is done to the rows of B requests before they are drawn from.

    common  the options that all of them share, None where they differ
    fused   rows that keep all of their tokens, by their temperature, where they differ
    is_plain  (B,) bool, rows that stay as they are
    """

    def __init__(self, options: Sequence[Options], put: Callable[[Hashable, Tensor], Tensor]):
        """options: of every request, in the order of the rows; put: brings numbers of a name to the device"""
        warps = [own.warp() for own in options]
        self.common = options[0] if all(warp == warps[0] for warp in warps) else None
        self.is_plain = put("is_plain", torch.tensor([own.is_plain for own in options]))
        self.fused: dict[float, Tensor] = {}
        if self.common is None:
            columns = {name: [warp[name] for warp in warps] for name in warps[0]}
            types = {name: torch.int64 if name == "top_k" else torch.float64 for name in columns}
            self._columns = {name: put(name, torch.tensor(columns[name], dtype=types[name])) for name in columns}
            rows: dict[float, list[int]] = {}
            for row, own in enumerate(options):
                if own.is_uncut:
                    rows.setdefault(own.temperature, []).append(row)
            self.fused = {temperature: put(temperature, torch.tensor(of)) for temperature, of in rows.items()}

    @property
    def key(self) -> Hashable:
        """What a round depends on beside the numbers in its tensors."""
        if self.common is not None:
            return tuple(self.common.warp().items())
        return tuple((temperature, len(rows)) for temperature, rows in self.fused.items())

    def keywords(self, num_positions: int) -> dict[str, Any]:
        """Those of `warp_rows`, for rows (B, P, V) that lie flat."""
        if self.common is not None:
            return self.common.warp()
        return {name: column.repeat_interleave(num_positions) for name, column in self._columns.items()}
