"""What is remembered of every row from round to round, so that rounds run on the rows in use alone.

Knows tensors with an entry a row; nothing of what they mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import proxy

import torch
from torch import Tensor

from mpg.models.upload import Upload


class _Held(NamedTuple):
    owner: Any
    name: str
    whole: Tensor
    by_attribute: bool


class State:
    """Tensors with room for so many rows and attributes, of which their owners see those in use: the first ones.

    Views of the whole tensors, so that a round with as many rows finds them where an earlier one did.

    num_rows, num_attributes  in use, none at first
    """

    def __init__(self, room: int, most_attributes: int, device: torch.device):
        self.room, self.most_attributes, self.device = room, most_attributes, device
        self.num_rows = self.num_attributes = 0
        self._held: list[_Held] = []

    def zeros(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """out: (room, *shape)"""
        return torch.zeros(self.room, *shape, dtype=dtype, device=self.device)

    def hold(self, owner: object, name: str, whole: Tensor, *, by_attribute: bool = False) -> None:
        """Let an attribute of an owner be what is in use of a tensor (room, ...) from now on.

        by_attribute: its second size grows by one with every attribute that takes part
        """
        # a cycle would keep the owners' memory until the garbage collector comes by
        self._held.append(_Held(proxy(owner), name, whole, by_attribute))
        self._show(self._held[-1])

    def use(self, num_rows: int, num_attributes: int) -> None:
        """Let so many rows be in use from now on, and so many attributes, which begin with 0 where there were fewer."""
        before, self.num_rows, self.num_attributes = self.num_attributes, num_rows, num_attributes
        for held in self._held:
            if held.by_attribute and num_attributes > before:
                first = held.whole.shape[1] - self.most_attributes + before
                held.whole[:, first:] = 0
            self._show(held)

    def wholes(self) -> list[Tensor]:
        """All that is held, each once."""
        return list({id(held.whole): held.whole for held in self._held}.values())

    def move(self, sources: Sequence[int], targets: Sequence[int], upload: Upload) -> None:
        """Let some rows hold what others do, once an upload is sent."""
        sent = upload.add([list(sources), list(targets)])

        def copy() -> None:
            of_sources, of_targets = sent.on(self.device)
            for whole in self.wholes():
                whole.index_copy_(0, of_targets, whole.index_select(0, of_sources))

        upload.then(copy)

    def _show(self, held: _Held) -> None:
        view = held.whole[: self.num_rows]
        if held.by_attribute:
            view = view[:, : view.shape[1] - self.most_attributes + self.num_attributes]
        setattr(held.owner, held.name, view)
