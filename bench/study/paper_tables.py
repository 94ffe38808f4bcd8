"""Tables 1 to 4 in the paper's layouts, from the committed scores alone.

Knows the paper's rows and columns; nothing of its claims. A column of the paper's judges has no value here.
"""

from __future__ import annotations

from collections.abc import Sequence

from layout import Cell, Column, Table
from mpg.evaluate.tasks import DIMENSIONS, MBTI_TASKS
from scores import Row, Rows, difference, mbti, perplexity, plays, ratio, timed, trait

# The paper's names, in the order of its Tables 1 and 2; behind them what it has in Tables 3 and 4 or in its text
NAMES = {
    "base": "Base", "pp": "Preference Prompting", "dpo-single": "DPO(single)", "soups": "DPO Soups", "mod": "MOD",
    "scr": "SCR(ref-Base)", "scr-dpo-single": "SCR(ref-DPO single)", "pp-single": "PP(single)", "seq-rs": "Seq-RS",
    "token-rs": "Token-RS", "base-specialized": "Base(specialized)", "pp-specialized": "PP(specialized)",
    "scr-specialized": "SCR(ref-specialized)",
}  # fmt: skip
TITLES = {method: f"{name}, `{method}`" for method, name in NAMES.items()}
TABLE_3 = ("base", "soups", "mod", "seq-rs", "token-rs", "scr", "scr-dpo-single")
TASKS = dict(zip(MBTI_TASKS, ("QA", "MCQA", "16P"), strict=True))
RUBRIC = ("Sty", "Tho", "Beh", "Nat", "Avg")
ROLEPLAY_RUBRIC = ("PR", "RM", "HI", "Avg")


def table1() -> Table:
    """Table 1: the classifier's mean probability of the target's poles beside the columns of the paper's judges."""
    columns = []
    for title in TASKS.values():
        columns.append(Column(f"{title}: {' '.join(RUBRIC)}", parts=tuple(f"{title}: {name}" for name in RUBRIC)))
        columns.append(Column(f"{title}: P(pole)", ".3f", brief=True))
    columns += [Column("Overall", parts=("Overall",)), Column("Overall: P(pole), 95 %", ".3f")]

    def cells(rows: Rows) -> list[Cell]:
        shown: list[Cell] = []
        for task in TASKS:
            shown += [None, ratio([row for row in rows if row["item"].startswith(f"{task}:")], trait)]
        return [*shown, None, ratio(rows, trait)]

    runs = {method: rows for method in NAMES if (rows := mbti(method))}
    return Table("Method", columns, {method: cells(rows) for method, rows in runs.items()}, TITLES)


def table1_more() -> Table:
    """What the texts of Table 1 tell beside it."""
    columns = [
        Column("P(pole), less the base's", "+.3f"),
        *(Column(f"P of {of}", ".3f", brief=True) for of in DIMENSIONS),
    ]
    columns += [Column("PPL", ".1f"), Column("forwards a token", ".2f", brief=True)]
    base = mbti("base")

    def cells(method: str, rows: Rows) -> list[Cell]:
        gain = "" if method == "base" else difference(rows, base, trait)
        poles = (ratio(rows, lambda row, of=of: row["traits"][of]) for of in DIMENSIONS)
        return [gain, *poles, _perplexity(rows), _per_token(rows, "model_calls_per_token")]

    runs = {method: rows for method in NAMES if (rows := mbti(method))}
    return Table("Method", columns, {method: cells(method, rows) for method, rows in runs.items()}, TITLES)


def table2() -> Table:
    """Table 2."""
    columns = [
        Column(" ".join(ROLEPLAY_RUBRIC), parts=ROLEPLAY_RUBRIC),
        Column("BLEU", ".3f"),
        Column("ROUGE-1", ".3f"),
    ]
    columns += [
        Column("BERTScore", parts=("BERTScore",)),
        Column("PPL", ".1f"),
        Column("ROUGE-1, less the base's", "+.3f"),
    ]
    base = plays("base")

    def cells(method: str, rows: Rows) -> list[Cell]:
        gain = "" if method == "base" else difference(rows, base, rouge1)
        return [None, ratio(rows, lambda row: row["bleu"]), ratio(rows, rouge1), None, _perplexity(rows), gain]

    runs = {method: rows for method in NAMES if (rows := plays(method))}
    return Table("Method", columns, {method: cells(method, rows) for method, rows in runs.items()}, TITLES)


def table3(run: str = "N=2") -> Table:
    """Table 3, of texts that were drawn and timed one by one; or the same of more attributes."""
    columns = [Column("Throughput, tok/s", ".1f"), Column("Latency, s/seq", ".2f"), Column("FwdPass, per tok", ".2f")]
    columns += [Column("Reject Rate, %", ".0f"), Column("depth, per tok", ".2f")]

    def cells(rows: Rows) -> list[Cell]:
        rejects = [row for row in rows if "reject_rate" in row]
        return [
            ratio(rows, lambda row: row["tokens"], lambda row: row["seconds"]),
            ratio(rows, lambda row: row["seconds"]),
            _per_token(rows, "calls"),
            ratio(rejects, lambda row: 100 * row["reject_rate"]) if rejects else "-",
            _per_token(rows, "depth"),
        ]

    runs = {method: rows for method in TABLE_3 if (rows := timed(method, run))}
    return Table("Method", columns, {method: cells(rows) for method, rows in runs.items()}, TITLES)


def table4() -> Table:
    """Table 4."""
    columns = [Column("task"), Column("Overall", parts=("Overall",)), Column("here, 95 %", ".3f"), Column("which is")]
    rows: dict[str, Sequence[Cell]] = {}
    for method in ("base-specialized", "scr-specialized"):
        if own := mbti(method):
            rows[f"{method} MBTI"] = ["MBTI", None, ratio(own, trait), "mean P(pole)"]
        if own := plays(method):
            rows[f"{method} Role-Play"] = ["Role-Play", None, ratio(own, rouge1), "ROUGE-1"]
    return Table("Method", columns, rows, {label: TITLES[label.split()[0]] for label in rows})


def rouge1(row: Row) -> float:
    """ROUGE-1 F1 of a text."""
    return row["rouge1"]


def _perplexity(rows: Rows) -> Cell:
    own = [{**row, "nats": row["nll"], "tokens": row["nll_tokens"]} for row in rows if row.get("nll") is not None]
    return perplexity(own) if own else None


def _per_token(rows: Rows, name: str) -> Cell:
    return ratio(rows, lambda row: row[name] * row["tokens"], lambda row: row["tokens"])
