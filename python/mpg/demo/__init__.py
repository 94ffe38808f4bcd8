"""The demo: a written corpus, its judge, models trained on it and the table that shows them."""

from pathlib import Path

MODELS = Path(__file__).parent / "models"  # a base with adapters E, S, T and J, as `mpg.load` takes it
