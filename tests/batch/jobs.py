"""Small jobs on the demo models, and what they wrote."""

from __future__ import annotations

import json
import random
from pathlib import Path

from mpg.batch.job import begin, describe, run_local
from mpg.batch.parts import Output
from mpg.batch.rows import scan
from mpg.batch.worker import Task
from mpg.demo.corpus import DEMO_QUESTIONS, HELD_OUT_QUESTIONS

QUESTIONS = [*DEMO_QUESTIONS, *(question.text for question in HELD_OUT_QUESTIONS)]
WEIGHTS = ["E=1", "E=1,T=0.5", {"J": -0.5, "S": 1}]
OF_TIME = ("tokens_per_second", "time_to_first_token")


def make_rows(count, longest=8, seed=0):
    rng = random.Random(seed)
    return [
        {
            "id": f"row {number}", "prompt": rng.choice(QUESTIONS), "weights": rng.choice(WEIGHTS),
            "max_new_tokens": rng.randint(2, longest), "number": number,
        }
        for number in range(count)
    ]  # fmt: skip


def write_rows(path, rows):
    Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def make_task(model, rows, output, form="jsonl", **how):
    asked = scan(str(rows))
    return Task(asked, Output.of(str(output), form, asked), lambda: model, **{"options": {"sampler": "direct"}, **how})


def run(model, rows, output, on_done=lambda done: None, **how):
    """Do what is left of a job. out: its chunks"""
    task = make_task(model, rows, output, **how)
    left = begin(task, describe(task, model.recipe, {}))
    run_local(task, left, on_done)
    return left


def told(output):
    """The rows of an output by their ids, without what depends on the time."""
    rows = [json.loads(line) for part in sorted(Path(output).glob("part-*")) for line in part.open()]
    found = {row["id"]: row for row in rows}
    assert len(found) == len(rows), "a row is there twice"
    for row in rows:
        row["stats"] = {name: value for name, value in row["stats"].items() if name not in OF_TIME}
    return found
