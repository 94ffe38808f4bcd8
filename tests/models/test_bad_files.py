"""Damaged files are refused in one sentence that names the argument and the file."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ensembles import load
from mpg.demo import MODELS
from mpg.models import sources

TOKENIZER = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")


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


@pytest.mark.parametrize("damage", [truncate, empty, scramble])
@pytest.mark.parametrize("argument", ["base", "attributes['E']", "tokenizer"])
def test_a_damaged_chat_template_is_refused_when_it_is_loaded(argument, damage, folders, tmp_path):
    places = {"base": folders["base"], "attributes['E']": folders["E"], "tokenizer": tmp_path / "other"}
    for place in places.values():
        shutil.copytree(MODELS, place, dirs_exist_ok=True, ignore=lambda _, names: {*names} - {*TOKENIZER})
    file = places[argument] / "chat_template.jinja"
    damage(file)
    with pytest.raises(
        ValueError, match="^" + re.escape(f"{argument}: expected a file that can be read, got {file}: ")
    ):
        load(folders["base"], {"E": folders["E"]}, tokenizer=places["tokenizer"], device="cpu")


def test_a_chat_template_in_the_tokenizers_configuration_is_looked_at_too(folders):
    base = folders["base"]
    for name in TOKENIZER[1:]:
        shutil.copy(MODELS / name, base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{% for m in messages %}"}))
    with pytest.raises(ValueError, match=r"^base: expected a file .*/tokenizer_config.json: TemplateSyntaxError: "):
        load(base, {"E": folders["E"]}, device="cpu")


def test_a_chat_template_that_takes_other_messages_is_sound(folders):
    for name in TOKENIZER:
        shutil.copy(MODELS / name, folders["base"])
    template = "{{ raise_exception('no') if messages[0].role == 'user' }}{% generation %}{% endgeneration %}"
    (folders["base"] / TOKENIZER[0]).write_text(template)
    assert sources.read_tokenizer("base", folders["base"]).chat_template == template


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


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(
    ("setting", "value"),
    [("lora_alpha", None), ("rank_pattern", 3), ("target_modules", 3), ("base_model_name_or_path", 3), ("r", "x")],
)
def test_a_setting_of_another_type_is_refused_with_the_folder(setting, value, merge, folders):
    file = folders["E"] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value, "use_dora": merge}))
    with pytest.raises(ValueError, match=r"^attributes\['E'\]: expected "):
        load(folders["base"], {"E": folders["E"]}, device="cpu", merge_adapters=merge)
