"""Numbers on their way from the host. Knows nothing of what they mean."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Upload:
    """Lists of numbers that go to a device in one copy, when the first of them is wanted there, and what is done with
    them there; no more can be added after that."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._sent: dict[torch.device, Tensor] = {}
        self._todo: list[Callable[[], object]] = []

    def add(self, numbers: Sequence[Any] | Tensor) -> Numbers:
        """numbers: of any one shape, whole, or a tensor of the host's, which may be float64"""
        assert not self._sent, "some of these numbers have been sent"
        part = torch.as_tensor(numbers)
        dtype = torch.int64 if part.dtype != torch.float64 or not part.numel() else torch.float64
        is_kept = part.dtype in (dtype, torch.bool) or not part.numel()  # an empty list is of any type
        assert is_kept, "some digits would be lost"
        first = sum(map(torch.numel, self._parts))
        self._parts.append(part.to(dtype).flatten().view(torch.int64))
        return Numbers(self, first, part.shape, dtype)

    def then(self, do: Callable[[], object]) -> None:
        """Let `send` do this too, after what it was to do before."""
        self._todo.append(do)

    def put(self, numbers: Sequence[Any] | Tensor, into: Tensor) -> None:
        """Let a tensor of a device hold these numbers from `send` on."""
        sent = self.add(numbers)
        self.then(lambda: into.copy_(sent.on(into.device)))

    def send(self) -> None:
        """Do what is to be done once the numbers are there."""
        todo, self._todo = self._todo, []
        for do in todo:
            do()

    def on(self, device: torch.device) -> Tensor:
        """All that were added before one of them was wanted on this device, one behind the other."""
        if device not in self._sent:
            parts = torch.cat(self._parts)
            # only from pinned memory the host does not wait for the copy
            self._sent[device] = (parts.pin_memory() if device.type == "cuda" else parts).to(device, non_blocking=True)
        return self._sent[device]


class Numbers(NamedTuple):
    """Some of an upload, int64 or float64."""

    upload: Upload
    first: int
    shape: torch.Size
    dtype: torch.dtype

    def on(self, device: torch.device) -> Tensor:
        part = self.upload.on(device)[self.first :][: self.shape.numel()].view(self.shape)
        return part if self.dtype == torch.int64 else part.view(self.dtype)


class Addresses:
    """Where numbers lie on a device: each list where the last one of its name and shape did, for what is captured."""

    def __init__(self) -> None:
        self._tensors: dict[Hashable, Tensor] = {}

    def put(self, name: Hashable, numbers: Tensor, device: torch.device, upload: Upload) -> Tensor:
        """Numbers of the host on a device, from when the upload is sent until others of this name and shape come."""
        key = name, numbers.shape, device
        if key not in self._tensors:
            self._tensors[key] = torch.empty_like(numbers, device=device)
        upload.put(numbers, self._tensors[key])
        return self._tensors[key]
