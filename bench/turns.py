"""Measured rows, and calls that take turns, run by run, so that a busy machine slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch

Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One measured number. `value` is None where it was not measured, `why` then; `is_limit` says that the goal is a
    maximum."""

    name: str
    value: float | None
    goal: float | None = None
    is_limit: bool = False
    why: str | None = None

    def as_json(self) -> dict[str, Any]:
        passed = None
        if self.value is not None and self.goal is not None:
            passed = self.value <= self.goal if self.is_limit else self.value >= self.goal
        return {"name": self.name, "value": self.value, "goal": self.goal, "pass": passed, "why": self.why}


class Seconds(NamedTuple):
    """What a call took, by the clock on the wall, and of the processor, which other programs do not add to."""

    wall: float
    processor: float


def take_turns(calls: dict[str, Callable[[], Any]], runs: int, device: str) -> dict[str, list[Seconds]]:
    """Seconds of every call in each run, after one that does not count."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in calls}
    for index in range(-1, runs):
        for name, call in calls.items():
            elapsed = time_once(call, device)
            if index >= 0:
                seconds[name].append(elapsed)
    return seconds


def time_once(call: Callable[[], Any], device: str) -> Seconds:
    """Seconds of one call, all of its work on the device included."""
    synchronise = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronise()
    started = time.perf_counter(), time.process_time()
    call()
    synchronise()
    return Seconds(time.perf_counter() - started[0], time.process_time() - started[1])


def shares(others: Sequence[Seconds], own: Sequence[Seconds]) -> Seconds:
    """How many times as fast the second of two calls is that took turns, the median of the runs, by either clock."""
    pairs = list(zip(others, own, strict=True))
    return Seconds(median(o.wall / s.wall for o, s in pairs), median(o.processor / s.processor for o, s in pairs))
