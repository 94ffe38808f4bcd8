"""Where models and adapters lie: folders, repositories of the hub, models in memory. Finds and reads them.

Knows names and files, and which file is damaged; nothing of adapters' weights or of what a combination needs.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from huggingface_hub import file_exists, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from jinja2 import TemplateSyntaxError
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import set_tqdm_hook

ADAPTER_CONFIG = "adapter_config.json"
CACHED = "models--"  # what the folder of a repository begins with in the hub's cache: models--OWNER--NAME
CONFIG = "config.json"
CONVERTED = "converted.json"  # of a folder that was made of another file: which, and how large its weights are
# Of a model and of an adapter: files of weights, and those that say in which files they are.
WEIGHTS = {False: ("model.safetensors", "model.safetensors.index.json"), True: ("adapter_model.safetensors",)}
PICKLES = {False: ("pytorch_model.bin", "pytorch_model.bin.index.json"), True: ("adapter_model.bin",)}
ALLOWING = ", or load with allow_pickle=True (--allow-pickle) if you trust it"
TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.json")
TEMPLATES = "additional_chat_templates/*.jinja"
# All that one may be read from: CONFIG too, whose model_type picks the class, at times over the one that is named.
TOKENIZER_PATTERNS = (
    CONFIG, "*token*", "tekken*", "vocab*", "merges*", "emoji.json", "*.model", "*.jinja", TEMPLATES,
)  # fmt: skip

Source: TypeAlias = str | Path | PreTrainedModel | PeftModel
Place = torch.device | str | dict[str, Any]  # a device, or what transformers' device_map takes to split a model


def check_found(argument: str, source: Source, host: Source) -> None:
    """Refuse what is neither a model nor an adapter, and an adapter as base."""
    if isinstance(source, str) and not source.strip():  # which a path would take for the working directory
        raise ValueError(f"{argument}: expected a folder, a hub name or a loaded model, got {source!r}")
    adapts, is_base = is_adapter(source, host), argument == "base"
    if adapts and is_base:
        raise ValueError(f"{argument}: expected a model, got the adapter {source}")
    if isinstance(source, nn.Module) or adapts or has_file(source, CONFIG):
        return
    wanted = f"a model ({CONFIG})"
    if not is_base:
        wanted += f" or an adapter ({ADAPTER_CONFIG})"
    if not is_base and isinstance(host, PeftModel):
        wanted += f" or an adapter of {sorted(host.peft_config)}"
    is_sentence = not is_base and len(str(source).split()) > 2
    hint = "; a text is a context: mpg.Context(system=...), {system: ...} in a recipe" if is_sentence else ""
    raise ValueError(f"{argument}: expected {wanted}, got {nothing_in(source, CONFIG)}{hint}")


def nothing_in(source: str | Path, name: str) -> str:
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


def has_file(source: str | Path, *names: str) -> bool:
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


def refuse_pickle(argument: str, source: str | Path, adapts: bool, otherwise: str = ALLOWING) -> None:
    """Refuse a model, or an adapter, that has weights as a pickle alone: reading one may run what it says."""
    if has_file(source, *WEIGHTS[adapts]):
        return
    if found := [name for name in PICKLES[adapts] if has_file(source, name)]:
        wanted, got = WEIGHTS[adapts][0], f"{found[0]} in {source}, a pickle"
        raise ValueError(f"{argument}: expected {wanted}, got {got}; save it with safetensors{otherwise}")


def is_adapter(source: Source, host: Source) -> bool:
    """Whether a source is an adapter: in a folder, in a repository, or by its name in the host."""
    if isinstance(source, nn.Module):
        return False
    return (isinstance(host, PeftModel) and source in host.peft_config) or has_file(source, ADAPTER_CONFIG)


def default_attributes(host: Source) -> dict[str, Source]:
    """The adapters that come with a model: those of a PeftModel, or of the folders in `adapters`."""
    if isinstance(host, PeftModel):
        return {name: name for name in host.peft_config}
    if isinstance(host, PreTrainedModel):
        return {}
    folders = sorted(config.parent for config in Path(host, "adapters").glob(f"*/{ADAPTER_CONFIG}"))
    return {folder.name: folder for folder in folders}


def read_model(argument: str, source: str | Path, dtype: torch.dtype | None, place: Place) -> PreTrainedModel:
    with refuse_unreadable(argument, source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if config.is_encoder_decoder:
        raise ValueError(f"{argument}: expected a decoder-only model, got the encoder-decoder {source}")
    quantisation = getattr(config, "quantization_config", None) or {}
    if quantisation.get("quant_method") == "bitsandbytes" and find_spec("bitsandbytes") is None:
        raise ValueError(f"{argument}: expected the package bitsandbytes, whose weights {source} holds, got none")
    is_cpu = isinstance(place, torch.device) and place.type == "cpu"
    refuse_damage(argument, source, "generation_config.json")  # transformers would go on without it
    with refuse_unreadable(argument, source), _bars_on_terminals():
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype or (torch.float32 if is_cpu else "auto"),
            device_map={"": place} if isinstance(place, torch.device) else place,
            trust_remote_code=False,  # else a terminal would be asked
        )
    left_out = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if left_out and place != torch.device("meta"):
        raise ValueError(f"{argument}: expected devices that hold all of {source}, got none for {left_out[0]}")
    return model


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Bars of transformers show where someone sees them move, and not in a file or a pipe."""
    before = set_tqdm_hook(None)
    set_tqdm_hook(before or (lambda bar, args, kwargs: bar(*args, **{**kwargs, "disable": None})))
    try:
        yield
    finally:
        set_tqdm_hook(before)


def read_tokenizer(argument: str, source: str | Path) -> PreTrainedTokenizerBase | None:
    if not has_file(source, *TOKENIZER_FILES):
        return None
    with refuse_unreadable(argument, source):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    refuse_damage(argument, source, TEMPLATE)
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except TemplateSyntaxError as error:  # which would be met at the first prompt
        file = Path(source, TEMPLATE if has_file(source, TEMPLATE) else TOKENIZER_FILES[0])
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{argument}: expected a file that can be read, got {file}: {reason}") from error
    except Exception:  # there is none, or it takes other messages
        pass
    return tokenizer


class Tokenizers:
    """Reads each tokenizer once: trainers leave a copy of the base's beside every adapter."""

    def __init__(self) -> None:
        self._by_content: dict[str, PreTrainedTokenizerBase | None] = {}

    def read(self, argument: str, source: str | Path) -> PreTrainedTokenizerBase | None:
        """The tokenizer that `read_tokenizer` reads."""
        with refuse_unreadable(argument, source):
            content = _content_of_tokenizer(Path(source)) or str(source)
        if content not in self._by_content:
            self._by_content[content] = read_tokenizer(argument, source)
        return self._by_content[content]


def _content_of_tokenizer(folder: Path) -> str:
    """Names and hashes of all that a tokenizer is read from; "" of what is no folder, and of one without any of it."""
    files = {file for pattern in TOKENIZER_PATTERNS for file in folder.glob(pattern) if file.is_file()}
    hashes = [f"{file.relative_to(folder)} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in sorted(files)]
    return " ".join(hashes)


def own_tokenizer(given: Any, tokenizers: Tokenizers) -> PreTrainedTokenizerBase | None:
    """The tokenizer that an argument is, or names."""
    if given is None or isinstance(given, PreTrainedTokenizerBase):
        return given
    if not isinstance(given, str | Path):
        wanted = "a folder, a hub name or a loaded tokenizer"
        raise ValueError(f"tokenizer: expected {wanted}, got {type(given).__name__}")
    tokenizer = tokenizers.read("tokenizer", given)
    if tokenizer is None:
        wanted = f"a tokenizer ({' or '.join(TOKENIZER_FILES)})"
        raise ValueError(f"tokenizer: expected {wanted}, got {nothing_in(given, TOKENIZER_FILES[0])}")
    return tokenizer


def is_same_model(source: str, other: str) -> bool | None:
    """Whether two names are of one model, as the weights say where both are here: in folders, or in the hub's cache.

    Where they cannot be compared, names that are equal, or of one repository of the hub, are of one model; of others
    nobody can tell, which is None.
    """
    if source == other:
        return True
    folder, other_folder = _local_folder(source), _local_folder(other)
    if folder and other_folder:
        is_same = folder.samefile(other_folder) or _has_same_weights(folder, other_folder)
        if is_same is not None:
            return is_same
    repository = _repository(source)
    return True if repository and repository == _repository(other) else None


def _local_folder(source: str) -> Path | None:
    """The folder that a name is of, or that of the repository's newest snapshot in the hub's cache."""
    if Path(source).is_dir():
        return Path(source)
    try:
        file = try_to_load_from_cache(source, CONFIG)
    except HFValidationError:  # no repository is called so
        return None
    return Path(file).parent if isinstance(file, str) else None


def _has_same_weights(folder: Path, other: Path) -> bool | None:
    """Whether two folders have the same tensors: by names, shapes, and the first, middle and last rows up to rounding.

    None where they hold no safetensors that can be read, or tensors of other names, as where one is quantised, or where
    one was, or both may have been rounded (float16 and bfloat16).
    """
    was_quantised = any((place / CONVERTED).is_file() for place in (folder, other))
    with ExitStack() as stack, suppress(OSError, SafetensorError):
        tensors, others = (_open_tensors(stack, place) for place in (folder, other))
        if not tensors or tensors.keys() != others.keys():
            return None
        for name, one in tensors.items():
            two, shape = others[name], one.get_shape()
            if shape != two.get_shape():
                return False
            for row in _sampled_rows(shape):
                rows = one[row : row + 1], two[row : row + 1]
                if not is_equal(*rows):
                    dtypes = {part.dtype for part in rows}
                    is_sure = not was_quantised and (len(dtypes) == 1 or torch.float32 in dtypes)
                    return False if is_sure else None
        return True
    return None


def weights_hash(model: nn.Module) -> str:
    """A hash of what `is_same_model` compares, as the model was read: shapes, and first, middle and last rows."""
    found = hashlib.sha256()
    for weight in model.parameters():
        found.update(str(tuple(weight.shape)).encode())
        for row in _sampled_rows(weight.shape):
            found.update(weight[row].detach().float().cpu().numpy().tobytes())
    return found.hexdigest()


def _sampled_rows(shape: Sequence[int]) -> list[int]:
    return sorted({0, shape[0] // 2, shape[0] - 1}) if shape and shape[0] else []


def _open_tensors(stack: ExitStack, folder: Path) -> dict[str, Any]:
    files = [stack.enter_context(safe_open(file, "pt")) for file in folder.glob("model*.safetensors")]
    return {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118  # not a mapping


def is_equal(own: torch.Tensor, saved: torch.Tensor) -> bool:
    """Whether two weights are one, which may have been rounded on either side."""
    return torch.equal(own, saved.to(own.dtype)) or torch.equal(own.to(saved.dtype), saved)


def _repository(source: str) -> str:
    """OWNER/NAME in small letters of a repository of the hub, or of its folder in a cache anywhere; "" of others."""
    cached = next((part for part in Path(source).parts if part.startswith(CACHED)), None)
    name = source if cached is None else cached.removeprefix(CACHED).replace("--", "/", 1)
    is_repository = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and (cached or not Path(source).is_dir())
    return name.lower() if is_repository else ""


@contextmanager
def refuse_unreadable(argument: str, source: str | Path) -> Iterator[None]:
    """Turn what a damaged file makes its reader raise into a ValueError that names the argument and the file. Refusals
    that name the argument go through."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the readers of JSON, safetensors and pickles share no type of their own
        if isinstance(error, ValueError) and str(error).startswith(f"{argument}: "):
            raise
        refuse_damage(argument, source)
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{argument}: expected files that can be read in {source}, got {reason}") from error


def refuse_damage(argument: str, source: str | Path, files: str = "*") -> None:
    """Refuse the first file of a folder, or of a repository in the hub's cache, that cannot be read by itself.

    files: a pattern of the names of those to try
    """
    folder = Path(source)
    if not folder.is_dir():
        cached = [try_to_load_from_cache(str(source), name) for name in (CONFIG, ADAPTER_CONFIG, *TOKENIZER_FILES)]
        folder = next((Path(file).parent for file in cached if isinstance(file, str)), folder)
    for file in sorted(folder.glob(files)):
        try:
            _try_to_read(file)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{argument}: expected a file that can be read, got {file}: {reason}") from error


def _try_to_read(file: Path) -> None:
    if file.name == "tokenizer.json":
        Tokenizer.from_file(str(file))
    elif file.suffix == ".json":
        json.loads(file.read_text(encoding="utf-8"))
    elif file.name == TEMPLATE and not file.read_text(encoding="utf-8").strip():
        raise ValueError("it is empty")
    elif file.suffix == ".safetensors":
        with safe_open(file, "pt"):
            pass
    elif file.suffix == ".bin" and "model" in file.name:
        torch.load(file, map_location="meta", weights_only=True)
