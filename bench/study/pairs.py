"""Training data of the study: the paper's pairs, each question on one of three sides for all dimensions and poles.

Knows the layouts of the paper's release; nothing of models. What it writes holds texts of the release, which carry no
licence: keep the folder out of the repository.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mpg.evaluate.tasks import DIMENSIONS, ROLEPLAY_PROMPT, hash_of
from mpg.train.pairs import Pair, read_pairs

# Shares of the questions, by their hash: what adapters learn from, what judges learn from, what is only reported on.
SHARES = {"adapters": 0.45, "judge": 0.35, "reported": 0.2}
NUM_ADAPTER_QUESTIONS = 100  # of each dimension at most, 16 of them to measure a training on
OPENING_WORDS = 20  # answers that open alike teach nothing within the tokens that trainings keep
ROLEPLAY = ("profile", "personality")
NUM_ROLEPLAY_PAIRS = 64  # of each kind at most
PERSONA = re.compile(r"Profile: *(?P<profile>.*?)\nPersonalities: *(?P<personality>.*?)\n", re.DOTALL)


def side_of(question: str) -> str:
    """The side that a question is on: a name of SHARES."""
    part = int(hash_of(question)[:12], 16) / 16**12
    for name, share in SHARES.items():
        if part < share:
            return name
        part -= share
    return name


def mbti_pairs(data: str | Path, dimension: str, side: str) -> list[Pair]:
    """The pairs of a dimension on one side, without their personas, the answer of the first pole being the chosen."""
    pairs = read_pairs(Path(data) / "mbti" / "preferences" / f"{dimension[0].lower()}_{dimension[1].lower()}_test.json",
                       dimension[0], drop_identical=True)  # fmt: skip
    if dimension == "EI":
        pairs += read_pairs(Path(data) / "mbti" / "preferences" / "e_i_train.json", "E", drop_identical=True)
    return _ordered(pair for pair in pairs if side_of(pair.question) == side)


def roleplay_pairs(data: str | Path, kind: str) -> list[dict[str, Any]]:
    """Pairs that teach to speak of one's profile, or as one's personality, under a prompt of our own."""
    pairs = []
    for pair in read_pairs(Path(data) / "roleplay" / f"{kind}_test.json", drop_identical=True):
        persona = PERSONA.search(pair.question)
        if persona and _opening(pair.chosen) != _opening(pair.rejected):
            prompt = [{"role": "user", "content": ROLEPLAY_PROMPT.format(**persona.groupdict())}]
            pairs.append({"prompt": prompt, **{side: [{"role": "assistant", "content": getattr(pair, side)}]
                                               for side in ("chosen", "rejected")}})  # fmt: skip
    return sorted(pairs, key=lambda pair: hash_of(pair["prompt"][0]["content"]))


def write_training_data(data: str | Path, out: Path) -> None:
    """Files of training data: one for each dimension, one for each kind of role-play, one for the reference model."""
    out.mkdir(parents=True, exist_ok=True)
    for dimension in DIMENSIONS:
        first, second = dimension
        rows = [
            {"question": pair.question, first: pair.chosen, second: pair.rejected}
            for pair in mbti_pairs(data, dimension, "adapters")
            if _opening(pair.chosen) != _opening(pair.rejected)
        ]
        _write(out / f"{dimension}.jsonl", rows[:NUM_ADAPTER_QUESTIONS])
    of_reference = []
    for kind in ROLEPLAY:
        rows = roleplay_pairs(data, kind)
        _write(out / f"{kind}.jsonl", rows[:NUM_ROLEPLAY_PAIRS])
        of_reference += rows[NUM_ROLEPLAY_PAIRS : NUM_ROLEPLAY_PAIRS * 3 // 2]  # others, of both kinds
    _write(out / "reference.jsonl", of_reference)


def _ordered(pairs: Iterable[Pair]) -> list[Pair]:
    """One pair for each question, in the order of their hashes."""
    by_hash = {hash_of(pair.question): pair for pair in pairs}
    return [by_hash[key] for key in sorted(by_hash)]


def _opening(answer: str) -> list[str]:
    return answer.split()[:OPENING_WORDS]


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    write_training_data(sys.argv[1], Path(sys.argv[2]))
