"""The adapters of the real model that ship: what their cards say, and that a recipe names them."""

from __future__ import annotations

import json
from itertools import product

import pytest
from safetensors import safe_open

from mpg.demo import SETS
from mpg.recipe import Recipe

FOLDER = SETS["smollm2"]
POLES = "EISNTFJP"


@pytest.mark.parametrize("pole", POLES)
def test_adapter_is_what_its_card_says(pole):
    card = json.loads((FOLDER / "adapters" / pole / "training.json").read_text())
    scores = card["scores"]
    row = f"| {pole} | {card['pairs']} | {scores['accuracy']:.3f} | {scores['margin']:.2f} | {card['seconds']} |"
    assert row in (FOLDER / "README.md").read_text().splitlines()
    assert scores["accuracy"] >= 0.9
    assert (card["pairs"] >= 160, card["held_out"], card["data"]["pole"]) == (True, 40, pole)
    with safe_open(FOLDER / "adapters" / pole / "adapter_model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_adapters_are_small_enough_to_ship():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*.safetensors")) <= 12e6


def test_recipe_has_every_pole_and_a_preset_and_a_sentence_for_every_type():
    recipe = Recipe.of("smollm2")
    assert recipe.base == "smollm2"
    types = ["".join(letters) for letters in product("EI", "SN", "TF", "JP")]
    assert list(recipe.attributes)[: len(POLES)] == list(POLES)
    assert recipe.presets == {name: dict.fromkeys(name, 1) for name in types}
    contexts = list(recipe.attributes.items())[len(POLES) :]  # of every type one, in words of its own
    assert sorted(name.upper() for name, _ in contexts) == sorted(types)
    assert len({context["system"] for _, context in contexts}) == len(types)
    assert not [name for name, context in contexts if name.upper() in context["system"].upper()]
