"""Adapters of one base model, stacked so that one batched forward runs them all.

Knows how a stacked layer computes; not how adapters are stored, nor when they are run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

import mpg_ext
from mpg.models.joined import JoinedLinear, JoinedPart
from mpg.models.linear import PackedLinear
from mpg.models.lora import Adapter


class Layout(NamedTuple):
    """Which groups of a model's adapters (0 without one) the rows of a forward run, neighbours the same.

    runs:   the group of neighbours, and their number
    groups: (R,) int64, of every row: where groups have different numbers of rows or leave others out between them, and
            where what reads it by row is the faster
    """

    runs: tuple[tuple[int, int], ...]
    groups: Tensor | None

    @property
    def first_group(self) -> int:
        """The first whose factors a forward is given: all are where it says which row runs which."""
        return self.runs[0][0] if self.groups is None else 0

    @classmethod
    def of(cls, groups: Sequence[int], device: torch.device | str) -> Layout:
        runs = tuple((group, sum(1 for _ in of_group)) for group, of_group in groupby(groups))
        is_even = all(run == (runs[0][0] + place, runs[0][1]) for place, run in enumerate(runs))
        return cls(runs, None if is_even else torch.tensor(groups).to(device))


@dataclass(eq=False)
class Rows:
    """What a stack's layers read of the next forward, as `LoraStack.set_active` has it. They hold this and not the
    stack, which holds them: else a model that is given up would wait for the collector of cycles."""

    num_rows: int = 0
    num_tokens: int = 0
    rows_of_group: int = 0
    first_group: int = 0
    merge_weights: Tensor | None = None
    groups: Tensor | None = None


class LoraStack:
    """The factors of all adapters of one model, layer by layer, in the model's dtype.

    Group 0 is the pure base (zeros), group g the g-th adapter; smaller ranks and skipped layers are padded with zeros.
    Layers that are joined are one, with their factors on the diagonal of its own.

    `set_active` tells the layers what the next forward holds; the rows of a group are neighbours (model-major).
    """

    def __init__(self, model: PreTrainedModel, adapters: Sequence[Adapter]) -> None:
        """Replace every adapted linear layer of `model`."""
        self.factors: list[tuple[Tensor, Tensor]] = []  # per layer down (G, r, in) and up (G, r, out)
        self.layers: list[LoraLinear] = []
        self.active: list[tuple[Tensor, Tensor]] | None = []  # of every layer, which holds its own; [] at first
        self._parents: list[tuple[nn.Module, str]] = []  # of every layer, and what it is called there
        self.rows = Rows()
        self.dtype = model.dtype
        sizes = {module: up.shape[1] for adapter in adapters for module, (_, up) in adapter.factors.items()}
        for module, part in list(model.named_modules()):
            if isinstance(part, JoinedLinear) and not sizes.keys().isdisjoint(part.names):
                self._replace(part, "linear", dict(zip(part.names, part.sizes, strict=True)))
            elif module in sizes and not isinstance(part, JoinedPart):
                parent, _, attribute = module.rpartition(".")
                self._replace(model.get_submodule(parent), attribute, {module: sizes[module]})
        self.fill(adapters)

    def _replace(self, parent: nn.Module, attribute: str, sizes: Mapping[str, int]) -> None:
        layer = LoraLinear(parent.get_submodule(attribute), self.rows, sizes)
        setattr(parent, attribute, layer)
        self.layers.append(layer)
        self._parents.append((parent, attribute))

    def fill(self, adapters: Sequence[Adapter]) -> None:
        """Take the factors of adapters, as many as at first and of the same layers and ranks."""
        self.factors = [_stack(adapters, layer, self.dtype) for layer in self.layers]
        for layer in self.layers:
            layer.blocks = _blocks(adapters, layer)
        self._merged = list[int](), list[tuple[Tensor, Tensor]]()

    def widen(self) -> None:
        """Let the base product of every plain layer make the first small product of all groups too."""
        for layer, (down, _) in zip(self.layers, self.factors, strict=True):
            if type(layer.base) is nn.Linear:
                layer.widen(down)

    def merge(self, groups: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The factors of some groups side by side, (2, N r, in) and (2, N r, out): group 1 is their sum, 0 the pure
        base. The latest are kept, as one call after another asks for the same."""
        if self._merged[0] != (index := list(groups)):
            self._merged = index, [(_behind_zeros(down[index]), _behind_zeros(up[index])) for down, up in self.factors]
        return self._merged[1]

    def set_active(
        self,
        factors: list[tuple[Tensor, Tensor]] | None,
        num_rows: int,
        num_tokens: int,
        *,
        first_group: int = 0,
        merge_weights: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> None:
        """Let the next forward of (num_rows, num_tokens) tokens use these factors; None is the plain base.

        first_group:   which the first of these factors is of
        merge_weights: (num_rows, N), each row's own weights of the N groups that `merge` joined
        groups:        (num_rows,) int64, which of the factors each row uses; default each by as many rows, in order
        """
        if factors is not self.active:
            for index, (layer, (parent, attribute)) in enumerate(zip(self.layers, self._parents, strict=True)):
                own = factors and factors[index]
                vars(layer)["factors"] = own  # past nn.Module, which would look for a parameter in it
                parent._modules[attribute] = layer.base if own is None else layer  # a small one takes less than a call
        self.active, rows = factors, self.rows
        rows.first_group, rows.merge_weights, rows.groups = first_group, merge_weights, groups
        rows.rows_of_group = num_rows // (factors[0][0].shape[0] if factors else 1)
        rows.num_rows, rows.num_tokens = num_rows, num_tokens


class LoraLinear(nn.Module):
    """A linear layer with one low-rank update per group: a base product for all rows and two small ones, by mpg's ops
    where the layout names groups, in one with the product where that is packed, and else batched.

    sizes:   of the outputs, by the name in the model: of one layer, or of those that are joined
    blocks:  of the up factors of layers that are joined, as `mpg_ext.lora_expand_` takes them
    factors: that the next forward uses, if any; the stack sets them
    wide:    the base's weight (out, in) and behind it the down factors of all groups (G * r, in), where one product
             makes both; the base's own is then a part of it
    """

    factors: tuple[Tensor, Tensor] | None
    wide: Tensor | None

    def __init__(self, base: nn.Module, rows: Rows, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.base = base
        self.rows = rows
        self.sizes = sizes
        self.blocks: list[int] = []
        self.factors = self.wide = None

    def widen(self, down: Tensor) -> None:
        """Make `wide`, with the down factors (G, r, in) of all groups."""
        assert isinstance(self.base, nn.Linear)
        weight, bias = self.base.weight, self.base.bias
        self.wide = torch.cat([weight.detach(), down.flatten(0, 1)])
        self.wide_bias = None if bias is None else torch.cat([bias.detach(), bias.new_zeros(down[..., 0].numel())])
        weight.data = self.wide[: len(weight)]

    def forward(self, x: Tensor) -> Tensor:
        assert self.factors is not None, "the plain base runs its own layers"
        down, up = self.factors
        # All rows in order, by row (its last token under logits_to_keep, cached ones in DeepSeek's latent attention) or
        # with all tokens flattened. Not e.g. an expert that sees some of the tokens: groups would mix.
        # Their number as a product: torch.compile then sees at once that the groups divide it.
        rows, shape = self.rows, x.shape
        num_rows = down.shape[0] * rows.rows_of_group if rows.groups is None else rows.num_rows
        num_tokens = rows.num_tokens
        if not (len(shape) > 2 and shape[0] == num_rows) and shape[:-1] != (num_rows * num_tokens,):
            wanted = num_rows, num_tokens
            names = ", ".join(self.sizes)
            raise ValueError(f"adapted layer {names}: expected tokens {wanted}, got {tuple(shape[:-1])}")
        base, is_plain_sum = self._modules["base"], rows.merge_weights is None  # past nn.Module, as in `adapted`
        assert base is not None
        if self.wide is not None and is_plain_sum:
            return self._multiply_wide(x, num_rows, up)
        if rows.groups is not None and is_plain_sum and isinstance(base, PackedLinear):
            out = base.adapted(x, down, up, rows.groups, self.blocks)
            if out is not None:
                return out
        out = base(x)
        if rows.groups is not None:
            groups = rows.groups.to(x.device)
            hidden = self._weigh(mpg_ext.lora_shrink(x.reshape(num_rows, -1, shape[-1]), down, groups))
            blocks = self.blocks if is_plain_sum else ()
            mpg_ext.lora_expand_(out.view(num_rows, -1, out.shape[-1]), hidden, up, groups, blocks=blocks)
            return out
        hidden = torch.bmm(x.reshape(down.shape[0], -1, shape[-1]), down.transpose(1, 2))  # (G, tokens, r)
        out.view(up.shape[0], -1, out.shape[-1]).baddbmm_(self._weigh(hidden), up)
        return out

    def _weigh(self, hidden: Tensor) -> Tensor:
        """Features of tokens, the last dimension N r where rows run a sum of N adapters, times each row's weights."""
        if (weights := self.rows.merge_weights) is None:
            return hidden
        num_rows, num_merged = weights.shape
        parts = hidden.reshape(num_rows, -1, num_merged, hidden.shape[-1] // num_merged)
        return (parts * weights.to(parts.device)[:, None, :, None]).view_as(hidden)

    def _multiply_wide(self, x: Tensor, num_rows: int, up: Tensor) -> Tensor:
        """`forward` in one product and one update."""
        assert self.wide is not None
        (num_groups, rank, size), first, groups = up.shape, self.rows.first_group, self.rows.groups
        columns = size + (first + num_groups) * rank  # groups behind them are not read
        bias = None if self.wide_bias is None else self.wide_bias[:columns]
        product = linear(x, self.wide[:columns], bias)
        out, hidden = product[..., :size], product[..., size + first * rank :]
        if groups is not None:
            rows = out.view(num_rows, -1, size), hidden.view(num_rows, -1, num_groups * rank)
            mpg_ext.lora_expand_(*rows, up, groups.to(x.device))
        else:
            of_groups = hidden.view(num_groups, -1, num_groups, rank)
            own = of_groups.diagonal(0, 0, 2).permute(2, 0, 1)  # (G, tokens, r)
            out.view(num_groups, -1, size).baddbmm_(own, up)
        return out


def _ranks(adapters: Sequence[Adapter], layer: LoraLinear) -> list[int]:
    """The largest rank that the adapters have at each of the layers that are joined, 0 for none."""
    factors = [[adapter.factors.get(module) for adapter in adapters] for module in layer.sizes]
    return [max((pair[0].shape[1] for pair in of_module if pair is not None), default=0) for of_module in factors]


def _blocks(adapters: Sequence[Adapter], layer: LoraLinear) -> list[int]:
    """Where the up factors of `_stack` are not zero, as `mpg_ext.lora_expand_` takes it."""
    bounds = pairwise(accumulate(layer.sizes.values(), initial=0))
    return [n for rank, (first, end) in zip(_ranks(adapters, layer), bounds, strict=True) for n in (rank, first, end)]


def _behind_zeros(factors: Tensor) -> Tensor:
    """Factors (N, r, ...) side by side behind as many zeros. out: (2, N r, ...)"""
    joined = factors.flatten(0, 1)
    return torch.stack([torch.zeros_like(joined), joined])


def _stack(adapters: Sequence[Adapter], layer: LoraLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors of one layer, (G, r, in) and (G, r, out); those of joined layers in rows and columns of their own.

    The other columns of such a row are zeros. The CPU's op passes over them; a GPU's reads them with the rest, so that
    one launch does for all: with rank 16 on every linear layer of Llama-3-8B in bfloat16 they are 42 MB a group, .3 %
    of what a token reads of the base.
    """
    pairs = [[adapter.factors.get(module) for adapter in adapters] for module in layer.sizes]
    ranks = _ranks(adapters, layer)
    size_in = next(pair[0].shape[0] for of_module in pairs for pair in of_module if pair is not None)
    device = layer.base.get_parameter("weight").device
    downs = torch.zeros(len(adapters) + 1, sum(ranks), size_in, dtype=dtype, device=device)
    ups = torch.zeros(len(adapters) + 1, sum(ranks), sum(layer.sizes.values()), dtype=dtype, device=device)
    row = column = 0
    for of_module, rank, size in zip(pairs, ranks, layer.sizes.values(), strict=True):
        for group, pair in enumerate(of_module, start=1):
            if pair is not None:
                down, up = pair
                downs[group, row : row + down.shape[1]] = down.T
                ups[group, row : row + up.shape[0], column : column + size] = up
        row, column = row + rank, column + size
    return downs, ups
