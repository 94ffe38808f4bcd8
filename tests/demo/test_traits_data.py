"""The preference pairs of mpg/demo/traits teach a trait, and not a length, an opening or a word."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from mpg import demo
from mpg.demo.trait_judge import NUM_HELD_OUT
from mpg.train.pairs import read_pairs, split

FOLDER = demo.MODELS.parent / "traits"
FILES = sorted(FOLDER.glob("*.jsonl"))
NAMES = re.compile(r"\b(mbti|intro|extra|extro)vert|\b(intuiti(ve|on)|sensing|perceiving|judging|personality)\b", re.I)
# The share of a pole's texts that a leaning word may be in. In the training half alone some lean by chance ("over").
LEANING = {"file": 0.08, "trained": 0.125, "judge": 0.08}


def read(file):
    """The pairs of a dimension by what they are for, and the letters of its poles."""
    poles = tuple(file.stem.upper())
    trained, held_out = split(whole := read_pairs(file, poles[0]), NUM_HELD_OUT)
    judge = read_pairs(FOLDER / "judge" / file.name, poles[0])
    return {"trained": trained, "held_out": held_out, "file": whole, "judge": judge}, poles


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_pairs_are_as_many_as_long_and_as_different_as_training_needs(file):
    parts, poles = read(file)
    assert len(parts["trained"]) >= 160 and len(parts["held_out"]) == 40 and len(parts["judge"]) >= 100
    for pairs in parts.values():
        lengths = [[len(answer.split()) for answer in of_pole] for of_pole in answers(pairs)]
        assert all(25 <= length <= 60 for of_pole in lengths for length in of_pole)
        one, other = map(sum, lengths)
        assert abs(one - other) <= 0.03 * min(one, other)
        for of_pole in answers(pairs):
            openings = Counter(" ".join(answer.split()[:3]) for answer in of_pole)
            assert max(openings.values()) <= max(0.02 * len(pairs), 2)
    every = parts["file"] + parts["judge"]
    assert len({" ".join(pair.question.lower().split()) for pair in every}) == len(every)
    assert len({" ".join(answer.lower().split()) for of_pole in answers(every) for answer in of_pole}) == 2 * len(every)
    assert all(tuple(json.loads(line)) == ("question", *poles) for line in file.read_text().splitlines())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_single_word_tells_the_pole(file):
    """None that is at least four times as often at one pole is in a larger share than LEANING; none names the trait."""
    parts, _ = read(file)
    assert not [
        pair
        for pairs in parts.values()
        for pair in pairs
        if NAMES.search(f"{pair.question} {pair.chosen} {pair.rejected}")
    ]
    for name, most in LEANING.items():
        words = [
            Counter(word for answer in of_pole for word in set(re.findall(r"[a-z']+", answer.lower())))
            for of_pole in answers(parts[name])
        ]
        for one, other in (words, words[::-1]):
            told = {word for word, count in one.items() if count >= 4 * other[word]}
            assert not {word for word in told if one[word] > most * len(parts[name])}


def answers(pairs):
    """Those of each pole."""
    return [[pair.chosen for pair in pairs], [pair.rejected for pair in pairs]]


def test_the_files_say_their_licence():
    assert FILES
    assert "SPDX-License-Identifier: Apache-2.0" in (FOLDER / "README.md").read_text()
