"""What combining does to the text: both traits rise together."""

from __future__ import annotations

import random
import statistics

from longer import IS_LONG
from mpg.demo.corpus import HELD_OUT_QUESTIONS
from mpg.demo.judge import score_traits


def test_geometric_combination_raises_both_traits_above_the_base(model):
    """40 held-out questions, 32 tokens (100 and whole texts in the long form), one fixed seed: the 95 % interval of the
    mean paired difference excludes 0."""
    prompts = [question.text for question in random.Random(0).sample(HELD_OUT_QUESTIONS, 100 if IS_LONG else 40)]
    how = {} if IS_LONG else {"max_new_tokens": 32}
    base = model.generate(prompts, sampler="direct", target="base", seed=0, **how)
    both = model.generate(prompts, weights={"E": 1, "T": 1}, sampler="direct", target="geometric", seed=1000, **how)
    for trait in ("E", "T"):
        gains = [
            score_traits(combined.text)[trait] - score_traits(plain.text)[trait]
            for combined, plain in zip(both, base, strict=True)
        ]
        error = statistics.stdev(gains) / len(gains) ** 0.5
        assert statistics.mean(gains) - 1.96 * error > 0, trait
