"""Linear layers that read one input, as one product: q, k and v of an attention, gate and up of an MLP.

Knows which layers these are and where each one's outputs lie; nothing of adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

# Layers of one module that read one input, by the names that transformers gives them.
READ_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class JoinedLinear(nn.Module):
    """Several linear layers as one, `linear`, whose outputs lie side by side in their order.

    names: what the layers are called in the model
    sizes: of their outputs
    """

    def __init__(self, names: Sequence[str], layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.names, self.sizes = tuple(names), [layer.out_features for layer in layers]
        first = layers[0]
        self.linear = nn.Linear(first.in_features, sum(self.sizes), first.bias is not None, device="meta")
        self.linear.weight = _join([layer.weight for layer in layers])
        if first.bias is not None:
            self.linear.bias = _join([layer.bias for layer in layers])
        # The latest x and what the layers made of it, or nothing. Written to in place: setting an attribute of a module
        # costs more than a small product.
        self.latest: list[Tensor] = []

    def read(self, place: int, x: Tensor) -> Tensor:
        """What the layer in this place makes of x, which the last one reads last."""
        latest = self.latest
        if not latest or latest[0] is not x:
            # Tensor.split is Python, which takes longer than this call
            latest[:] = x, *self.linear(x).split_with_sizes(self.sizes, -1)
        out = latest[1 + place]
        if place == len(self.sizes) - 1:
            latest.clear()
        return out


class JoinedPart(nn.Module):
    """Stands where one of the joined layers stood."""

    def __init__(self, joined: JoinedLinear, place: int) -> None:
        super().__init__()
        self.joined, self.place = joined, place
        self.in_features, self.out_features = joined.linear.in_features, joined.sizes[place]

    def forward(self, x: Tensor) -> Tensor:
        return self.joined.read(self.place, x)


def join_linears(model: nn.Module) -> None:
    """Join the plain linear layers of `model` that read one input and are alike but for the size of their outputs.

    Their weights are copied, and freed where nobody else holds them.
    """
    for parent_name, parent in list(model.named_modules()):
        for names in READ_TOGETHER:
            layers = list(filter(_is_plain, (getattr(parent, name, None) for name in names)))
            if len(layers) == len(names) and len({_kind(layer) for layer in layers}) == 1:
                prefix = parent_name + "." if parent_name else ""
                joined = JoinedLinear([prefix + name for name in names], layers)
                for place, name in enumerate(names):
                    setattr(parent, name, JoinedPart(joined, place))


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to what a module computes, or moves it."""
    return any(getattr(module, name, None) for name in ("_forward_hooks", "_forward_pre_hooks", "_hf_hook"))


def _is_plain(layer: object) -> TypeGuard[nn.Linear]:
    return type(layer) is nn.Linear and not has_hooks(layer)


def _kind(layer: nn.Linear) -> tuple[object, ...]:
    return layer.in_features, layer.weight.dtype, layer.weight.device, layer.bias is None


def _join(parts: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.cat([part.detach() for part in parts]), requires_grad=False)
