"""Where the tensors of a test lie in memory, and that an op leaves every byte that is not its to write.

Knows no op.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


def laid_out(rows: Tensor, layout: str) -> Tensor:
    """The same rows (..., V) in memory that holds NaN around them.

    strided: the leading dimensions in reverse, every row on 16 bytes; misaligned: rows at every distance from 16 bytes.
    """
    *leading, size = rows.shape
    if layout == "contiguous":
        return rows.contiguous()
    if layout == "misaligned":
        view = rows.new_full((*leading, size + 1 + size % 2), math.nan)[..., 1 : size + 1]
    else:
        storage = rows.new_full((*leading[::-1], size + 8 - size % 8), math.nan)
        view = storage.permute(*reversed(range(len(leading))), -1)[..., :size]
    return view.copy_(rows)


def guarded(tensor: Tensor) -> Tensor:
    """The same values, contiguous, between others in the same memory."""
    storage = tensor.new_full((len(tensor) + 2, *tensor.shape[1:]), 7)
    storage[1:-1] = tensor
    return storage[1:-1]


def far_apart(rows: Tensor, dimension: int, folder: Path) -> Tensor:
    """The same rows (..., V) with more than 2**32 elements between neighbours along a dimension.

    On the CPU in a file of which only they exist. An offset cut to 32 bits ends behind the first of them, in zeros.
    """
    apart = 2**32 + rows.numel()
    strides = list(rows.contiguous().stride())
    strides[dimension] = apart
    size = (rows.shape[dimension] - 1) * apart + 2 * rows.numel()
    if rows.is_cuda:
        storage = torch.zeros(size, dtype=rows.dtype, device=rows.device)
    else:
        storage = torch.from_file(str(folder / "rows"), shared=True, size=size, dtype=rows.dtype)
    return storage.as_strided(rows.shape, strides).copy_(rows)


@contextmanager
def nothing_else_written(inputs: Iterable[Tensor | None], written: Iterable[Tensor] = ()) -> Iterator[None]:
    """Asserts of the memory behind all of these tensors that only elements of `written` change."""
    is_written = [(tensor, False) for tensor in inputs if tensor is not None] + [(tensor, True) for tensor in written]
    before = [whole_memory(tensor).clone() for tensor, _ in is_written]
    yield
    for (tensor, may_change), memory in zip(is_written, before, strict=True):
        if may_change:
            memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor)
        assert torch.equal(whole_memory(tensor).view(torch.uint8), memory.view(torch.uint8))


def whole_memory(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
