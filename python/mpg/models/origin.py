"""The caller's own model behind a loaded one, which may be trained on: notices changes and carries them over.

Knows which weights of the loaded model are copies; nothing of what is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from mpg.models.linear import PackedLinear
from mpg.models.lora import Adapter, LoraLinear, LoraStack, adapter_in_memory, own_layers

SAMPLE = 64  # values of a weight that are compared: torch does not count what is written through `.data`


class Origin:
    """A loaded model that the caller gave, and what its weights were when they were last read.

    argument: what the caller named the model, for messages
    """

    def __init__(self, argument: str, source: PreTrainedModel | PeftModel, adapters: Sequence[Adapter]) -> None:
        self.argument = argument
        self._base: Any = source.get_base_model() if isinstance(source, PeftModel) else source
        self._names = set(self._weights())
        self._adapters = list(adapters)
        self._seen = self._look()

    def has_changed(self) -> bool:
        """Raises ValueError where its modules are other ones, or hold a merged adapter."""
        seen, self._seen = self._seen, self._look()
        return seen[0] != self._seen[0] or not torch.equal(seen[1], self._seen[1])

    @torch.no_grad()
    def read(self, model: PreTrainedModel, adapters: list[Adapter], stack: LoraStack | None) -> None:
        """Let a loaded model and its adapters have the weights that the caller's have now."""
        for name, weight in self._weights().items():
            module, _, attribute = name.rpartition(".")
            layer: Any = model.get_submodule(module)
            layer = layer.base if isinstance(layer, LoraLinear) else layer
            own = getattr(layer, attribute)
            new = weight.detach().to(own.device, own.dtype)  # shared where it can be
            if isinstance(layer, PackedLinear) and attribute == "weight":
                layer.pack(new)
            else:
                own.data = new
        if stack is not None:
            for place, adapter in enumerate(adapters):
                if adapter.model is not None:
                    adapters[place] = adapter_in_memory(adapter.name, adapter.model, adapter.source)
            stack.fill(adapters)

    def _weights(self) -> dict[str, nn.Parameter]:
        """By the names that they have without PEFT's layers; quantised ones are the caller's own and do not change."""
        named = self._base.named_parameters(remove_duplicate=False)
        plain = {name.replace(".base_layer.", "."): weight for name, weight in named if type(weight) is nn.Parameter}
        return {name: weight for name, weight in plain.items() if ".lora_" not in name}

    @torch.no_grad()
    def _look(self) -> tuple[list[Any], Tensor]:
        layers, weights = dict(own_layers(self.argument, self._base)), self._weights()
        if other := sorted(self._names ^ weights.keys()):
            wanted = f"the weights that it was loaded with, got others at {other[0]}; load again"
            raise ValueError(f"{self.argument}: expected {wanted}")
        found: list[Tensor] = list(weights.values())
        scalings: list[float] = []
        for adapter in [adapter for adapter in self._adapters if adapter.model is not None]:
            for layer in layers.values():
                if adapter.source in layer.lora_A:
                    found += [part[adapter.source].get_parameter("weight") for part in (layer.lora_A, layer.lora_B)]
                    scalings.append(layer.scaling[adapter.source])
        counts = [(tuple(w.shape), w.data_ptr(), None if w.is_inference() else w._version) for w in found]
        with_values = [weight.flatten() for weight in found if weight.device.type != "meta"]
        samples = [w[:: max(len(w) // SAMPLE, 1)].to("cpu", torch.float64) for w in with_values] or [torch.empty(0)]
        return [scalings, counts], torch.cat(samples)
