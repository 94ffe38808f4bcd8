"""Damaged files are refused in one sentence that names the argument and the file."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

import mpg
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
        load(folders["base"], {"E": folders["E"]}, device="cpu", allow_pickle=True)


@pytest.mark.parametrize(
    ("argument", "safe", "pickled"),
    [
        ("base", "model.safetensors", "pytorch_model.bin"),
        ("draft", "model.safetensors", "pytorch_model.bin"),
        ("attributes['E']", "adapter_model.safetensors", "adapter_model.bin"),
        ("attributes['E']", "model.safetensors", "pytorch_model.bin"),  # a model for an attribute
    ],
)
def test_weights_that_are_a_pickle_are_read_where_that_is_allowed(argument, safe, pickled, folders, tmp_path):
    folder = folders["base" if argument == "base" else "E"]
    if argument != "base" and safe == "model.safetensors":
        folder = shutil.copytree(folders["base"], tmp_path / "other")
    attribute = folder if argument.startswith("attributes") else folders["E"]
    how = {"attributes": {"E": attribute}, "draft": folder if argument == "draft" else None, "device": "cpu"}
    expected = load(folders["base"], **how)
    weights = load_file(folder / safe)
    (folder / safe).unlink()
    torch.save(weights, folder / pickled)
    wanted = (
        f"{argument}: expected {safe}, got {pickled} in {folder}, a pickle; save it with safetensors, or load with "
    )
    with pytest.raises(ValueError, match="^" + re.escape(wanted)):
        load(folders["base"], **how)
    read = load(folders["base"], **how, allow_pickle=True)
    for own, its in zip(expected._models, read._models, strict=True):
        assert all(map(torch.equal, own.model.parameters(), its.model.parameters()))
    (folder / safe).write_bytes(b"")  # where both are there the pickle is not looked at
    with pytest.raises(ValueError, match=re.escape(str(folder / safe))):
        load(folders["base"], **how)


class Runs:
    """A pickle of this writes a file when it is read."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (open, (str(self.place), "w"))


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin"])
def test_what_a_pickle_would_run_is_not_run(name, allow_pickle, folders, tmp_path):
    folder, argument = (folders["E"], "attributes") if name.startswith("adapter") else (folders["base"], "base")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save({"weight": Runs(tmp_path / "ran")}, folder / name)
    with pytest.raises(ValueError, match=f"^{argument}"):
        load(folders["base"], {"E": folders["E"]}, device="cpu", allow_pickle=allow_pickle)
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_model_is_not_run(folders, tmp_path):
    config = json.loads((folders["base"] / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folders["base"] / "config.json").write_text(json.dumps(config | {"model_type": "its-own", "auto_map": own}))
    (folders["base"] / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match=r"^base: expected files that can be read in "):
        load(folders["base"], {}, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_no_recipe_allows_itself_a_pickle(folders, tmp_path):
    (tmp_path / "mpg.yaml").write_text("base: base\nattributes: {E: E}\nallow_pickle: true\n")
    with pytest.raises(ValueError, match="recipe: unknown key 'allow_pickle'"):
        mpg.load(tmp_path)


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
