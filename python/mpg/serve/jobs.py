"""One choice of one request, on its way to the engine and back. Knows neither who asked nor who runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from mpg.results import Result, Token

if TYPE_CHECKING:
    from mpg.decode.request import Entry, Request
    from mpg.frontend.requests import Call
    from mpg.model import Model
    from mpg.models.pool import View

# New tokens of one round; the result at the end; or why there is none
Event: TypeAlias = list[Token] | Result | list[Any] | Exception
Tell: TypeAlias = Callable[[Sequence[tuple["Job", Event]]], object]


class Refused(Exception):
    """The server does not take a request that may be as it should be: too many wait, or it is about to end."""


class TooLarge(ValueError):
    """A request that this server can never run."""


class Need(NamedTuple):
    """What a job takes of caches while it is decoded.

    rows       by what runs them
    positions  of each row
    ahead      bytes of the rows in which its prompt is read ahead, 0 for one that is no more than a part
    """

    rows: tuple[tuple[View, int], ...]
    positions: int
    ahead: int


@dataclass(eq=False)
class Job:
    """A text that is to be generated, or, with `scores_prompt`, a prompt whose tokens are to be scored.

    id        of what it is a part of, and `number` its place there, as who asks knows them
    call      that it belongs to, of one prompt
    model     that the call was read by
    tell      called in the engine's thread with the events of one round, those of all jobs that have this function
    entry     while it is decoded
    need      of cache rows, once that has been asked
    interval  seconds from one event with tokens to the next, the first of which comes at once; all jobs' are told at
              the same times. inf: all tokens come with the end
    num_sent  tokens that it has been told or `_held` has for it, and `num_seen` those that its entry has brought:
              fewer where it had to begin again, as it does with the same uniforms
    """

    id: Any
    model: Model
    call: Call
    request: Request
    tell: Tell
    deadline: float
    number: int = 0
    interval: float = inf
    scores_prompt: bool = False
    added_at: float = field(default_factory=perf_counter)
    entry: Entry | None = None
    need: Need | None = None
    num_sent: int = 0
    num_seen: int = 0
    is_over: bool = False
    _held: list[Token] = field(default_factory=list)
    _tick: float = -1.0  # of its last event

    def is_last(self, event: Event) -> bool:
        """Whether no other event follows."""
        return self.scores_prompt or not isinstance(event, list)

    def unsent(self, tokens: list[Token], now: float, *, is_last: bool) -> list[Token]:
        """What is to be told of it after a round that brought these tokens: nothing, or all that has not been told.
        now: by `monotonic`"""
        num_known = self.num_sent - self.num_seen
        self.num_seen += len(tokens)
        if num_known:
            tokens = tokens[num_known:]
        self.num_sent += len(tokens)
        self._held += tokens
        if self.interval == inf and not is_last:
            return []
        tick = now // self.interval if self.interval else now
        if not self._held or (tick == self._tick and not is_last):
            return []
        new, self._held, self._tick = self._held, [], tick
        return new
