"""A judge of the four traits: how much a text is like the answers of one pole and unlike those of the other.

Knows texts alone: TF-IDF of words and of parts of words, and a logistic regression for each dimension (scikit-learn),
trained when it is first asked, in some seconds, on pairs of its own (traits/judge), which no adapter has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from mpg.demo import TRAITS
from mpg.extras import install
from mpg.train.pairs import Pair, read_pairs, split

DIMENSIONS = ("EI", "SN", "TF", "JP")
NUM_HELD_OUT = 40


@dataclass(frozen=True)
class TraitJudge:
    """The classifiers by dimension, and the share of held-out answers whose pole each of them tells."""

    classifiers: dict[str, Any]
    accuracy: dict[str, float]

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The probability that each text is of the first pole of a dimension ("E" of "EI"), (len(texts),) in [0, 1]."""
        return {of: classifier.predict_proba(texts)[:, 1] for of, classifier in self.classifiers.items()}


@cache
def trait_judge() -> TraitJudge:
    """The judge. Raises ImportError, with what helps, without scikit-learn."""
    classifiers, accuracy = {}, {}
    for dimension in DIMENSIONS:
        own = read_pairs(TRAITS / "judge" / f"{dimension.lower()}.jsonl", dimension[0])
        classifiers[dimension] = _untrained().fit(*_texts(own))
        accuracy[dimension] = float(classifiers[dimension].score(*_texts(held_out_pairs(dimension))))
    return TraitJudge(classifiers, accuracy)


def held_out_pairs(dimension: str) -> list[Pair]:
    """The pairs by which judge and adapters are measured, and that neither was trained on: the first pole is chosen."""
    return split(read_pairs(TRAITS / f"{dimension.lower()}.jsonl", dimension[0]), NUM_HELD_OUT)[1]


def _untrained() -> Any:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline, make_union
    except ImportError as error:
        raise ImportError(f"the judge of the traits needs scikit-learn: {install('demo')}") from error
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    parts = TfidfVectorizer(ngram_range=(2, 5), sublinear_tf=True, analyzer="char_wb")
    return make_pipeline(make_union(words, parts), LogisticRegression(C=10, max_iter=1000))


def _texts(pairs: Sequence[Pair]) -> tuple[list[str], list[bool]]:
    """Answers, and whether each is of the first pole."""
    return [text for pair in pairs for text in (pair.chosen, pair.rejected)], [True, False] * len(pairs)
