"""The demo's written corpus: questions, answers and preference pairs drawn from templates.

Knows nothing of models, tokens or scores. The templates, and how they are written, are in corpus.yaml beside it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

OPPOSITE = {"E": "I", "S": "N", "T": "F", "J": "P"}
"""Each trait, named by the pole that its adapter favours, and the other pole of its dimension."""

TRAITS = tuple(OPPOSITE)

SENTENCES_PER_ANSWER = 3
"""Traits that one answer shows, after its opening."""

_DATA = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
TOPICS, QUESTION_TEMPLATES, OPENINGS = (tuple(_DATA[key]) for key in ("topics", "questions", "openings"))
SENTENCES = {pole: tuple(templates) for pole, templates in _DATA["sentences"].items()}
DEMO_QUESTIONS = tuple(_DATA["demo"])

MARKERS = {
    pole: frozenset(re.findall(r"\[([^\]]+)\]", " ".join(templates).lower())) for pole, templates in SENTENCES.items()
}
"""Lower-case marker phrases of each pole."""


class Question(NamedTuple):
    """A question as asked and the topic that its answer is about."""

    text: str
    topic: str


def _questions(*, held_out: bool) -> tuple[Question, ...]:
    return tuple(
        Question(template.replace("{topic}", topic), topic)
        for i, template in enumerate(QUESTION_TEMPLATES)
        for j, topic in enumerate(TOPICS)
        if ((i + j) % 5 == 0) == held_out
    )


# The pair (template, topic) is held out where the sum of their places in the lists is divisible by 5: one question in
# five, from all templates and topics, and training meets each template and each topic in other pairs.
TRAIN_QUESTIONS = _questions(held_out=False)
HELD_OUT_QUESTIONS = _questions(held_out=True)


def neutral(rng: random.Random, questions: Sequence[Question] = TRAIN_QUESTIONS) -> tuple[str, str]:
    """Draw a question and an answer that shows three traits in random order, each by a random pole.

    out: question, answer
    """
    question = rng.choice(questions)
    poles = [rng.choice((trait, OPPOSITE[trait])) for trait in rng.sample(TRAITS, SENTENCES_PER_ANSWER)]
    return question.text, " ".join(sentences(rng, question.topic, poles))


def preference_pair(
    rng: random.Random, trait: str, questions: Sequence[Question] = TRAIN_QUESTIONS
) -> tuple[str, str, str]:
    """Draw a question and two answers that differ in one sentence: one shows `trait`, the other its opposite.

    out: question, answer with the trait, answer with the opposite
    """
    question = rng.choice(questions)
    others = rng.sample([t for t in TRAITS if t != trait], SENTENCES_PER_ANSWER - 1)
    shared = sentences(rng, question.topic, [rng.choice((t, OPPOSITE[t])) for t in others])
    place = 1 + rng.randrange(SENTENCES_PER_ANSWER)  # the opening stays in front
    chosen, rejected = (
        " ".join([*shared[:place], _fill(rng, rng.choice(SENTENCES[pole]), question.topic), *shared[place:]])
        for pole in (trait, OPPOSITE[trait])
    )
    return question.text, chosen, rejected


def sentences(rng: random.Random, topic: str, poles: Sequence[str]) -> list[str]:
    """Write an opening about `topic` and then one sentence for each of `poles`, in that order.

    poles: letters of E, I, S, N, T, F, J, P
    """
    templates = [rng.choice(OPENINGS), *(rng.choice(SENTENCES[pole]) for pole in poles)]
    return [_fill(rng, template, topic) for template in templates]


def _fill(rng: random.Random, template: str, topic: str) -> str:
    text = template.replace("{topic}", topic).replace("[", "").replace("]", "")
    text = re.sub(r"\{([^{}]*)\}", lambda match: rng.choice(match[1].split("|")), text)
    return text[0].upper() + text[1:]
