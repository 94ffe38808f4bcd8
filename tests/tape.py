"""What a captured graph does, on the CPU: a step's ops, run again on the very memory that they ran on.

Knows aten's ops; nothing of who records what. A replay runs no Python of the step: a branch that it took, a number that
it read, an address that it used are those of the recording.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# A stream that is being captured cannot be waited for, and memory of the host is not what it was at a replay.
FORBIDDEN = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "lift_fresh")


class Tape(TorchDispatchMode):
    """A capture, as `mpg.models.graphs` wants it. `num_recorded` counts those of all tapes."""

    num_recorded = 0

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        assert device.type == "cpu"

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor, int]:
        self.ops: list[tuple[Any, Any, Any, Any]] = []
        with self:
            output = step()
        Tape.num_recorded += 1
        ops = self.ops
        return lambda: _replay(ops), output, output.nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_index = func is torch.ops.aten.index.Tensor
        counts = is_index and any(index is not None and index.dtype == torch.bool for index in args[1])
        if counts or func.overloadpacket.__name__ in FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        return out


@torch.no_grad()
def _replay(ops: list[tuple[Any, Any, Any, Any]]) -> None:
    for func, args, kwargs, recorded in ops:
        for old, new in zip(tree_leaves(recorded), tree_leaves(func(*args, **kwargs)), strict=True):
            if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # neither in place nor a view
                old.copy_(new)
