"""Ten thousand short calls to one loaded model, of every kind, and of a server of it: memory, file descriptors and
threads stay flat. Run by `make check`; last line JSON.

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
from pathlib import Path
from typing import Any

import httpx
import torch

import mpg
from mpg.demo import MODELS

sys.path.append(str(Path(__file__).parent / "serve"))
from serving import Served, serving

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
# From a fifth of the calls on, when caches have their size: 1 KB a call would show, or an object in 16 calls, or a
# descriptor or thread in 2000. Threads of the handlers' pool come and go.
MAY_GROW = {"bytes": 8 * 2**20, "objects": 500, "descriptors": 2, "threads": 4}
SERVED = 0.25  # of all calls


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


def request(client: httpx.Client, draw: random.Random, seed: int) -> str:
    """One request of a random kind, of which some are refused and some left in their midst. out: how it ended"""
    prompt, kind = (
        "".join(draw.choices(LETTERS, k=draw.randint(1, 60))),
        draw.choice(["whole", "stream", "left", "bad"]),
    )
    body = {"model": draw.choice(["E", "S=0.5,T=1", "base"]), "seed": seed, "max_tokens": 200 if kind == "left" else 2}
    body |= {"messages": [{"role": "user", "content": prompt}], "stream": kind in ("stream", "left")}
    if kind == "bad":
        body |= draw.choice([{"messages": []}, {"temperature": -1}, {"model": "nobody"}, {"max_tokens": 10**6}])
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert (answer.status_code == 200) == (kind != "bad"), answer.read()
        for line in answer.iter_lines():
            if kind == "left" and line:
                break
    return kind


def taken() -> dict[str, int]:
    """Resident bytes of this process that are no file's, the objects that Python tracks, without garbage, open file
    descriptors, and threads."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what glibc keeps free would hide a leak that fills it
    with open("/proc/self/statm") as pages:
        _, resident, of_files, *_ = map(int, pages.read().split())
    descriptors, threads = (len(os.listdir(f"/proc/self/{of}")) for of in ("fd", "task"))
    size = (resident - of_files) * os.sysconf("SC_PAGE_SIZE")
    return {"bytes": size, "objects": len(gc.get_objects()), "descriptors": descriptors, "threads": threads}


def soak(served: Served, num_calls: int, seed: int) -> dict[str, Any]:
    """Calls and requests in turn. out: how they ended, and what was taken by the end beyond what was by a fifth."""
    draw, ended = random.Random(seed), Counter[str]()
    for calls in (num_calls // 5, num_calls - num_calls // 5):
        with httpx.Client(base_url=served.url, timeout=60) as client:
            for _ in range(calls):
                number = ended.total()
                is_served = draw.random() < SERVED
                ended[request(client, draw, number) if is_served else call(served.model, draw, number)] += 1
        served.is_idle()
        time.sleep(1)  # until the server has noticed that its clients are gone
        if calls == num_calls // 5:
            before = taken()
    return {"ended": ended, "grown": {name: after - before[name] for name, after in taken().items()}}


def main(num_calls: int = 10_000, seed: int = 0) -> int:
    torch.set_num_threads(1)
    started = time.perf_counter()
    with serving(mpg.load(MODELS)) as served:
        result = soak(served, num_calls, seed)
    passed = all(result["grown"][name] <= most for name, most in MAY_GROW.items())
    print(
        json.dumps({"calls": num_calls, "seconds": round(time.perf_counter() - started, 1), **result, "passed": passed})
    )
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
