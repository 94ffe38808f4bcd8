"""Scores of answers, written as they come: JSON Lines (`records`) beside the answers, by whatever judge.

Knows judges by their interface alone. A row has item, seed and attribute of an answer, a hash of its text, its `scores`
by criterion, null where missing, and what else the judge tells.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mpg.evaluate.records import NOT_COMPARED, open_records
from mpg.evaluate.tasks import Item, deal_options

# Called with the index of an answer, its scores by criterion, and what else is to be kept of it
OnScore = Callable[[int, Mapping[str, "float | None"], Mapping[str, Any]], None]


class Judge(Protocol):
    """Who scores answers.

    name      as tables show it
    criteria  what it scores
    identity  what decides upon its scores: another identity is another job
    """

    name: str
    criteria: tuple[str, ...]
    identity: dict[str, Any]

    def score(self, asked: Sequence[tuple[Item, str]], on_score: OnScore) -> list[str]:
        """Score answers to items, as these were asked. out: of every answer that got no reply at all, so that another
        call would ask again, from where and why"""


def write_scores(
    path: str | Path,
    judge: Judge,
    items: Sequence[Item],
    header: Mapping[str, Any],
    answers: Sequence[Mapping[str, Any]],
    *,
    on_row: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Score answers that have no score yet.

    header, answers  of the file of answers, as `read_records` returns them
    on_row           is called after every score, with how many there are

    out: the scores that there are, in the order of the answers, and of every answer that got no reply, why

    Raises ValueError as `open_records` does, and as the judge does; what was scored until then stays.
    """
    by_id = {item.id: item for item in items}
    of = {name: value for name, value in header.items() if name not in NOT_COMPARED}
    with open_records(path, {"what": "scores", **judge.identity, "answers": of}) as records:
        there = {_key(row) for row in records.rows}
        keys = [_key({**answer, "of_text": hash_of_text(answer["text"])}) for answer in answers]
        todo = [(key, answer) for key, answer in zip(keys, answers, strict=True) if key not in there]
        count = len(answers) - len(todo)

        def write(index: int, scores: Mapping[str, float | None], more: Mapping[str, Any]) -> None:
            nonlocal count
            row = dict(zip(_KEY, todo[index][0], strict=True))
            records.append(row | {"scores": dict(scores), **more})
            count += 1
            on_row(count, len(answers))

        on_row(count, len(answers))
        asked = [(deal_options(by_id[answer["item"]], answer["seed"]), answer["text"]) for _, answer in todo]
        failures = judge.score(asked, write)
        rows = {_key(row): row for row in records.rows}
    return [rows[key] for key in keys if key in rows], failures


def hash_of_text(text: str) -> str:
    """A hash by which a score is of this text, and not of another that was there before."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_rate(scores: Sequence[Mapping[str, float | None]]) -> float | None:
    """The share of scored answers that have a score on every criterion; None of none."""
    whole = [None not in values.values() for values in scores]
    return sum(whole) / len(whole) if whole else None


_KEY = ("item", "seed", "attribute", "of_text")


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _KEY)
