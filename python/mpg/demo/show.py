"""The demo: the same questions answered by the base, by single attributes and by both at once, side by side.

Knows columns, cells and intervals; which models, questions and judge there are is a stage's business.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mpg.app.colours import colours_of, legend, strongest_push
from mpg.demo.precision import spell
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


def show(
    console: Console, model: Model, stage: Stage, num_questions: int, num_held_out: int, seed: int
) -> dict[str, Any]:
    """Stream the answers to the console, then what was measured over `num_held_out` (>= 2) other questions.

    out: the same as JSON has it: of every column its answers, the median of their tokens per second, and scores by
    trait, gains over the base and perplexity, each with a 95 % interval
    """
    colours = colours_of(dict.fromkeys(name for column in stage.columns for name in column.weights or {}))
    console.print(legend(colours))
    asked = stage.questions[:num_questions]
    answers = [_answer(console, model, stage, colours, question, seed + index) for index, question in enumerate(asked)]
    with console.status(f"Answering {num_held_out} more questions to measure the traits"):
        rows = _measure(model, stage, list(colours), num_held_out, seed)
    for row, of_column in zip(rows, zip(*answers, strict=True), strict=True):
        row["tokens_per_second"] = statistics.median(result.stats["tokens_per_second"] for result in of_column)
        row["answers"] = {question: result.text for question, result in zip(asked, of_column, strict=True)}
    console.print(_summary(stage, model, colours, rows, min(num_held_out, len(stage.held_out))))
    if (column := stage.by_sentence) is not None:
        how = {"seed": seed, "max_new_tokens": stage.max_new_tokens, **column.options}
        result = model.generate(stage.questions[0], weights=column.weights, **how)
        texts = " and ".join(str(model.models.contexts[name].system) for name in column.weights or {})
        begin = f'The first question without an adapter, by the sentence "{texts}" ({column.title}): '
        console.print(Text.assemble((begin, "bold"), result.text))
    return {"judge": stage.verdict, "precision": model.precision, "columns": rows}


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


def _measure(model: Model, stage: Stage, traits: Sequence[str], num: int, seed: int) -> list[dict[str, Any]]:
    """Scores of every column, and their differences to the base question by question, which single answers are too few
    for."""
    questions = stage.held_out[:num]
    columns = [_Sample.draw(model, stage, column, questions, seed) for column in stage.columns]
    base, bootstrap, one = columns[0], Bootstrap(len(questions), seed), np.ones(len(questions))

    def mean(values: np.ndarray) -> Estimate:
        return bootstrap.estimate(bootstrap.ratios(values, one))

    rows = []
    for column, sample in zip(stage.columns, columns, strict=True):
        nats = bootstrap.estimate(bootstrap.ratios(sample.surprise, sample.num_tokens))
        perplexity = Estimate(*(math.exp(part) for part in (nats.value, nats.low, nats.high)))
        rows.append(
            {
                **{"title": column.title, "weights": column.weights, "options": column.options},
                "scores": {trait: asdict(mean(sample.scores[trait])) for trait in traits},
                "gains": {trait: asdict(mean(sample.scores[trait] - base.scores[trait])) for trait in traits},
                "perplexity": asdict(perplexity),
            }
        )
    return rows


def _summary(
    stage: Stage, model: Model, colours: Mapping[str, str], rows: Sequence[Mapping[str, Any]], num: int
) -> Table:
    table = _table(stage, f"Over {num} held-out questions, with 95 % intervals")
    speed = "Tokens/s are medians of the answers above, which came one at a time."
    table.caption = f"{stage.verdict} The perplexity is that of the texts under the base, in {spell(model)}. {speed}"
    for trait, colour in colours.items():
        shown = [_interval(rows[0]["scores"][trait], ".2f")]
        shown += [_interval(row["gains"][trait], "+.2f") for row in rows[1:]]
        table.add_row(*(Text(f"{trait} {text}", style=colour) for text in shown))
    table.add_row(*(f"perplexity {_interval(row['perplexity'], '.1f')}" for row in rows))
    table.add_row(*(f"{row['tokens_per_second']:.0f} tokens/s" for row in rows))
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


def _interval(estimate: Mapping[str, float], form: str) -> str:
    return "{:{form}} [{:{form}}, {:{form}}]".format(*estimate.values(), form=form)


def _table(stage: Stage, title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left", expand=True)
    for column in stage.columns:
        table.add_column(column.title, ratio=1, vertical="top", overflow="fold")
    return table
