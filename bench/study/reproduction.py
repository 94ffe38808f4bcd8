"""`make report`: docs/reproduction.md, its pictures and its tables as JSON, from the committed scores alone, the same
bytes every time.

Knows what is claimed and how a number becomes a verdict; runs no model.

    python bench/study/reproduction.py [DOCS]
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import figures
import paper_tables
import study_tables
from claims import INFJ, alone, claims, emptiness, few_prompts, held_out, slower, suppression
from layout import NOT_RUN, Table, words
from mpg.evaluate.tasks import TYPES, dimension_of
from mpg.paper.statistics import Estimate
from scores import (
    RESULTS,
    Row,
    difference,
    mbti,
    perplexity,
    plays,
    ratio,
    read,
    share_at,
    share_in_texts,
    share_of,
    share_of_round,
    shift_of,
    timed,
    trait,
)

DOCS = Path(__file__).parents[2] / "docs"

HISTORIES = ("tune-ESTP-iterative", "tune-INFJ-iterative", "tune-INFJ-optuna")
TABLES: dict[str, Callable[[], Table]] = {
    "table1": paper_tables.table1, "table1 more": paper_tables.table1_more, "table2": paper_tables.table2,
    "table3": paper_tables.table3, "table4": paper_tables.table4, "claims": claims, "bounds": study_tables.bounds,
    "front": study_tables.front, "negative": study_tables.negative, "empty": study_tables.empty,
    "tuning": study_tables.tuning, "adapters": study_tables.adapters, "seeds": study_tables.seeds,
}  # fmt: skip


def main(docs: Path) -> None:
    drawn = figures.draw_all(docs / "reproduction")
    tables = {name: table() for name, table in TABLES.items()}
    (docs / "reproduction.md").write_text(page(drawn, tables), encoding="utf-8")
    told = {name: table.as_json() for name, table in tables.items()}
    (docs / "reproduction" / "tables.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def page(drawn: Sequence[str], tables: Mapping[str, Table]) -> str:
    """The whole page."""
    template = (Path(__file__).parent / "reproduction.md").read_text(encoding="utf-8")
    parts = {name: table.markdown() for name, table in tables.items()}
    parts |= {
        "findings": "\n".join(f"{n}. {text or NOT_RUN}" for n, text in enumerate(findings(), 1)),
        "few prompts": few_prompts(), "judge": judge(), "power": power(), "questions": questions(),
        "signatures": signatures(), "dominance": dominance(), "missing": missing(),
        "agreement": agreement(tables["bounds"]), "attributes": attributes(), "parting": parting(),
        "size front": size("front"), "size negative": size("negative"), "recipe": recipe(),
        "number changes": str(sum("" not in cells for cells in tables["negative"].rows.values())),
        "number texts": str(len(read("laws-ESTP")[1].get("base", ()))), "number plays": str(len(plays("base"))),
        "number timed": f"{len({row['prompt'] for row in timed('base')})} prompts", "runs": runs(),
        "by type": by_type(), "number held out": number_held_out(),
        "number reference pairs": str(study_tables.cards().get("reference", {}).get("pairs", NOT_RUN)),
    }  # fmt: skip
    for name in [*figures.PICTURES, *HISTORIES]:
        parts[f"picture {name}"] = f"![{name}](reproduction/{name}.png)" if name in drawn else f"({name}: {NOT_RUN})"
    for name, text in parts.items():
        template = template.replace(f"<!-- {name} -->", text)
    return re.sub("\n{3,}", "\n\n", template)  # where a part has nothing to say


def findings() -> Iterator[Any]:
    """The sentences that open the page; one without its scores says that."""
    k1, k4, k8 = (share_of_round(k, 2.0) for k in (1, 4, 8))
    first = share_of("arithmetic", 4, 4, 2.0)
    yield k4 and (
        "SCR as published (chunks of k = 4; M_0 = 2, which the paper leaves open) delivers "
        f"{words(k4)} of the shift that its own target asks for, and {words(first)} in the first token of a chunk; "
        f"chunks of one token deliver {words(k1)}, of eight {words(k8)} (four attributes of equal weight)."
    )
    m5, m10 = (share_of_round(4, m) for m in (5.0, 10.0))
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


def judge() -> str:
    """How far to trust the judge."""
    header = next((h for name in ("front", "negative", "table-ESTP") if (h := read(name)[0]).get("judge")), {})
    if not header:
        return NOT_RUN

    def say(accuracies: Mapping[str, float]) -> str:
        return ", ".join(f"{dimension} {accuracy:.3f}" for dimension, accuracy in accuracies.items())

    whole = f"The judge tells the pole of held-out answers in these shares: {say(header['judge'])}"
    file = RESULTS / "judge.json"
    if not file.is_file():
        return f"{whole}."
    found = json.loads(file.read_text())
    openings = say(found["accuracy of openings"])
    return f"{whole}; of their first {found['words']} words, about as many as a text here has: {openings}."


def power() -> str:
    """What there is for methods to show."""
    told = [f"{task} by {words(gain, '+.3f')}" for task, gain in alone().items() if gain]
    return f"alone they change {' and '.join(told)}" if told else NOT_RUN


def questions() -> str:
    """What Table 1 rests on."""
    done = [name for name in TYPES if read(f"table-{name}")[1]]
    if not done:
        return NOT_RUN
    items, each = len({row["item"] for row in mbti("base")}), read(f"table-{done[0]}")[0]["items"]
    return f"{each} questions for each of {', '.join(done)}, {items} different ones, that no weights are tuned on."


def by_type() -> str:
    """How far types and questions differ, by the method that moves the judge most."""
    of_types = {name: (mbti("pp", [name]), mbti("base", [name])) for name in TYPES}
    told = [f"{words(difference(*rows, trait), '+.3f')} for {name}" for name, rows in of_types.items() if all(rows)]
    runs = read("front")[1]
    if not told or not {"pp", "base"} <= runs.keys():
        return NOT_RUN
    front = words(difference(runs["pp"], runs["base"], trait), "+.3f")
    return (
        f"Types and questions differ: preference prompting changes P(pole) by {', '.join(told)}, and on the "
        f"questions of the front above, other ones, by {front} for ESTP."
    )


def number_held_out() -> str:
    """The questions that tuned weights are reported on."""
    rows = [row for name in HISTORIES for row in held_out(name.removeprefix("tune-")).values()]
    of_items = {item: dimension_of(pole) for row in rows for item, own in row["items"].items() for pole in own}
    told = ", ".join(f"{count} of {dimension}" for dimension, count in sorted(Counter(of_items.values()).items()))
    return f"{len(of_items)} questions, {told}" if of_items else NOT_RUN


def signatures() -> str:
    """How the metrics of Table 2 were taken."""
    told = read("table-roleplay")[0].get("signatures", {})
    return "\n".join(f"- {name}: {text}" for name, text in told.items()) or NOT_RUN


def recipe() -> str:
    """What all adapters were trained with."""
    cards = study_tables.cards()
    if not cards:
        return NOT_RUN
    first, *others = ({**card["recipe"], "seed": None, "likelihood": None} for card in cards.values())
    assert all(other == first for other in others), "the adapters are of several recipes"
    told = ", ".join(f"{key} {value}" for key, value in first.items() if key not in ("seed", "likelihood"))
    return f"All by DPO with {told}{'; the reference with likelihood 1' if 'reference' in cards else ''}."


def attributes() -> str:
    """What the number of attributes changes."""
    sizes = (1, 2, 4, 8)
    found = [(n, share_of_round(4, 2.0, n), share_of("arithmetic", n, 4, 2.0)) for n in sizes]
    told = [(n, words(all_tokens), words(first)) for n, all_tokens, first in found if all_tokens and first]
    if len(told) < len(found):
        return NOT_RUN
    shares = ", ".join(f"{all_tokens} at N = {n}" for n, all_tokens, _ in told)
    of_first = ", ".join(first for *_, first in told)
    asked = ", ".join(f"{shift_of(n).value:.4f}" for n in sizes)
    return (
        f"At k = 4 and M = 2 the share is {shares}; that of a chunk's first token is {of_first}. The shift that is "
        f"asked for is {asked} nats a token there: each attribute has an Nth of the weight, and from the fifth on one "
        "opposes one of the first four. At k = 1 and N = 1 the bound is what is missed: "
        f"{words(share_of('arithmetic', 1, 1, 2.0))}."
    )


def agreement(bounds: Table) -> str:
    """Whether texts show the share that their next token has."""
    left = {name: cells[3] for name, cells in bounds.rows.items() if isinstance(cells[3], Estimate)}
    apart = [name for name, own in left.items() if own.low > 0 or own.high < 0]
    if not left:
        return NOT_RUN
    said = f"Its interval excludes 0 for {', '.join(apart)}." if apart else "No interval of it excludes 0."
    shares = ", ".join(f"{words(share_in_texts(read('laws-ESTP')[1][name]))} of {name}" for name in left)
    return f"{said} As a share of the target's the texts' shift is {shares}: a ratio of two such means tells little."


def runs() -> str:
    """How far the runs of Table 3 agree."""
    names = list(read("speeds")[1])
    told = [
        f"{paper_tables.NAMES[method]} {' and '.join(f'{e.value + 1:.2f}' for e in estimates)}"
        for method in ("mod", "token-rs", "seq-rs")
        if all(estimates := [slower(method, run=name) for name in names])
    ]
    return f"The time of a token over SCR's, in each run: {', '.join(told)}." if names else NOT_RUN


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
    """Which settings have measurably more of the trait than soups, and no larger perplexity; and whether one of five
    forwards a token has more than the best of several soups."""
    runs = read("front")[1]
    soups = [name for name in runs if name.startswith("soups ")]
    if not soups:
        return NOT_RUN
    compared = [
        (name, soup)
        for name in runs
        for soup in soups
        if name not in soups and perplexity(runs[name]).value <= perplexity(runs[soup]).value
    ]
    above = [f"{one} over {other}" for one, other in compared if difference(runs[one], runs[other], trait).low > 0]
    found = ", ".join(above) or "none"
    told = (
        f"Settings whose P(pole) is measurably above that of soups of no smaller perplexity: {found}, "
        f"of {len(compared)} that were compared; were all alike, chance would give {0.025 * len(compared):.1f}."
    )
    alike = ("geometric 2", "best-soups 2")
    if not runs.keys() >= {*alike}:
        return told
    gain = words(difference(*(runs[name] for name in alike), trait), "+.3f")
    costs = (ratio(runs[name], lambda row: row["calls"] * row["tokens"], lambda row: row["tokens"]) for name in alike)
    calls = " and ".join(f"{cost.value:.2f}" for cost in costs)
    return f"{told} At nearly equal forwards, {calls} a token, {' less '.join(alike)} is {gain} in P(pole)."


def size(name: str) -> str:
    """What every row of a table rests on."""
    header, runs = read(name)
    prompts = {len({row["prompt"] for row in rows}) for rows in runs.values()}
    told = " to ".join(str(n) for n in sorted({min(prompts), max(prompts)}))
    return f"A row is of {told} prompts, up to {header['new_tokens']} tokens each."


def missing() -> str:
    """What has no scores yet."""
    names = [*["laws-ESTP", "laws-ESTPINFJ", "front", "negative", "rows", "speeds", "seeds"], *HISTORIES]
    names += [f"table-{name}" for name in (*TYPES, "roleplay")]
    left = [name for name in names if not (read(name)[1] or (name in HISTORIES and held_out(name[5:])))]
    return f"These have no scores yet: {', '.join(left)}." if left else "Every file of scores is there."


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS)
