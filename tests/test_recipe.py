"""Recipes: what a file says, what it means for a call, and at which key it is wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import mpg
from mpg.app.cli.command import app
from mpg.demo import MODELS
from mpg.paper.check import check
from mpg.paper.methods import answer
from mpg.recipe import Recipe, parse_setting

SHORT = {"seed": 3, "max_new_tokens": 8}
BODY = f"""\
base: {MODELS}
draft: E
attributes: {{E: {MODELS}/adapters/E, T: {MODELS}/adapters/T}}
weights: ET
presets:
  ET: {{E: 1, T: 0.5}}
  F: {{T: -1}}
options:
  sampler: scr
  window: 30
  tau: 1e-3
  temperature: 0.6
"""


@pytest.fixture(scope="module")
def cooked(model, tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    file.write_text(BODY)
    return mpg.load(file, device=model.models.device)


def test_a_recipe_says_which_models_there_are(cooked):
    assert cooked.models.attribute_names == ("E", "T")
    assert cooked.models.is_same("draft", "E")
    assert cooked.recipe.weights == {"E": 1, "T": 0.5}
    assert cooked.recipe.options == {"sampler": "scr", "window": 30, "tau": 1e-3, "temperature": 0.6}


def test_a_silent_caller_gets_the_recipe_and_a_loud_one_what_he_says(cooked):
    silent = cooked.generate("Hello?", **SHORT)
    options = {"sampler": "scr", "window": 30, "tau": 1e-3}
    plain = mpg.Model(cooked.models)
    assert silent.weights == {"E": 1, "T": 0.5}
    assert silent.tokens == plain.generate("Hello?", weights=silent.weights, temperature=0.6, **options, **SHORT).tokens
    warm = cooked.generate("Hello?", weights={"T": 1}, temperature=1.3, **SHORT)
    assert warm.tokens == plain.generate("Hello?", weights={"T": 1}, temperature=1.3, **options, **SHORT).tokens


def test_another_sampler_takes_of_the_recipe_the_options_that_it_has(cooked):
    direct = cooked.generate("Hello?", sampler="direct", **SHORT)
    plain = mpg.Model(cooked.models).generate(
        "Hello?", weights={"E": 1, "T": 0.5}, sampler="direct", temperature=0.6, **SHORT
    )
    assert direct.tokens == plain.tokens
    with pytest.raises(ValueError, match="window: not an option of sampler 'direct', got 9"):
        cooked.generate("Hello?", sampler="direct", window=9)


def test_weights_are_a_mapping_or_text_or_a_preset_for_all_or_each_of_the_prompts(cooked):
    results = cooked.generate(["Hello?"] * 4, weights=["ET", "E=1,T=0.5", {"E": 1, "T": 0.5}, None], **SHORT)
    assert all(result.weights == {"E": 1, "T": 0.5} for result in results)
    assert cooked.generate("Hello?", weights="F", sampler="direct", **SHORT).weights == {"T": -1}
    with pytest.raises(ValueError, match=r"weights: expected NAME=NUMBER,... or a preset among ET, F, got 'EF'"):
        cooked.generate("Hello?", weights="EF")
    with pytest.raises(ValueError, match=r"weights: expected NAME=NUMBER,... \(there are no presets\), got 'ET'"):
        mpg.Model(cooked.models).generate("Hello?", weights="ET")
    with pytest.raises(
        ValueError, match=r"weights: expected NAME=NUMBER,... of E, T \(there are no presets\), got 'ET'"
    ):
        mpg.Model(cooked.models, Recipe("base", {"E": "e", "T": "t"})).generate("Hello?", weights="ET")


def test_the_target_base_needs_no_weights_of_the_recipe(cooked):
    assert cooked.generate("Hello?", sampler="direct", target="base", **SHORT).weights == {}


def test_methods_and_check_take_the_weights_of_a_recipe_and_not_its_options(cooked):
    plain = mpg.Model(cooked.models)
    [result] = answer(cooked, "mod", ["Hello?"], **SHORT)[""]
    assert result.tokens == answer(plain, "mod", ["Hello?"], {"E": 1, "T": 0.5}, **SHORT)[""][0].tokens
    report = check(cooked, "ET", ["Hello?", "Who?"], max_new_tokens=2)
    assert report.sections[0].weights == {"E": 1, "T": 0.5}
    expected = check(plain, {"E": 1, "T": 0.5}, ["Hello?", "Who?"], max_new_tokens=2)
    assert [section.intended for section in report.sections] == [section.intended for section in expected.sections]


def test_a_folder_that_holds_a_recipe_is_one_unless_attributes_are_given(model):
    assert model.models.attribute_names == ("E", "S", "T", "J")
    assert "ESTJ" in model.recipe.presets
    assert mpg.load(MODELS, {"a": MODELS / "adapters/E"}, device="cpu").recipe.presets == {}


def test_what_is_given_beside_a_recipe_goes_before_it(cooked, tmp_path):
    file = tmp_path / "mine.yml"
    file.write_text(BODY)
    assert mpg.load(file, draft="T", device="cpu").models.is_same("draft", "T")
    with pytest.raises(ValueError, match=r"^draft: expected .* got .*none, which is no folder"):
        mpg.load(file, draft=tmp_path / "none", device="cpu")
    with pytest.raises(ValueError, match=r"attributes: expected none beside the recipe .*mine.yml"):
        mpg.load(file, {"E": MODELS})


@pytest.mark.parametrize("target", ["made/here", "mine.yaml"])
def test_a_combination_round_trips(cooked, target, tmp_path):
    cooked.save_pretrained(tmp_path / target)
    again = mpg.Model.from_pretrained(tmp_path / target, device=cooked.models.device)
    assert again.recipe == cooked.recipe
    assert again.models.describe() == cooked.models.describe()
    assert again.generate("Hello?", **SHORT).tokens == cooked.generate("Hello?", **SHORT).tokens


def test_a_folder_without_a_recipe_saves_its_attributes_by_name(model, tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    for file in MODELS.iterdir():
        if file.name != "mpg.yaml":
            (tmp_path / "set" / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    loaded = mpg.load("set", device="cpu")
    monkeypatch.chdir("/")
    loaded.save_pretrained(tmp_path / "set")
    assert mpg.load(tmp_path / "set", device="cpu").recipe == loaded.recipe
    text = (tmp_path / "set/mpg.yaml").read_text()
    assert text.startswith("base: .\nattributes:\n  E: adapters/E\n")
    (tmp_path / "set").rename(tmp_path / "moved")  # models below the recipe move with it
    assert mpg.load(tmp_path / "moved", device="cpu").models.attribute_names == loaded.models.attribute_names


def test_a_recipe_says_where_its_models_are_unless_the_caller_does(tmp_path):
    file = tmp_path / "mine.yaml"
    (tmp_path / "other").symlink_to(MODELS)
    body = f"base: {MODELS}\nattributes:\n  F: other\ndevice_map:\n  base: cpu\n  F: PLACE\n"

    def devices(place, **arguments):
        file.write_text(body.replace("PLACE", place))
        loaded = mpg.load(file, dtype="float32", **arguments)
        loaded.save_pretrained(file)
        return loaded.recipe.device_map, loaded.models.describe()["F"]["device"], Recipe.of(file).device_map

    for place, plain in {"meta": "meta", "{'': cpu}": {"": "cpu"}}.items():
        saved = {"base": "cpu", "F": plain}
        assert devices(place) == (saved, "meta" if place == "meta" else "cpu", saved)
    assert devices("meta", device="cpu") == ({}, "cpu", None)
    given = {"F": torch.device("meta")}
    assert devices("cpu", device_map=given, device="cpu") == ({"F": "meta"}, "meta", {"F": "meta"})


def test_a_recipe_takes_adapters_of_another_base_where_it_says_so(tmp_path):
    for name in ("base", "other"):
        shutil.copytree(MODELS, tmp_path / name, ignore=shutil.ignore_patterns("mpg.yaml"))
    weights = load_file(tmp_path / "other/model.safetensors")
    save_file(
        {name: weight + 1 for name, weight in weights.items()}, tmp_path / "other/model.safetensors", {"format": "pt"}
    )
    file = tmp_path / "mine.yaml"
    body = "base: other\nattributes:\n  E: base/adapters/E\n"
    file.write_text(body)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}: attributes\['E'\]: expected an adapter of"):
        mpg.load(file, device="cpu")
    mpg.load(file, device="cpu", allow_other_base=True).save_pretrained(file)
    assert mpg.load(file, device="cpu").recipe.allow_other_base is True
    file.write_text(body + "allow_other_base: 1\n")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}: allow_other_base: expected True or False, got 1"):
        mpg.load(file, device="cpu")


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("{F: gpu}", r"device_map\['F'\]: expected 'cpu' or 'cuda\[:i\]', got 'gpu'"),
        ("\n  base: cpu\n  T: cpu", "device_map: unknown name 'T'; expected one of F, base, anchor, draft"),
        ("\n  F: cpu\n  base: true", "device_map: expected a device for 'base', got True"),
        ("\n  base:\n    model: [0]", r"device_map\['base'\]: expected a device for 'model', got \[0\]"),
        ("auto", "device_map: expected a mapping, got 'auto'"),
        ("\n  draft: cpu", "device_map: expected names that bring a model of their own, got draft"),
    ],
)
def test_a_mistaken_device_is_refused_with_its_key(device_map, message, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: {MODELS}\nattributes: {{F: {MODELS}/adapters/E}}\ndevice_map: {device_map}\n")
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: {message}"):
        mpg.load(file)


def test_models_in_memory_are_refused_with_the_remedy_before_anything_is_written(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(MODELS)
    adapters = MODELS / "adapters"
    for argument, loaded in {
        "base": mpg.load(PeftModel.from_pretrained(base, adapters / "E", "E"), tokenizer=MODELS),
        "attributes['E']": mpg.load(
            MODELS, {"T": adapters / "T", "E": AutoModelForCausalLM.from_pretrained(MODELS)}, dtype="float32"
        ),
    }.items():
        with pytest.raises(ValueError, match=rf"^{re.escape(argument)}: .*got a \w+ in memory; save it with its own"):
            loaded.save_pretrained(tmp_path / "new")
        assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=r"^base: expected a folder or a hub name, got none"):
        mpg.Model(loaded.models).save_pretrained(tmp_path)


def test_paths_are_the_recipes_own_and_other_names_are_the_hubs(tmp_path, monkeypatch):
    for folder in ("here/base", "here/adapters/E", "base"):
        (tmp_path / folder).mkdir(parents=True)
    file = tmp_path / "here/mine.yaml"
    file.write_text(
        "base: base\nanchor: me/model\ndraft: gpt2\ntokenizer: ../base\nattributes: {E: adapters/E, T: me/T}\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.of("here/mine.yaml")
    assert (recipe.base, recipe.anchor, recipe.draft) == (str(tmp_path / "here/base"), "me/model", "gpt2")
    assert Path(recipe.tokenizer).samefile(tmp_path / "base")
    assert recipe.attributes == {"E": str(tmp_path / "here/adapters/E"), "T": "me/T"}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (None, "expected a file that can be read, got {}: No such file or directory"),
        (b"\xff\xfe\x00", "expected text in UTF-8, got {}: "),
    ],
)
def test_a_file_that_is_not_there_or_no_text_is_named(written, message, tmp_path):
    file = tmp_path / "mine.yaml"
    if written is not None:
        file.write_bytes(written)
    with pytest.raises(ValueError, match=f"^{re.escape(f'recipe: {message.format(file)}')}"):
        mpg.load(file)


def test_a_model_that_cannot_be_loaded_is_refused_with_its_recipe(tmp_path):
    (tmp_path / "empty").mkdir()
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: {MODELS}\nattributes:\n  E: {MODELS}/adapters/E\n  T: empty\n")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}: attributes\['T'\]: expected a model"):
        mpg.load(file, device="cpu")


@pytest.mark.parametrize(
    ("text", "value"), [("0.7", 0.7), ("1e-3", 1e-3), ("12", 12), ("true", True), ("merged", "merged"), ("null", None)]
)
def test_values_are_read_as_a_person_means_them(text, value):
    assert parse_setting(f" tau = {text}") == ("tau", value)
    assert type(parse_setting(f"tau={text}")[1]) is type(value)


def test_commands_take_a_recipe(cooked, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(BODY)

    def run(command, *arguments):
        done = CliRunner().invoke(app, [command, "--models", str(file), "--device", "cpu", "--json", *arguments])
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)

    prompt = ["--prompt", "Hello?", "--seed", "3", "--max-new-tokens", "8"]
    assert tuple(run("generate", *prompt)["tokens"]) == cooked.generate("Hello?", **SHORT).tokens
    given = run("generate", *prompt, "--weights", "F", "--sampler", "direct")
    assert tuple(given["tokens"]) == cooked.generate("Hello?", weights="F", sampler="direct", **SHORT).tokens
    assert run("info")["recipe"]["presets"] == {"ET": {"E": 1, "T": 0.5}, "F": {"T": -1}}
    (tmp_path / "prompts").write_text("Hello?\nWho?\n")
    report = run("check", "--prompts", str(tmp_path / "prompts"), "--max-new-tokens", "2", "--seeds", "1")
    assert report["sections"][0]["weights"] == {"E": 1, "T": 0.5}


def test_the_recipe_of_the_page_loads(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
    [body] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "mpg.yaml").write_text(body)
    (tmp_path / "base").symlink_to(MODELS)
    (tmp_path / "adapters").symlink_to(MODELS / "adapters")
    loaded = mpg.load(tmp_path, device="cpu")
    assert loaded.generate("Hello?", max_new_tokens=2).weights == loaded.recipe.weights
    assert loaded.generate("Hello?", weights="ESTJ", max_new_tokens=2).weights == loaded.recipe.presets["ESTJ"]


def test_a_target_that_cannot_be_written_is_refused_by_name_and_what_was_there_stays(tmp_path):
    recipe = Recipe(base=str(MODELS), attributes={})
    (tmp_path / "file").write_text("a")
    for target, message in (
        (tmp_path / "file", "target: expected a folder that there is or that can be made, got '.*file': File exists"),
        (tmp_path / "file" / "x.yaml", "target: expected a folder that there is .*, got '.*file': "),
        ("/proc/x.yaml", "target: expected a file that can be written, got '/proc/x.yaml': "),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            recipe.write(target)
    (tmp_path / "mpg.yaml").mkdir()
    with pytest.raises(ValueError, match=r"^target: expected a file, got the folder '.*mpg.yaml'$"):
        recipe.write(tmp_path)
    assert (tmp_path / "file").read_text() == "a"


def test_the_base_of_the_set_that_ships_is_called_demo_in_a_recipe_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("base: demo\nattributes: {calm: {system: Be calm.}}\nweights: {calm: 1}\n")
    own = mpg.load(MODELS, {"calm": {"system": "Be calm."}}, device="cpu")
    expected = own.generate("Hello?", weights={"calm": 1}, **SHORT).tokens
    assert mpg.load("mine.yaml", device="cpu").generate("Hello?", **SHORT).tokens == expected
