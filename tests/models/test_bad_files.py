"""Damaged files are refused in one sentence that names the argument and the file."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file

from ensembles import load
from mpg.models import sources


@pytest.fixture
def folders(tmp_path, tiny_model, lora_folder):
    """A sound base and adapter, for one file of them to be damaged."""
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")  # before PEFT puts its layers into it
    return {"base": tmp_path / "base", "E": lora_folder("E", base=base)}


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def scramble(path):
    path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize("damage", [truncate, empty, scramble])
@pytest.mark.parametrize(
    ("argument", "file"),
    [
        ("base", "config.json"),
        ("base", "model.safetensors"),
        ("base", "generation_config.json"),  # without which transformers would go on
        ("base", "tokenizer.json"),
        ("base", "tokenizer_config.json"),
        ("attributes['E']", "adapter_config.json"),
        ("attributes['E']", "adapter_model.safetensors"),
        ("attributes['E']", "adapter_model.bin"),
    ],
)
def test_a_damaged_file_is_refused_with_argument_and_file(argument, file, damage, folders):
    folder = folders["base" if argument == "base" else "E"]
    if file.startswith("tokenizer"):
        (folder / file).write_text("{}")
    if file == "adapter_model.bin":
        weights = folder / "adapter_model.safetensors"
        torch.save(load_file(weights), folder / file)
        weights.unlink()
    damage(folder / file)
    wanted = f"{argument}: expected a file that can be read, got {folder / file}: "
    with pytest.raises(ValueError, match="^" + re.escape(wanted)):
        load(folders["base"], {"E": folders["E"]}, device="cpu")


def test_a_damaged_file_of_a_cached_repository_is_named(folders, monkeypatch):
    truncate(folders["base"] / "model.safetensors")
    monkeypatch.setattr(sources, "try_to_load_from_cache", lambda name, file: str(folders["base"] / file))
    with pytest.raises(ValueError, match=r"^base: .*, got .*/model.safetensors: SafetensorError: "):
        sources.refuse_damage("base", "me/mine")


def test_files_that_are_sound_but_of_no_model_are_refused_with_what_their_reader_said(folders):
    (folders["base"] / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^base: expected files that can be read in .*/base, got ValueError: .*model"):
        load(folders["base"], {"E": folders["E"]}, device="cpu")


def test_a_model_folder_without_weights_is_refused(folders):
    (folders["base"] / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^base: expected files .*model.safetensors"):
        load(folders["base"], {"E": folders["E"]}, device="cpu")
