"""The study's judge of traits: trained on the judge's side of the paper's pairs, which no adapter sees.

MPG_DATA=... MPG_STUDY=... python bench/study/judge.py     saves it for `mpg evaluate --judge`, in MPG_STUDY/judge; and
how well it tells held-out answers, whole and cut as short as the study's texts, in judge.json beside the scores
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from common import DATA, LIMIT, RUNS, surprise, told, write
from mpg.evaluate.judges.classifier import Labelled, Scorer, TraitClassifier
from mpg.frontend.prompts import Prompt
from mpg.model import Model
from mpg.results import Result
from pairs import DIMENSIONS, mbti_pairs

FOLDER = RUNS / "judge"
NUM_WORDS = 31  # of a text of 40 tokens, about


def study_judge() -> TraitClassifier:
    """The judge, trained in some seconds where it is not there yet."""
    if not FOLDER.is_dir():
        of_sides = ({of: _labelled(of, side) for of in DIMENSIONS} for side in ("judge", "reported"))
        TraitClassifier.train(*of_sides, about={"trained on": "the judge's side of the paper's pairs"}).save(FOLDER)
    return TraitClassifier.load(FOLDER)


def judged(model: Model, prompts: Sequence[Prompt], results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row a text: which prompt it answers, what it cost, -log p under the base in nats, and the judge's probabilities
    of first poles."""
    nats, traits = surprise(model, prompts, results), study_judge().score([result.text for result in results])
    return [
        {
            "prompt": prompts.index(prompts[index]), **told(result), "nats": round(nats[index], 3),
            "traits": {of: round(float(of_texts[index]), 4) for of, of_texts in traits.items()},
        }
        for index, result in enumerate(results)
    ]  # fmt: skip


def share_told(judge: Scorer, dimension: str, labelled: Labelled, num_words: int) -> float:
    """The share of answers, cut behind some words, whose pole a judge tells."""
    texts, is_first = labelled
    told = judge.score([" ".join(text.split()[:num_words]) for text in texts])[dimension] > 0.5
    return float(np.mean(told == np.asarray(is_first)))


def _labelled(dimension: str, side: str) -> Labelled:
    pairs = mbti_pairs(DATA, dimension, side)[:LIMIT]
    return [text for pair in pairs for text in (pair.chosen, pair.rejected)], [True, False] * len(pairs)


def main() -> None:
    judge = study_judge()
    of_dimensions = {of: _labelled(of, "reported") for of in DIMENSIONS}
    openings = {of: share_told(judge, of, labelled, NUM_WORDS) for of, labelled in of_dimensions.items()}
    answers = {of: len(texts) for of, (texts, _) in of_dimensions.items()}
    found = {"answers": answers, "accuracy": judge.accuracy, "words": NUM_WORDS, "accuracy of openings": openings}
    write("judge", found)


if __name__ == "__main__":
    main()
