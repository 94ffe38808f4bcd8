"""The demo: the same questions answered by the base, by single attributes and by both at once, side by side."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mpg.app.colours import colours_of, legend, strongest_push
from mpg.demo.corpus import HELD_OUT_QUESTIONS, TRAITS
from mpg.demo.judge import score_traits
from mpg.model import Model
from mpg.results import Result, Token

COLOURS = colours_of(TRAITS)


@dataclass(frozen=True)
class Column:
    """One way to answer: its title, weights and options."""

    title: str
    weights: dict[str, float] | None
    options: dict[str, Any]


COLUMNS = (
    Column("base", None, {"sampler": "direct", "target": "base"}),
    Column("E", {"E": 1}, {"sampler": "direct", "target": "geometric"}),
    Column("T", {"T": 1}, {"sampler": "direct", "target": "geometric"}),
    Column("E+T scr arithmetic", {"E": 1, "T": 1}, {"sampler": "scr", "target": "arithmetic"}),
    Column("E+T direct geometric", {"E": 1, "T": 1}, {"sampler": "direct", "target": "geometric"}),
)


def show(console: Console, model: Model, questions: Sequence[str], num_held_out: int, seed: int) -> None:
    """Stream the answers to the console, then the mean trait scores over `num_held_out` (>= 2) other questions."""
    console.print(legend(COLOURS))
    for i, question in enumerate(questions):
        _answer(console, model, question, seed + i)
    with console.status(f"Answering {num_held_out} more questions to measure the traits"):
        means = _means(model, num_held_out, seed)
    console.print(means)


def _answer(console: Console, model: Model, question: str, seed: int) -> None:
    """Stream the answers of all columns to one question."""
    texts = [Text() for _ in COLUMNS]
    results: list[Result] = []  # of the columns that are done
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for column, text in zip(COLUMNS, texts, strict=True):

            def append(token: Token, column: Column = column, text: Text = text) -> None:
                text.append(token.text, style=COLOURS.get(strongest_push(token, column.weights or {}), ""))
                live.update(_answers(question, texts, results), refresh=console.is_terminal)

            how = {"seed": seed, "trace": True, "on_token": append, **column.options}
            results.append(model.generate(question, weights=column.weights, **how))
    console.print(_answers(question, texts, results))


def _answers(question: str, texts: Sequence[Text], results: Sequence[Result]) -> Table:
    table = _table(title=question)
    table.add_row(*texts)
    table.add_section()
    table.add_row(*(_traits(score_traits(result.text)) for result in results))
    table.add_row(*(f"{result.stats['tokens_per_second']:.0f} tokens/s" for result in results))
    return table


def _means(model: Model, num_questions: int, seed: int) -> Table:
    """Trait scores of every column over held-out questions, which single answers are too few to show."""
    questions = [question.text for question in random.Random(seed).sample(HELD_OUT_QUESTIONS, num_questions)]
    table = _table(f"Mean trait scores over {num_questions} held-out questions, with their standard errors")
    scores = []
    for column in COLUMNS:
        results = model.generate(questions, weights=column.weights, seed=seed, **column.options)
        scores.append([score_traits(result.text) for result in results])
    table.caption = (
        "Arithmetic means 'or': a token follows one trait. Geometric means 'and'. scr delivers part of either."
    )
    for trait, colour in COLOURS.items():
        values = [[score[trait] for score in column] for column in scores]
        means = [f"{trait}{statistics.mean(v):+.2f} ± {statistics.stdev(v) / len(v) ** 0.5:.2f}" for v in values]
        table.add_row(*(Text(mean, style=colour) for mean in means))
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", expand=True)
    for column in COLUMNS:
        table.add_column(column.title, ratio=1, vertical="top", overflow="fold")
    return table


def _traits(scores: dict[str, float]) -> Text:
    return Text(" ").join(Text(f"{name}{scores[name]:+.1f}", style=colour) for name, colour in COLOURS.items())
