"""The preference pairs of mpg/demo/traits teach a trait, and not a length, an opening or a word."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from mpg import demo

FOLDER = demo.MODELS.parent / "traits"
FILES = sorted(FOLDER.glob("*.jsonl"))
NAMES = re.compile(r"\b(mbti|intro|extra|extro)vert|\b(intuiti(ve|on)|sensing|perceiving|judging|personality)\b", re.I)


def read(file):
    """The pairs of a dimension, those of the judge last, and the letters of its poles."""
    lines = file.read_text().splitlines() + (FOLDER / "judge" / file.name).read_text().splitlines()
    return [json.loads(line) for line in lines], tuple(file.stem.upper())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_pairs_are_as_many_as_long_and_as_different_as_training_needs(file):
    pairs, poles = read(file)
    assert len(file.read_text().splitlines()) >= 200
    assert len(pairs) >= 300
    assert all(tuple(pair) == ("question", *poles) for pair in pairs)
    for field in ("question", *poles):
        assert len({pair[field] for pair in pairs}) == len(pairs)
    lengths = {pole: [len(pair[pole].split()) for pair in pairs] for pole in poles}
    assert all(25 <= length <= 60 for of_pole in lengths.values() for length in of_pole)
    one, other = (sum(of_pole) for of_pole in lengths.values())
    assert abs(one - other) <= 0.03 * min(one, other)
    for pole in poles:
        openings = Counter(" ".join(pair[pole].split()[:3]) for pair in pairs)
        assert max(openings.values()) <= 0.02 * len(pairs)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_single_word_tells_the_pole(file):
    """None that has at least four times as many texts at one pole is in more than 8 % of them; none names the trait."""
    pairs, poles = read(file)
    assert not [pair for pair in pairs if NAMES.search(json.dumps(pair))]
    words = {
        pole: Counter(w for pair in pairs for w in set(re.findall(r"[a-z']+", pair[pole].lower()))) for pole in poles
    }
    for one, other in (poles, poles[::-1]):
        told = {word for word, count in words[one].items() if count >= 4 * words[other][word]}
        assert not {word for word in told if words[one][word] > 0.08 * len(pairs)}


def test_the_files_say_their_licence():
    assert FILES
    assert "SPDX-License-Identifier: Apache-2.0" in (FOLDER / "README.md").read_text()
