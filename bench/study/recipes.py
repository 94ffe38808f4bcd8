"""What the study's adapters were trained with, and how well they tell held-out pairs: adapters.json beside the scores.

MPG_STUDY=... python bench/study/recipes.py
"""

from __future__ import annotations

import json
from pathlib import Path

from common import RUNS, write

KEPT = ("base", "pairs", "held_out", "recipe", "dtype", "versions", "scores")


def main() -> None:
    cards = {path.parent.name: json.loads(path.read_text()) for path in (RUNS / "adapters").glob("*/training.json")}
    told = {
        name: {**{key: cards[name][key] for key in KEPT}, "data": Path(cards[name]["data"]["source"]).name}
        for name in sorted(cards)
    }
    write("adapters", told)


if __name__ == "__main__":
    main()
