"""Writes README's figures of the real model from what `mpg demo --save` wrote. Knows how to print them; runs nothing.

OMP_NUM_THREADS=1 mpg demo --quantize int4 --held-out 64 --save bench/results/demo-cpu.json
python docs/tabulate_demo.py
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README, SAVED = ROOT / "README.md", ROOT / "bench" / "results" / "demo-cpu.json"
END = "<!-- end -->"
MOST_WORDS = 9  # of an answer on the first screen


def tables(saved: Mapping[str, Any]) -> dict[str, list[str]]:
    """The lines of each table of README, by the comment that opens it."""
    columns, traits = saved["columns"], list(saved["columns"][0]["scores"])
    scores = [f"| {saved['held_out']} held-out questions | {' | '.join(traits)} | perplexity | tokens/s |"]
    scores.append("|---|" + "---:|" * (len(traits) + 2))
    for column in columns:
        is_base = column["weights"] is None
        of_traits = column["scores" if is_base else "gains"]
        cells = [_interval(of_traits[trait], ".2f" if is_base else "+.2f") for trait in traits]
        cells += [_interval(column["perplexity"], ".1f"), f"{column['tokens_per_second']:.0f}"]
        scores.append(f"| {_name(column)} | {' | '.join(cells)} |")
    question = next(iter(columns[0]["answers"]))
    begun = [f'{_name(column)}: *"{_begin(column["answers"][question])}"*' for column in columns[:3]]
    scores += ["", *textwrap.wrap(f"{question} {' '.join(begun)}", 120)]
    texts = ["| | |", "|---|---|"]
    texts += [f"| {_name(column)} | {' '.join(column['answers'][question].split())} ... |" for column in columns]
    return {"<!-- scores: docs/tabulate_demo.py -->": scores, "<!-- texts: docs/tabulate_demo.py -->": texts}


def _begin(text: str) -> str:
    """The first sentence, where that is a short one."""
    words = text.split()
    ends = next((place for place, word in enumerate(words, 1) if word[-1] in ".!?"), len(words))
    return " ".join(words[:ends]) if ends <= MOST_WORDS else " ".join([*words[:MOST_WORDS], "..."])


def _name(column: Mapping[str, Any]) -> str:
    if column["weights"] is None:
        return "base"
    name, options = ",".join(f"{trait}={weight:g}" for trait, weight in column["weights"].items()), column["options"]
    if options["sampler"] == "direct":
        return name
    more = f", `{options['draft']}` draft" if "draft" in options else ", as published"
    return f"{name}, `{options['sampler']}` {options['target']}{more}"


def _interval(estimate: Mapping[str, float], form: str) -> str:
    value, low, high = (re.sub(r"\b0\.", ".", format(estimate[part], form)) for part in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def write(saved: Mapping[str, Any], page: str) -> str:
    """The page with its tables anew."""
    for begin, lines in tables(saved).items():
        before, rest = page.split(begin)
        page = "\n".join([before + begin, *lines, END + rest.split(END, 1)[1]])
    return page


if __name__ == "__main__":
    README.write_text(write(json.loads(SAVED.read_text()), README.read_text()))
