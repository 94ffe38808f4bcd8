"""Tables in the layouts of the paper's Tables 1 to 4, from scores: a plain object that JSON holds, and Markdown.

Every number comes with its 95 % interval, and with its difference from a named method's on the same resamples, from a
bootstrap over prompts and over seeds within them. What has no score is missing, and shown as that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from mpg.evaluate.judges.endpoint import CRITERIA
from mpg.evaluate.tasks import DIMENSIONS
from mpg.paper.statistics import NUM_RESAMPLES, Bootstrap

SHORT = {
    "style": "Sty", "thought": "Tho", "behaviour": "Beh", "naturalness": "Nat",
    "profile_relevance": "PR", "persona_match": "PM", "humanlikeness": "HI",
}  # fmt: skip
NAMES = {"qa": "QA", "mcqa": "MCQA", "16p": "16P", "roleplay": "Role-Play"}
NOT_RUN = "not run"


@dataclass(frozen=True)
class Score:
    """What one text got. Several of one prompt and seed (of methods of single attributes) count as their mean.

    prompt  what is resampled: a question, whichever types ask it
    task    of `mpg.evaluate.tasks.TASKS`
    values  by criterion, None where missing
    """

    prompt: str
    task: str
    seed: int
    values: Mapping[str, float | None]


@dataclass(frozen=True)
class Column:
    """A number of every method: the mean over its parts, each of them the mean of some criteria over a task's texts.

    parts   tasks (None: all), and criteria whose mean a text counts with; a text that lacks one counts nowhere
    over    a criterion by which to divide, so that the number is sum / sum over all texts
    is_log  whether the number is exp of that: perplexity
    """

    label: str
    parts: tuple[tuple[str | None, tuple[str, ...]], ...]
    over: str | None = None
    is_log: bool = False


@dataclass(frozen=True)
class Section:
    """The scores of one judge, or of one that was not run, or what was measured.

    methods    by method its scores, or why there are none
    key        the label of the column that is shown with its interval and difference
    notes      lines below the table: signatures, held-out accuracy, parse rates
    not_run    labels of columns that were not run
    judge      whose scores these are, if anybody's
    absent     what stands for a number that a method has none of
    reference  the method that differences are from, where the table's is none of these
    """

    title: str
    columns: Sequence[Column]
    methods: Mapping[str, Sequence[Score] | str]
    key: str
    notes: Sequence[str] = ()
    not_run: Sequence[str] = ()
    judge: str | None = None
    absent: str = "missing"
    reference: str | None = None


def judge_columns(tasks: Sequence[str], criteria: Sequence[str]) -> list[Column]:
    """Table 1's columns: of every task the criteria and their mean, and the mean of these."""
    of_tasks: list[Column] = []
    for task in tasks:
        prefix = f"{NAMES[task]} " if len(tasks) > 1 else ""
        of_tasks += [Column(f"{prefix}{SHORT.get(name, name)}", ((task, (name,)),)) for name in criteria]
        of_tasks += [Column(f"{prefix}Avg", ((task, tuple(criteria)),))]
    overall = Column("Overall", tuple((task, tuple(criteria)) for task in tasks))
    return [*of_tasks, overall] if len(tasks) > 1 else of_tasks


PERPLEXITY = Column("PPL", ((None, ("nll",)),), over="nll_tokens", is_log=True)
METRIC_COLUMNS = [  # the right side of Table 2, and what tells a text that repeats itself
    Column("BLEU", ((None, ("bleu",)),)),
    Column("ROUGE-1", ((None, ("rouge1",)),)),
    Column("BERTScore", ((None, ("bertscore",)),)),
    PERPLEXITY,
    Column("words", ((None, ("words",)),)),
    Column("distinct-1", ((None, ("distinct1",)),)),
    Column("distinct-2", ((None, ("distinct2",)),)),
]
COST_COLUMNS = [  # Table 3
    Column("tok/s", ((None, ("tokens",)),), over="seconds"),
    Column("s/sequence", ((None, ("seconds",)),)),
    Column("forwards/token", ((None, ("calls",)),), over="tokens"),
    Column("reject rate", ((None, ("rejected",)),), over="tried"),
]
CHOICE_COLUMNS = [*(Column(of, (("mcqa", (of,)),)) for of in DIMENSIONS), Column("All", (("mcqa", ("all",)),))]


def judged(
    judge: str,
    tasks: Sequence[str],
    criteria: Sequence[str],
    methods: Mapping[str, Sequence[Score] | str],
    notes: Sequence[str] = (),
) -> Section:
    """The section of a judge: Table 1's, or the left side of Table 2."""
    columns = judge_columns(tasks, criteria)
    return Section(f"Evaluated by {judge}", columns, methods, columns[-1].label, notes, judge=judge)


def not_run(rubric: str, tasks: Sequence[str], methods: Iterable[str]) -> Section:
    """The section of an endpoint where none was asked."""
    return judged("an endpoint", tasks, CRITERIA[rubric], dict.fromkeys(methods, NOT_RUN))


def cost_of(row: Mapping[str, Any]) -> dict[str, float | None]:
    """What a row of answers (`answers`) took, for `COST_COLUMNS`: calls of models, and candidates tried and rejected
    where its method rejects any."""
    stats, tokens = row["stats"], row["tokens"]
    costs = {"tokens": tokens, "seconds": tokens / max(stats["tokens_per_second"], 1e-4)}
    costs["calls"] = stats["model_calls_per_token"] * tokens
    if "reject_rate" in stats:  # of candidates under rejection sampling, of rounds under scr
        costs["tried"] = stats.get("num_tries", stats["rounds"])
        costs["rejected"] = stats["reject_rate"] * costs["tried"]
    return costs


def tabulate(
    title: str, sections: Sequence[Section], reference: str, agreements: Sequence[Any] = (), seed: int = 0
) -> dict[str, Any]:
    """All sections as one plain object.

    reference   the method that differences are from, but in sections that have their own
    agreements  what `agreement` returned
    seed        of the bootstrap

    out: title, reference, agreement and sections, as `tabulate_section` returns them
    """
    return {
        "title": title,
        "reference": reference,
        "sections": [tabulate_section(section, reference, seed) for section in sections],
        "agreement": list(agreements),
    }


def render(table: Mapping[str, Any]) -> str:
    """What `tabulate` returned, in Markdown: means; of the key column also its interval, and the difference."""
    lines = [f"# {table['title']}", ""]
    for section in table["sections"]:
        columns, key = section["columns"], section["key"]
        lines += [f"## {section['title']}", ""]
        lines.append(f"| method | {' | '.join(columns)} | {key}, 95 % | {key}: - {section['reference']} |")
        lines.append("|---" * (len(columns) + 3) + "|")
        for row in section["rows"]:
            cells = row["cells"]
            texts = [_number(cells[name]["value"]) if name in cells else _empty(section, row, name) for name in columns]
            texts.append(_interval(cells[key]) if key in cells else _empty(section, row, key))
            difference = cells[key]["difference"] if key in cells else None
            texts.append(_interval(difference, signed=True) if difference else "")
            lines.append(f"| {row['method']} | {' | '.join(texts)} |")
        reasons = [row for row in section["rows"] if row["reason"] not in (None, NOT_RUN)]
        below = [*(f"- {row['method']}: {NOT_RUN}: {row['reason']}" for row in reasons)]
        below += [f"- {note}" for note in section["notes"]]
        lines += ["", *below, ""] if below else [""]
    if table["agreement"]:
        lines += ["## Agreement between judges", "", "| judges | criterion | texts | Spearman | mean difference |"]
        lines.append("|---" * 5 + "|")
    for row in table["agreement"]:
        spearman = "missing" if row["spearman"] is None else _number(row["spearman"])
        names = f"{' and '.join(row['judges'])} | {SHORT.get(row['criterion'], row['criterion'])}"
        lines.append(f"| {names} | {row['texts']} | {spearman} | {_number(row['mean_absolute_difference'])} |")
    return "\n".join(lines).rstrip() + "\n"


def overall(tables: Mapping[str, Mapping[str, Any]], methods: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Table 4's layout: of some tables, by the names that these are to have, what every judge said over all.

    methods  those to show; None means all that one of the tables has

    out: of each method its name, and by column (of a table and judge) a cell as `tabulate_section` has it, or what
    stands in its place
    """
    columns = {
        f"{name}, {section['title'][0].lower()}{section['title'][1:]}": section
        for name, table in tables.items()
        for section in table["sections"]
        if section["judge"] is not None
    }
    shown = methods or dict.fromkeys(row["method"] for section in columns.values() for row in section["rows"])
    rows = []
    for method in shown:
        cells = {}
        for column, section in columns.items():
            own = next((row for row in section["rows"] if row["method"] == method), None)
            cell = own and own["cells"].get(section["key"])
            cells[column] = cell or (_empty(section, own, section["key"]) if own else NOT_RUN)
        rows.append({"method": method, "cells": cells})
    return rows


def render_overall(rows: Sequence[Mapping[str, Any]]) -> str:
    """What `overall` returned, in Markdown."""
    columns = list(rows[0]["cells"]) if rows else []
    lines = [f"| method | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        shown = [cell if isinstance(cell, str) else _interval(cell) for cell in row["cells"].values()]
        lines.append(f"| {row['method']} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def agreement(scores: Mapping[str, Mapping[Any, Mapping[str, float | None]]]) -> list[dict[str, Any]]:
    """How far pairs of judges agree, by criterion that both have.

    scores  by judge, and by what was judged, the scores by criterion

    out: judges, criterion, texts that both scored, Spearman's correlation (None where one of them gives all the same)
    and the mean absolute difference
    """
    from scipy.stats import spearmanr

    found = []
    for one, other in combinations(scores, 2):
        shared = scores[one].keys() & scores[other].keys()
        for criterion in dict.fromkeys(name for key in sorted(shared, key=str) for name in scores[one][key]):
            both = [(scores[one][key].get(criterion), scores[other][key].get(criterion)) for key in shared]
            pairs = np.array([pair for pair in both if None not in pair], dtype=float).reshape(-1, 2)
            if len(pairs):
                can_vary = len(pairs) > 1 and all(len(set(side)) > 1 for side in pairs.T)
                spearman = round(float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic), 6) if can_vary else None
                distance = round(float(np.abs(pairs[:, 0] - pairs[:, 1]).mean()), 6)
                found.append(
                    {
                        "judges": [one, other], "criterion": criterion, "texts": len(pairs), "spearman": spearman,
                        "mean_absolute_difference": distance,
                    }
                )  # fmt: skip
    return found


def tabulate_section(section: Section, reference: str, seed: int = 0) -> dict[str, Any]:
    """One section as a plain object.

    out: of the section all but its scores, and rows; of a row the method, why it has no scores or None, and the cells
    by column, but for missing ones: value, low, high, and the difference from the section's own reference or else this
    one, as such three or None
    """
    reference = section.reference or reference
    told = [score for scores in section.methods.values() if not isinstance(scores, str) for score in scores]
    prompts = {task: sorted({score.prompt for score in told if task in (None, score.task)}) for task in _tasks(section)}
    seeds = sorted({score.seed for score in told})
    resamples = {task: _Resamples(len(names), len(seeds), seed) for task, names in prompts.items() if names}
    ratios: dict[str, dict[str, np.ndarray]] = {}
    for method, scores in section.methods.items():
        ratios[method] = {}
        if isinstance(scores, str):
            continue
        for column in section.columns:
            parts = []
            for task, criteria in column.parts:
                if task in resamples:
                    grid = _grid(scores, task, criteria, column.over, prompts[task], seeds)
                    parts.append(resamples[task].ratios(*grid))
            if len(parts) == len(column.parts) and not any(np.isnan(part[0]) for part in parts):
                mean = np.mean(parts, axis=0)
                ratios[method][column.label] = np.exp(mean) if column.is_log else mean
    rows = []
    for method, scores in section.methods.items():
        cells: dict[str, Any] = {}
        for label, own in ratios[method].items():
            other = None if method == reference else ratios.get(reference, {}).get(label)
            difference = None if other is None else _estimate(own - other)
            cells[label] = {**_estimate(own), "difference": difference}
        rows.append({"method": method, "reason": scores if isinstance(scores, str) else None, "cells": cells})
    return {
        "title": section.title,
        "judge": section.judge,
        "notes": list(section.notes),
        "columns": [column.label for column in section.columns],
        "key": section.key,
        "not_run": list(section.not_run),
        "absent": section.absent,
        "reference": reference,
        "rows": rows,
    }


def _empty(section: Mapping[str, Any], row: Mapping[str, Any], column: str) -> str:
    """What stands where a number would."""
    return NOT_RUN if row["reason"] or column in section["not_run"] else str(section["absent"])


def _tasks(section: Section) -> list[str | None]:
    return list(dict.fromkeys(task for column in section.columns for task, _ in column.parts))


def _grid(
    scores: Sequence[Score], task: str | None, criteria: Sequence[str], over: str | None, prompts: list[str], seeds: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Sums and what to divide them by, (prompts, seeds), 0 and 0 where nothing was scored."""
    places = {prompt: row for row, prompt in enumerate(prompts)}, {seed: column for column, seed in enumerate(seeds)}
    sums, counts = np.zeros((2, len(prompts), len(seeds)))
    for score in scores:
        values = [score.values.get(name) for name in (*criteria, *([over] if over else []))]
        if task in (None, score.task) and None not in values:
            own: list[Any] = values
            place = places[0][score.prompt], places[1][score.seed]
            sums[place] += own[0] if over else np.mean(own)
            counts[place] += own[1] if over else 1
    if over:
        return sums, counts
    return np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0), (counts > 0).astype(float)


class _Resamples:
    """The same resamples of prompts, and of seeds within each, for whatever is compared.

    times  (1 + NUM_RESAMPLES, prompts * seeds), how often each text is in a resample; first all of them, once
    """

    def __init__(self, num_prompts: int, num_seeds: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        prompts = rng.integers(num_prompts, size=(NUM_RESAMPLES, num_prompts, 1))
        texts = prompts * num_seeds + rng.integers(num_seeds, size=(NUM_RESAMPLES, num_prompts, num_seeds))
        size = num_prompts * num_seeds
        drawn = np.bincount(
            (np.arange(NUM_RESAMPLES)[:, None, None] * size + texts).ravel(), minlength=NUM_RESAMPLES * size
        )
        self.times = np.concatenate([np.ones((1, size)), drawn.reshape(NUM_RESAMPLES, size)])

    def ratios(self, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """sums, counts (prompts, seeds). out: (1 + NUM_RESAMPLES,), that of all texts first; NaN over nothing"""
        whole, over = self.times @ sums.ravel(), self.times @ counts.ravel()
        return np.divide(whole, over, out=np.full_like(whole, np.nan), where=over > 0)


def _estimate(ratios: np.ndarray) -> dict[str, float]:
    """Value and interval, to six digits, so that machines agree; resamples without a score do not count."""
    estimate = Bootstrap.estimate(ratios)
    return {name: round(getattr(estimate, name), 6) for name in ("value", "low", "high")}


def _number(value: float, signed: bool = False) -> str:
    return f"{value:{'+' if signed else ''}.{3 if abs(value) < 100 else 1}f}"


def _interval(cell: Mapping[str, float], signed: bool = False) -> str:
    value, low, high = (_number(cell[name], signed) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
