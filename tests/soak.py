"""Ten thousand short calls to one loaded model, of every kind: memory stays flat. Run by `make check`; last line JSON.

Knows nothing of what is generated. Arguments: the number of calls (10000), a seed (0).
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import sys
import time
from collections import Counter
from typing import Any

import torch

import mpg
from mpg.demo import MODELS

LETTERS = "abcdefghij klmnop"
SAMPLERS: list[dict[str, Any]] = [
    {"sampler": "direct", "target": "geometric"},
    {"sampler": "direct", "target": "arithmetic", "mixture_span": 2, "top_p": 0.9},
    {"sampler": "direct", "target": "anchored", "min_p": 0.01, "trace": True},
    {"sampler": "exact", "target": "geometric", "chunk_size": 2},
    {"sampler": "exact", "target": "geometric", "draft": "merged", "verify": "token"},
    {"sampler": "exact", "target": "arithmetic", "draft": "lookup", "adaptive": True},
    {"sampler": "scr", "target": "arithmetic"},
    {"sampler": "token-rs", "target": "arithmetic", "tries": 4},
    {"sampler": "seq-rs", "target": "geometric", "tries": 2},
]
HABITS: list[dict[str, Any]] = [  # beside what the sampler is told; the last three go under exact and direct alone
    {},
    {"stop_strings": ["a", "e"]},
    {"stopping_criteria": [lambda input_ids, scores: torch.ones(1, dtype=torch.bool)]},
    {"num_return_sequences": 3},
    {"temperature": 0},
    {"repetition_penalty": 1.3},
    {"logits_processor": [lambda input_ids, scores: scores - 1]},
]
# From a fifth of the calls on, when caches have their size: 1 KB a call would show, or an object in 16 calls.
MAY_GROW_BYTES, MAY_GROW_OBJECTS = 8 * 2**20, 500


def refuse(token: mpg.Token) -> None:
    raise InterruptedError


# What raises, before a call has begun or in its midst, and how.
FAILURES: list[tuple[type[Exception], dict[str, Any]]] = [
    (ValueError, {"weights": {"no such attribute": 1}}),
    (ValueError, {"max_new_tokens": 10**6}),
    (ValueError, {"sampler": "direct", "logits_processor": [lambda input_ids, scores: scores - torch.inf]}),
    (InterruptedError, {"on_token": refuse}),
]


def call(model: mpg.Model, draw: random.Random, seed: int) -> str:
    """One call of a random kind; out: how it ended. Any other error than the one that is expected goes through."""
    prompts = ["".join(draw.choices(LETTERS, k=draw.randint(1, 60))) for _ in range(draw.randint(1, 4))]
    weights = [{name: draw.uniform(0.1, 1) for name in draw.sample(["E", "S", "T", "J"], 2)} for _ in prompts]
    options = draw.choice(SAMPLERS)
    habit = draw.choice(HABITS if options["sampler"] in ("exact", "direct") else HABITS[:-3])
    options = {"weights": weights, "max_new_tokens": draw.randint(1, 2), "batch_size": draw.randint(1, 4), **options}
    if draw.random() < 0.1:
        error, cause = draw.choice(FAILURES)
        try:
            model.generate(prompts, seed=seed, **options | cause)
        except error:
            return error.__name__
        raise AssertionError(f"expected {error.__name__} of {cause}")
    model.generate(prompts, seed=seed, **options | habit)
    return "ok"


def memory() -> tuple[int, int]:
    """Resident bytes of this process that are no file's, and the objects that Python tracks; without garbage."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what glibc keeps free would hide a leak that fills it
    with open("/proc/self/statm") as pages:
        _, resident, of_files, *_ = map(int, pages.read().split())
    return (resident - of_files) * os.sysconf("SC_PAGE_SIZE"), len(gc.get_objects())


def main(num_calls: int = 10_000, seed: int = 0) -> int:
    torch.set_num_threads(1)
    model = mpg.load(MODELS)
    draw, ended = random.Random(seed), Counter[str]()
    started = time.perf_counter()
    for index in range(num_calls):
        if index == num_calls // 5:
            before = memory()
        ended[call(model, draw, seed=index)] += 1
    grown = [after - early for after, early in zip(memory(), before, strict=True)]
    passed = grown[0] <= MAY_GROW_BYTES and grown[1] <= MAY_GROW_OBJECTS
    result = {"calls": num_calls, "ended": ended, "seconds": round(time.perf_counter() - started, 1)}
    print(json.dumps(result | {"grown_bytes": grown[0], "grown_objects": grown[1], "passed": passed}))
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
