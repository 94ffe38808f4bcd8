"""`make report`: docs/reproduction.md and its pictures, from the committed scores alone, the same bytes every time.

Knows what is claimed and how a number becomes a verdict; runs no model.

    python bench/study/reproduction.py [DOCS]
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import figures
import scores
from mpg.evaluate.tasks import DIMENSIONS, TYPES, question_of
from mpg.paper.methods import METHODS
from mpg.paper.statistics import FEW_PROMPTS, Estimate
from scores import (
    difference,
    perplexity,
    ratio,
    read,
    share_at,
    share_in_texts,
    share_of,
    shift_of,
    trait,
    words,
)

DOCS = Path(__file__).parents[2] / "docs"

NOT_RUN = "not run"
HISTORIES = ("tune-ESTP-iterative", "tune-INFJ-iterative", "tune-INFJ-optuna")
INFJ = "rows E=1,T=-9,J=-3"

Row = Mapping[str, Any]


def main(docs: Path) -> None:
    drawn = figures.draw_all(docs / "reproduction")
    (docs / "reproduction.md").write_text(page(drawn), encoding="utf-8")


def page(drawn: Sequence[str]) -> str:
    """The whole page."""
    template = (Path(__file__).parent / "reproduction.md").read_text(encoding="utf-8")
    parts: dict[str, str] = {
        "findings": "\n".join(f"{n}. {text or NOT_RUN}" for n, text in enumerate(findings(), 1)),
        "claims": claims(), "judge": judge(), "adapters": adapters(), "table1": table1(), "table2": table2(),
        "table3": table3(), "table4": table4(), "tuning": tuning(), "front": front_table(), "dominance": dominance(),
        "bounds": bounds_table(), "negative": negative_table(), "empty": empty_table(), "seeds": seeds(),
        "missing": missing(), "attributes": attributes(), "parting": parting(),
    }  # fmt: skip
    for name in [*figures.PICTURES, *HISTORIES]:
        parts[f"picture {name}"] = f"![{name}](reproduction/{name}.png)" if name in drawn else f"({name}: {NOT_RUN})"
    for name, text in parts.items():
        template = template.replace(f"<!-- {name} -->", text)
    return template


def verdict(estimate: Estimate | None) -> str:
    """What an interval says of a difference that a claim has above 0."""
    if estimate is None:
        return NOT_RUN
    if estimate.low > 0:
        return "confirmed"
    return "refuted" if estimate.high < 0 else "not confirmed at this scale"


def findings() -> Iterator[Any]:
    """The sentences that open the page; one without its scores says that."""
    k1, k4, k8 = (share_of("arithmetic", 4, k, 2.0) for k in (1, 4, 8))
    m5, m10 = (share_of("arithmetic", 4, 4, m) for m in (5.0, 10.0))
    yield k4 and (
        "SCR as published (chunks of k = 4; M_0 = 2, which the paper leaves open) delivers "
        f"{words(k4)} of the shift that its own target asks for: "
        f"chunks of one token deliver {words(k1)}, of eight {words(k8)} (four attributes of equal weight)."
    )
    runs = read("laws-ESTP")[1]
    if k4 and "scr carried" in runs:
        carried, short = (_usual_bound(runs[name]) for name in ("scr carried", "scr W=5"))
        yield (
            f"With the bound the share grows ({words(m5)} at M = 5, {words(m10)} at M = 10); the published estimate of "
            f"M, carried from text to text at W = 20, ends at {carried:.2f} in the median text (where the share is "
            f"{words(share_at(4, carried))}), and at W = 5 at {short:.2f} ({words(share_at(4, short))})."
        )
    else:
        yield ""
    runs = read("front")[1]
    if {"geometric 2", "soups 2", "base"} <= runs.keys():
        gains = [words(difference(runs[name], runs["base"], trait), "+.3f") for name in ("soups 2", "geometric 2")]
        apart = difference(runs["geometric 2"], runs["soups 2"], trait)
        ppl = [words(perplexity(runs[name]), ".1f") for name in ("base", "soups 2", "geometric 2")]
        yield (
            f"At weights of 2 each DPO soups move the judge's mean probability of the four traits by {gains[0]} and "
            f"the exact geometric target by {gains[1]} (perplexities {ppl[1]} and {ppl[2]}, the base's {ppl[0]}): what "
            f"costs five forwards a token {'beats' if apart.low > 0 else 'does not measurably beat'} what costs one."
        )
    else:
        yield ""
    changes = [suppression(target, way) for target in ("arithmetic", "geometric") for way in ("E=-0.9", "I=0.9")]
    if all(changes):
        told = [words(change, "+.3f") for change in changes]
        costs = [words(perplexity(read("negative")[1][f"arithmetic T=1,{way}"]), ".1f") for way in ("E=-0.9", "I=0.9")]
        yield (
            f"In the arithmetic target a weight of -.9 of E's own adapter changes P(E) by {told[0]} at a perplexity of "
            f"{costs[0]}, and .9 of the opposite pole's by {told[1]} at {costs[1]}; in the geometric target the two "
            f"change it by {told[2]} and {told[3]}."
        )
    else:
        yield ""
    share = emptiness(INFJ, "empty_nucleus")
    yield share and (
        "At the paper's INFJ weights [1, 0, -9, -3] its arithmetic score is positive for no token of the "
        f"nucleus that SCR drafts from at {words(share)} of all positions: there the method as printed has nothing to "
        "accept."
    )


def _usual_bound(rows: Sequence[Row]) -> float:
    return math.exp(median(row["log_bound"] for row in rows))


def suppression(target: str, way: str) -> Estimate | None:
    """How far P(E) changes against T=1 alone."""
    _, runs = read("negative")
    name = f"{target} T=1,{way}"
    if name not in runs or "geometric T=1" not in runs:
        return None
    return difference(runs[name], runs["geometric T=1"], lambda row: row["traits"]["EI"])


def emptiness(name: str, key: str) -> Estimate | None:
    """The share of positions whose arithmetic row is empty."""
    _, runs = read("rows")
    return ratio(runs[name], lambda row: row[key], lambda row: row["tokens"]) if name in runs else None


def mbti(method: str) -> list[Row]:
    """Rows of a method over all types that were run. They ask the same questions: what is resampled is a question."""
    rows = []
    for name in TYPES:
        for row in read(f"table-{name}")[1].get(method, ()):
            traits = {dimension: row[dimension] for dimension in DIMENSIONS}
            rows.append({**row, "item": question_of(row["item"]), "traits": traits})
    return rows


def plays(method: str) -> list[Row]:
    return [row for row in read("table-roleplay")[1].get(method, ()) if row.get("rouge1") is not None]


def compare(
    rows_of: Callable[[str], list[Row]], one: str, other: str, value: Callable[[Any], float]
) -> Estimate | None:
    rows, others = rows_of(one), rows_of(other)
    return difference(rows, others, value) if rows and others else None


def claims() -> str:
    """The paper's claims one by one."""

    def rouge(row: Row) -> float:
        return row["rouge1"]

    def less(estimate: Estimate | None, one: float = 0.0) -> Estimate | None:
        return estimate and Estimate(one - estimate.value, one - estimate.high, one - estimate.low)

    def more(estimate: Estimate | None, one: float) -> Estimate | None:
        return estimate and Estimate(estimate.value - one, estimate.low - one, estimate.high - one)

    calls = _calls("scr")
    kept = share_of("arithmetic", 4, 4, 2.0)
    tuned = _tuned_gain("ESTP")
    rows: list[tuple[str, str, Estimate | None]] = [
        ("SCR preserves the correctness of rejection sampling (3.3): at k = 4 all of the shift is delivered",
         "delivered share, less .99", more(kept, 0.99)),
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
        ("DPO(single) is above Base (Table 1)", "mean P(pole), difference", compare(mbti, "dpo-single", "base", trait)),
        ("Preference prompting is above Base (Table 1)", "mean P(pole), difference",
         compare(mbti, "pp", "base", trait)),
        ("SCR(ref-DPO single) is above Base in likeness to references (Table 2)", "ROUGE-1 F1, difference",
         compare(plays, "scr-dpo-single", "base", rouge)),
        ("SCR(ref-DPO single) is above DPO Soups in likeness to references (Table 2)", "ROUGE-1 F1, difference",
         compare(plays, "scr-dpo-single", "soups", rouge)),
        ("SCR needs some 1.4 forwards a token at N = 2, fewer than MOD's 2 (Table 3)", "2 less the forwards a token",
         less(calls, 2.0)),
        ("SCR(ref-specialized) is above the specialised model alone (Table 4, MBTI)", "mean P(pole), difference",
         compare(mbti, "scr-specialized", "base-specialized", trait)),
        ("SCR(ref-specialized) is above the specialised model alone (Table 4, role-play)", "ROUGE-1 F1, difference",
         compare(plays, "scr-specialized", "base-specialized", rouge)),
        ("Iterative adjustment raises the accuracy of multiple choice (Figure 3), on questions it did not see",
         "accuracy, tuned less start, over poles and not questions", tuned),
        ("A negative weight suppresses its trait (4.4)", "P(E) of T=1, less that of T=1,E=-0.9 (arithmetic)",
         less(suppression("arithmetic", "E=-0.9"))),
        ("The INFJ weights [1, 0, -9, -3] are weights to generate with (4.4)",
         "share of nuclei that are not empty, less .5", less(emptiness(INFJ, "empty_nucleus"), 0.5)),
    ]  # fmt: skip
    lines = ["| claim | what is compared | estimate, 95 % | verdict |", "|---|---|---|---|"]
    lines += [f"| {claim} | {what} | {words(e, '+.3f')} | {verdict(e)} |" for claim, what, e in rows]
    lines.append("")
    for tables, rows_of in (("Table 1", mbti), ("Tables 2 and 3", plays)):
        prompts = len({row["item"] for row in rows_of("base")})
        if 0 < prompts < FEW_PROMPTS:
            lines.append(
                f"What is compared by {tables} rests on {prompts} questions, too few: intervals are too narrow."
            )
    return "\n".join(lines)


def _calls(method: str) -> Estimate | None:
    rows = read("table-roleplay")[1].get(method)
    return rows and ratio(rows, lambda r: r["model_calls_per_token"] * r["tokens"], lambda r: r["tokens"])


def _held_out(name: str) -> dict[str, dict[str, float]]:
    """What a history reports on questions that it was not tuned on, by weights."""
    path = scores.RESULTS / f"tune-{name}.jsonl"
    if not path.is_file():
        return {}
    rows = map(json.loads, path.read_text().splitlines()[1:])
    return {row["held_out"]: row["scores"] for row in rows if "held_out" in row}


def _tuned_gain(type_name: str) -> Estimate | None:
    """Of the mean accuracy by pole, tuned less start: four numbers each, resampled."""
    held = _held_out(f"{type_name}-iterative")
    if len(held) < 2:
        return None
    start, tuned = list(held.values())[1], list(held.values())[-1]
    rows = [{"prompt": pole, "gain": tuned[pole] - start[pole]} for pole in tuned if pole in start]
    return ratio(rows, lambda row: row["gain"])


def judge() -> str:
    header = next((h for name in ("front", "negative", "table-ESTP") if (h := read(name)[0]).get("judge")), {})
    if not header:
        return NOT_RUN
    told = ", ".join(f"{dimension} {accuracy:.3f}" for dimension, accuracy in header["judge"].items())
    return f"The judge tells the pole of held-out answers in these shares: {told}."


def adapters() -> str:
    """The recipes of the adapters, as they were recorded."""
    path = scores.RESULTS / "adapters.json"
    if not path.is_file():
        return NOT_RUN
    lines = ["| adapter | pairs | held out: accuracy | margin | loss | seed |", "|---|---:|---:|---:|---:|---:|"]
    cards = json.loads(path.read_text())
    for name, card in cards.items():
        own = card["scores"]
        numbers = f"{own['accuracy']:.3f} | {own['margin']:.3f} | {own['loss']:.3f}"
        lines.append(f"| {name} | {card['pairs']} | {numbers} | {card['recipe']['seed']} |")
    recipe, *others = ({**card["recipe"], "seed": None, "likelihood": None} for card in cards.values())
    assert all(other == recipe for other in others), "the adapters are of several recipes"
    told = ", ".join(f"{key} {value}" for key, value in recipe.items() if key not in ("seed", "likelihood"))
    reference = "; the reference with likelihood 1" if "reference" in cards else ""
    return "\n".join([*lines, "", f"All by DPO with {told}{reference}."])


def table1() -> str:
    """Table 1, the classifier's columns filled."""
    done = [name for name in TYPES if read(f"table-{name}")[1]]
    if not done:
        return NOT_RUN
    lines = [
        "| method | QA | MCQA | 16P | Overall, 95 % | less the base's | PPL | forwards a token | Sty Tho Beh Nat |"
    ]
    lines.append("|---|---:|---:|---:|---|---|---:|---:|---|")
    base = mbti("base")
    for method in METHODS:
        rows = mbti(method)
        if not rows:
            lines.append(f"| {method} | " + " | ".join([NOT_RUN] * 8) + " |")
            continue
        tasks = []
        for task in ("qa", "mcqa", "16p"):
            own = [trait(row) for row in rows if row["item"].startswith(task)]
            tasks.append(f"{sum(own) / len(own):.3f}" if own else NOT_RUN)
        gain = "" if method == "base" else words(difference(rows, base, trait), "+.3f")
        calls = ratio(rows, lambda r: r["model_calls_per_token"] * r["tokens"], lambda r: r["tokens"]).value
        numbers = f"{words(ratio(rows, trait), '.3f')} | {gain} | {_perplexity(rows)} | {calls:.2f}"
        lines.append(f"| {method} | {' | '.join(tasks)} | {numbers} | {NOT_RUN} |")
    items = len({row["item"] for row in base})
    told = f"{items} questions that no weights are tuned on, asked for each of {', '.join(done)}."
    return "\n".join([*lines, "", told, judge()])


def table2() -> str:
    """Table 2."""
    if not read("table-roleplay")[1]:
        return NOT_RUN
    lines = [
        "| method | BLEU | ROUGE-1, 95 % | less the base's | PPL | BERTScore | endpoint: PR PM HI |",
        "|---|---:|---|---|---:|---|---|",
    ]
    base = plays("base")
    for method in METHODS:
        rows = plays(method)
        if not rows:
            lines.append(f"| {method} | " + " | ".join([NOT_RUN] * 6) + " |")
            continue
        bleu = ratio(rows, lambda row: row["bleu"]).value
        gain = "" if method == "base" else words(difference(rows, base, lambda row: row["rouge1"]), "+.3f")
        rouge = words(ratio(rows, lambda row: row["rouge1"]), ".3f")
        lines.append(f"| {method} | {bleu:.3f} | {rouge} | {gain} | {_perplexity(rows)} | {NOT_RUN} | {NOT_RUN} |")
    signatures = read("table-roleplay")[0]["signatures"]
    return "\n".join([*lines, "", *(f"- {name}: {text}" for name, text in signatures.items())])


def table3() -> str:
    """Table 3, from the texts of Table 2."""
    runs = read("table-roleplay")[1]
    if not runs:
        return NOT_RUN
    lines = [
        "| method | forwards a token | depth a token | reject rate | tokens/s of a text |",
        "|---|---:|---:|---:|---:|",
    ]
    for method in ("base", "soups", "mod", "seq-rs", "token-rs", "scr", "scr-dpo-single"):
        if rows := runs.get(method):
            tokens = sum(row["tokens"] for row in rows)
            cells = [
                sum(row[n] * row["tokens"] for row in rows) / tokens
                for n in ("model_calls_per_token", "depth_per_token")
            ]
            rejects = [row["reject_rate"] for row in rows if "reject_rate" in row]
            rate = f"{sum(rejects) / len(rejects):.2f}" if rejects else "-"
            speed = sorted(row["tokens_per_second"] for row in rows)[len(rows) // 2]
            lines.append(f"| {method} | {cells[0]:.2f} | {cells[1]:.2f} | {rate} | {speed:.1f} |")
    return "\n".join(lines)


def table4() -> str:
    """Table 4."""
    lines = ["| method | MBTI, mean P(pole) | Role-Play, ROUGE-1 |", "|---|---|---|"]
    for method in ("base-specialized", "scr-specialized"):
        rows, plays_of = mbti(method), plays(method)
        first = words(ratio(rows, trait), ".3f") if rows else NOT_RUN
        second = words(ratio(plays_of, lambda row: row["rouge1"]), ".3f") if plays_of else NOT_RUN
        lines.append(f"| {method} | {first} | {second} |")
    return "\n".join([*lines, "", judge()])


def tuning() -> str:
    """What histories found, and what that is worth on the other half."""
    lines = ["| history | weights | held out: accuracy by pole |", "|---|---|---|"]
    for path in sorted(scores.RESULTS.glob("tune-*.jsonl")):
        for weights, own in _held_out(path.stem.removeprefix("tune-")).items():
            told = ", ".join(f"{pole} {share:.2f}" for pole, share in own.items())
            lines.append(f"| {path.stem.removeprefix('tune-')} | {weights or 'none'} | {told} |")
    return "\n".join(lines) if len(lines) > 2 else NOT_RUN


def front_table() -> str:
    _, runs = read("front")
    lines = [
        "| setting | mean P(pole), 95 % | less the base's | perplexity | forwards a token |",
        "|---|---|---|---|---:|",
    ]
    for name, rows in runs.items():
        gain = "" if name == "base" else words(difference(rows, runs["base"], trait), "+.3f")
        calls = ratio(rows, lambda r: r["calls"] * r["tokens"], lambda r: r["tokens"]).value
        ppl = words(perplexity(rows), ".1f")
        lines.append(f"| {name} | {words(ratio(rows, trait), '.3f')} | {gain} | {ppl} | {calls:.2f} |")
    return "\n".join([*lines, "", size("front"), judge()]) if runs else NOT_RUN


def bounds_table() -> str:
    """What M becomes in texts of k = 4, and what SCR delivers there."""
    runs = read("laws-ESTP")[1]
    lines = [
        "| texts | M at their end, median (range) | share there | share in the texts | forwards a token |",
        "|---|---|---|---|---:|",
    ]
    for name, rows in runs.items():
        if name.startswith("scr"):
            ends = sorted(math.exp(row["log_bound"]) for row in rows)
            told = f"{median(ends):.2f} ({ends[0]:.2f} to {ends[-1]:.2f})"
            calls = ratio(rows, lambda row: row["calls"] * row["tokens"], lambda row: row["tokens"]).value
            shares = f"{words(share_at(4, median(ends)))} | {words(share_in_texts(rows))}"
            lines.append(f"| {name} | {told} | {shares} | {calls:.2f} |")
    return "\n".join(lines) if len(lines) > 2 else NOT_RUN


def attributes() -> str:
    """What the number of attributes changes."""
    sizes = (1, 2, 4, 8)
    found = [share_of("arithmetic", n, 4, 2.0) for n in sizes]
    if not all(found):
        return NOT_RUN
    told = ", ".join(f"{words(e)} at N = {n}" for n, e in zip(sizes, found, strict=True))
    asked = ", ".join(f"{shift_of(n).value:.4f}" for n in sizes)
    return (
        f"At k = 4 and M = 2 the share is {told}. The shift that is asked for is {asked} nats a token there: each "
        "attribute has an Nth of the weight, and from the fifth on one opposes one of the first four. At k = 1 and "
        f"N = 1 the bound is what is missed: {words(share_of('arithmetic', 1, 1, 2.0))}."
    )


def parting() -> str:
    """Where the geometric and the arithmetic target differ; the weight of the second has no scale."""
    runs = read("front")[1]
    if "arithmetic" not in runs:
        return NOT_RUN
    told = []
    for name, rows in runs.items():
        if name.startswith("geometric ") and name != "geometric-scr":
            nats = difference(rows, runs["arithmetic"], lambda row: row["nats"], lambda row: row["tokens"])
            gain = difference(rows, runs["arithmetic"], trait)
            told.append((float(name.split()[1]), f"{words(nats, '+.2f')} and {words(gain, '+.3f')}"))
    return "Geometric less arithmetic, in the logarithm of the perplexity and in P(pole): " + "; ".join(
        f"{text} at {weight:g}" for weight, text in sorted(told)
    ) + "."  # fmt: skip


def dominance() -> str:
    """Which settings are better than soups in one of both, measurably, and no worse in the other."""
    runs = read("front")[1]
    soups = [name for name in runs if name.startswith("soups ")]
    pairs = [
        f"{name} over {soup}"
        for name in runs
        for soup in soups
        if name not in soups
        and difference(runs[name], runs[soup], trait).low > 0
        and perplexity(runs[name]).value <= perplexity(runs[soup]).value
    ]
    if not soups:
        return NOT_RUN
    return (
        f"Settings with measurably more of the trait than soups of no smaller perplexity: {', '.join(pairs) or 'none'}."
    )


def negative_table() -> str:
    _, runs = read("negative")
    lines = ["| target and weights | P(E), 95 % | less that of T=1 alone | perplexity |", "|---|---|---|---|"]
    for name, rows in runs.items():
        told = ratio(rows, lambda row: row["traits"]["EI"])
        gain = "" if name in ("base", "geometric T=1") else words(
            difference(rows, runs["geometric T=1"], lambda row: row["traits"]["EI"]), "+.3f")  # fmt: skip
        lines.append(f"| {name} | {words(told, '.3f')} | {gain} | {words(perplexity(rows), '.1f')} |")
    return "\n".join([*lines, "", size("negative"), judge()]) if runs else NOT_RUN


def size(name: str) -> str:
    """What every row of a table rests on."""
    header, runs = read(name)
    prompts = {len({row["prompt"] for row in rows}) for rows in runs.values()}
    told = " to ".join(str(n) for n in sorted({min(prompts), max(prompts)}))
    return f"A row is of {told} prompts, up to {header['new_tokens']} tokens each."


def empty_table() -> str:
    _, runs = read("rows")
    lines = [
        "| weights | no token of the vocabulary | no token of the nucleus | base's mass that is left |",
        "|---|---|---|---|",
    ]
    for name, rows in runs.items():
        cells = [words(emptiness(name, key)) for key in ("empty", "empty_nucleus")]
        left = words(ratio(rows, lambda row: row["left_mass"], lambda row: row["tokens"]))
        lines.append(f"| {name.removeprefix('rows ')} | {' | '.join(cells)} | {left} |")
    return "\n".join(lines) if runs else NOT_RUN


def seeds() -> str:
    _, runs = read("seeds")
    if "base" not in runs:
        return NOT_RUN
    lines, base = (
        ["| adapter alone | P of its pole, 95 % | less the base's | perplexity |", "|---|---|---|---|"],
        runs["base"],
    )
    for name, rows in {"base, of E": base, "base, of T": base, **runs}.items():
        if name == "base":
            continue

        def of(row: Row, dimension: str = "TF" if "T" in name else "EI") -> float:
            return row["traits"][dimension]

        gain = "" if rows is base else words(difference(rows, base, of), "+.3f")
        lines.append(f"| {name} | {words(ratio(rows, of), '.3f')} | {gain} | {words(perplexity(rows), '.1f')} |")
    return "\n".join([*lines, "", judge()])


def missing() -> str:
    """What has no scores yet."""
    names = [*["laws-ESTP", "laws-ESTPINFJ", "front", "negative", "rows", "seeds"], *HISTORIES]
    names += [f"table-{name}" for name in (*TYPES, "roleplay")]
    left = [name for name in names if not (read(name)[1] or (name in HISTORIES and _held_out(name[5:])))]
    return f"These have no scores yet: {', '.join(left)}." if left else "Every file of scores is there."


def _perplexity(rows: Sequence[Row]) -> str:
    own = [{**row, "nats": row["nll"], "tokens": row["nll_tokens"]} for row in rows if row.get("nll") is not None]
    return f"{perplexity(own).value:.1f}" if own else NOT_RUN


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS)
