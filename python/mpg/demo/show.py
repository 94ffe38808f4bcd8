"""The demo: the same questions answered by the base, by single attributes and by both at once, side by side.

Knows columns, cells and intervals; which models, questions and judge there are is a stage's business.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mpg.app.colours import colours_of, legend, strongest_push
from mpg.model import Model
from mpg.paper.scoring import token_logprobs
from mpg.paper.statistics import Bootstrap, Estimate
from mpg.results import Result, Token

BATCH = 16  # held-out questions that are answered at once

Judge = Callable[[Sequence[str]], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Column:
    """One way to answer: its title, weights and options."""

    title: str
    weights: dict[str, float] | None
    options: dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """What a demo needs beside models.

    questions, held_out  those that are answered one by one, and those that the table may be over
    num_held_out         of these, unless the caller says otherwise
    judge                from texts to a score of each trait for each text, higher for more of it
    verdict              what the scores are, for the table's caption
    by_sentence          one more way, for the first question alone: a context instead of adapters
    """

    columns: Sequence[Column]
    questions: Sequence[str]
    held_out: Sequence[str]
    num_held_out: int
    judge: Judge
    verdict: str
    max_new_tokens: int
    by_sentence: Column | None = None


def show(console: Console, model: Model, stage: Stage, num_questions: int, num_held_out: int, seed: int) -> None:
    """Stream the answers to the console, then what was measured over `num_held_out` (>= 2) other questions."""
    colours = colours_of(dict.fromkeys(name for column in stage.columns for name in column.weights or {}))
    console.print(legend(colours))
    answers = [
        _answer(console, model, stage, colours, question, seed + index)
        for index, question in enumerate(stage.questions[:num_questions])
    ]
    speeds = [
        statistics.median(r.stats["tokens_per_second"] for r in of_column) for of_column in zip(*answers, strict=True)
    ]
    with console.status(f"Answering {num_held_out} more questions to measure the traits"):
        table = _measure(model, stage, colours, speeds, num_held_out, seed)
    console.print(table)
    if (column := stage.by_sentence) is not None:
        how = {"seed": seed, "max_new_tokens": stage.max_new_tokens, **column.options}
        result = model.generate(stage.questions[0], weights=column.weights, **how)
        console.print(Text.assemble((f"{column.title}: ", "bold"), result.text))


def _answer(
    console: Console, model: Model, stage: Stage, colours: Mapping[str, str], question: str, seed: int
) -> list[Result]:
    """Stream the answers of all columns to one question."""
    texts = [Text() for _ in stage.columns]
    results: list[Result] = []  # of the columns that are done
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for column, text in zip(stage.columns, texts, strict=True):

            def append(token: Token, column: Column = column, text: Text = text) -> None:
                text.append(token.text, style=colours.get(strongest_push(token, column.weights or {}), ""))
                live.update(_answers(stage, question, texts, results), refresh=console.is_terminal)

            how = {"seed": seed, "trace": True, "on_token": append, "max_new_tokens": stage.max_new_tokens}
            results.append(model.generate(question, weights=column.weights, **how, **column.options))
    console.print(_answers(stage, question, texts, results))
    return results


def _answers(stage: Stage, question: str, texts: Sequence[Text], results: Sequence[Result]) -> Table:
    table = _table(stage, question)
    table.add_row(*texts)
    table.add_section()
    table.add_row(*(f"{result.stats['tokens_per_second']:.0f} tokens/s" for result in results))
    return table


def _measure(
    model: Model, stage: Stage, colours: Mapping[str, str], speeds: Sequence[float], num: int, seed: int
) -> Table:
    """Scores of every column as differences to the base, question by question, which single answers are too few for."""
    questions = stage.held_out[:num]
    columns = [_Sample.draw(model, stage, column, questions, seed) for column in stage.columns]
    base, bootstrap = columns[0], Bootstrap(len(questions), seed)
    table = _table(stage, f"Over {len(questions)} held-out questions, with 95 % intervals")
    speed = "Tokens/s: medians of the answers above, one at a time."
    table.caption = f"{stage.verdict} Perplexity is the base's, in {model.precision}. {speed}"
    one = np.ones(len(questions))
    for trait in colours:
        row = [Text(f"{trait} {base.scores[trait].mean():.2f}", style=colours[trait])]
        for sample in columns[1:]:
            gain = bootstrap.estimate(bootstrap.ratios(sample.scores[trait] - base.scores[trait], one))
            row.append(Text(f"{trait} {_interval(gain, '+.2f')}", style=colours[trait]))
        table.add_row(*row)
    surprises = [bootstrap.estimate(bootstrap.ratios(sample.surprise, sample.num_tokens)) for sample in columns]
    bounds = [Estimate(*(math.exp(part) for part in (s.value, s.low, s.high))) for s in surprises]
    table.add_row(*(f"perplexity {_interval(perplexity, '.1f')}" for perplexity in bounds))
    table.add_row(*(f"{speed:.0f} tokens/s" for speed in speeds))
    return table


@dataclass(frozen=True)
class _Sample:
    """What a column answered to P questions.

    scores      (P,) by trait
    surprise    (P,) nats under the base, summed over the tokens of a text
    num_tokens  (P,)
    """

    scores: Mapping[str, np.ndarray]
    surprise: np.ndarray
    num_tokens: np.ndarray

    @staticmethod
    def draw(model: Model, stage: Stage, column: Column, questions: Sequence[str], seed: int) -> _Sample:
        results, surprise = [], []
        for first in range(0, len(questions), BATCH):
            asked = list(questions[first : first + BATCH])
            batch = model.generate(
                asked, weights=column.weights, seed=seed + first, max_new_tokens=stage.max_new_tokens,
                **column.options,
            )  # fmt: skip
            prompts = [model.encode(question) for question in asked]
            logprobs = token_logprobs(model.models, ("base",), prompts, [result.tokens for result in batch])
            surprise.append(-logprobs[0].sum(-1).cpu().numpy())
            results += batch
        lengths = np.array([len(result.tokens) for result in results], dtype=float)
        return _Sample(stage.judge([result.text for result in results]), np.concatenate(surprise), lengths)


def _interval(estimate: Estimate, form: str) -> str:
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _table(stage: Stage, title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left", expand=True)
    for column in stage.columns:
        table.add_column(column.title, ratio=1, vertical="top", overflow="fold")
    return table
