"""Local judges of traits: the demo's, and one that was trained on other pairs and saved in a folder.

Either has `score(texts) -> {dimension: P(first pole)}` and `accuracy`, the share of held-out answers whose pole it
tells. A saved one is numbers alone: its features are hashed, so that no word of its training is in the folder.
Needs scikit-learn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mpg.evaluate.judging import OnScore
from mpg.evaluate.tasks import Item, dimension_of
from mpg.extras import install
from mpg.files import parse_json, refuse_unreadable_text, whole_file

CARD = "judge.json"  # dimensions, held-out accuracy, and what the trainer says of the data
ARRAYS = "judge.npz"  # by dimension: coefficients, intercept, weights of the features
NUM_FEATURES = 2**16  # of words, and again of parts of words

# Answers, and whether each is of the first pole
Labelled = tuple[Sequence[str], Sequence[bool]]


class Scorer(Protocol):
    """What a judge of traits has."""

    @property
    def accuracy(self) -> dict[str, float]:
        """The share of held-out answers whose pole it tells, by dimension."""

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The probability that each text is of the first pole of a dimension ("E" of "EI"), (len(texts),) in [0, 1]."""


class TraitClassifier:
    """A logistic regression for each dimension, over TF-IDF of hashed words and parts of words."""

    def __init__(self, arrays: Mapping[str, np.ndarray], accuracy: dict[str, float], about: dict[str, Any]) -> None:
        self.arrays, self.accuracy, self.about = dict(arrays), accuracy, about

    @classmethod
    def train(
        cls, pairs: Mapping[str, Labelled], held_out: Mapping[str, Labelled], about: Mapping[str, Any] | None = None
    ) -> TraitClassifier:
        """Train on `pairs` by dimension ("EI", ...), and measure on `held_out`.

        about  what `judge.json` is to say beside the numbers: where the pairs are from, how many, the split
        """
        from sklearn.feature_extraction.text import TfidfTransformer
        from sklearn.linear_model import LogisticRegression

        arrays: dict[str, np.ndarray] = {}
        for dimension, (texts, is_first) in pairs.items():
            counts = _features(texts)
            weigher = TfidfTransformer(sublinear_tf=True).fit(counts)
            regression = LogisticRegression(C=10, max_iter=1000).fit(weigher.transform(counts), is_first)
            arrays[f"{dimension}.idf"] = weigher.idf_.astype("float32")
            arrays[f"{dimension}.coefficients"] = regression.coef_[0].astype("float32")
            arrays[f"{dimension}.intercept"] = regression.intercept_.astype("float32")
        judge = cls(arrays, {}, dict(about or {}))
        for dimension, (texts, is_first) in held_out.items():
            told = judge.score(texts)[dimension] > 0.5
            judge.accuracy[dimension] = float(np.mean(told == np.asarray(is_first)))
        return judge

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Scores as of `Scorer.score`."""
        from sklearn.feature_extraction.text import TfidfTransformer

        scores, counts = {}, _features(texts)
        for dimension in (name.removesuffix(".idf") for name in self.arrays if name.endswith(".idf")):
            weigher = TfidfTransformer(sublinear_tf=True)
            weigher.idf_ = self.arrays[f"{dimension}.idf"].astype(float)
            logits = weigher.transform(counts) @ self.arrays[f"{dimension}.coefficients"].astype(float)
            scores[dimension] = 1 / (1 + np.exp(-(logits + self.arrays[f"{dimension}.intercept"])))
        return scores

    def save(self, folder: str | Path) -> None:
        """Write the judge to a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        with whole_file("judge", Path(folder) / ARRAYS) as file:
            np.savez_compressed(file, allow_pickle=False, **self.arrays)
        with whole_file("judge", Path(folder) / CARD) as file:
            file.write_text(json.dumps({"accuracy": self.accuracy, **self.about}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> TraitClassifier:
        """The judge in a folder. Raises ValueError where there is none."""
        card, arrays = Path(folder) / CARD, Path(folder) / ARRAYS
        with refuse_unreadable_text("judge", card):
            text = card.read_text(encoding="utf-8")
        try:
            about = dict(parse_json(text))
            with np.load(arrays) as stored:
                return cls(dict(stored), about.pop("accuracy"), about)
        except (OSError, ValueError, TypeError, KeyError) as error:  # a JSONDecodeError is a ValueError
            raise ValueError(
                f"judge: expected a trait judge in {folder}, got {type(error).__name__}: {error}"
            ) from None


class ClassifierJudge:
    """A `Scorer` as a judge of answers: of every dimension the probability of the target's pole.

    name      "classifier", or the name of its folder
    scale     the least and the most of a score
    identity  what a file of its scores says of it
    """

    scale = (0.0, 1.0)

    def __init__(self, source: str | Path | None, poles: Sequence[str]) -> None:
        """source: the folder of a saved one; None means the demo's. poles: of the target, such as E, S, T, P"""
        scorer: Scorer
        if source is None:
            from mpg.demo.trait_judge import trait_judge

            self.name, scorer, digest = "classifier", trait_judge(), ""
        else:
            self.name, scorer = Path(source).resolve().name, TraitClassifier.load(source)
            digest = hashlib.sha256((Path(source) / ARRAYS).read_bytes()).hexdigest()
        self.scorer = scorer
        wanted, known = [dimension_of(pole) for pole in poles], scorer.accuracy
        if not set(wanted) <= set(known):
            raise ValueError(
                f"judge: expected a judge of {', '.join(wanted)} in {source}, got one of {', '.join(known)}"
            )
        self.accuracy = {dimension: known[dimension] for dimension in wanted}
        self.criteria, self.poles = tuple(wanted), tuple(poles)
        self.identity = {"judge": self.name, "sha256": digest, "poles": list(poles), "accuracy": self.accuracy}

    def score(self, asked: Sequence[tuple[Item, str]], on_score: OnScore) -> list[str]:
        """Scores of answers, see `mpg.evaluate.judging.Judge`."""
        told = self.scorer.score([text for _, text in asked]) if asked else {}
        for index in range(len(asked)):
            first = {dimension: float(told[dimension][index]) for dimension in self.criteria}
            is_first = {dimension_of(pole): dimension_of(pole)[0] == pole for pole in self.poles}
            on_score(index, {of: round(p if is_first[of] else 1 - p, 6) for of, p in first.items()}, {})
        return []


def _features(texts: Sequence[str]) -> Any:
    """Counts of hashed words and parts of words, (len(texts), 2 NUM_FEATURES), sparse."""
    try:
        from scipy.sparse import hstack
        from sklearn.feature_extraction.text import HashingVectorizer
    except ImportError as error:
        raise ImportError(f"the judge of the traits needs scikit-learn: {install('evaluate')}") from error
    how = {"n_features": NUM_FEATURES, "norm": None, "alternate_sign": False}
    words = HashingVectorizer(ngram_range=(1, 2), **how)
    parts = HashingVectorizer(ngram_range=(2, 5), analyzer="char_wb", **how)
    return hstack([words.transform(texts), parts.transform(texts)]).tocsr()
