"""Forwards and rounds of fixed shapes, captured once and replayed: a GPU then runs what no Python launches.

Knows addresses, and what a capture forbids; nothing of models, caches or what the tensors mean.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from threading import Lock
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MAX_GRAPHS = 64  # of one workspace: a few numbers of tokens and groups, each at four cache lengths an octave

logger = logging.getLogger("mpg")

# Records what a step runs. out: what runs it again, the tensors that it fills, and the bytes that are kept for it
Capture: TypeAlias = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any, int]]


def bucket(size: int, least: int) -> int:
    """`size` rounded up to a multiple of `least`, and beyond four of these to one of four sizes an octave."""
    step = max(least, 2 ** (size - 1).bit_length() // 8)
    return -(-size // step) * step


class CaptureError(RuntimeError):
    """A step cannot be captured; the message says why."""


class Graphs:
    """The captured forwards, or rounds, of one workspace, by what they depend on; the MAX_GRAPHS latest are kept.

    num_bytes: what the captures have taken beside the workspace's own buffers
    """

    def __init__(self, capture: Capture) -> None:
        self.num_bytes = 0
        self._capture = capture
        self._graphs: OrderedDict[Hashable, tuple[list[Tensor], Callable[[], None], Any]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def run(self, key: Hashable, forward: Callable[..., Any], *inputs: Tensor, held: Sequence[Tensor] = ()) -> Any:
        """forward(*inputs), where everything else that it reads and writes lies where it lay at the first run.

        key:  all that shapes and Python's branches depend on
        held: what it changes and must find as it was, since before the first run it is tried

        out: overwritten by the next run

        Raises CaptureError, at the first run of a key, where the forward waits for the device or cannot be captured.
        """
        if key not in self._graphs:
            static, before = [value.clone() for value in inputs], [tensor.clone() for tensor in held]
            try:
                self._graphs[key] = static, *self._record(partial(forward, *static))
            finally:
                _fill(held, before)
            logger.info("captured: %d of these caches, %.1f MiB", len(self), self.num_bytes / 2**20)
        self._graphs.move_to_end(key)
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        static, replay, output = self._graphs[key]
        _fill(static, inputs)
        replay()
        return output

    def _record(self, step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        try:
            with _NoHostReads():  # before the capture: one that is broken off leaves a device in an odd state
                step()
            replay, output, num_bytes = self._capture(step)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a driver, or the forward of an unknown model, raises
            raise CaptureError(str(error)) from error
        self.num_bytes += num_bytes
        return replay, output


class CudaCapture:
    """Captures CUDA graphs on a stream and in a memory pool of their own; only one of them may run at a time."""

    lock = Lock()  # beginning a capture waits for the device, which no other capture may be using

    def __init__(self, device: torch.device) -> None:
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Any]) -> tuple[Callable[[], None], Any, int]:
        device = self.stream.device
        current = torch.cuda.current_stream(device)
        with self.lock:
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                step()  # what libraries set up at their first call on a stream cannot be captured
            current.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # other threads may go on allocating meanwhile
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                before = torch.cuda.memory_reserved(device)
                output = step()
                num_bytes = max(0, torch.cuda.memory_reserved(device) - before)
        return graph.replay, output, num_bytes


CAPTURES: dict[str, Callable[[torch.device], Capture]] = {"cuda": CudaCapture}  # by the type of device


class _NoHostReads(TorchDispatchMode):
    """Raises for an op that a capture forbids, as the host waits for the device in it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _waits(func, args, out):
            raise RuntimeError(f"{func} waits for the device")
        return out


def _waits(func: Any, args: Sequence[Any], out: Any) -> bool:
    aten, kind = torch.ops.aten, func.overloadpacket
    if kind in (aten.index, aten.index_put, aten.index_put_):
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    if kind in (aten._to_copy, aten.copy_):
        return any(isinstance(value, Tensor) and value.device != out.device for value in args)
    if kind is aten.lift_fresh:  # torch.tensor(numbers)
        return True
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def _fill(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)
