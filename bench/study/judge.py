"""The study's judge of traits: trained on the judge's side of the paper's pairs, which no adapter sees.

MPG_DATA=... MPG_STUDY=... python bench/study/judge.py     saves it for `mpg evaluate --judge`, in MPG_STUDY/judge
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common import DATA, RUNS, surprise, told
from mpg.evaluate.judges.classifier import Labelled, TraitClassifier
from mpg.frontend.prompts import Prompt
from mpg.model import Model
from mpg.results import Result
from pairs import DIMENSIONS, mbti_pairs

FOLDER = RUNS / "judge"


def study_judge() -> TraitClassifier:
    """The judge, trained in some seconds where it is not there yet."""
    if not FOLDER.is_dir():
        of_sides = ({of: _labelled(of, side) for of in DIMENSIONS} for side in ("judge", "reported"))
        TraitClassifier.train(*of_sides, about={"trained on": "the judge's side of the paper's pairs"}).save(FOLDER)
    return TraitClassifier.load(FOLDER)


def judged(model: Model, prompts: Sequence[Prompt], results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row a text: what it cost, -log p under the base in nats, and the judge's probabilities of first poles."""
    nats, traits = surprise(model, prompts, results), study_judge().score([result.text for result in results])
    return [
        {
            "prompt": index, **told(result), "nats": round(nats[index], 3),
            "traits": {of: round(float(of_texts[index]), 4) for of, of_texts in traits.items()},
        }
        for index, result in enumerate(results)
    ]  # fmt: skip


def _labelled(dimension: str, side: str) -> Labelled:
    pairs = mbti_pairs(DATA, dimension, side)
    return [text for pair in pairs for text in (pair.chosen, pair.rejected)], [True, False] * len(pairs)


if __name__ == "__main__":
    for dimension, accuracy in study_judge().accuracy.items():
        print(f"{dimension}: {accuracy:.3f}")
