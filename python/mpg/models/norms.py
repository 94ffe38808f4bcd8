"""RMS norms on the CPU: modules that compute one, by whatever steps, do it in one op.

Knows which roundings a norm may have; nothing of the models that it is in.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import mpg_ext
from mpg.models.joined import has_hooks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# As in Llama; as in OLMo 2, where only the result is rounded; as in Gemma. In float32 the first two are the same.
VARIANTS: tuple[dict[str, Any], ...] = ({"rounds_first": True}, {}, {"offset": 1.0})
SCALES = (1.0, 100.0)  # of rows that tell a norm from others, beside one so small that its eps counts


def fuse_norms(model: nn.Module) -> None:
    """Let the modules of `model` on the CPU that turn out to be RMS norms compute in one op. They stay where they are,
    read their weights when they are called, and are left alone where they have hooks.

    torch's small steps take four times as long as the op: with few weights, a tenth of a token's time.
    """
    for module in model.modules():
        if (options := _options_of(module)) is not None:
            module.forward = partial(_forward, module, options)


def _forward(module: nn.Module, options: dict[str, Any], x: Tensor) -> Tensor:
    weight = module._parameters["weight"]  # past nn.Module, whose lookup takes a tenth of the call
    assert weight is not None
    if x.dtype != weight.dtype:
        return type(module).forward(module, x)
    return mpg_ext.rms_norm(x, weight, **options)


@torch.no_grad()
def _options_of(module: nn.Module) -> dict[str, Any] | None:
    """Those with which the op is what a module computes of random rows with a random weight, to a few roundings; None
    for a module that is no such norm."""
    own = [name for name, weight in module._parameters.items() if weight is not None]
    eps = [value for name, value in vars(module).items() if "eps" in name and isinstance(value, float)]
    if own != ["weight"] or len(eps) != 1 or has_hooks(module) or "forward" in vars(module):
        return None
    weight = module.get_parameter("weight")
    if weight.device.type != "cpu" or weight.ndim != 1 or weight.dtype not in DTYPES:
        return None
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([eps[0] ** 0.5, *SCALES])[:, None, None]
    x = (scales * torch.randn(len(scales), 2, len(weight), generator=generator)).to(weight.dtype)
    random_weight = torch.randn(weight.shape, generator=generator).to(weight.dtype)
    try:
        expected = functional_call(module, {"weight": random_weight}, x)
    except Exception:  # whatever a module raises that takes something else
        return None
    if not isinstance(expected, Tensor) or (expected.shape, expected.dtype) != (x.shape, x.dtype):
        return None
    candidates = [{"eps": eps[0], **variant} for variant in VARIANTS]
    errors = [(mpg_ext.rms_norm(x, random_weight, **options).double() - expected).abs() for options in candidates]
    best = min(range(len(candidates)), key=lambda place: errors[place].sum().item())
    most = 2 * torch.finfo(x.dtype).eps + 16 * torch.finfo(torch.float32).eps
    bound = most * expected.double().abs() + torch.finfo(x.dtype).tiny
    return candidates[best] if (errors[best] <= bound).all() else None
