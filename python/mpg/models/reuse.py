"""Second module trees over weights that are there: of a caller's model, and of a loaded one for other adapters.

Knows modules; nothing of where models lie.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from mpg.models.joined import JoinedLinear
from mpg.models.lora import own_layers
from mpg.models.runner import LoadedModel


def share(argument: str, model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The base model as a second module tree over the same weights; nothing done to it reaches the caller's model.

    argument: what the caller named the model, for messages

    Raises ValueError where PEFT's layers cannot be taken off: an adapter that is merged, that is not LoRA, or that was
    injected into a model which is no PeftModel (its base passes would silently lose it).
    """
    original: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    memo: dict[int, object] = {id(buffer): buffer for buffer in original.buffers()}
    for parameter in original.parameters():
        # A new Parameter over the same storage has its own requires_grad and device. Quantised ones carry more state.
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
    try:
        twin = copy.deepcopy(original, memo)
    except RuntimeError as error:
        wanted = "a model that can be copied, as one with ensure_weight_tying in an adapter cannot"
        raise ValueError(f"{argument}: expected {wanted}, got {error}") from error
    for module, layer in own_layers(argument, twin) if isinstance(model, PeftModel) else ():
        twin.set_submodule(module, layer.get_base_layer())
    for module, part in twin.named_modules():
        if type(part).__module__.startswith("peft."):
            wanted = "a plain model or a PeftModel with nothing but LoRA"
            raise ValueError(f"{argument}: expected {wanted}, got {type(part)} at {module}")
    return twin


def reuse(argument: str, loaded: LoadedModel) -> LoadedModel:
    """The model once more, without its adapters and with the very weights of the other, which may run meanwhile."""
    model, stack = loaded.model, loaded.stack
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    memo |= {id(module.latest): [] for module in model.modules() if isinstance(module, JoinedLinear)}
    for layer in stack.layers if stack is not None else ():
        memo[id(layer)] = copy.deepcopy(layer.base, memo)
    twin = copy.deepcopy(model, memo)
    sizes = loaded.num_parameters, loaded.bytes_per_position, loaded.devices
    return LoadedModel(
        argument, loaded.source, twin, loaded.tokenizer, *sizes, by_lengths=loaded.by_lengths, by_rows=loaded.by_rows
    )


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """The modules that a model was read with, before its layers were joined and packed; without weights."""
    with torch.device("meta"):
        return type(model)(model.config)
