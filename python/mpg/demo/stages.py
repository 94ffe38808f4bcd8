"""The two sets of models that the demo knows: the real one, and the tiny one that ships whole and needs no download."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from mpg.demo.corpus import DEMO_QUESTIONS, HELD_OUT_QUESTIONS, TRAITS
from mpg.demo.judge import score_traits
from mpg.demo.show import Column, Stage
from mpg.demo.trait_judge import held_out_pairs, trait_judge

QUESTIONS = (
    "How do you like to spend a free weekend?",
    "A friend asks you for advice about a new job. What do you say?",
    "What do you do when a plan falls through?",
)


@cache
def stage(models: str) -> Stage:
    """The stage "smollm2" or "demo". Raises ImportError, with what helps, if the first's judge lacks scikit-learn."""
    if models == "demo":
        held_out = [question.text for question in random.Random(0).sample(HELD_OUT_QUESTIONS, 100)]
        verdict = "Scores are log odds of marker phrases: 0 is balance, a sentence some 1.7."
        return Stage(_columns(1), DEMO_QUESTIONS, held_out, 100, _tiny_scores, verdict, 64)
    accuracy = trait_judge().accuracy
    verdict = (
        "Scores are a judge's probability of the pole; it is right about "
        f"{accuracy['EI']:.0%} (E) and {accuracy['TF']:.0%} (T) of held-out answers."
    )
    held_out = [pair.question for pairs in zip(*map(held_out_pairs, accuracy), strict=True) for pair in pairs]
    by_sentence = Column("enfp=2", {"enfp": 2.0}, {"sampler": "direct"})
    return Stage(_columns(2), QUESTIONS, held_out, 12, _real_scores, verdict, 32, by_sentence)


def _columns(weight: float) -> tuple[Column, ...]:
    both = {"E": weight, "T": weight}
    return (
        Column("base", None, {"sampler": "direct", "target": "base"}),
        *(Column(f"{name}={weight:g}", {name: weight}, {"sampler": "direct"}) for name in both),
        Column("both, scr as published", both, {"sampler": "scr", "target": "arithmetic"}),
        Column("both, exact", both, {"sampler": "exact", "draft": "merged", "target": "geometric"}),
    )


def _tiny_scores(texts: Sequence[str]) -> Mapping[str, np.ndarray]:
    scores = [score_traits(text) for text in texts]
    return {trait: np.array([score[trait] for score in scores]) for trait in TRAITS}


def _real_scores(texts: Sequence[str]) -> Mapping[str, np.ndarray]:
    return {dimension[0]: score for dimension, score in trait_judge().score(texts).items()}
