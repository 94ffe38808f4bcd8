"""The caller's own model behind a loaded one, which may be trained on: notices changes and carries them over.

Knows which weights of the loaded model are copies; nothing of what is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from mpg.models.joined import JoinedLinear
from mpg.models.linear import PackedLinear
from mpg.models.lora import Adapter, adapter_in_memory, own_layers
from mpg.models.quantize import Int4Linear
from mpg.models.stack import LoraLinear, LoraStack

SAMPLE = 64  # values of a weight that are compared: torch does not count what is written through `.data`


class Origin:
    """A loaded model that the caller gave, and what its weights were when they were last read.

    argument: what the caller named the model, for messages
    """

    def __init__(self, argument: str, source: PreTrainedModel | PeftModel, adapters: Sequence[Adapter]) -> None:
        self.argument = argument
        self._base: Any = source.get_base_model() if isinstance(source, PeftModel) else source
        self._adapters = [adapter for adapter in adapters if adapter.model is not None]
        self._parts = self._walk()  # a walk names nothing: names take ten times as long, at every call
        self._shapes = self._describe()
        self._found = self._find()
        self._places: list[Any] = []
        self._samples: list[list[Tensor]] = []  # views of the weights, as long as they lie where they lay
        self._seen = self._new = self._look()

    def has_changed(self) -> bool:
        """Whether its weights are others than those that were last read.

        Raises ValueError, at every call, where its modules, the sizes of its weights or its adapters are other ones, or
        an adapter is merged into it.
        """
        if (parts := self._walk()) != self._parts:
            self._check()
            self._found, self._parts = self._find(), parts
        self._new = self._look()
        is_same = self._seen[0] == self._new[0] and all(map(torch.equal, self._seen[1], self._new[1]))
        if not is_same:
            self._check()
        return not is_same

    @torch.no_grad()
    def read(self, model: PreTrainedModel, adapters: list[Adapter], stack: LoraStack | None) -> None:
        """Let a loaded model and its adapters have the weights that the caller's have now."""
        weights: dict[str, Tensor] = dict(self._weights())
        for module, part in model.named_modules():
            for attribute in ("weight", "bias") if isinstance(part, JoinedLinear) else ():
                names = [f"{name}.{attribute}" for name in part.names if f"{name}.{attribute}" in weights]
                if names:
                    weights[f"{module}.linear.{attribute}"] = torch.cat([weights.pop(name) for name in names])
        for name, weight in weights.items():
            module, _, attribute = name.rpartition(".")
            layer: Any = model.get_submodule(module)
            layer = layer.base if isinstance(layer, LoraLinear) else layer
            if isinstance(layer, Int4Linear) and attribute == "weight":
                layer.pack(weight.detach())
                continue
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
        self._seen = self._new

    def _weights(self) -> dict[str, nn.Parameter]:
        """Weights by their names without PEFT's layers; quantised ones are the caller's own and do not change."""
        named = self._base.named_parameters(remove_duplicate=False)
        plain = {name.replace(".base_layer.", "."): weight for name, weight in named if type(weight) is nn.Parameter}
        return {name: weight for name, weight in plain.items() if ".lora_" not in name}

    def _walk(self) -> list[Any]:
        """Every module and parameter by its id, and which adapters are merged into it."""
        found: list[Any] = []
        modules: list[nn.Module] = [self._base]
        for module in modules:
            modules += [part for part in module._modules.values() if part is not None]
            found += (id(module), *map(id, module._parameters.values()))
            if isinstance(module, LoraLayer):
                found.append(tuple(module.merged_adapters))
        return found

    def _describe(self) -> dict[str, Any]:
        """Types of modules, without PEFT's, and shapes of weights and of the adapters' factors, by their names."""
        found: dict[str, Any] = {}
        for name, module in self._base.named_modules():
            if not isinstance(module, LoraLayer) and ".lora_" not in name:
                found[name.removesuffix(".base_layer")] = type(module)
        found |= {name: tuple(weight.shape) for name, weight in self._weights().items()}
        for module, layer in own_layers(self.argument, self._base):
            for adapter in [adapter for adapter in self._adapters if adapter.source in layer.lora_A]:
                parts = (layer.lora_A, layer.lora_B)
                found[f"{adapter.name}: {module}"] = [part[adapter.source].weight.shape for part in parts]
        return found

    def _check(self) -> None:
        shapes, wanted = self._describe(), "the modules and weights that it was loaded with"
        for adapter in self._adapters:
            own = f"{adapter.name}: "
            if not any(name.startswith(own) for name in shapes):
                got = "a model without it (deleted, unloaded, or merged and unloaded)"
                raise ValueError(f"{own}expected the adapter {adapter.source!r} in memory, got {got}; load again")
        for name in sorted(self._shapes.keys() | shapes.keys()):
            if self._shapes.get(name) != shapes.get(name):
                at = name if ": " in name else f"{self.argument}: {name}"
                argument, _, at = at.partition(": ")
                raise ValueError(f"{argument}: expected {wanted}, got others at {at}; load again")
        if any(weight.device.type == "meta" for weight in self._weights().values()):
            raise ValueError(f"{self.argument}: expected {wanted}, got none (on the meta device); load again")

    def _find(self) -> tuple[list[Tensor], list[tuple[LoraLayer, str]]]:
        """All weights, and the layers of each adapter."""
        layers = dict(own_layers(self.argument, self._base))
        found: list[Tensor] = list(self._weights().values())
        adapted = []
        for adapter in self._adapters:
            for layer in [layer for layer in layers.values() if adapter.source in layer.lora_A]:
                found += [part[adapter.source].get_parameter("weight") for part in (layer.lora_A, layer.lora_B)]
                adapted.append((layer, adapter.source))
        return found, adapted

    @torch.no_grad()
    def _look(self) -> tuple[list[Any], list[Tensor]]:
        weights, adapted = self._found
        places = [(w.shape, w.stride(), w.data_ptr()) for w in weights]
        if places != self._places:
            self._places = places
            samples: dict[Any, list[Tensor]] = {}
            for weight in [weight for weight in weights if weight.device.type != "meta" and weight.numel()]:
                span = 1 + sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
                step = max(span // SAMPLE, 1)
                sample = weight.as_strided(((span - 1) // step + 1,), (step,))  # a view, however it is laid out
                samples.setdefault((weight.device, weight.dtype), []).append(sample)
            self._samples = list(samples.values())
        scalings = [layer.scaling[name] for layer, name in adapted]
        counts = [None if weight.is_inference() else weight._version for weight in weights]
        return [scalings, places, counts], [torch.cat(samples).cpu() for samples in self._samples]
