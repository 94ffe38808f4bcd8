"""Figures 3 and 4: weights for ESTP and INFJ, tuned by `mpg tune` on one half of the multiple-choice questions.

MPG_DATA=... MPG_STUDY=... python bench/study/tuning.py [ESTP | INFJ]
"""

from __future__ import annotations

import subprocess
import sys

from common import DATA, RESULTS, RUNS

SEARCHES = (("ESTP", "iterative", 16), ("INFJ", "iterative", 20), ("INFJ", "optuna", 20))


def main() -> None:
    for poles, search, trials in SEARCHES:
        if sys.argv[1:] and poles not in sys.argv[1:]:
            continue
        recipe = RUNS / f"set-{poles}" / "mpg.yaml"
        recipe.parent.mkdir(exist_ok=True)
        adapters = "".join(f"  {pole}: ../adapters/{pole}\n" for pole in poles)
        recipe.write_text(f"base: smollm2\nattributes:\n{adapters}")
        out = RESULTS / f"tune-{poles}-{search}.jsonl"
        what = ["--type", poles, "--data", str(DATA), "--models", str(recipe), "--out", str(out)]
        how = ["--search", search, "--trials", str(trials), "--low", "-4", "--dtype", "bfloat16"]
        subprocess.run([sys.executable, "-m", "mpg", "tune", *what, *how], check=True)


if __name__ == "__main__":
    main()
