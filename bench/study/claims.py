"""The paper's claims one by one, and what the committed scores say of each. Knows how an interval becomes a verdict."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import scores
from layout import NOT_RUN, Column, Table
from mpg.evaluate.held_out import estimate_gain
from mpg.evaluate.tasks import TYPES
from mpg.paper.statistics import FEW_PROMPTS, Estimate
from paper_tables import NAMES, rouge1
from scores import Row, Rows, difference, mbti, plays, ratio, read, share_of_round, timed, times, trait

INFJ = "rows E=1,T=-9,J=-3"


def claims() -> Table:
    """The claims, each with the interval of a difference that it has above 0, and the verdict."""

    def less(estimate: Estimate | None, one: float = 0.0) -> Estimate | None:
        return estimate and Estimate(one - estimate.value, one - estimate.high, one - estimate.low)

    def more(estimate: Estimate | None, one: float) -> Estimate | None:
        return estimate and Estimate(estimate.value - one, estimate.low - one, estimate.high - one)

    calls = _calls(timed("scr"), "calls")
    kept = share_of_round(4, 2.0)
    rows: list[tuple[str, str, Estimate | None]] = [
        ("SCR preserves the correctness of rejection sampling (3.3): at k = 4 all of the shift is delivered",
         "share delivered over all tokens, less .99", more(kept, 0.99)),
        ("SCR(ref-Base) is above Base (Table 1)", "mean P(pole), difference", compare(mbti, "scr", "base", trait)),
        ("SCR(ref-DPO single) is above SCR(ref-Base) (Table 1)", "mean P(pole), difference",
         compare(mbti, "scr-dpo-single", "scr", trait)),
        ("SCR(ref-DPO single) is above MOD (Table 1)", "mean P(pole), difference",
         compare(mbti, "scr-dpo-single", "mod", trait)),
        ("SCR(ref-Base) is above DPO Soups (Table 1)", "mean P(pole), difference",
         compare(mbti, "scr", "soups", trait)),
        ("SCR(ref-DPO single) is above DPO Soups (Table 1)", "mean P(pole), difference",
         compare(mbti, "scr-dpo-single", "soups", trait)),
        ("SCR(ref-DPO single) is above Preference prompting (Table 1)", "mean P(pole), difference",
         compare(mbti, "scr-dpo-single", "pp", trait)),
        ("SCR(ref-Base) is above Preference prompting (Table 1)", "mean P(pole), difference",
         compare(mbti, "scr", "pp", trait)),
        ("DPO(single) is above Base (Table 1)", "mean P(pole), difference", compare(mbti, "dpo-single", "base", trait)),
        ("DPO Soups is above Base (Table 1)", "mean P(pole), difference", compare(mbti, "soups", "base", trait)),
        ("Preference prompting is above Base (Table 1)", "mean P(pole), difference",
         compare(mbti, "pp", "base", trait)),
        *((f"SCR(ref-DPO single) is above Base for {name} too (Table 1)", "mean P(pole), difference",
           compare(partial(mbti, types=[name]), "scr-dpo-single", "base", trait)) for name in TYPES),
        ("SCR(ref-Base) is above Base on multiple choice (Table 1, MCQA)", "mean P(pole), difference",
         compare(_choices, "scr", "base", trait)),
        *((f"SCR(ref-Base) is above {NAMES[other]} on multiple choice (Table 1, MCQA)", "mean P(pole), difference",
           compare(_choices, "scr", other, trait)) for other in ("pp", "soups", "mod")),
        ("MOD is below Base on multiple choice (Table 1, MCQA)", "mean P(pole), Base's less MOD's",
         compare(_choices, "base", "mod", trait)),
        ("DPO(single) is below Base on multiple choice (Table 1, MCQA)", "mean P(pole), Base's less DPO(single)'s",
         compare(_choices, "base", "dpo-single", trait)),
        ("The lead of SCR is the same by another judge (Table 1)", "scores of GPT-4o and DeepSeek-R1", None),
        ("SCR(ref-DPO single) is above Base in likeness to references (Table 2)", "ROUGE-1 F1, difference",
         compare(plays, "scr-dpo-single", "base", rouge1)),
        ("SCR(ref-DPO single) is above DPO Soups in likeness to references (Table 2)", "ROUGE-1 F1, difference",
         compare(plays, "scr-dpo-single", "soups", rouge1)),
        ("SCR(ref-DPO single) is above Preference prompting in likeness to references (Table 2)",
         "ROUGE-1 F1, difference", compare(plays, "scr-dpo-single", "pp", rouge1)),
        ("MOD is above Preference prompting in likeness to references (Table 2)", "ROUGE-1 F1, difference",
         compare(plays, "mod", "pp", rouge1)),
        ("MOD is above DPO Soups in likeness to references (Table 2)", "ROUGE-1 F1, difference",
         compare(plays, "mod", "soups", rouge1)),
        ("SCR needs some 1.4 forwards a token at N = 2, fewer than MOD's 2 (Table 3)", "2 less the forwards a token",
         less(calls, 2.0)),
        ("SCR is faster than MOD at N = 2 (Table 3)", "time of a token, MOD's over SCR's, less 1", slower("mod")),
        ("SCR is faster than Token-RS at N = 2 (Table 3)", "time of a token, Token-RS's over SCR's, less 1",
         slower("token-rs")),
        ("SCR is faster than Seq-RS at N = 2 (Table 3)", "time of a token, Seq-RS's over SCR's, less 1",
         slower("seq-rs")),
        ("SCR is nearly as fast as a single model at N = 2 (Table 3)", "1.5 less the time of a token over the base's",
         less(slower("scr", other="base"), 0.5)),
        *((f"{NAMES[method]} needs more forwards a token at N = 4 than at N = 2 (4.5)", "forwards a token, difference",
           growth(method)) for method in ("scr", "token-rs", "seq-rs")),
        ("SCR needs fewer forwards a token than MOD's 4 at N = 4 (4.5)", "4 less the forwards a token (Table 1)",
         less(_calls(mbti("scr"), "model_calls_per_token"), 4.0)),
        *((f"SCR's throughput is at least twice that of {NAMES[method]} at N = 4 (4.5: 2 to 10 times)",
           f"time of a token, {NAMES[method]}'s over SCR's, less 2", more(slower(method, "N=4"), 1.0))
          for method in ("mod", "token-rs", "seq-rs")),
        ("SCR(ref-specialized) is above the specialised model alone (Table 4, MBTI)", "mean P(pole), difference",
         compare(mbti, "scr-specialized", "base-specialized", trait)),
        ("SCR(ref-specialized) is above the specialised model alone (Table 4, role-play)", "ROUGE-1 F1, difference",
         compare(plays, "scr-specialized", "base-specialized", rouge1)),
        *((f"Iterative adjustment raises {name}'s accuracy of multiple choice (Figure 3), on questions it did not see",
           "mean accuracy of the poles, tuned less start", _tuned_gain(name)) for name in ("ESTP", "INFJ")),
        ("A negative weight suppresses its trait (4.4)", "P(E) of T=1, less that of T=1,E=-0.9 (arithmetic)",
         less(suppression("arithmetic", "E=-0.9"))),
        ("The INFJ weights [1, 0, -9, -3] are weights to generate with (4.4)",
         "share of nuclei that are not empty, less .5", less(emptiness(INFJ, "empty_nucleus"), 0.5)),
    ]  # fmt: skip
    columns = [Column("what is compared"), Column("estimate, 95 %", "+.3f"), Column("verdict")]
    return Table("claim", columns, {claim: [what, estimate, verdict(estimate)] for claim, what, estimate in rows})


def few_prompts() -> str:
    """Which comparisons rest on too few questions."""
    rests = {
        "Table 1": {row["item"] for row in mbti("base")},
        "Table 1's multiple choice": {row["item"] for row in _choices("base")},
        "Table 2": {row["item"] for row in plays("base")},
        "Table 3": {row["prompt"] for row in timed("base")},
    }
    return "\n".join(
        f"What is compared by {table} rests on {len(prompts)} questions, too few: intervals are too narrow."
        for table, prompts in rests.items()
        if 0 < len(prompts) < FEW_PROMPTS
    )


def _choices(method: str) -> list[dict[str, Any]]:
    return [row for row in mbti(method) if row["item"].startswith("mcqa:")]


def _calls(rows: Rows, name: str) -> Estimate | None:
    return ratio(rows, lambda row: row[name] * row["tokens"], lambda row: row["tokens"]) if rows else None


def growth(method: str) -> Estimate | None:
    """How many more forwards a token takes with four attributes than with two, of other prompts."""
    more, less = timed(method, "N=4"), timed(method)
    return difference(more, less, lambda row: row["calls"] * row["tokens"], lambda row: row["tokens"]) if more else None


def slower(method: str, run: str = "N=2", other: str = "scr") -> Estimate | None:
    """How much more time a token takes a method than another."""
    rows, others = timed(method, run), timed(other, run)
    return times(rows, others, lambda row: row["seconds"], lambda row: row["tokens"]) if rows and others else None


def alone() -> dict[str, Estimate | None]:
    """How far adapters move what the tables show, each alone."""
    return {
        "Table 1's P(pole)": compare(mbti, "dpo-single", "base", trait),
        "Table 2's ROUGE-1": compare(plays, "dpo-single", "base", rouge1),
    }


def held_out(name: str) -> dict[str, dict[str, Any]]:
    """The rows of a history on questions that it was not tuned on, by weights: base, start, ..., tuned. Histories of
    before questions had scores of their own have no "items"."""
    path = scores.RESULTS / f"tune-{name}.jsonl"
    if not path.is_file():
        return {}
    rows = map(json.loads, path.read_text().splitlines()[1:])
    return {row["held_out"]: {"items": {}, **row} for row in rows if "held_out" in row}


def _tuned_gain(type_name: str) -> Estimate | None:
    """The gain in the mean accuracy of the poles, tuned less start."""
    held = list(held_out(f"{type_name}-iterative").values())
    return estimate_gain(held[-1]["items"], held[1]["items"]) if len(held) > 1 else None


def verdict(estimate: Estimate | None) -> str:
    """What an interval says of a difference that a claim has above 0."""
    if estimate is None:
        return NOT_RUN
    if estimate.low > 0:
        return "confirmed"
    return "refuted" if estimate.high < 0 else "not confirmed at this scale"


def of_e(row: Row) -> float:
    """The judge's P(E) of a text."""
    return row["traits"]["EI"]


def suppression(target: str, way: str) -> Estimate | None:
    """How far P(E) changes against T=1 alone."""
    _, runs = read("negative")
    name = f"{target} T=1,{way}"
    if name not in runs or "geometric T=1" not in runs:
        return None
    return difference(runs[name], runs["geometric T=1"], of_e)


def emptiness(name: str, key: str) -> Estimate | None:
    """The share of positions whose arithmetic row is empty."""
    _, runs = read("rows")
    return ratio(runs[name], lambda row: row[key], lambda row: row["tokens"]) if name in runs else None


def compare(
    rows_of: Callable[[str], list[dict[str, Any]]], one: str, other: str, value: Callable[[Row], float]
) -> Estimate | None:
    """How far one method is above another."""
    rows, others = rows_of(one), rows_of(other)
    return difference(rows, others, value) if rows and others else None
