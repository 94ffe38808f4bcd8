"""The study's judge of traits: trained on the judge's side of the paper's pairs, which no adapter sees.

    python bench/study/judge.py DATA     prints the share of held-out answers whose pole it tells, by dimension
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

from mpg.demo.trait_judge import TraitJudge, train_judge
from pairs import DIMENSIONS, mbti_pairs


@cache
def study_judge(data: str | Path) -> TraitJudge:
    """The judge, made anew in some seconds: it keeps words of the release, so it is in no file."""
    of_sides = ({of: mbti_pairs(data, of, side) for of in DIMENSIONS} for side in ("judge", "reported"))
    return train_judge(*of_sides)


if __name__ == "__main__":
    for dimension, accuracy in study_judge(sys.argv[1]).accuracy.items():
        print(f"{dimension}: {accuracy:.3f}")
