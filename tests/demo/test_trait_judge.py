"""The judge of the traits: what it has read, and how often it is right about texts that it has not."""

from __future__ import annotations

import sys

import numpy as np
import pytest

pytest.importorskip("sklearn")
from mpg.demo import TRAITS
from mpg.demo.trait_judge import DIMENSIONS, held_out_pairs, trait_judge
from mpg.train.pairs import read_pairs


def test_judge_tells_the_poles_of_answers_to_held_out_questions():
    """80 answers a dimension: one that guesses is right about more than 60 of them in one case of a million."""
    assert trait_judge().accuracy.keys() == set(DIMENSIONS)
    assert min(trait_judge().accuracy.values()) > 0.75
    for dimension in DIMENSIONS:
        pairs = held_out_pairs(dimension)
        first, second = (
            trait_judge().score([getattr(pair, side) for pair in pairs])[dimension] for side in ("chosen", "rejected")
        )
        assert np.mean(first > second) > 0.85
        assert np.all((first >= 0) & (first <= 1))


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_judge_has_read_no_question_and_no_answer_of_the_adapters(dimension):
    file = f"{dimension.lower()}.jsonl"
    own, others = (read_pairs(folder / file, dimension[0]) for folder in (TRAITS / "judge", TRAITS))
    for part in ("question", "chosen", "rejected"):
        assert not {getattr(pair, part) for pair in own} & {getattr(pair, part) for pair in others}


def test_judge_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"pip install --no-build-isolation -e '\.\[demo\]'"):
        trait_judge.__wrapped__()  # as if none had been trained
