"""Whole numbers on their way from the host. Knows nothing of what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Upload:
    """Lists of numbers that go to a device in one copy, when the first of them is wanted there; no more can be added
    after that."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._sent: dict[torch.device, Tensor] = {}

    def add(self, numbers: Sequence[Any] | Tensor) -> Numbers:
        """numbers: int64, of any one shape"""
        assert not self._sent, "some of these numbers have been sent"
        part = torch.as_tensor(numbers, dtype=torch.int64)
        first = sum(map(torch.numel, self._parts))
        self._parts.append(part.flatten())
        return Numbers(self, first, part.shape)

    def on(self, device: torch.device) -> Tensor:
        """All that were added before one of them was wanted on this device, one behind the other."""
        if device not in self._sent:
            self._sent[device] = torch.cat(self._parts).to(device)
        return self._sent[device]


class Numbers(NamedTuple):
    """Some of an upload."""

    upload: Upload
    first: int
    shape: torch.Size

    @classmethod
    def of(cls, numbers: Sequence[Any]) -> Numbers:
        """An upload of these alone."""
        return Upload().add(numbers)

    def on(self, device: torch.device) -> Tensor:
        return self.upload.on(device)[self.first :][: self.shape.numel()].view(self.shape)
