"""Linear layers of four-bit weights on the CPU: how a weight is rounded, and its product.

Knows one scheme and which way is faster here; nothing of adapters or of what the layers are for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mpg.models.linear import (
    ROWS_TOGETHER,
    TIMED_ROWS,
    Way,
    can_be_packed,
    has_room,
    multiply_packed,
    pack,
    time_layers,
)

INT4_DRAFT = "int4-draft"  # of what drafts for `exact` alone
QUANTIZERS = ("none", "int4", INT4_DRAFT)
GROUP = 32  # weights of a row that share a scale and an offset, as in llama.cpp's Q4_1
HIGHEST = 15

# Inside an operator, torch.compile makes no code for every number of rows.
_library = torch.library.Library("mpg_quantize", "DEF")
_library.define(
    "multiply(Tensor x, Tensor weight, Tensor scales, Tensor? packed, Tensor? bias, int first_rows) -> Tensor"
)


class Int4(NamedTuple):
    """A weight (out, in) whose values are (number - 8) scale + offset.

    numbers: (out, in) int32, 0 to 15
    scales:  (in / 32, out, 2) bfloat16, scale and offset of every group
    """

    numbers: Tensor
    scales: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Int4:
        """A weight rounded to the nearest of 16 values, evenly spread between the least and the greatest of a group.

        A group that is Q4_1's own has its values again, up to bfloat16. One with NaN or inf becomes NaN.
        """
        groups = weight.float().unflatten(1, (-1, GROUP))
        low, high = groups.aminmax(dim=-1)
        scale = ((high - low) / HIGHEST).bfloat16()
        offset = ((low + high + scale.float()) / 2).bfloat16()
        steps = (groups - offset.float()[..., None]) / torch.where(scale == 0, 1, scale.float())[..., None]
        numbers = (steps.round() + 8).nan_to_num().clamp(0, HIGHEST).to(torch.int32).flatten(1)
        return cls(numbers, torch.stack([scale, offset], -1).transpose(0, 1).contiguous())

    def dequantize(self) -> Tensor:
        """(out, in) bfloat16"""
        scale, offset = self.scales.float().transpose(0, 1)[..., None].unbind(2)
        return ((self.numbers.unflatten(1, (-1, GROUP)) - 8) * scale + offset).flatten(1).bfloat16()

    def pack(self) -> tuple[Tensor, Tensor]:
        """The numbers as torch's product wants them, (out, in / 2) uint8, and the scales."""
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(self.numbers, 1), self.scales


def _multiply_int4(x: Tensor, weight: tuple[Tensor, Tensor]) -> Tensor:
    """x (rows, in), contiguous. out: (rows, out)"""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight[0], GROUP, weight[1])


INT4 = Way("int4", lambda weight: Int4.of(weight).pack(), _multiply_int4)


@torch.library.impl(_library, "multiply", "CompositeExplicitAutograd")
def _multiply(
    x: Tensor, weight: Tensor, scales: Tensor, packed: Tensor | None, bias: Tensor | None, first_rows: int
) -> Tensor:
    if packed is not None and x.numel() >= first_rows * x.shape[-1]:
        return multiply_packed(x, packed, bias)
    out = _multiply_int4(x.reshape(-1, x.shape[-1]).contiguous(), (weight, scales))
    out = out if bias is None else out + bias
    return out.view(*x.shape[:-1], scales.shape[1])


@torch.library.register_fake("mpg_quantize::multiply", lib=_library)
def _shape(
    x: Tensor, weight: Tensor, scales: Tensor, packed: Tensor | None, bias: Tensor | None, first_rows: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], scales.shape[1])


class Int4Linear(nn.Module):
    """What a linear layer of bfloat16 inputs computes with its weight rounded to four bits.

    first_rows: inputs of as many rows are multiplied by a second weight of the same values in bfloat16, which oneDNN
                has in its blocks; None is never, and then there is none
    """

    def __init__(self, layer: nn.Linear, first_rows: int | None = None) -> None:
        super().__init__()
        self.first_rows = first_rows
        self.bias = layer.bias
        self.pack(layer.weight.detach())

    def pack(self, weight: Tensor) -> None:
        """Take a plain weight (out, in) of any type."""
        int4 = Int4.of(weight.bfloat16())
        packed, scales = int4.pack()
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        second = None if self.first_rows is None else pack(int4.dequantize())
        self.packed = None if second is None else nn.Parameter(second, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        multiply = torch.ops.mpg_quantize.multiply if torch.compiler.is_compiling() else _multiply
        return multiply(x, self.weight, self.scales, self.packed, self.bias, self.first_rows or 0)


def quantize_linears(argument: str, model: PreTrainedModel) -> None:
    """Replace the linear layers of a bfloat16 model on the CPU but for its head; they themselves stay as they are.

    Inputs and outputs of a layer must be multiples of 32 and of 16; others stay. A second weight for many rows is kept
    where that is faster, by times as `pack_linears` takes them, and while both fit.

    argument: what the caller named the model, for the message

    Raises ValueError for a model without such a layer.
    """
    head = model.get_output_embeddings()
    layers = {name: layer for name, layer in model.named_modules() if layer is not head and _can_be_quantized(layer)}
    if not layers:
        wanted = f"linear layers of {GROUP} inputs and {ROWS_TOGETHER} outputs, or multiples"
        raise ValueError(f"quantize: expected {wanted} in {argument}, got none beside the head")
    able = [layer for layer in layers.values() if can_be_packed(layer)]
    first_rows = dict(zip(able, map(choose, time_layers(able, INT4)), strict=True)) if has_room(able) else {}
    for name, layer in layers.items():
        model.set_submodule(name, Int4Linear(layer, first_rows.get(layer)))


def choose(times: Sequence[Sequence[float]]) -> int | None:
    """The number of rows from which the second weight is faster, None never; between timed ones by a straight line.

    times: at each of TIMED_ROWS the seconds in four bits and in bfloat16
    """
    saved = [int4 - packed for int4, packed in times]
    after = next((place for place in range(len(saved)) if min(saved[place:]) > 0), None)
    if after is None or after == 0:
        return None if after is None else 1
    before = after - 1
    share = saved[before] / (saved[before] - saved[after])
    return math.ceil(TIMED_ROWS[before] + share * (TIMED_ROWS[after] - TIMED_ROWS[before]))


def _can_be_quantized(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return type(layer) is nn.Linear and layer.in_features % GROUP == 0 and layer.out_features % ROWS_TOGETHER == 0
