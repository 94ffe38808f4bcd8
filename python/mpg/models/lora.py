"""LoRA adapters of one base model: how they are stored, and which kinds can be stacked."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, PeftType, load_peft_weights
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mpg.models.linear import PackedLinear
from mpg.models.sources import is_equal

PREFIX = "base_model.model."  # of every key that PEFT saves
# The name of the adapter stands in the keys of a state_dict(), not in those that save_pretrained() writes.
FACTOR_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.(?P<adapter>[^.]+))?\.weight")
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Settings that make an adapter more than y + x A B: what a stacked layer would silently leave out.
UNSUPPORTED_SETTINGS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "megatron_config",
    "lora_bias",
    "layer_replication",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
)
# Every other initialisation (PiSSA, OLoRA, CorDA, LoftQ, ...) also changes the base weights.
PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


class UnstackableError(ValueError):
    """An adapter that is more than low-rank updates of linear layers. PEFT may merge it all the same."""


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter.

    name:       what the caller called it, for messages
    source:     where it came from
    factors:    per module down (in, r) and up (r, out) with the scaling folded in, both float32
    trained_on: the base model's name or path at that time, "" if unknown or the very model that it is in
    model:      that model, of an adapter in memory
    """

    name: str
    source: str
    factors: dict[str, tuple[Tensor, Tensor]]
    trained_on: str = ""
    model: PeftModel | None = None

    @property
    def rank(self) -> int:
        return max(down.shape[1] for down, _ in self.factors.values())


def read_adapter(
    name: str, folder: str | Path, model: PreTrainedModel, weights_of: PreTrainedModel | None = None
) -> Adapter:
    """Read a LoRA adapter of `model` from a folder or hub repository in PEFT's format.

    weights_of: the same model where `model` has no weights

    Warns, as PEFT does, of layers that the configuration targets and the file lacks: they stay the base's.

    Raises ValueError, naming the setting or module, for missing files and for weights that are not those that the
    configuration describes, and what readers raise for damaged ones. It is an UnstackableError for every kind that
    cannot be stacked, and for weights of the base that were saved with the adapter (PEFT does so for an adapted head)
    and are not the model's.
    """
    if Path(folder).is_dir() and not any((Path(folder) / file).is_file() for file in WEIGHT_FILES):
        raise ValueError(f"{name}: expected {WEIGHT_FILES[0]} in the adapter folder {folder}, got none")
    config = _check_config(name, PeftConfig.from_pretrained(str(folder)))
    weights = load_peft_weights(str(folder), device="cpu")
    sides: dict[str, dict[str, Tensor]] = {}  # lora_A and lora_B by module
    adapters = set()
    for key, match in [(key, FACTOR_KEY.fullmatch(key)) for key in weights]:
        if match is not None:
            sides.setdefault(match["module"].removeprefix(PREFIX), {})[match["side"]] = weights.pop(key)
            adapters.add(match["adapter"])
    if len(adapters) > 1:
        raise ValueError(f"{name}: expected the weights of one adapter in {folder}, got those of {sorted(adapters)}")
    if other := [key for key in weights if ".lora_" in key]:
        raise UnstackableError(f"{name}: expected LoRA on linear layers alone, got {other[0]} too")
    if not sides:
        raise ValueError(f"{name}: expected LoRA weights in the adapter folder {folder}, got none")
    factors = {}
    for module, parts in sides.items():
        down, up = parts.get("A"), parts.get("B")  # (r, in), (out, r)
        if up is None or down is None or up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
            got = ", ".join(f"lora_{side} {tuple(part.shape)}" for side, part in sorted(parts.items()))
            raise ValueError(f"{name}: expected lora_A (r, in) and lora_B (out, r) of module {module}, got {got}")
        rank, alpha = (
            pattern.get(get_pattern_key(list(pattern), module), default) if pattern else default
            for pattern, default in ((config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha))
        )
        if rank != down.shape[0]:
            wanted = f"rank {rank} at module {module}, as its configuration says"
            raise ValueError(f"{name}: expected {wanted}, got {down.shape[0]}")
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        factors[module] = (down.float().T, up.float().T * scaling)
        _check_fit(model, name, module, *factors[module])
    _check_targets(name, config, model, list(factors))
    for key, weight in weights.items():
        saved = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        own = _find_weight(weights_of or model, saved)
        if own is None or not is_equal(own, weight):
            raise UnstackableError(f"{name}: expected the model's weights for {saved}, got some of its own")
    return Adapter(name, str(folder), factors, config.base_model_name_or_path or "")


def _find_weight(model: nn.Module, name: str) -> Tensor | None:
    """A model's parameter of this name on the CPU, in no other order than it was read in."""
    module, _, attribute = name.rpartition(".")
    layer = dict(model.named_modules(remove_duplicate=False)).get(module)
    if isinstance(layer, PackedLinear) and attribute == "weight":
        return layer.unpacked()
    weight = None if layer is None else layer._parameters.get(attribute)
    return None if weight is None else weight.cpu()


def _check_fit(model: nn.Module, name: str, module: str, down: Tensor, up: Tensor) -> None:
    try:
        layer = model.get_submodule(module)
    except AttributeError:
        got = f"an adapter of {module}, which it does not have"
        raise ValueError(f"{name}: expected an adapter of {type(model).__name__}, got {got}") from None
    layer = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    if isinstance(layer, Conv1D):
        shape = tuple(layer.weight.shape)  # GPT-2 stores (in, out)
    elif isinstance(layer, nn.Linear):
        shape = (layer.in_features, layer.out_features)
    else:
        raise UnstackableError(f"{name}: expected linear layers alone, got {type(layer).__name__} at {module}")
    if shape != (down.shape[0], up.shape[1]):
        sizes = (down.shape[0], up.shape[1])
        raise ValueError(f"{name}: expected (in, out) = {shape} for module {module}, got {sizes}")


def _check_targets(name: str, config: LoraConfig, model: PreTrainedModel, modules: Sequence[str]) -> None:
    """Compare the modules of a file with those that PEFT would adapt by its configuration."""
    if config.target_modules is None:
        usual = LoraModel.target_module_mapping.get(model.config.model_type, [])
        config = replace(config, target_modules=list(usual))
    full_config = _maybe_include_all_linear_layers(copy.copy(config), model)
    targets = [module for module, _ in model.named_modules() if check_target_module_exists(full_config, module)]
    if other := [module for module in modules if module not in targets]:
        wanted = f"modules that its configuration targets ({config.target_modules})"
        raise ValueError(f"{name}: expected {wanted}, got weights of {_some(other)} too")
    if missing := [module for module in targets if module not in modules]:
        text = f"its configuration targets {_some(missing)}, for which its file has no weights"
        warnings.warn(f"{name}: {text}; they stay as in the base", stacklevel=7)


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def adapter_in_memory(name: str, model: PeftModel, adapter_name: str) -> Adapter:
    """Take an adapter that is already loaded in a PeftModel, with the scaling it has there.

    Raises UnstackableError, which is a ValueError, for every kind that cannot be stacked.
    """
    _check_config(name, model.peft_config[adapter_name])
    factors, base = {}, model.get_base_model()
    for module, layer in own_layers(name, base):
        if adapter_name in layer.lora_embedding_A:
            raise UnstackableError(f"{name}: expected LoRA on linear layers alone, got an adapter of {module} too")
        if adapter_name in layer.lora_A:
            down, up = (part[adapter_name].get_parameter("weight").detach() for part in (layer.lora_A, layer.lora_B))
            factors[module] = (down.float().T, up.float().T * layer.scaling[adapter_name])
            _check_fit(base, name, module, *factors[module])
    if not factors:
        got = "none: it was deleted, unloaded, or merged and unloaded"
        raise ValueError(f"{name}: expected layers of the adapter {adapter_name!r} in the PeftModel, got {got}")
    return Adapter(name, adapter_name, factors, model=model)


def own_layers(argument: str, base: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """PEFT's layers in a model, by name. Raises ValueError where an adapter is merged into the weights of one."""
    for module, layer in list(base.named_modules()):
        if isinstance(layer, LoraLayer):
            if layer.merged:
                got = f"{layer.merged_adapters} merged into the weights"
                raise ValueError(f"{argument}: expected adapters beside the base, got {got}; call unmerge_adapter()")
            yield module, layer


def _check_config(name: str, config: PeftConfig) -> LoraConfig:
    if config.peft_type != PeftType.LORA:
        has_weights = not (config.is_prompt_learning or config.is_adaption_prompt)
        raise (UnstackableError if has_weights else ValueError)(
            f"{name}: expected a LoRA adapter, got {config.peft_type}"
        )
    assert isinstance(config, LoraConfig)
    for setting in UNSUPPORTED_SETTINGS:
        value = getattr(config, setting, None)  # not every version of PEFT has all of them
        if value:
            raise UnstackableError(f"{name}: expected a plain LoRA adapter, got one with {setting}={value!r}")
    if config.bias != "none":
        raise UnstackableError(f"{name}: expected a LoRA adapter with bias='none', got bias={config.bias!r}")
    if config.init_lora_weights not in PLAIN_INITIALISATIONS:
        raise UnstackableError(
            f"{name}: expected a LoRA adapter that leaves the base weights as they are, got "
            f"init_lora_weights={config.init_lora_weights!r}; save it with path_initial_model_for_weight_conversion"
        )
    return config
