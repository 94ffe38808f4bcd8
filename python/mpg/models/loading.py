"""How the models of a combination are loaded, checked against each other and put on their devices.

Knows sources and devices; nothing of what is done with the models once they are an `Ensemble`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from mpg.context import Context
from mpg.models import gguf, sources
from mpg.models.agreement import check_agreement, check_tokenizers, check_trained_on
from mpg.models.attention import choose_lengths, most_by_rows, use_ragged_attention, verify_ragged_attention
from mpg.models.compiled import compile_layers
from mpg.models.ensemble import ANCHOR, BASE, DRAFT, MERGED, ROLES, Ensemble, Slot
from mpg.models.graphs import CAPTURES
from mpg.models.joined import join_linears
from mpg.models.linear import pack_linears
from mpg.models.lora import Adapter, UnstackableError, adapter_in_memory, read_adapter
from mpg.models.merging import merge_adapter
from mpg.models.norms import fuse_norms
from mpg.models.origin import Origin
from mpg.models.places import resolve_device, resolve_dtype, resolve_places
from mpg.models.quantize import INT4_DRAFT, QUANTIZERS, quantize_linears
from mpg.models.reuse import reuse, share, skeleton
from mpg.models.runner import LoadedModel
from mpg.models.sources import ADAPTER_CONFIG, Place, Source
from mpg.models.stack import LoraStack

if TYPE_CHECKING:
    from mpg.recipe import Recipe


def load(
    recipe: Recipe,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    graphs: bool = False,
    compile: bool = False,
    beside: Ensemble | None = None,
) -> Ensemble:
    """The models of a recipe, loaded. `mpg.load` says what they and the other arguments may be, and what raises.

    beside: what was loaded by these arguments of a recipe that differs in attributes alone; the models and adapters of
            folders that it has are not loaded again, and their weights shared
    """
    of_recipe = {name: getattr(recipe, name) for name in ("allow_other_base", "merge_adapters", "allow_pickle")}
    switches = {**of_recipe, "graphs": graphs, "compile": compile}
    for argument, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{argument}: expected True or False, got {value!r}")
    if recipe.quantize not in (None, *QUANTIZERS):
        raise ValueError(f"quantize: expected {' or '.join(map(repr, QUANTIZERS))}, got {recipe.quantize!r}")
    if not isinstance(recipe.attributes, Mapping | None):
        got = type(recipe.attributes).__name__
        raise ValueError(f"attributes: expected a mapping from names to sources, got {got}")
    given = dict(recipe.attributes or {})
    contexts = {
        name: Context.of(_argument(name), at) for name, at in given.items() if isinstance(at, Context | Mapping)
    }
    if isinstance(recipe.anchor, Context | Mapping):
        contexts[ANCHOR] = Context.of(ANCHOR, recipe.anchor)
        recipe = replace(recipe, anchor=contexts[ANCHOR].source)
    given |= {name: _reader(name, context, given) for name, context in contexts.items() if name != ANCHOR}
    roles = {ANCHOR: recipe.anchor, DRAFT: recipe.draft}
    asked = {BASE: recipe.base} | {role: source for role, source in roles.items() if source is not None}
    asked |= {_argument(name): source for name, source in given.items() if name not in contexts or source is not None}
    for argument, source in asked.items():
        if not isinstance(source, Source):
            wanted = "a folder, a hub name or a loaded model"
            raise ValueError(f"{argument}: expected {wanted}, got {type(source).__name__}")
        asked[argument] = gguf.resolve(argument, source)
    given = {name: asked.get(_argument(name)) for name in given}
    recipe = replace(recipe, **{role: asked[role] for role in (BASE, *roles) if role in asked})
    tokenizers = sources.Tokenizers()
    tokenizer = sources.own_tokenizer(recipe.tokenizer, tokenizers)
    peft_models = [source for source in (*given.values(), recipe.draft) if isinstance(source, PeftModel)]
    base, anchor = _with_adapters(recipe.base, peft_models), _with_adapters(recipe.anchor, peft_models)
    names = sources.default_attributes(base) if recipe.attributes is None else given
    host = base if anchor is None or anchor in names or sources.is_adapter(anchor, base) else anchor
    if recipe.attributes is None:
        names = sources.default_attributes(host)
    for argument, source in asked.items():  # before minutes of loading
        if argument not in (ANCHOR, DRAFT) or source not in names:
            sources.check_found(argument, source, host)
    if not names and recipe.attributes is None:
        wanted = "at least one, or {} for contexts that calls bring"
        if isinstance(host, str | Path):
            wanted += f", given here or found as {Path(host, 'adapters', 'NAME', ADAPTER_CONFIG)}"
        raise ValueError(f"attributes: expected {wanted}, got none")
    for name in names:
        if not isinstance(name, str) or not name.strip() or name in (*ROLES, MERGED):
            wanted = f"names other than {BASE!r}, {ANCHOR!r}, {DRAFT!r} and {MERGED!r}"
            raise ValueError(f"attributes: expected {wanted}, got {name!r}")

    loader = _Loader(recipe, names, host, dtype, device, () if beside is None else beside._models, tokenizers)
    slots = {BASE: loader.add(BASE, base)}
    if host is anchor:
        slots[ANCHOR] = loader.add(ANCHOR, host)
    for name, source in names.items():
        slot = slots[BASE] if source is None else loader.add_attribute(_argument(name), source)
        slots[name] = slot._replace(context=name) if name in contexts else slot
    for role, source in ((ANCHOR, anchor), (DRAFT, recipe.draft)):
        if source is None or (role == DRAFT and recipe.quantize == INT4_DRAFT):
            slots[role] = slots[BASE]
        elif isinstance(source, str) and source in names:
            slots[role] = slots[source]
        elif role == DRAFT:
            slots[role] = loader.add_attribute(role, source)
        elif role not in slots:
            slots[role] = loader.add(role, source)
    if tokenizer is not None:
        loader.models[0].tokenizer = tokenizer
    others = []
    if recipe.quantize == INT4_DRAFT:
        known = [] if beside is None else [loaded for loaded in beside._models if loaded.argument == DRAFT]
        of_draft = names.get(recipe.draft, recipe.draft) if isinstance(recipe.draft, str) else recipe.draft
        others.append(reuse(DRAFT, known[0]) if known else _int4_draft(recipe, base, of_draft, device))
        slots[DRAFT] = Slot(others[0], context=recipe.draft if recipe.draft in contexts else "")
    models = loader.finish(others)
    if others and of_draft is None:
        _adapt(others[0], slots[BASE].model.adapters, base)
    if graphs:
        _allow_captures(models)
    for loaded in models:
        if compile:
            compile_layers(loaded.argument, loaded.model, loaded.stack)
            loaded.is_compiled = True
        else:  # a compiled layer has its norms fused with what is around them
            fuse_norms(loaded.model)
    if ANCHOR in contexts:
        slots[ANCHOR] = slots[ANCHOR]._replace(context=ANCHOR)
    return Ensemble(models, slots, tuple(names), contexts)


def _int4_draft(recipe: Recipe, base: Source, source: Source | None, device: Any) -> LoadedModel:
    """The draft in four bits, or a copy of the base where there is none, beside models of another type."""
    if source is not None and (isinstance(source, PeftModel) or sources.is_adapter(source, base)):
        raise ValueError(f"draft: expected a model beside quantize={INT4_DRAFT!r}, got an adapter")
    alone = replace(
        recipe, base=source or base, attributes={}, anchor=None, draft=None, tokenizer=None, device_map=None,
        quantize="int4",
    )  # fmt: skip
    [loaded] = load(alone, device=device)._models
    loaded.argument = DRAFT
    return loaded


def _adapt(loaded: LoadedModel, adapters: Sequence[Adapter], base: Source) -> None:
    """Let a copy of the base run the base's adapters too."""
    if not adapters:
        return
    loaded.adapters = list(adapters)
    loaded.stack = LoraStack(loaded.model, loaded.adapters)
    if loaded.origin is not None:
        assert isinstance(base, nn.Module)
        loaded.origin = Origin(BASE, base, loaded.adapters)


class _Loader:
    """Gives every distinct source one slot. Adapters attach to one model, the host, and are stacked by `finish`."""

    def __init__(
        self,
        recipe: Recipe,
        names: Mapping[str, Source],
        host: Source,
        dtype: Any,
        device: Any,
        loaded: Sequence[LoadedModel],
        tokenizers: sources.Tokenizers,
    ) -> None:
        self.recipe, self.host, self.tokenizers = recipe, host, tokenizers
        folders = [known for known in loaded if known.origin is None]
        self.known: dict[int | str, LoadedModel] = {known.source: known for known in reversed(folders)}
        self.read_adapters = {adapter.source: adapter for known in folders for adapter in known.adapters}
        self.reused: list[LoadedModel] = []
        arguments = {name: _argument(name) for name in names} | {role: role for role in ROLES}
        self.places = resolve_places(recipe.device_map, arguments)  # those that no model has taken yet
        self.dtype, self.device = resolve_dtype(dtype), resolve_device(device, recipe.base)
        self.is_int4 = recipe.quantize == "int4"
        if self.is_int4 and self.dtype not in (None, torch.bfloat16):
            raise ValueError(f"dtype: expected bfloat16 beside quantize='int4', which computes in it, got {self.dtype}")
        if self.is_int4:
            self.dtype = torch.bfloat16
        self.keeps_devices = device is None
        self.models: list[LoadedModel] = []
        self.given: dict[int, PreTrainedModel | PeftModel] = {}  # models of the caller's, by the loaded one's id
        self.slots: dict[int | str, Slot] = {}

    def add(self, argument: str, source: Source) -> Slot:
        """The slot of an adapter (by its name in the host or by its folder) or of a model."""
        key = _key(source)
        if key not in self.slots:
            in_memory = self.host.peft_config if isinstance(self.host, PeftModel) else ()
            is_read = isinstance(source, str | Path) and source not in in_memory and key not in self.known
            if is_read and not self.recipe.allow_pickle:
                sources.refuse_pickle(argument, source, sources.is_adapter(source, self.host))
            if key in self.known:
                self.reused.append(reuse(argument, self.known[key]))
                self.models.append(self.reused[-1])
                self.slots[key] = Slot(self.reused[-1])
                self.places.pop(argument, None)
            elif isinstance(source, nn.Module) or not sources.is_adapter(source, self.host):
                self.slots[key] = self._add_model(argument, source)
            elif isinstance(self.host, PeftModel) and source in self.host.peft_config:
                try:
                    self.slots[key] = self._add_adapter(adapter_in_memory(argument, self.host, str(source)))
                except UnstackableError as error:
                    remedy = "save it and load its folder with merge_adapters=True"
                    raise ValueError(f"{error}; {remedy}") from error
            else:
                try:
                    with sources.refuse_unreadable(argument, source):  # a configuration may hold anything
                        self.slots[key] = self._add_adapter(self._read_adapter(argument, source))
                except UnstackableError as error:
                    if not self.recipe.merge_adapters:
                        raise ValueError(f"{error}; merge it, or load with merge_adapters=True") from error
                    with sources.refuse_unreadable(argument, source):
                        self.slots[key] = self._add_merged(argument, source)
        return self.slots[key]

    def add_attribute(self, argument: str, source: Source) -> Slot:
        """The slot of a source; a PeftModel stands for its active adapter, and not for the model under it."""
        if not isinstance(source, PeftModel):
            return self.add(argument, source)
        if not isinstance(self.host, PeftModel) or source.get_base_model() is not self.host.get_base_model():
            raise ValueError(
                f"{argument}: expected a PeftModel around the very model that adapters attach to, got one around "
                f"another; give its adapter as a folder, or the model that merge_and_unload() makes of it"
            )
        if len(source.active_adapters) != 1:
            got = f"{source.active_adapters}; call set_adapter()"
            raise ValueError(f"{argument}: expected a PeftModel with one active adapter, got {got}")
        return self.add(argument, source.active_adapters[0])

    def finish(self, others: Sequence[LoadedModel]) -> list[LoadedModel]:
        """Stack the adapters and compare the models, among them others that are finished."""
        if self.places:
            got = f"{next(iter(self.places))}, an adapter or a model that has another name"
            raise ValueError(f"device_map: expected names that bring a model of their own, got {got}")
        for loaded in self.models:
            is_new, is_given = loaded not in self.reused, id(loaded) in self.given
            on_cpu = loaded.model.device.type == "cpu"
            if is_new and (on_cpu or not is_given):  # a given one keeps its weights: a GPU may have no room for copies
                join_linears(loaded.model)
            if is_new and self.is_int4:
                quantize_linears(loaded.argument, loaded.model)
            if loaded.adapters:
                loaded.stack = LoraStack(loaded.model, loaded.adapters)
                if is_new and not on_cpu and not is_given:  # where a launch has a price
                    loaded.stack.widen()
            if is_new:
                pack_linears(loaded.model)
            if (given := self.given.get(id(loaded))) is not None:
                loaded.origin = Origin(loaded.argument, given, loaded.adapters)
        self.models += others
        for loaded in self.models[1:]:
            check_agreement(self.models[0], loaded)
        known = [(loaded.argument, loaded.tokenizer) for loaded in self.models if loaded.tokenizer is not None]
        for adapter in (adapter for loaded in self.models for adapter in loaded.adapters):
            if Path(adapter.source).is_dir() and (tokenizer := self.tokenizers.read(adapter.name, adapter.source)):
                known.append((adapter.name, tokenizer))
        for argument, tokenizer in known[1:]:
            check_tokenizers(known[0][1], argument, tokenizer)
        return self.models

    def _read_adapter(self, argument: str, source: Any) -> Adapter:
        if str(source) in self.read_adapters:
            return replace(self.read_adapters[str(source)], name=argument)
        loaded = self.slots[_key(self.host)].model
        plain = skeleton(loaded.model) if loaded in self.reused else loaded.model
        return read_adapter(argument, source, plain, weights_of=loaded.model)

    def _add_adapter(self, adapter: Adapter) -> Slot:
        loaded = self.slots[_key(self.host)].model
        if not self.recipe.allow_other_base:
            check_trained_on(adapter.name, adapter.source, adapter.trained_on, loaded)
        loaded.adapters.append(adapter)
        return Slot(loaded, len(loaded.adapters))

    def _add_merged(self, argument: str, folder: str | Path) -> Slot:
        """An adapter in a model of its own, the host once more."""
        if not self.recipe.allow_other_base:
            trained_on = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path or ""
            check_trained_on(argument, str(folder), trained_on, self.slots[_key(self.host)].model)
        model, place = self._read(argument, self.host)
        if isinstance(self.host, nn.Module):
            model = copy.deepcopy(model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*tie_word_embeddings")  # what PEFT warns of is taken care of
            model = merge_adapter(argument, folder, model)
        slot = self._add_loaded(argument, folder, model, place)
        size = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
        warnings.warn(f"{argument}: it cannot be stacked; merged, it takes {size:.1f} MiB of its own", stacklevel=6)
        return slot

    def _add_model(self, argument: str, source: Source) -> Slot:
        if isinstance(source, PeftModel) and source is not self.host:
            wanted = "a PeftModel only where adapters attach to it"
            raise ValueError(f"{argument}: expected {wanted}, got another; give its base or a merged model")
        slot = self._add_loaded(argument, source, *self._read(argument, source))
        if isinstance(source, nn.Module):
            self.given[id(slot.model)] = source
        return slot

    def _read(self, argument: str, source: Source) -> tuple[PreTrainedModel, Place | None]:
        """A model, and where it goes, None being where it is."""
        place = self.places.pop(argument, None)
        if self.is_int4:
            own: Any = source.device if isinstance(source, nn.Module) and self.keeps_devices else self.device
            where = place or own
            if not isinstance(where, torch.device) or where.type != "cpu":
                raise ValueError(f"quantize: expected {argument} on the CPU, got {where}; device='cpu' puts it there")
        if not isinstance(source, nn.Module):
            dtype = self.dtype or (self.models[0].model.dtype if self.models else None)
            place = place or self.device
            return sources.read_model(argument, source, dtype, place), place
        model = share(argument, source)
        if not isinstance(place, torch.device | None):
            raise ValueError(f"{argument}: expected one device in device_map for a loaded model, got {place!r}")
        return model, place or (None if self.keeps_devices else self.device)

    def _add_loaded(self, argument: str, source: Source, model: PreTrainedModel, place: Place | None) -> Slot:
        tokenizer = None if isinstance(source, nn.Module) else self.tokenizers.read(argument, source)
        use_ragged_attention(model, argument)
        # A pad token makes some models (GPT-2) look for padding in every input, which waits for the device.
        model.config.pad_token_id = None
        model.requires_grad_(False).eval()
        self._move(argument, model, place)
        bytes_per_position = verify_ragged_attention(model, argument) if model.device.type != "meta" else 0
        name = str(source) if isinstance(source, str | Path) else model.name_or_path or type(model).__name__
        devices = tuple(dict.fromkeys(parameter.device for parameter in model.parameters()))
        size = model.num_parameters()
        loaded = LoadedModel(argument, name, model, tokenizer, size, bytes_per_position, devices)
        loaded.by_lengths = choose_lengths(model)
        loaded.by_rows = most_by_rows(model)
        self.models.append(loaded)
        return Slot(self.models[-1])

    def _move(self, argument: str, model: PreTrainedModel, place: Place | None) -> None:
        device = place if isinstance(place, torch.device) else model.device
        dtype = self.dtype or model.dtype
        if (model.device, model.dtype) == (device, dtype):
            return
        if model.device.type == "meta":
            raise ValueError(f"{argument}: expected a model with weights, got one on the meta device")
        is_split = len(set(getattr(model, "hf_device_map", {}).values())) > 1
        if is_split or getattr(model.config, "quantization_config", None):
            wanted = f"a {'split' if is_split else 'quantised'} model of {dtype} on {device}, as it cannot be changed"
            raise ValueError(f"{argument}: expected {wanted}, got {model.dtype} on {model.device}")
        model.to(device, dtype)


def _allow_captures(models: Sequence[LoadedModel]) -> None:
    """Let forwards be captured, of every model that lies on one device whose forwards can be."""
    able = [loaded for loaded in models if len(loaded.devices) == 1 and loaded.devices[0].type in CAPTURES]
    if not able:
        where = ", ".join(sorted({str(device) for loaded in models for device in loaded.devices}))
        raise ValueError(f"graphs: expected a model on one device of {', '.join(CAPTURES)}, got {where}")
    for loaded in able:
        loaded.new_capture = partial(CAPTURES[loaded.devices[0].type], loaded.devices[0])


def _reader(name: str, context: Context, attributes: Mapping[str, Any]) -> Any:
    """The source of what reads a context: its own, which an attribute's name may stand for, or None, the base."""
    source = attributes.get(context.source, context.source) if isinstance(context.source, str) else context.source
    if isinstance(source, Context | Mapping):
        got = f"{context.source!r}, which is a context too"
        raise ValueError(f"{_argument(name)}: source: expected an adapter or a model, got {got}")
    return source


def _argument(name: str) -> str:
    return f"attributes[{name!r}]"


def _key(source: Source) -> int | str:
    return id(source) if isinstance(source, nn.Module) else str(source)


def _with_adapters(model: Any, peft_models: Sequence[PeftModel]) -> Any:
    """The PeftModel around this very model, if there is one: PEFT has put its layers into the model itself."""
    return next((peft_model for peft_model in peft_models if peft_model.get_base_model() is model), model)
