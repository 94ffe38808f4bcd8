"""The two sets of models that the demo knows: the real one, and the tiny one that ships whole and needs no download."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from mpg.demo.corpus import DEMO_QUESTIONS, HELD_OUT_QUESTIONS, TRAITS
from mpg.demo.judge import score_traits
from mpg.demo.show import Column, Stage
from mpg.demo.trait_judge import held_out_pairs, trait_judge

EXACT = {"sampler": "exact", "target": "geometric"}
REAL_ATTRIBUTES = ("E", "T")


def _columns(one: str, other: str, weight: float, exact: dict[str, Any]) -> tuple[Column, ...]:
    both = {one: weight, other: weight}
    return (
        Column("base", None, {"sampler": "direct", "target": "base"}),
        *(Column(f"{name}={weight:g}", {name: weight}, {"sampler": "direct"}) for name in (one, other)),
        Column("both, scr as published", both, {"sampler": "scr", "target": "arithmetic"}),
        Column("both, exact", both, exact),
    )


def _tiny_scores(texts: Sequence[str]) -> Mapping[str, np.ndarray]:
    scores = [score_traits(text) for text in texts]
    return {trait: np.array([score[trait] for score in scores]) for trait in TRAITS}


def _real_scores(texts: Sequence[str]) -> Mapping[str, np.ndarray]:
    return {dimension[0]: score for dimension, score in trait_judge().score(texts).items()}


@cache
def stage(models: str) -> Stage:
    """The stage of the set "smollm2" or "demo"."""
    if models == "demo":
        held_out = [question.text for question in random.Random(0).sample(HELD_OUT_QUESTIONS, 100)]
        verdict = "Scores are log odds of marker phrases: 0 is balance, a sentence some 1.7."
        return Stage(_columns("E", "T", 1, EXACT), DEMO_QUESTIONS, held_out, _tiny_scores, verdict, 48)
    accuracy = trait_judge().accuracy
    names = " and ".join(f"{of} {accuracy[of]:.2f}" for of in accuracy if of[0] in REAL_ATTRIBUTES)
    verdict = f"Scores are a judge's probability of the pole; its accuracy on held-out answers is {names}."
    held_out = [pair.question for pairs in zip(*map(held_out_pairs, accuracy), strict=True) for pair in pairs]
    return Stage(_columns(*REAL_ATTRIBUTES, 1, EXACT), QUESTIONS, held_out, _real_scores, verdict, 48)


QUESTIONS = (
    "How do you like to spend a free weekend?",
    "A friend asks you for advice about a new job. What do you say?",
    "What do you do when a plan falls through?",
)
