"""What handlers are told of a request. Knows no model: they may be in a process without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mpg.results import Token


class Begun(NamedTuple):
    """A request that has been read.

    num_jobs       of which each ends by itself: its choices, and behind them prompts that are scored
    num_choices
    prompt_tokens  of all prompts, each once
    echoes         of each prompt what comes before its answers
    prompts        of each whose tokens are scored, these by id, with the number of characters that each completes
    spelled        these token ids as text
    """

    num_jobs: int
    num_choices: int
    prompt_tokens: int
    echoes: Sequence[str] = ()
    prompts: Sequence[Sequence[tuple[int, int]]] = ()
    spelled: Mapping[int, str] = {}


class New(NamedTuple):
    """Tokens that a choice has got.

    text     that they complete
    tokens   themselves, where the request asks for more than their text
    spelled  all token ids among these as text, where it asks for log-probabilities
    """

    text: str
    num_tokens: int
    tokens: Sequence[Token] = ()
    spelled: Mapping[int, str] = {}


class Scored(NamedTuple):
    """A prompt's tokens but the first: (log-probability, the largest of its row by token id) of each."""

    tokens: Sequence[Any]
    spelled: Mapping[int, str]


class End(NamedTuple):
    """How a choice has ended, as its `Result` says it."""

    finish_reason: str
    seed: int
    weights: dict[str, float]
    stats: dict[str, float]
