"""The settings of a training: the paper's by default, a preset for small data, and none out of range."""

from __future__ import annotations

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
