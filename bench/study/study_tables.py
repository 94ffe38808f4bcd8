"""The study's own tables, beside the paper's four: bounds, front, negative weights, tuning, adapters.

Knows what a row of each holds; the words around them are `reproduction`'s business.
"""

from __future__ import annotations

import json
import math
from statistics import median

import scores
from claims import emptiness, held_out, of_e
from layout import Cell, Column, Table
from mpg.evaluate.held_out import estimate_gain, estimate_value
from scores import (
    TARGET_TEXTS,
    Row,
    Rows,
    beyond_share,
    difference,
    perplexity,
    ratio,
    read,
    share_at,
    share_in_texts,
    shift_in_texts,
    trait,
)

PERPLEXITY = Column("perplexity", ".1f")
FORWARDS = Column("forwards a token", ".2f", brief=True)


def bounds() -> Table:
    """What M becomes in texts, what SCR delivers there in the next token, and whether the texts agree."""
    columns = [Column("M at their end, median (range)"), Column("share there, of all tokens", ".2f")]
    columns += [Column("shift in the texts, nats a token", "+.4f"), Column("less the share of the target's", "+.4f")]
    columns.append(Column("of the shift of `exact`", ".2f"))
    rows: dict[str, list[Cell]] = {}
    for name, own in read("laws-ESTP")[1].items():
        told: list[Cell] = ["", "", shift_in_texts(own), "", ""] if name not in ("laws", "rounds", "base") else []
        if name.startswith("scr"):
            ends = sorted(math.exp(row["log_bound"]) for row in own)
            share = share_at(1 if name == TARGET_TEXTS else 4, median(ends))
            told[:2] = [f"{median(ends):.2f} ({ends[0]:.2f} to {ends[-1]:.2f})", share]
            if share and name != TARGET_TEXTS:
                told[3] = beyond_share(own, share.value)
            told[4] = share_in_texts(own, "exact")
        if told:
            rows[name] = [*told, _forwards(own)]
    return Table("texts", [*columns, FORWARDS], rows)


def front() -> Table:
    """Trait, perplexity and cost of every method as its weights grow."""
    _, runs = read("front")
    columns = [Column("mean P(pole), 95 %", ".3f"), Column("less the base's", "+.3f"), PERPLEXITY, FORWARDS]
    rows: dict[str, list[Cell]] = {}
    for name, own in runs.items():
        gain = "" if name == "base" else difference(own, runs["base"], trait)
        rows[name] = [ratio(own, trait), gain, perplexity(own), _forwards(own)]
    titles = {"geometric 0.25": "geometric 0.25 (MOD)", "anchored 0.25": "anchored 0.25 (arithmetic)"}
    return Table("setting", columns, rows, titles)


def negative() -> Table:
    """What either way to take E away does."""
    _, runs = read("negative")
    columns = [Column("P(E), 95 %", ".3f"), Column("less that of T=1 alone", "+.3f")]
    columns += [Column("less the opposite pole's way", "+.3f"), PERPLEXITY]
    rows: dict[str, list[Cell]] = {}
    for name, own in runs.items():
        gain = difference(own, runs["geometric T=1"], of_e) if "," in name else ""
        opposite = runs.get(name.replace("E=-", "I="), [])
        against = difference(own, opposite, of_e) if "E=-" in name and opposite else ""
        rows[name] = [ratio(own, of_e), gain, against, perplexity(own)]
    return Table("target and weights", columns, rows)


def empty() -> Table:
    """How often an arithmetic row has no token that may be accepted."""
    columns = [Column("no token of the vocabulary", ".2f"), Column("no token of the nucleus", ".2f")]
    columns.append(Column("base's mass that is left", ".2f"))
    rows: dict[str, list[Cell]] = {}
    for name, own in read("rows")[1].items():
        left = ratio(own, lambda row: row["left_mass"], lambda row: row["tokens"])
        rows[name.removeprefix("rows ")] = [emptiness(name, "empty"), emptiness(name, "empty_nucleus"), left]
    return Table("weights", columns, rows)


def tuning() -> Table:
    """What histories found, and what that is worth on the other half."""
    columns = [
        Column("held out: accuracy by pole"),
        Column("value: their mean, 95 %", ".3f"),
        Column("less start's", "+.3f"),
    ]
    rows: dict[str, list[Cell]] = {}
    for path in sorted(scores.RESULTS.glob("tune-*.jsonl")):
        history = path.stem.removeprefix("tune-")
        held = held_out(history)
        start = list(held.values())[1]["items"] if len(held) > 1 else {}
        for weights, own in held.items():
            shares = ", ".join(f"{pole} {share:.2f}" for pole, share in own["scores"].items())
            gain = "" if own["items"] is start else estimate_gain(own["items"], start)
            rows[f"{history}: {weights or 'none'}"] = [shares, estimate_value(own["items"]), gain]
    return Table("history and weights", columns, rows)


def adapters() -> Table:
    """How well the adapters tell held-out pairs."""
    columns = [Column("pairs", "d", brief=True)]
    columns += [Column(name, ".3f", brief=True) for name in ("held out: accuracy", "margin", "loss")]
    columns.append(Column("seed", "d", brief=True))
    rows: dict[str, list[Cell]] = {}
    for name, card in cards().items():
        own = card["scores"]
        rows[name] = [card["pairs"], own["accuracy"], own["margin"], own["loss"], card["recipe"]["seed"]]
    return Table("adapter", columns, rows)


def cards() -> dict[str, dict]:
    """What the trainings recorded of themselves, by adapter."""
    path = scores.RESULTS / "adapters.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def seeds() -> Table:
    """Adapters of several training seeds, each alone."""
    runs = read("seeds")[1]
    columns = [Column("P of its pole, 95 %", ".3f"), Column("less the base's", "+.3f"), PERPLEXITY]
    rows: dict[str, list[Cell]] = {}
    base = runs.get("base", [])
    for name, own in {"base, of E": base, "base, of T": base, **runs}.items():

        def of(row: Row, dimension: str = "TF" if "T" in name else "EI") -> float:
            return row["traits"][dimension]

        if base and name != "base":
            rows[name] = [ratio(own, of), "" if own is base else difference(own, base, of), perplexity(own)]
    return Table("adapter alone", columns, rows)


def _forwards(rows: Rows) -> Cell:
    return ratio(rows, lambda row: row["calls"] * row["tokens"], lambda row: row["tokens"])
