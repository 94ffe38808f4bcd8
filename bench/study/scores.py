"""The study's committed scores as estimates: shares, differences and their intervals, by a bootstrap over prompts.

Knows the files in bench/results/study; nothing of pictures and pages.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mpg.evaluate.tasks import DIMENSIONS, TYPES, question_of
from mpg.paper.statistics import Bootstrap, Estimate

RESULTS = Path(os.environ.get("MPG_STUDY_RESULTS", Path(__file__).parents[1] / "results" / "study"))
SEED = 0
TARGET_TEXTS = "scr k=1 M=10"  # of the law that SCR aims at
Row = Mapping[str, Any]
Rows = Sequence[Row]


@cache
def read(name: str) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The header of a file and its rows by setting; nothing of one that is not there yet."""
    path = RESULTS / f"{name}.jsonl"
    if not path.is_file():
        return {}, {}
    header, *lines = map(json.loads, path.read_text().splitlines())
    return header, {line["setting"]: line["rows"] for line in lines if "setting" in line}


def mbti(method: str, types: Sequence[str] = TYPES) -> list[dict[str, Any]]:
    """Rows of a method over some types, once it has answered for all of them that were begun. Types ask the same
    questions: what is resampled is a question."""
    runs = [runs for name in types if (runs := read(f"table-{name}")[1])]
    if not all(method in of_type for of_type in runs):
        return []
    return [
        {**row, "item": question_of(row["item"]), "traits": {of: row[of] for of in DIMENSIONS}}
        for of_type in runs
        for row in of_type[method]
    ]


def plays(method: str) -> list[dict[str, Any]]:
    """Rows of a method in role-play."""
    return [row for row in read("table-roleplay")[1].get(method, ()) if row.get("rouge1") is not None]


def timed(method: str, run: str = "N=2") -> list[dict[str, Any]]:
    """Rows of a method's texts that were timed, of one run, or of all runs of so many attributes."""
    runs = read("speeds")[1]
    return [row for name, rows in runs.items() if name.startswith(run) for row in rows if row["method"] == method]


def ratio(rows: Rows, over: Callable[[Any], float], under: Callable[[Any], float] = lambda row: 1.0) -> Estimate:
    """The sum of one number of rows over that of another, resampled by prompt."""
    return Bootstrap.estimate(_ratios(rows, over, under))


def difference(
    rows: Rows, others: Rows, over: Callable[[Any], float], under: Callable[[Any], float] = lambda row: 1.0
) -> Estimate:
    """The ratio of some rows less that of others, on the same resamples of prompts."""
    assert {*map(_prompt, rows)} == {*map(_prompt, others)}
    return Bootstrap.estimate(_ratios(rows, over, under) - _ratios(others, over, under))


def times(
    rows: Rows, others: Rows, over: Callable[[Any], float], under: Callable[[Any], float] = lambda row: 1.0
) -> Estimate:
    """The ratio of some rows over that of others, less 1, on the same resamples of prompts."""
    assert {*map(_prompt, rows)} == {*map(_prompt, others)}
    return Bootstrap.estimate(_ratios(rows, over, under) / _ratios(others, over, under) - 1)


def trait(row: Row) -> float:
    """The mean probability of the target's poles that the judge gave a text."""
    return float(np.mean(list(row["traits"].values())))


def perplexity(rows: Rows) -> Estimate:
    """The perplexity of texts under the base."""
    log = _ratios(rows, lambda row: row["nats"], lambda row: row["tokens"])
    return Bootstrap.estimate(np.exp(log))


def share(setting: str, base: str, target: str, file: str = "laws-ESTP") -> Estimate | None:
    """The share of the shift from base to target that a law of the next token delivers."""
    rows = read(file)[1].get("laws", ())
    return _share(rows, setting, base, target) if rows and setting in rows[0] else None


def _share(rows: Rows, setting: str, base: str, target: str) -> Estimate:
    return ratio(rows, lambda row: row[setting] - row[base], lambda row: row[target] - row[base])


def share_of(score: str, n: int, k: int, bound: float) -> Estimate | None:
    """The share that SCR delivers with n attributes, chunks of k and bound M; from the file that has it."""
    names = (f"{score} N={n} k={k} M={bound:g}", f"base {score} N={n}", f"target {score} N={n}")
    return share(*names) or share(*names, "laws-ESTPINFJ")


def shift_of(n: int) -> Estimate:
    """The shift of the mean log-ratio that n attributes ask for, in nats a token."""
    file = "laws-ESTP" if f"target arithmetic N={n}" in read("laws-ESTP")[1]["laws"][0] else "laws-ESTPINFJ"
    target, base = f"target arithmetic N={n}", f"base arithmetic N={n}"
    return ratio(read(file)[1]["laws"], lambda row: row[target] - row[base])


def share_of_round(k: int, bound: float, n: int = 4) -> Estimate | None:
    """The share that SCR delivers of what n attributes ask for, over all tokens that its rounds keep."""
    rows, name = read("laws-ESTP" if n == 4 else "laws-ESTPINFJ")[1].get("rounds"), f"N={n} k={k} M={bound:g}"
    return ratio(rows, lambda row: row[name][0], lambda row: row[name][1]) if rows else None


def share_at(k: int, bound: float) -> Estimate | None:
    """That share at any M between those that were taken, read off the curve of each resample."""
    header, runs = read("laws-ESTP")
    if "rounds" not in runs:
        return None
    names = [f"N=4 k={k} M={m:g}" for m in header["bounds"]]
    curves = [_ratios(runs["rounds"], lambda row, n=n: row[n][0], lambda row, n=n: row[n][1]) for n in names]
    at = np.log(bound)
    return Bootstrap.estimate(np.array([np.interp(at, np.log(header["bounds"]), one) for one in np.transpose(curves)]))


def shift_in_texts(rows: Rows) -> Estimate:
    """How far the log-ratio of whole texts is above that of the base's texts to the same prompts, in nats a token."""
    return difference(rows, read("laws-ESTP")[1]["base"], lambda row: row["log_ratio"], lambda row: row["tokens"])


def beyond_share(rows: Rows, share: float) -> Estimate:
    """How far that shift is beyond a share of the one of SCR's own target, in nats a token."""
    own, target = _shifts(rows)
    return Bootstrap.estimate(own - share * target)


def share_in_texts(rows: Rows, of: str = TARGET_TEXTS) -> Estimate:
    """That shift over the one of SCR's own target, or of another's texts."""
    own, target = _shifts(rows, of)
    return Bootstrap.estimate(own / target)


def _shifts(rows: Rows, of: str = TARGET_TEXTS) -> tuple[np.ndarray, np.ndarray]:
    """The shift of some texts and that of others, on the same resamples."""
    runs = read("laws-ESTP")[1]
    own, base, target = (
        _ratios(texts, lambda row: row["log_ratio"], lambda row: row["tokens"])
        for texts in (rows, runs["base"], runs[of])
    )
    return own - base, target - base


def enumerated() -> list[dict[str, Any]]:
    """Contexts of which every chunk was enumerated, of each length."""
    rows = read("first-tokens")[1].get("laws", [])
    longest = max((len(row["chunks"]) for row in rows), default=0)
    return [row for row in rows if len(row["chunks"]) == longest]


def distance(setting: str) -> Estimate | None:
    """The mean total variation between a law of the next token and the target's, over those contexts."""
    rows = enumerated()
    return ratio(rows, lambda row: row[setting][1]) if rows else None


def exact_and_drawn_share(k: int, bound: float) -> tuple[Estimate, Estimate] | None:
    """The share of the shift that SCR delivers in the next token, from all chunks and from drawn ones, over contexts of
    which there are both."""
    all_chunks = {(row["prompt"], row["prefix"]): row for row in enumerated()}
    drawn = [row for row in read("laws-ESTP")[1].get("laws", ()) if (row["prompt"], row["prefix"]) in all_chunks]
    rows, name = [all_chunks[row["prompt"], row["prefix"]] for row in drawn], f"k={k} M={bound:g}"
    if not rows or name not in rows[0]:
        return None
    return (
        ratio(rows, lambda row: row[name][0] - row["base"][0], lambda row: row["target"][0] - row["base"][0]),
        _share(drawn, f"arithmetic N=4 {name}", "base arithmetic N=4", "target arithmetic N=4"),
    )


def _ratios(rows: Rows, over: Callable[[Any], float], under: Callable[[Any], float]) -> np.ndarray:
    names = sorted({_prompt(row) for row in rows})
    sums = np.zeros((2, len(names)))
    for row in rows:
        sums[:, names.index(_prompt(row))] += over(row), under(row)
    return Bootstrap(len(names), SEED).ratios(*sums)


def _prompt(row: Row) -> Any:
    return row["prompt"] if "prompt" in row else row["item"]
