"""What the demo's real model computes in, and on how many threads: what answers soonest on this machine as it is.

Knows what is tried and how it is timed; nothing of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median

import torch

from mpg.model import Model
from mpg.models.sources import CONVERTED

TURNS, TOKENS = 3, 8  # by turns, the first of which warms up; and of a turn the tokens


def quicker(
    model: Model, load_int4: Callable[[], Model], question: str, on_step: Callable[[str], None]
) -> tuple[Model, str]:
    """The model that was loaded, or the same in four bits, whichever writes a few tokens sooner, and what to say of it.

    Each is tried on all threads and on one, which are the sooner where other programs run, and torch is left with what
    was found. A GPU has no four bits, and weights that did not come from a file of such weights would lose by them:
    there it is the model that was loaded.

    on_step  told what is about to be done, before each of what may take long
    """
    source = model.models.describe()["base"]["source"]
    if model.models.device.type != "cpu" or not Path(source, CONVERTED).is_file():
        return model, f"The answers are computed in {spell(model)}."
    on_step("loading the same in four bits")
    ways = list(product([model, load_int4()], sorted({torch.get_num_threads(), 1}, reverse=True)))
    how = {"weights": dict.fromkeys(model.models.attribute_names[:1], 1.0), "sampler": "direct", "seed": 0}
    speeds: list[list[float]] = [[] for _ in ways]
    for turn in range(TURNS):
        on_step(f"trying what answers sooner here: turn {turn + 1} of {TURNS}, {len(ways)} ways, {TOKENS} tokens each")
        for of_way, (each, threads) in zip(speeds, ways, strict=True):
            torch.set_num_threads(threads)
            of_way.append(each.generate(question, max_new_tokens=TOKENS, **how).stats["tokens_per_second"])
    found = [median(of_way[1:]) for of_way in speeds]
    best = max(range(len(ways)), key=found.__getitem__)
    tried = [f"{spell(each)} on {threads} {'thread' if threads == 1 else 'threads'}" for each, threads in ways]
    chosen, threads = ways[best]
    torch.set_num_threads(threads)
    others = [f"{way} {speed:.0f}" for way, speed in zip(tried, found, strict=True) if way != tried[best]]
    return chosen, (
        f"The answers are computed in {tried[best]}, which wrote {found[best]:.0f} tokens/s in a trial on this machine "
        f"({', '.join(others)}). "
        "To choose for yourself, give --quantize int4 or none, and set OMP_NUM_THREADS."
    )


def spell(model: Model) -> str:
    """What a model computes in, as a sentence has it."""
    return model.precision.replace(", int4", " with int4")
