"""Sentences against adapters on the shipped model: writes the table and the plot of contexts.md, some 20 minutes.

Knows what to run and how to print it; texts, judge and intervals are the demo's.

    python docs/tabulate_contexts.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import mpg
from mpg.demo.stages import stage
from mpg.demo.trait_judge import DIMENSIONS, trait_judge
from mpg.paper.scoring import token_logprobs
from mpg.paper.statistics import Bootstrap, Estimate

PAGE = Path(__file__).with_name("contexts.md")
TYPES = ("ENFP", "ISTJ")
WEIGHTS = (0.5, 1.0, 2.0)  # of each of four attributes, or half of it of each of eight
NUM_QUESTIONS, MAX_NEW_TOKENS, BATCH, SEED = 32, 32, 16, 0
SENTENCES = {
    "E": "You love to be among people and to think aloud with them.",
    "I": "You need time to yourself and think before you speak.",
    "S": "You trust facts, experience and what you can see and touch.",
    "N": "You love ideas, possibilities and the meaning behind things.",
    "T": "You decide by reasons and what works, with a cool head.",
    "F": "You decide by your heart and by how people feel.",
    "J": "You make plans and keep to them, in good order and in good time.",
    "P": "You keep your options open and take things as they come.",
}


@dataclass(frozen=True)
class Way:
    """One way to get a type: what it is called, its weight, and the arguments of `generate`."""

    name: str
    weight: float | None
    arguments: Mapping[str, Any]
    system: str | None = None


@dataclass(frozen=True)
class Sample:
    """Scores of every question: probability (4, P) of the type's pole in each dimension; nats under the base and tokens
    (P,); and positions that a token took."""

    scores: np.ndarray
    surprise: np.ndarray
    num_tokens: np.ndarray
    positions: float


def ways_of(poles: str) -> list[Way]:
    contexts = {f"{pole}-sentence": SENTENCES[pole] for pole in poles}
    ways = [Way("one prompt with all four sentences", None, {"target": "base"}, " ".join(contexts.values()))]
    for weight in WEIGHTS:
        both = {name: weight / 2 for name in (*poles, *contexts)}
        ways += [
            Way(
                "a sentence for each trait", weight, {"weights": dict.fromkeys(contexts, weight), "contexts": contexts}
            ),
            Way("an adapter for each trait", weight, {"weights": dict.fromkeys(poles, weight)}),
            Way("sentences and adapters", weight, {"weights": both, "contexts": contexts}),
        ]
    return ways


def sample(model: mpg.Model, poles: str, way: Way, questions: Sequence[str]) -> Sample:
    results, surprise = [], []
    for first in range(0, len(questions), BATCH):
        asked = [[{"role": "user", "content": question}] for question in questions[first : first + BATCH]]
        told = [[{"role": "system", "content": way.system}, *prompt] if way.system else prompt for prompt in asked]
        how = {"sampler": "direct", "seed": SEED + first, "max_new_tokens": MAX_NEW_TOKENS}
        batch = model.generate(told, **how, **way.arguments)
        prompts = [model.encode(prompt) for prompt in asked]
        logprobs = token_logprobs(model.models, ("base",), prompts, [result.tokens for result in batch])
        surprise.append(-logprobs[0].sum(-1).numpy())
        results += batch
    judged = trait_judge().score([result.text for result in results])
    scores = [judged[of] if pole == of[0] else 1 - judged[of] for of, pole in zip(DIMENSIONS, poles, strict=True)]
    num_tokens = np.array([len(result.tokens) for result in results], dtype=float)
    positions = sum(len(result.tokens) * result.stats["positions_per_token"] for result in results) / num_tokens.sum()
    return Sample(np.stack(scores), np.concatenate(surprise), num_tokens, positions)


def main() -> None:
    torch.set_num_threads(1)
    model = mpg.load("smollm2", dtype="bfloat16", device="cpu")
    questions = list(stage("smollm2").held_out[:NUM_QUESTIONS])
    bootstrap, one = Bootstrap(len(questions), SEED), np.ones(len(questions))
    lines = ["| type | way | weight of each | shift towards the type | perplexity | positions a token |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    points: dict[tuple[str, str], list[tuple[Estimate, Estimate]]] = {}
    for poles in TYPES:
        base = sample(model, poles, Way("base", None, {"target": "base"}), questions)
        for way in [Way("the base alone", None, {"target": "base"}), *ways_of(poles)]:
            own = base if way.name == "the base alone" else sample(model, poles, way, questions)
            shift = bootstrap.estimate(bootstrap.ratios((own.scores - base.scores).mean(0), one))
            nats = bootstrap.estimate(bootstrap.ratios(own.surprise, own.num_tokens))
            perplexity = Estimate(*(math.exp(part) for part in (nats.value, nats.low, nats.high)))
            points.setdefault((poles, way.name), []).append((perplexity, shift))
            weight = "" if way.weight is None else f"{way.weight / (1 + (way.name == 'sentences and adapters')):g}"
            shown = "" if own is base else _interval(shift, "+.3f")
            lines.append(
                f"| {poles} | {way.name} | {weight} | {shown} | {_interval(perplexity, '.1f')} | {own.positions:.1f} |"
            )
            print(lines[-1], flush=True)
    begin, end = "<!-- written by docs/tabulate_contexts.py -->", "<!-- end -->"
    lines += ["", judge_line()]
    page = PAGE.read_text()
    PAGE.write_text("\n".join([page.split(begin)[0] + begin, "", *lines, "", end + page.split(end)[1]]))
    plot(points)


def judge_line() -> str:
    *told, last = (f"{right:.0%} ({of[0]} or {of[1]})" for of, right in trait_judge().accuracy.items())
    return f"The judge tells the pole of {', '.join(told)} and {last} of held-out answers; a coin tells half."


def plot(points: Mapping[tuple[str, str], Sequence[tuple[Estimate, Estimate]]]) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, poles in zip(figure.subplots(1, len(TYPES)), TYPES, strict=True):
        for (of, name), of_way in points.items():
            if of == poles:
                x, y = (np.array([e.value for e in column]) for column in zip(*of_way, strict=True))
                spread = np.abs([[e.low - e.value, e.high - e.value] for _, e in of_way]).T
                axes.errorbar(x, y, spread, marker="o", capsize=3, label=name)
        axes.set(title=poles, xlabel="perplexity under the base", ylabel="shift towards the type", xscale="log")
        axes.legend(fontsize="small")
    figure.savefig(PAGE.with_suffix(".png"), dpi=110)


def _interval(estimate: Estimate, form: str) -> str:
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


if __name__ == "__main__":
    main()
