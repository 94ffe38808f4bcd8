"""Linear layers on the CPU: torch's own product, or one of packed weights, whichever is faster.

Knows how long any way takes on this machine; nothing of adapters or of what the layers are for.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import combinations, product
from operator import itemgetter
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention, silu

import mpg_ext
from mpg.models import timings
from mpg.models.timings import Kind, Times

PANEL = 16  # outputs whose weights lie together, see mpg_ext.linear_panels
MIN_WEIGHTS = 2**15  # of a layer that is worth a look: a smaller one is read in the time that a call takes of its own
TIMED_ROWS = (1, 2, 3, 8, 40)  # a base's step, one with an adapter, with two, a small batch, a chunk for many models
TIMED_WEIGHTS = 2**20  # of a layer at once: parts of a large one stand for it
ROWS_TOGETHER = 16  # of a weight, that a product takes at once
TIMED_BYTES = 2**26  # of all parts that take turns: more than caches hold, as when a token is decoded
BETWEEN = 2**18  # numbers that are read before each call: in a forward weights are not at hand either
TIMED_SECONDS, MAX_TURNS = 0.2, 10  # for a model, of which those in four bits and the others are timed apart
GAIN = 0.9  # of plain's time, that packed must stay below to be worth its weight
MAX_SHARE = 0.25  # of the machine's memory, for second weights
EVERY = range(1, sys.maxsize)  # numbers of rows

# At TIMED_ROWS. Kept, so that two models of one process round alike.
_times: Times = {}

# A weight in oneDNN's blocks has no strides. Inside an operator, torch.compile does not ask for them.
_library = torch.library.Library("mpg_linear", "DEF")
_library.define(
    "packed(Tensor x, Tensor weight, Tensor? plain, Tensor? bias, int first_rows, int end_rows, int size) -> Tensor"
)


@torch.library.impl(_library, "packed", "CompositeExplicitAutograd")
def _packed(
    x: Tensor, weight: Tensor, plain: Tensor | None, bias: Tensor | None, first_rows: int, end_rows: int, size: int
) -> Tensor:
    if plain is not None and not first_rows <= x.numel() // x.shape[-1] < end_rows:
        return linear(x, plain, bias)
    return multiply_packed(x, weight, bias, size)


def pack(weight: Tensor) -> Tensor:
    """A plain weight (out, in) as `multiply_packed` takes it: in float32 in panels, else in oneDNN's blocks."""
    if weight.dtype != torch.float32:
        return torch.ops.mkldnn._reorder_linear_weight(weight)
    return pad(weight, (0, 0, 0, -len(weight) % PANEL)).view(-1, PANEL, weight.shape[1]).mT.contiguous()


def multiply_packed(x: Tensor, weight: Tensor, bias: Tensor | None = None, size: int | None = None) -> Tensor:
    """x (..., in) times a weight of `pack`. out: (..., size), by default all that the weight has"""
    if weight.dtype != torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return mpg_ext.linear_panels(x, weight, bias, out_features=size)


class Way(NamedTuple):
    """A way to multiply: its name, what it makes of a plain weight (out, in), and x (rows, in) times that."""

    name: str
    prepare: Callable[[Tensor], Any]
    multiply: Callable[[Tensor, Any], Tensor]


PLAIN = Way("plain", lambda weight: weight, linear)
PACKED = Way("packed", pack, multiply_packed)


@torch.library.register_fake("mpg_linear::packed", lib=_library)
def _packed_shape(
    x: Tensor, weight: Tensor, plain: Tensor | None, bias: Tensor | None, first_rows: int, end_rows: int, size: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], size)


class PackedLinear(nn.Module):
    """What a linear layer computes, of a packed weight.

    rows: numbers of an input's rows at which it is; others are multiplied by the plain weight, which is then kept
        beside the packed one
    """

    def __init__(self, layer: nn.Linear, rows: range = EVERY) -> None:
        super().__init__()
        self.plain = layer.weight if rows != EVERY else None
        self.pack(layer.weight.detach())
        self.bias: nn.Parameter | None
        self.register_parameter("bias", layer.bias)
        self.rows, self.out_features = rows, layer.out_features

    def pack(self, weight: Tensor) -> None:
        """Take a plain weight (out, in)."""
        self.weight = nn.Parameter(pack(weight), requires_grad=False)
        if self.plain is not None:
            self.plain.data = weight

    def unpacked(self) -> Tensor:
        """The plain weight."""
        weight = self.weight.detach()
        return weight.to_dense() if weight.is_mkldnn else weight.mT.flatten(0, 1)[: self.out_features]

    def adapted(self, x: Tensor, down: Tensor, up: Tensor, groups: Tensor, blocks: Sequence[int]) -> Tensor | None:
        """What the layer and the adapters of rows make of x in one op, see `mpg_ext.linear_panels`; None where it is
        not packed for that."""
        own = self._parameters  # past nn.Module, which takes as long to find one as x its product with a few ranks
        weight, bias = own["weight"], own["bias"]
        assert weight is not None
        if weight.dtype != torch.float32:
            return None
        if self.plain is not None and not self.rows.start <= x.numel() // x.shape[-1] < self.rows.stop:
            return None
        return mpg_ext.linear_panels(x, weight, bias, down, up, groups, out_features=self.out_features, blocks=blocks)

    def forward(self, x: Tensor) -> Tensor:
        packed = torch.ops.mpg_linear.packed if torch.compiler.is_compiling() else _packed
        return packed(x, self.weight, self.plain, self.bias, self.rows.start, self.rows.stop, self.out_features)


def pack_linears(model: nn.Module) -> None:
    """Replace the linear layers of `model` on the CPU that are faster packed; the layers themselves stay as they are.

    Plain and packed are timed when a machine first meets a size of layer, all of a model in .2 s. A weight
    that is in use elsewhere (tied to the embedding, or of a model that the caller keeps, or plain for some numbers of
    rows and packed for others) is then there twice; the last only while that takes a quarter of the machine's memory.
    The two differ by rounding, so what was timed is kept for other processes, see `mpg.models.timings`.
    """
    layers = {name: layer for name, layer in model.named_modules() if can_be_packed(layer)}
    may_keep_both = has_room(layers.values())
    for (name, layer), times in zip(layers.items(), time_layers(list(layers.values()), PLAIN), strict=True):
        rows = choose(times, may_keep_both)
        if rows is not None:
            model.set_submodule(name, PackedLinear(layer, rows))


def choose(times: Sequence[Sequence[float]], may_keep_both: bool = True) -> range | None:
    """The numbers of rows at which a layer is packed; None for none.

    times: at each of TIMED_ROWS the seconds in another way and packed
    """
    shares = [packed / other for other, packed in times]
    if not may_keep_both:
        return EVERY if sum(shares) < GAIN * len(shares) else None
    ends = (*TIMED_ROWS, EVERY.stop)
    gaining = [  # from where it gains on, as long as it loses nowhere
        (end - first, range(ends[first], ends[end]))
        for first, end in combinations(range(len(ends)), 2)
        if shares[first] < GAIN and max(shares[first:end]) < 1 / GAIN
    ]
    return max(gaining, key=itemgetter(0), default=(0, None))[1]


def has_room(layers: Collection[nn.Linear]) -> bool:
    """Whether the machine's memory has room for second weights of these layers."""
    num_bytes = sum(layer.weight.nbytes for layer in layers)
    return num_bytes < MAX_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def can_be_packed(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is plain and on the CPU, large enough to gain, and of a type that is multiplied fast packed."""
    if type(layer) is not nn.Linear or layer.weight.device.type != "cpu" or layer.weight.numel() < MIN_WEIGHTS:
        return False
    if (dtype := layer.weight.dtype) == torch.bfloat16 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def time_layers(layers: Sequence[nn.Linear], other: Way) -> list[list[list[float]]]:
    """Seconds of each layer, at each of TIMED_ROWS, in another way and packed."""
    kinds = [
        (layer.out_features, layer.in_features, layer.weight.dtype, torch.get_num_threads(), other.name)
        for layer in layers
    ]
    if not _times.keys() >= set(kinds):
        _times.update(timings.read())
    unknown: dict[Kind, list[Tensor]] = {}
    for kind, layer in zip(kinds, layers, strict=True):
        if kind not in _times:
            unknown.setdefault(kind, []).append(layer.weight.detach())
    if unknown:
        _times.update(timings.keep(_time(unknown, other)))
    return [_times[kind] for kind in kinds]


@torch.no_grad()
def _time(weights: Mapping[Kind, Sequence[Tensor]], other: Way) -> Times:
    """Seconds of layers of these kinds at TIMED_ROWS, in another way and packed: of one thread the processor's, as
    others may be running; several share what only the clock on the wall sees whole. Of each part it is the fastest of
    several turns, in which all kinds take part. To a call counts what it adds to the small steps that follow it in a
    forward, too: oneDNN's code makes them slower than torch's own does."""
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    ends_at = now() + TIMED_SECONDS
    plain = {kind: _parts(of_kind, TIMED_BYTES // (2 * len(weights))) for kind, of_kind in weights.items()}
    prepared = {kind: [(way, [way.prepare(part) for part in plain[kind]]) for way in (other, PACKED)] for kind in plain}
    inputs = {kind: [torch.randn(rows, kind[1], dtype=kind[2]) for rows in TIMED_ROWS] for kind in plain}
    fastest = {
        kind: [([math.inf] * len(parts), [math.inf] * len(parts)) for _ in TIMED_ROWS] for kind, parts in plain.items()
    }
    steps_alone = math.inf
    between, state = torch.ones(BETWEEN), torch.ones(1, 1, 64)
    for turn in range(MAX_TURNS):  # the first one warms up
        if turn > 1 and now() > ends_at:
            break
        for place, kind in product(range(len(TIMED_ROWS)), plain):
            x = inputs[kind][place]
            for found, (way, parts) in zip(fastest[kind][place], prepared[kind], strict=True):
                for index, part in enumerate(parts if turn else parts[:1]):
                    between.sum()
                    begun = now()
                    _small_steps(state)  # a forward comes from such to a product
                    started = now()
                    way.multiply(x, part)
                    _small_steps(state)
                    seconds = now() - started
                    found[index] = min(found[index], seconds if turn else math.inf)
                    steps_alone = min(steps_alone, started - begun)
    return {
        kind: [[sum(seconds - steps_alone for seconds in found) for found in of_rows] for of_rows in of_kind]
        for kind, of_kind in fastest.items()
    }


def _small_steps(x: Tensor) -> None:
    """Operations as they lie between two products of a forward. x: (1, 1, size)"""
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))
    heads = normed.view(1, 1, 4, -1).transpose(1, 2)
    attended = scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(x.shape)
    torch.cat([silu(attended) * normed + x, x])


def _parts(weights: Sequence[Tensor], num_bytes: int) -> list[Tensor]:
    """Parts of TIMED_WEIGHTS at most of some weights, one after another: at least one, then while they fit."""
    parts: list[Tensor] = []
    for weight in weights:
        rows = TIMED_WEIGHTS // weight.shape[1]
        for part in weight.split(max(rows - rows % ROWS_TOGETHER, ROWS_TOGETHER)):
            if parts and num_bytes < part.nbytes:
                return parts
            parts.append(part)
            num_bytes -= part.nbytes
    return parts
