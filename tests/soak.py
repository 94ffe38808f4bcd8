"""A few thousand short requests to one loaded model: memory stays flat. Run by `make check`; the last line is JSON.

Knows nothing of what is generated. Arguments: the number of requests (3000), a seed (0).
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time

import torch

import mpg
from mpg.demo import MODELS

LETTERS = "abcdefghij klmnop"
SAMPLERS = [
    {"sampler": "direct", "target": "geometric"},
    {"sampler": "exact", "target": "geometric"},
    {"sampler": "exact", "target": "arithmetic", "draft": "lookup"},
    {"sampler": "scr", "target": "arithmetic"},
    {"sampler": "token-rs", "target": "arithmetic"},
]
MAY_GROW_BYTES = 8 * 2**20  # from a fifth of the requests on, when caches have their size: 3.5 KB a request would show


def memory_bytes() -> int:
    """Resident memory of this process, garbage collected."""
    gc.collect()
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(num_requests: int = 3000, seed: int = 0) -> int:
    torch.set_num_threads(1)
    model = mpg.load(MODELS)
    draw = random.Random(seed)
    started = time.perf_counter()
    for request in range(num_requests):
        if request == num_requests // 5:
            before = memory_bytes()
        prompts = ["".join(draw.choices(LETTERS, k=draw.randint(1, 60))) for _ in range(draw.randint(1, 3))]
        weights = {name: draw.uniform(0.1, 1) for name in draw.sample(["E", "S", "T", "J"], 2)}
        options = draw.choice(SAMPLERS)
        model.generate(prompts, weights=weights, seed=request, max_new_tokens=draw.randint(1, 6), **options)
    grown = memory_bytes() - before
    result = {"requests": num_requests, "seconds": round(time.perf_counter() - started, 1)}
    print(json.dumps(result | {"resident_bytes": before, "grown_bytes": grown, "passed": grown <= MAY_GROW_BYTES}))
    return int(grown > MAY_GROW_BYTES)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
