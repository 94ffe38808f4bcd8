"""How the models of a combination are found, read, checked against each other and put on their devices.

Knows folders, hub names and loaded models; nothing of what is done with them once they are an `Ensemble`.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import file_exists, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import mpg_ext
from mpg.models.cache import use_ragged_attention, verify_ragged_attention
from mpg.models.compiled import compile_layers
from mpg.models.ensemble import ANCHOR, BASE, DRAFT, MERGED, ROLES, Ensemble, Slot
from mpg.models.graphs import CAPTURES
from mpg.models.linear import pack_linears
from mpg.models.lora import Adapter, AdapterStack, adapter_in_memory, read_adapter, refuse_unreadable, share
from mpg.models.runner import Member
from mpg.models.workspaces import Workspaces

ADAPTER_CONFIG = "adapter_config.json"
CACHED = "models--"  # what the folder of a repository begins with in the hub's cache: models--OWNER--NAME
SPLITTING_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.json")

Source = str | Path | PreTrainedModel | PeftModel
Place = torch.device | str | dict[str, Any]  # a device, or what transformers' device_map takes to split a model


def load(
    base: Source,
    attributes: Mapping[str, Source] | None = None,
    *,
    anchor: Source | None = None,
    draft: Source | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: Mapping[str, Any] | None = None,
    allow_other_base: bool = False,
    graphs: bool = False,
    compile: bool = False,
) -> Ensemble:
    """Load the models of a combination. Models that are passed in stay as they are: only their weights are shared.

    base:       a folder or hub name, a loaded model, or a PeftModel (its adapters are then off for the base itself)
    attributes: {name: adapter folder, name of an adapter in the PeftModel, model folder, or loaded model}; a PeftModel
                around the base stands for its one active adapter; the default is every adapter of the PeftModel, or
                the folders in base/adapters by name
    anchor:     what the attributes were trained against: an attribute's name, or an adapter or a model as above
    draft:      what proposes tokens: an attribute's name, or a source as for the attributes; both default to the base
    tokenizer:  default: the one in the base folder, if any
    dtype:      default: loaded models keep theirs, a base folder has the checkpoint's own on CUDA and float32 on CPU,
                other folders take the base's
    device:     "cpu" or "cuda[:i]", for every model; default: loaded models stay where they are, folders are read to
                the device of a loaded base, else to "cuda" where mpg can use it, else to "cpu". On the CPU large
                float32 layers are packed anew: those of a loaded model then take their memory twice
    device_map: {"base", "anchor", "draft" or an attribute's name: the device of its model}, before `device`; a folder
                also takes what splits a model in transformers ("auto", {module: device}, ...). Adapters run where
                their model is, all else where the base is
    allow_other_base: take adapters also where they name another base model than the one they get, as below
    graphs:     capture the forwards of decoding as CUDA graphs and replay them, also in later calls: for each model
                that lies on one CUDA device. Its caches are rounded up to sizes that calls share, rows by a quarter at
                most, positions by a quarter or to the next 64; caches and graphs of its four latest sizes stay in
                memory, and are given up where a call needs it. A model that cannot be captured warns once and runs as
                without. Shown on the CPU by recorded forwards alone, and not yet run on a GPU; hence the default
    compile:    run decoding passes through torch.compile, with one code for all decoder layers that are alike, made in
                some 10 seconds whenever a kind of pass (one token or several, how many adapters) first comes. Of the 50
                operations of a Llama layer with adapters 26 are left, of 39 without 15. Meant for GPUs, where each is a
                launch, and not yet run on one; on the CPU nothing is gained. Prompts are read as without, and hooks of
                single layers may be passed over

    Adapters attach to the model they were trained on: the anchor where that is a model, else the base. So
    base=specialised, anchor=original, attributes={name: adapter of the original} is the specialised reference of
    arXiv 2511.01891, Table 4.

    Vocabularies must be the same token by token, where tokenizers are known; the models' sizes may then differ by
    padding, and what is beyond the smallest is cut off. Warns where an attribute has another chat template or end of
    text than the base.

    An adapter of another base is refused where its shapes and modules do not fit, and where it surely was trained on
    another model than the one it gets: where both are repositories of the hub, whose names differ in more than owner
    and case, or both are models' folders on this machine, which differ and are not called alike. A folder against a
    repository, or against a folder that is not here, is a difference in names alone, as of a renamed copy: that warns.
    allow_other_base=True is for mirrors and copies under other names, and turns off both.

    Raises ValueError, naming the argument, for what cannot be found or read, cannot be stacked or cannot run on a
    ragged cache, for members whose dtypes or vocabularies differ, for graphs=True where no model can have them, and for
    compile=True where a model's layers are not found.
    """
    if not isinstance(allow_other_base, bool):
        raise ValueError(f"allow_other_base: expected True or False, got {allow_other_base!r}")
    if not isinstance(graphs, bool):
        raise ValueError(f"graphs: expected True or False, got {graphs!r}")
    if not isinstance(compile, bool):
        raise ValueError(f"compile: expected True or False, got {compile!r}")
    if attributes is not None and not isinstance(attributes, Mapping):
        raise ValueError(f"attributes: expected a mapping from names to sources, got {type(attributes).__name__}")
    sources: dict[str, Any] = {BASE: base, ANCHOR: anchor, DRAFT: draft}
    sources = {role: source for role, source in sources.items() if role == BASE or source is not None}
    sources |= {_argument(name): source for name, source in (attributes or {}).items()}
    for argument, source in sources.items():
        if not isinstance(source, Source):
            wanted = "a folder, a hub name or a loaded model"
            raise ValueError(f"{argument}: expected {wanted}, got {type(source).__name__}")

    own_tokenizer = _own_tokenizer(tokenizer)
    peft_models = [source for source in (*(attributes or {}).values(), draft) if isinstance(source, PeftModel)]
    base, anchor = _with_adapters(base, peft_models), _with_adapters(anchor, peft_models)
    names = _default_attributes(base) if attributes is None else attributes
    host = base if anchor is None or anchor in names or _is_adapter(anchor, base) else anchor
    if attributes is None:
        names = _default_attributes(host)
    for argument, source in sources.items():  # before minutes of loading
        if argument not in (ANCHOR, DRAFT) or source not in names:
            _check_found(argument, source, host)
    if not names:
        wanted = "at least one"
        if isinstance(host, str | Path):
            wanted = f"at least one, given here or found as {Path(host, 'adapters', 'NAME', ADAPTER_CONFIG)}"
        raise ValueError(f"attributes: expected {wanted}, got none")

    places = _resolve_places(
        device_map, {**{name: _argument(name) for name in names}, **{role: role for role in ROLES}}
    )
    loader = _Loader(
        _resolve_dtype(dtype), _resolve_device(device, base), places, host,
        keeps_devices=device is None, allows_other_base=allow_other_base,
    )  # fmt: skip
    slots = {BASE: loader.add(BASE, base)}
    if host is anchor:
        slots[ANCHOR] = loader.add(ANCHOR, host)
    for name, source in names.items():
        if not isinstance(name, str) or not name or name in (BASE, ANCHOR, DRAFT, MERGED):
            wanted = f"names other than {BASE!r}, {ANCHOR!r}, {DRAFT!r} and {MERGED!r}"
            raise ValueError(f"attributes: expected {wanted}, got {name!r}")
        slots[name] = loader.add_attribute(_argument(name), source)
    for role, source in ((ANCHOR, anchor), (DRAFT, draft)):
        if source is None:
            slots[role] = slots[BASE]
        elif isinstance(source, str) and source in names:
            slots[role] = slots[source]
        elif role == DRAFT:
            slots[role] = loader.add_attribute(role, source)
        elif role not in slots:
            slots[role] = loader.add(role, source)
    if own_tokenizer is not None:
        loader.members[0].tokenizer = own_tokenizer
    members = loader.finish()
    if graphs:
        _keep_workspaces(members)
    for member in members if compile else ():
        compile_layers(member.argument, member.model, member.stack)
    return Ensemble(members, slots, tuple(names))


class _Loader:
    """Gives every distinct source one slot. Adapters attach to one model, the host, and are stacked by `finish`."""

    def __init__(
        self,
        dtype: torch.dtype | None,
        device: torch.device,
        places: dict[str, Place],
        host: Source,
        *,
        keeps_devices: bool,
        allows_other_base: bool,
    ) -> None:
        """device: of models that `places` does not name; loaded ones stay where they are if keeps_devices"""
        self.dtype, self.device, self.places, self.host = dtype, device, places, host
        self.keeps_devices, self.allows_other_base = keeps_devices, allows_other_base
        self.members: list[Member] = []
        self.slots: dict[int | str, Slot] = {}

    def add(self, argument: str, source: Source) -> Slot:
        """The slot of an adapter (by its name in the host or by its folder) or of a model."""
        key = _key(source)
        if key not in self.slots:
            if isinstance(source, nn.Module) or not _is_adapter(source, self.host):
                self.slots[key] = self._add_model(argument, source)
            elif isinstance(self.host, PeftModel) and source in self.host.peft_config:
                self.slots[key] = self._add_adapter(adapter_in_memory(argument, self.host, source))
            else:
                self.slots[key] = self._add_adapter(read_adapter(argument, source))
        return self.slots[key]

    def add_attribute(self, argument: str, source: Source) -> Slot:
        """As `add`, but a PeftModel stands for its active adapter, and not for the model under it."""
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

    def finish(self) -> list[Member]:
        """Stack the adapters and compare the members."""
        if self.places:
            got = f"{next(iter(self.places))}, an adapter or a model that has another name"
            raise ValueError(f"device_map: expected names that bring a model of their own, got {got}")
        for member in self.members:
            if member.adapters:
                member.stack = AdapterStack(member.model, member.adapters)
            pack_linears(member.model)
        for member in self.members[1:]:
            _check_agreement(self.members[0], member)
        known = [(member.argument, member.tokenizer) for member in self.members if member.tokenizer is not None]
        for adapter in (adapter for member in self.members for adapter in member.adapters):
            if Path(adapter.source).is_dir() and (tokenizer := _read_tokenizer(adapter.name, adapter.source)):
                known.append((adapter.name, tokenizer))
        for argument, tokenizer in known[1:]:
            _check_tokenizers(known[0][1], argument, tokenizer)
        return self.members

    def _add_adapter(self, adapter: Adapter) -> Slot:
        index, _ = self.slots[_key(self.host)]
        if not self.allows_other_base:
            _check_trained_on(adapter, self.members[index])
        self.members[index].adapters.append(adapter)
        return index, len(self.members[index].adapters)

    def _add_model(self, argument: str, source: Source) -> Slot:
        tokenizer = None
        place = self.places.pop(argument, None)
        if isinstance(source, PeftModel) and source is not self.host:
            wanted = "a PeftModel only where adapters attach to it"
            raise ValueError(f"{argument}: expected {wanted}, got another; give its base or a merged model")
        if isinstance(source, nn.Module):
            model = share(argument, source)
            if not isinstance(place, torch.device | None):
                raise ValueError(f"{argument}: expected one device in device_map for a loaded model, got {place!r}")
            place = place or (None if self.keeps_devices else self.device)
        else:
            dtype = self.dtype or (self.members[0].model.dtype if self.members else None)
            model = _read_model(argument, source, dtype, place or self.device)
            tokenizer = _read_tokenizer(argument, source)
        use_ragged_attention(model, argument)
        # A pad token makes some models (GPT-2) look for padding in every input, which waits for the device.
        model.config.pad_token_id = None
        model.requires_grad_(False).eval()
        self._move(argument, model, place)
        bytes_per_position = verify_ragged_attention(model, argument) if model.device.type != "meta" else 0
        name = str(source) if isinstance(source, str | Path) else model.name_or_path or type(model).__name__
        devices = tuple(dict.fromkeys(parameter.device for parameter in model.parameters()))
        member = Member(argument, name, model, tokenizer, model.num_parameters(), bytes_per_position, devices)
        self.members.append(member)
        return len(self.members) - 1, 0

    def _move(self, argument: str, model: PreTrainedModel, place: Place | None) -> None:
        device = place if isinstance(place, torch.device) else model.device
        dtype = self.dtype or model.dtype
        if (model.device, model.dtype) == (device, dtype):
            return
        is_split = len(set(getattr(model, "hf_device_map", {}).values())) > 1
        if is_split or getattr(model.config, "quantization_config", None):
            wanted = f"a {'split' if is_split else 'quantised'} model of {dtype} on {device}, as it cannot be changed"
            raise ValueError(f"{argument}: expected {wanted}, got {model.dtype} on {model.device}")
        model.to(device, dtype)  # type: ignore[arg-type]  # its annotation lost the arguments


def _keep_workspaces(members: Sequence[Member]) -> None:
    """Let forwards be captured, of every model that lies on one device whose forwards can be."""
    able = [member for member in members if len(member.devices) == 1 and member.devices[0].type in CAPTURES]
    if not able:
        where = ", ".join(sorted({str(device) for member in members for device in member.devices}))
        raise ValueError(f"graphs: expected a model on one device of {', '.join(CAPTURES)}, got {where}")
    for member in able:
        member.workspaces = Workspaces(partial(CAPTURES[member.devices[0].type], member.devices[0]))


def _argument(name: str) -> str:
    return f"attributes[{name!r}]"


def _key(source: Source) -> int | str:
    return id(source) if isinstance(source, nn.Module) else str(source)


def _check_found(argument: str, source: Source, host: Source) -> None:
    """Refuse what is neither a model nor an adapter, and an adapter as base."""
    is_adapter = _is_adapter(source, host)
    if is_adapter and argument == BASE:
        raise ValueError(f"{argument}: expected a model, got the adapter {source}")
    if isinstance(source, nn.Module) or is_adapter or _has_file(source, "config.json"):
        return
    wanted = "a model (config.json)"
    if argument != BASE:
        wanted += f" or an adapter ({ADAPTER_CONFIG})"
    if argument != BASE and isinstance(host, PeftModel):
        wanted += f" or an adapter of {sorted(host.peft_config)}"
    raise ValueError(f"{argument}: expected {wanted}, got {_nothing_in(source, 'config.json')}")


def _nothing_in(source: str | Path, name: str) -> str:
    """What to say of a source that has no such file: of a name that is no folder also what the hub says."""
    if Path(source).is_dir():
        return f"none of it in {source}"
    try:
        file_exists(str(source), name)
        found = ", and none of it in a repository of the hub by that name"
    except HFValidationError:  # nor can a repository be called so
        found = ""
    except Exception as error:  # its types are those of an HTTP client, another in every version of the hub's package
        found = f", and could not be looked for on the hub: {type(error).__name__}: {error}".splitlines()[0]
    return f"{source}, which is no folder{found}"


def _has_file(source: str | Path, *names: str) -> bool:
    """Whether a folder, or a hub repository that is cached or answers, holds one of these files.

    The hub is asked once. A download would be tried again for half a minute, also for a folder's name that is mistyped.
    """
    if Path(source).is_dir():
        return any((Path(source) / name).is_file() for name in names)
    try:
        cached = (try_to_load_from_cache(str(source), name) for name in names)
        return any(isinstance(file, str) for file in cached) or any(file_exists(str(source), name) for name in names)
    except Exception:  # no name of a repository, none that may be read, no network
        return False


def _is_adapter(source: Source, host: Source) -> bool:
    if isinstance(source, nn.Module):
        return False
    return (isinstance(host, PeftModel) and source in host.peft_config) or _has_file(source, ADAPTER_CONFIG)


def _with_adapters(model: Any, peft_models: Sequence[PeftModel]) -> Any:
    """The PeftModel around this very model, if there is one: PEFT has put its layers into the model itself."""
    return next((peft_model for peft_model in peft_models if peft_model.get_base_model() is model), model)


def _default_attributes(host: Source) -> dict[str, Source]:
    if isinstance(host, PeftModel):
        return {name: name for name in host.peft_config}
    if isinstance(host, PreTrainedModel):
        return {}
    folders = sorted(config.parent for config in Path(host, "adapters").glob(f"*/{ADAPTER_CONFIG}"))
    return {folder.name: folder for folder in folders}


def _read_model(argument: str, source: str | Path, dtype: torch.dtype | None, place: Place) -> PreTrainedModel:
    with refuse_unreadable(argument, source):
        config = AutoConfig.from_pretrained(source)
    if config.is_encoder_decoder:
        raise ValueError(f"{argument}: expected a decoder-only model, got the encoder-decoder {source}")
    quantisation = getattr(config, "quantization_config", None) or {}
    if quantisation.get("quant_method") == "bitsandbytes" and find_spec("bitsandbytes") is None:
        raise ValueError(f"{argument}: expected the package bitsandbytes, whose weights {source} holds, got none")
    is_cpu = isinstance(place, torch.device) and place.type == "cpu"
    with refuse_unreadable(argument, source):
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype or (torch.float32 if is_cpu else "auto"),
            device_map={"": place} if isinstance(place, torch.device) else place,
        )
    left_out = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if left_out and place != torch.device("meta"):
        raise ValueError(f"{argument}: expected devices that hold all of {source}, got none for {left_out[0]}")
    return model


def _read_tokenizer(argument: str, source: str | Path) -> PreTrainedTokenizerBase | None:
    if not _has_file(source, *TOKENIZER_FILES):
        return None
    with refuse_unreadable(argument, source):
        return AutoTokenizer.from_pretrained(source)


def _own_tokenizer(given: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer that an argument is, or names."""
    if given is None or isinstance(given, PreTrainedTokenizerBase):
        return given
    if not isinstance(given, str | Path):
        wanted = "a folder, a hub name or a loaded tokenizer"
        raise ValueError(f"tokenizer: expected {wanted}, got {type(given).__name__}")
    tokenizer = _read_tokenizer("tokenizer", given)
    if tokenizer is None:
        wanted = f"a tokenizer ({' or '.join(TOKENIZER_FILES)})"
        raise ValueError(f"tokenizer: expected {wanted}, got {_nothing_in(given, TOKENIZER_FILES[0])}")
    return tokenizer


def _check_agreement(base: Member, other: Member) -> None:
    if base.model.dtype != other.model.dtype:
        dtypes = f"expected the base's dtype {base.model.dtype}, got {other.model.dtype}"
        raise ValueError(f"{other.argument}: {dtypes}; dtype= converts them all")
    size, other_size = base.vocab_size, other.vocab_size
    if size != other_size and (base.tokenizer is None or other.tokenizer is None):
        known = "without the tokenizers of both, which would tell padding from tokens"
        raise ValueError(
            f"{other.argument}: expected the base's vocabulary of {size} tokens, got {other_size}, {known}"
        )
    for tokenizer in (base.tokenizer, other.tokenizer) if size != other_size else ():
        assert tokenizer is not None
        token, token_id = max(_vocabulary(tokenizer).items(), key=lambda item: item[1])
        if token_id >= min(size, other_size):
            wanted = f"models of {size} and {other_size} tokens that differ by padding alone"
            raise ValueError(f"{other.argument}: expected {wanted}, got the token {token!r} of id {token_id}")
    ends, other_ends = base.eos_token_ids, other.eos_token_ids
    if other.argument != DRAFT and not set(other_ends) <= set(ends):
        text = f"its texts end with {list(other_ends)}, those of the base with {list(ends)}, which will be looked for"
        warnings.warn(f"{other.argument}: {text}", stacklevel=5)


def _check_tokenizers(base: PreTrainedTokenizerBase, argument: str, other: PreTrainedTokenizerBase) -> None:
    ids, other_ids = _vocabulary(base), _vocabulary(other)
    for token in ids.keys() | other_ids.keys() if ids != other_ids else ():
        if ids.get(token) != other_ids.get(token):
            wanted, got = ids.get(token), other_ids.get(token)
            raise ValueError(f"{argument}: expected token {token!r} to have the base's id {wanted}, got {got}")
    if argument != DRAFT and other.chat_template and other.chat_template != base.chat_template:
        text = "its chat template is not the base's, which writes every conversation"
        warnings.warn(f"{argument}: {text}", stacklevel=5)


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids by token, but for a padding token of its own: training scripts add one, and no text has it."""
    ids = dict(tokenizer.get_vocab())
    if tokenizer.pad_token not in (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token):
        ids.pop(tokenizer.pad_token, None)
    return ids


def _check_trained_on(adapter: Adapter, member: Member) -> None:
    """Refuse an adapter of a model that surely is another than the one it gets, and warn where names alone differ."""
    given, places = member.model.name_or_path or "", [adapter.trained_on]
    if adapter.trained_on.startswith("."):  # seen from its own folder, by its name or by where that is a link to
        place = Path(adapter.source, adapter.trained_on)
        places = [str(place.resolve()), os.path.normpath(place)]
    if not adapter.trained_on or not given or any(_is_same_model(place, given) for place in places):
        return
    remedy = "if that is the same model under another name, load with allow_other_base=True"
    both = places[0], given
    if all(map(_is_repository, both)) or all(Path(place, "config.json").is_file() for place in both):
        got = f"one that was trained on {places[0]}"
        raise ValueError(f"{adapter.name}: expected an adapter of {member.source}, got {got}; {remedy}")
    text = f"it was trained on {places[0]}, and attaches to {member.source}"
    warnings.warn(f"{adapter.name}: {text}; {remedy}, else its effect is undefined", stacklevel=7)


def _is_same_model(source: str, other: str) -> bool:
    """Whether two names are of one folder, or end alike."""
    if Path(source).is_dir() and Path(other).is_dir() and Path(source).samefile(other):
        return True
    return _model_name(source) == _model_name(other)


def _model_name(source: str) -> str:
    """The last part of a folder's or repository's name, in small letters."""
    parts = [part for part in Path(source).parts if part.startswith(CACHED)] or Path(source).parts
    return parts[-1].split("--")[-1].lower() if parts else ""


def _is_repository(source: str) -> bool:
    """Whether a name is OWNER/NAME and no folder here, or a folder in the hub's cache."""
    is_cached = any(part.startswith(CACHED) for part in Path(source).parts)
    return is_cached or (re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is not None and not Path(source).is_dir())


def _resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(resolved, torch.dtype) and resolved.is_floating_point):
        raise ValueError(f"dtype: expected a floating-point torch dtype such as 'bfloat16', got {dtype!r}")
    return resolved


def _resolve_places(device_map: Mapping[str, Any] | None, arguments: Mapping[str, str]) -> dict[str, Place]:
    """The device map by the arguments of load(), which messages name; `arguments` has them by its keys."""
    if device_map is not None and not isinstance(device_map, Mapping):
        raise ValueError(f"device_map: expected a mapping from {list(arguments)} to devices, got {device_map!r}")
    places: dict[str, Place] = {}
    for name, place in (device_map or {}).items():
        if name not in arguments:
            raise ValueError(f"device_map: expected some of {list(arguments)}, got {name!r}")
        splits = isinstance(place, dict) or place in SPLITTING_DEVICE_MAPS
        places[arguments[name]] = place if splits else _resolve_device(place, argument=f"device_map[{name!r}]")
    return places


def _resolve_device(device: Any, base: Source | None = None, argument: str = "device") -> torch.device:
    with_cuda = mpg_ext.build_info()["cuda"]
    if device is None:
        can_use_cuda = with_cuda and torch.cuda.is_available()
        device = base.device if isinstance(base, nn.Module) else "cuda" if can_use_cuda else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{argument}: expected 'cpu' or 'cuda[:i]', got {str(device)!r}")
    if resolved.type != "cuda":
        return torch.device(resolved.type)
    if not with_cuda or not torch.cuda.is_available():
        without = "mpg" if not with_cuda else None if torch.version.cuda else f"torch {torch.__version__}"
        why = f"{without} was built without CUDA" if without else "no CUDA device is visible"
        raise ValueError(f"{argument}: expected 'cpu', as {why}, got {str(device)!r}")
    index = torch.cuda.current_device() if resolved.index is None else resolved.index  # as parameters report it
    if index >= torch.cuda.device_count():
        raise ValueError(f"{argument}: expected one of {torch.cuda.device_count()} CUDA devices, got {str(device)!r}")
    return torch.device("cuda", index)
