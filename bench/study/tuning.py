"""Figures 3 and 4: weights for ESTP and INFJ, tuned by `mpg tune` on one half of the multiple-choice questions.

MPG_DATA=... MPG_STUDY=... python bench/study/tuning.py [ESTP | INFJ]
"""

from __future__ import annotations

import sys

from common import BASE, DATA, LIMIT, RESULTS, RUNS, limited
from mpg.app.cli.command import app as mpg

SEARCHES = (("ESTP", "iterative", 16), ("INFJ", "iterative", 20), ("INFJ", "optuna", 20))


def main() -> None:
    for poles, search, trials in SEARCHES:
        if sys.argv[1:] and poles not in sys.argv[1:]:
            continue
        recipe = RUNS / f"set-{poles}" / "mpg.yaml"
        recipe.parent.mkdir(exist_ok=True)
        adapters = "".join(f"  {pole}: ../adapters/{pole}\n" for pole in poles)
        recipe.write_text(f"base: {BASE}\nattributes:\n{adapters}")
        out = RESULTS / f"tune-{poles}-{search}.jsonl"
        what = ["--type", poles, "--data", str(DATA), "--models", str(recipe), "--out", str(out)]
        how = ["--search", search, "--trials", str(limited(trials)), "--low", "-4", "--dtype", "bfloat16"]
        how += [] if LIMIT is None else ["--limit", str(LIMIT)]
        mpg(["tune", *what, *how], standalone_mode=False)


if __name__ == "__main__":
    main()
