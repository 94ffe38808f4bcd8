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
from claims import INFJ, alone, claims, emptiness, few_prompts, held_out, of_e, slower, suppression
from layout import NOT_RUN, Table, words
from mpg.evaluate.tasks import TYPES, dimension_of
from mpg.paper.statistics import FEW_PROMPTS, Estimate
from scores import (
    RESULTS,
    Row,
    difference,
    enumerated,
    exact_and_drawn_share,
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
    "table3": paper_tables.table3, "table3 N=4": lambda: paper_tables.table3("N=4"),
    "table4": paper_tables.table4, "claims": claims, "bounds": study_tables.bounds,
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
        "number changes": str(sum(cells[1] != "" for cells in tables["negative"].rows.values())),
        "number texts": str(len(read("laws-ESTP")[1].get("base", ()))),
        "number plays": str(len({row["item"] for row in plays("base")})),
        "number timed": f"{len({row['prompt'] for row in timed('base')})} prompts", "runs": runs(),
        "by type": by_type(), "number held out": number_held_out(), "enumerated": enumerations(),
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
    first, runs = share_of("arithmetic", 4, 4, 2.0), read("laws-ESTP")[1]
    in_texts = share_in_texts(runs["scr"], "exact") if "scr" in runs else None
    yield k4 and (
        "SCR as published (chunks of k = 4; M_0 = 2, which the paper leaves open) delivers "
        f"{words(k4)} of the shift that its own target asks for, and {words(first)} in the first token of a chunk; "
        f"chunks of one token deliver {words(k1)}, of eight {words(k8)} (four attributes of equal weight). In whole "
        f"texts its shift is {words(in_texts)} of the exact sampler's."
    )
    m5, m10 = (share_of_round(4, m) for m in (5.0, 10.0))
    if k4 and "scr carried" in runs:
        carried, short = (_usual_bound(runs[name]) for name in ("scr carried", "scr W=5"))
        yield (
            f"With the bound the share grows ({words(m5)} at M = 5, {words(m10)} at M = 10); the published estimate of "
            f"M, carried from text to text at W = 20, ends at {carried:.2f} in the median text (where the share is "
            f"{words(share_at(4, carried))}), and at W = 5 at {short:.2f} ({words(share_at(4, short))})."
        )
    else:
        yield ""
    above, compared = dominating()
    gains = ", ".join(f"{words(gain, '+.3f')} at weights of {weight}" for weight, gain in at_equal_cost().items())
    yield gains and (
        f"In {len(above)} of {len(compared)} comparisons with DPO soups of no smaller perplexity another method has "
        f"measurably more of the four traits (by chance in {0.025 * len(compared):.1f}); at nearly equal forwards a "
        f"token the exact geometric target less the best of four soups is {gains}, in the judge's mean P(pole)."
    )
    ways, targets = ("E=-0.9", "I=0.9"), ("arithmetic", "geometric")
    changes = {target: [suppression(target, way) for way in ways] for target in targets}
    if all(all(pair) for pair in changes.values()):
        runs = read("negative")[1]
        told = []
        for target, pair in changes.items():
            names = [f"{target} T=1,{way}" for way in ways]
            own, opposite = (words(change, "+.3f") for change in pair)
            costs = " and ".join(words(perplexity(runs[name]), ".1f") for name in names)
            apart = words(difference(*(runs[name] for name in names), of_e), "+.3f")
            told.append(f"by {own} and {opposite} in the {target} target ({apart} apart, at perplexities of {costs})")
        yield f"A weight of -.9 of E's own adapter and one of .9 of I's change P(E) {', and '.join(told)}."
    else:
        yield ""
    share = emptiness(INFJ, "empty_nucleus")
    yield share and (
        "At the paper's INFJ weights [1, 0, -9, -3] its arithmetic score is positive for no token of the "
        f"nucleus that SCR drafts from at {words(share)} of the positions along the base's texts: there the method as "
        "printed has no first token to accept, and none to fall back on."
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
    """How far types and questions differ, by the method that needs no adapter."""
    of_types = {name: (mbti("pp", [name]), mbti("base", [name])) for name in TYPES}
    told = [f"{words(difference(*rows, trait), '+.3f')} for {name}" for name, rows in of_types.items() if all(rows)]
    runs = read("front")[1]
    if not told or not {"pp", "base"} <= runs.keys():
        return NOT_RUN
    front = words(difference(runs["pp"], runs["base"], trait), "+.3f")
    return (
        f"By type, preference prompting changes P(pole) by {', '.join(told)}; on the questions of the front above, "
        f"other ones, by {front} for ESTP."
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


def enumerations() -> str:
    """What the exact laws rest on, and whether drawn chunks agree with them."""
    rows, found = read("first-tokens")[1].get("laws", []), enumerated()
    shares = exact_and_drawn_share(4, 2.0)
    if not shares:
        return NOT_RUN
    counts = sorted(row["chunks"][-1] for row in found)
    prompts = len({row["prompt"] for row in found})
    base = ratio(rows, lambda row: row["base"][1])
    return (
        f"This was possible for {len(found)} of {len(rows)} contexts, of {prompts} prompts (themselves, and with the "
        f"first token of an answer), with {counts[0]} to {counts[-1]} chunks of four tokens. The others have more, as "
        f"their drafts are less certain: over all {len(rows)} the base's distance is {words(base, '.3f')}. On the "
        f"contexts that this figure shares with the ones above, SCR delivers {words(shares[0])} of the next token's "
        f"shift at k = 4, M = 2 by all chunks, and {words(shares[1])} by drawn ones."
        f"{' So few prompts give intervals that are too narrow.' if prompts < FEW_PROMPTS else ''}"
    )


def agreement(bounds: Table) -> str:
    """Whether texts show the share that their next token has."""
    left = {name: cells[3] for name, cells in bounds.rows.items() if isinstance(cells[3], Estimate)}
    apart = [name for name, own in left.items() if own.low > 0 or own.high < 0]
    if not left:
        return NOT_RUN
    said = f"Its interval excludes 0 for {', '.join(apart)}." if apart else "No interval of it excludes 0."
    shares = ", ".join(f"{words(share_in_texts(read('laws-ESTP')[1][name]))} of {name}" for name in left)
    return f"{said} As a share of the target's the texts' shift is {shares}."


def runs() -> str:
    """How far the runs of Table 3 agree."""
    names = [name for name in read("speeds")[1] if name.startswith("N=2")]
    told = [
        f"{paper_tables.NAMES[method]} {' and '.join(f'{e.value + 1:.2f}' for e in estimates)}"
        for method in ("mod", "token-rs", "seq-rs")
        if all(estimates := [slower(method, run=name) for name in names])
    ]
    return f"The time of a token over SCR's, in each run: {', '.join(told)}." if names else NOT_RUN


def parting() -> str:
    """Where the geometric and the arithmetic target differ; the weight of the second has no scale."""
    runs = read("front")[1]
    names = sorted((name for name in runs if name.startswith("geometric ")), key=lambda name: float(name.split()[1]))
    arithmetic = runs.get("anchored 0.25")
    if not names or not arithmetic:
        return NOT_RUN
    nats, gains = (
        {name.split()[1]: difference(runs[name], arithmetic, *how) for name in names}
        for how in ((lambda row: row["nats"], lambda row: row["tokens"]), (trait,))
    )
    told = "; ".join(f"{words(nats[at], '+.2f')} and {words(gains[at], '+.3f')} at {at}" for at in nats)
    costs = ", ".join(at for at, own in nats.items() if own.low > 0 or own.high < 0) or "no weight"
    traits = ", ".join(at for at, own in gains.items() if own.low > 0 or own.high < 0) or "no weight"
    return (
        f"Geometric less arithmetic, in the logarithm of the perplexity and in P(pole): {told}. They part measurably "
        f"in perplexity at {costs}, and in P(pole) at {traits}."
    )


def dominating() -> tuple[list[str], list[tuple[str, str]]]:
    """Which settings have measurably more of the trait than soups of no smaller perplexity; and all compared."""
    runs = read("front")[1]
    soups = [name for name in runs if name.startswith("soups ")]
    compared = [
        (name, soup)
        for name in runs
        for soup in soups
        if name not in soups and perplexity(runs[name]).value <= perplexity(runs[soup]).value
    ]
    above = [f"{one} over {other}" for one, other in compared if difference(runs[one], runs[other], trait).low > 0]
    return above, compared


def at_equal_cost() -> dict[str, Estimate]:
    """How much more of the trait the geometric target has than the best of several soups, by weight."""
    runs = read("front")[1]
    weights = [name.split()[1] for name in runs if name.startswith("best-soups ")]
    pairs = {weight: (f"geometric {weight}", f"best-soups {weight}") for weight in weights}
    return {weight: difference(runs[one], runs[other], trait) for weight, (one, other) in pairs.items() if one in runs}


def dominance() -> str:
    """Whether any setting dominates soups."""
    above, compared = dominating()
    if not compared:
        return NOT_RUN
    return (
        "Settings whose P(pole) is measurably above that of soups of no smaller perplexity: "
        f"{', '.join(above) or 'none'}, of {len(compared)} that were compared; were all alike, "
        f"chance would give {0.025 * len(compared):.1f}."
    )


def size(name: str) -> str:
    """What every row of a table rests on."""
    header, runs = read(name)
    prompts = {len({row["prompt"] for row in rows}) for rows in runs.values()}
    told = " to ".join(str(n) for n in sorted({min(prompts), max(prompts)}))
    return f"A row is of {told} prompts, {header['texts']} texts each, of up to {header['new_tokens']} tokens."


def missing() -> str:
    """What has no scores yet."""
    names = ["laws-ESTP", "laws-ESTPINFJ", "first-tokens", "front", "negative", "rows", "speeds", "seeds"]
    names += [*HISTORIES, *(f"table-{name}" for name in (*TYPES, "roleplay"))]
    left = [name for name in names if not (read(name)[1] or (name in HISTORIES and held_out(name[5:])))]
    return f"These have no scores yet: {', '.join(left)}." if left else "Every file of scores is there."


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS)
