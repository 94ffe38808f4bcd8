"""The settings of a training: the paper's by default, a preset for small data, and none out of range."""

from __future__ import annotations

import pytest

from mpg.train.settings import PRESETS, SETTINGS, Settings, describe


def test_the_recipe_of_the_paper_is_the_default():
    recipe = Settings.of("paper", {"learning_rate": None})
    assert (recipe.rank, recipe.alpha, recipe.dropout, recipe.modules) == (8, 16, 0.05, "all-linear")
    assert (recipe.learning_rate, recipe.weight_decay, recipe.schedule) == (5e-5, 0.01, "cosine")
    assert (recipe.warmup_steps, recipe.batch_size, recipe.accumulation, recipe.epochs) == (100, 16, 8, 3)
    assert recipe.beta == 0.1


def test_a_preset_gives_way_to_what_is_given_and_every_setting_says_its_defaults():
    small = Settings.of("small", {"epochs": 7})
    assert (small.epochs, small.learning_rate) == (7, PRESETS["small"]["learning_rate"])
    for name, setting in SETTINGS.items():
        assert describe(name).startswith(setting.metadata["meaning"])
        assert "Default: " in describe(name)
    assert "none (small: 96)" in describe("max_answer")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 0),
        ("alpha", 0),
        ("dropout", 1),
        ("modules", "q_proj,,v_proj"),
        ("learning_rate", 0),
        ("learning_rate", float("nan")),
        ("weight_decay", -1),
        ("schedule", "step"),
        ("warmup_steps", -1),
        ("batch_size", 0),
        ("accumulation", 0),
        ("epochs", 1.5),
        ("beta", 0),
        ("likelihood", -1),
        ("max_answer", 0),
        ("held_out", 0),
        ("checkpoint_steps", 0),
        ("gradient_checkpointing", "yes"),
        ("adapter_dtype", "int8"),
        ("seed", -1),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected "):
        Settings.of("paper", {name: value})


def test_an_unknown_setting_and_preset_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^learning_rat: unknown setting; did you mean 'learning_rate'\?"):
        Settings.of("paper", {"learning_rat": 1})
    with pytest.raises(ValueError, match=r"^preset: expected one of paper, small, got 'big'"):
        Settings.of("big", {})
