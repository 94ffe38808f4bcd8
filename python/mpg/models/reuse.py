"""Weights that two loadings of one model share, so that they are there once. Knows modules; nothing of adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mpg.models.runner import LoadedModel


def reuse_weights(models: Sequence[LoadedModel], others: Sequence[LoadedModel]) -> None:
    """Let models have the very weights of others that are the same, each in the other one's place; their own are freed.

    For models that nothing has run yet: graphs hold addresses.
    """
    for loaded in models:
        for other in [other for other in others if other.argument == loaded.argument]:
            known = {name: tensor for name, _, _, tensor in _tensors(other.model)}
            for name, tensors, key, tensor in list(_tensors(loaded.model)):
                if name in known and _is_same(tensor, known[name]):
                    tensors[key] = known[name]


def _tensors(model: nn.Module) -> Iterator[tuple[str, dict[str, Tensor | None], str, Tensor]]:
    """Every parameter and buffer: its name, whether adapters are around its layer or not; where it is; and itself."""
    for path, module in model.named_modules():
        place = ".".join(part for part in path.split(".") if part != "base")
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    yield f"{place}.{key}", tensors, key, tensor


def _is_same(tensor: Tensor, other: Tensor) -> bool:
    kinds = [(one.shape, one.dtype, one.device, one.layout) for one in (tensor, other)]
    if kinds[0] != kinds[1]:
        return False
    if tensor.is_mkldnn:
        tensor, other = tensor.to_dense(), other.to_dense()
    return torch.equal(tensor, other)
