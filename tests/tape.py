"""What a captured graph does, on the CPU: a step's ops, run again on the very memory that they ran on.

Knows aten's ops; nothing of who records what. A replay runs no Python of the step: a branch that it took, a number that
it read, an address that it used are those of the recording.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from threading import local
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# A stream that is being captured cannot be waited for, and memory of the host is not what it was at a replay.
FORBIDDEN = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "lift_fresh")


class Tape(TorchDispatchMode):
    """A capture, as `mpg.models.graphs` wants it. `num_recorded` counts those of all tapes; while one of a thread
    records, no other may, and none may be run there."""

    num_recorded, of_thread = 0, local()

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        assert device.type == "cpu"

    def __call__(self, step: Callable[[], Any]) -> tuple[Callable[[], None], Any, int]:
        _refuse_nesting()
        self.ops: list[tuple[Any, Any, Any, Any]] = []
        Tape.of_thread.is_recording = True
        try:
            with self:
                output = step()
        finally:
            Tape.of_thread.is_recording = False
        Tape.num_recorded += 1
        ops = self.ops
        return lambda: _replay(ops), output, sum(out.nbytes for out in tree_leaves(output) if isinstance(out, Tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_index = func is torch.ops.aten.index.Tensor
        counts = is_index and any(index is not None and index.dtype == torch.bool for index in args[1])
        if counts or func.overloadpacket.__name__ in FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        is_new = not _storages(out) <= _storages([args, kwargs])  # a view stays one of the same memory
        if func._schema.is_mutable:
            self.ops.append((func, args, kwargs, tree_leaves(out) if is_new else []))
        elif is_new:
            variant = _writing_variant(func)
            if variant is None:
                self.ops.append((func, args, kwargs, tree_leaves(out)))
            else:
                again, names = variant
                outputs = dict(zip(names, out if isinstance(out, tuple) else [out], strict=True))
                self.ops.append((again, args, kwargs | outputs, []))
        return out


def _refuse_nesting() -> None:
    if getattr(Tape.of_thread, "is_recording", False):
        raise RuntimeError("operation not permitted when stream is capturing: a graph")


@torch.no_grad()
def _replay(ops: list[tuple[Any, Any, Any, list[Any]]]) -> None:
    _refuse_nesting()
    for func, args, kwargs, recorded in ops:
        outputs = func(*args, **kwargs)
        for old, new in zip(recorded, tree_leaves(outputs), strict=True) if recorded else ():
            if isinstance(old, Tensor):
                old.copy_(new)


def _storages(values: Any) -> set[int]:
    tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
    # a weight in oneDNN's blocks has no storage, and nothing is a view of it
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if not tensor.is_mkldnn}


@cache
def _writing_variant(func: Any) -> tuple[Any, list[str]] | None:
    """The overload of an op that writes to given tensors, and what it calls these."""
    packet, inputs = func.overloadpacket, [(each.name, str(each.type)) for each in func._schema.arguments]
    for overload in (getattr(packet, name) for name in packet.overloads()):
        arguments = overload._schema.arguments
        outputs = [each.name for each in arguments if each.is_out]
        if outputs and inputs == [(each.name, str(each.type)) for each in arguments if not each.is_out]:
            return overload, outputs
    return None
