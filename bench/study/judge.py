"""The study's judge of traits: trained on the judge's side of the paper's pairs, which no adapter sees.

MPG_DATA=... MPG_STUDY=... python bench/study/judge.py     saves it for `mpg evaluate --judge`, in MPG_STUDY/judge
"""

from __future__ import annotations

from common import DATA, RUNS
from mpg.evaluate.judges.classifier import Labelled, TraitClassifier
from pairs import DIMENSIONS, mbti_pairs

FOLDER = RUNS / "judge"


def study_judge() -> TraitClassifier:
    """The judge, trained in some seconds where it is not there yet."""
    if not FOLDER.is_dir():
        of_sides = ({of: _labelled(of, side) for of in DIMENSIONS} for side in ("judge", "reported"))
        TraitClassifier.train(*of_sides, about={"trained on": "the judge's side of the paper's pairs"}).save(FOLDER)
    return TraitClassifier.load(FOLDER)


def _labelled(dimension: str, side: str) -> Labelled:
    pairs = mbti_pairs(DATA, dimension, side)
    return [text for pair in pairs for text in (pair.chosen, pair.rejected)], [True, False] * len(pairs)


if __name__ == "__main__":
    for dimension, accuracy in study_judge().accuracy.items():
        print(f"{dimension}: {accuracy:.3f}")
