"""Damaged files are refused in one sentence that names the argument and the path."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file

from mpg.models.loading import load


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
        ("base", "tokenizer.json"),
        ("attributes['E']", "adapter_config.json"),
        ("attributes['E']", "adapter_model.safetensors"),
        ("attributes['E']", "adapter_model.bin"),
    ],
)
def test_a_damaged_file_is_refused_with_argument_and_path(argument, file, damage, folders):
    folder = folders["base" if argument == "base" else "E"]
    if file == "tokenizer.json":
        (folder / file).write_text("{}")
    if file == "adapter_model.bin":
        weights = folder / "adapter_model.safetensors"
        torch.save(load_file(weights), folder / file)
        weights.unlink()
    damage(folder / file)
    with pytest.raises(
        ValueError, match=rf"^{re.escape(argument)}: expected files .* in {re.escape(str(folder))}, got"
    ):
        load(folders["base"], {"E": folders["E"]}, device="cpu")


def test_a_model_folder_without_weights_is_refused(folders):
    (folders["base"] / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^base: expected files .*model.safetensors"):
        load(folders["base"], {"E": folders["E"]}, device="cpu")
