"""Decoder layers run by torch.compile: one piece of code for all layers of a model that are alike.

Knows how a layer is called and what its code may depend on; nothing of what is decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mpg.models.cache import RaggedCache
from mpg.models.stack import LoraStack, Rows

# Of a row: a chunk and the token before it. Longer forwards read prompts.
MAX_TOKENS = 33


def compile_layers(argument: str, model: PreTrainedModel, stack: LoraStack | None) -> None:
    """Let the decoder layers of `model` run compiled where a forward decodes, and as they are where it reads prompts.

    argument: what the caller named the model, for the message

    Code is made when a forward first needs it: for one row or several, one token or several, so many adapters. All else
    that differs from forward to forward (how many rows, lengths, weights, the layer) are arguments of it. A module's
    hooks are no condition of it either.

    Raises ValueError for a model whose layers are not found.
    """
    layers = [module for module in model.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]
    wanted = model.config.get_text_config().num_hidden_layers
    if len(layers) != wanted:
        raise ValueError(f"compile: expected {wanted} decoder layers in {argument}, got {len(layers)}")
    # A code object of this model's own, as torch.compile makes no more than 8 variants of one. Packed weights have no
    # strides to assert.
    own_run = FunctionType(_run.__code__.replace(), _run.__globals__)
    run = torch.compile(own_run, dynamic=True, options={"size_asserts": False})
    rows = None if stack is None else stack.rows
    for index, layer in enumerate(layers):
        layer.forward = partial(_forward, run, rows, layer, index)


def _forward(
    run: Callable[..., Any], rows: Rows | None, layer: nn.Module, index: int, *args: Any, **kwargs: Any
) -> Any:
    cache: Any = next((value for value in (*args, *kwargs.values()) if isinstance(value, RaggedCache)), None)
    own: Any = None if cache is None else cache.layers[index]
    decodes = own is not None and own.is_initialized and cache.rows is None and args[0].shape[1] <= MAX_TOKENS
    # Where a mode watches the operations, as before a capture, torch.compile would give up on the code for good.
    if not decodes or _get_current_dispatch_mode() is not None:
        return type(layer).forward(layer, *args, **kwargs)
    cache.current = own
    try:
        return run(type(layer).forward, layer, rows, args, kwargs)
    finally:
        cache.current = None


def _run(forward: Callable[..., Any], layer: nn.Module, rows: Rows | None, args: Any, kwargs: Any) -> Any:
    if rows is not None:  # read from an argument they are inputs of the code, from a layer they would be constants
        _ = rows.rows_of_group, rows.num_rows, rows.num_tokens, rows.groups
    return forward(layer, *args, **kwargs)
