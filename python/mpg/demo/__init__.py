"""The demo: models that ship, a corpus and traits that they were trained on, judges, and the table that shows them."""

from pathlib import Path

MODELS = Path(__file__).parent / "models"  # a base with adapters E, S, T and J, as `mpg.load` takes it
# Sets by the names that `mpg.load` and --models know them by, where no folder is called so
SETS = {"demo": MODELS, "smollm2": Path(__file__).parent / "smollm2"}
TRAITS = Path(__file__).parent / "traits"  # preference pairs by dimension, and those of the judge
