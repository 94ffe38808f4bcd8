"""The real model that the demo has, beside transformers' `generate` and under every sampler and draft.

Knows what is compared and wanted; how calls take turns is `turns`'s. Texts do not end before their length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import peers
from mpg.demo.stages import stage
from mpg.model import Model, load
from mpg.models import gguf
from mpg.paper.methods import answer
from turns import Row, Say, shares, take_turns

# Own call, other call, batch, how many times as fast by the processor's time on a CPU; of several drafts the best
GOALS = (
    ("base", "eager", 1, 1.0),
    ("base", "eager", 8, 1.5),
    ("direct_n2", "base", 1, 0.85),
    ("direct_n4", "base", 1, 0.75),
    ("exact_n4", "direct_n4", 1, 1.1),
)
NUM_MODELS = (1, 2, 4, 8)
DRAFTS = ("reference", "merged", "lookup")


def measure(dtype: torch.dtype, new_tokens: int, runs: int, say: Say) -> list[Row]:
    """Shares of times as far as goals name them, tokens a second of every call (at batch 8 of the base's alone) by the
    processor's time, and tokens a round of each draft."""
    model = Model(load("smollm2", dtype=dtype).models)  # without its recipe's options: every call says its own
    base = AutoModelForCausalLM.from_pretrained(gguf.resolve("base", gguf.SMOLLM2), dtype=dtype).eval()
    base.generation_config.eos_token_id, model.models.eos_token_ids = None, ()
    name = f"smollm2, {str(dtype).removeprefix('torch.')}"
    rows, seconds = [], {}
    for batch in (1, 8):
        say(f"{name}, batch {batch}")
        prompts = _prompts(model, batch)
        calls = _calls(model, base, prompts, new_tokens)
        if batch > 1:  # minutes for each of the others, and no goal
            calls = {name: calls[name] for name in ("eager", "base")}
        seconds[batch] = take_turns(calls, runs, "cpu")
        for call, times in seconds[batch].items():
            speed = batch * new_tokens / median(of_run.processor for of_run in times)
            rows.append(Row(f"{name}/{call}_b{batch}_tokens_per_second", speed))
    for own, other, batch, goal in GOALS:
        times = seconds[batch]
        owns = [call for call in times if call == own or call.startswith(f"{own}_")]
        share = max(shares(times[other], times[call]).processor for call in owns)
        rows.append(Row(f"{name}/{own}_vs_{other}_b{batch}", share, goal if dtype == torch.float32 else None))
    prompt = _prompts(model, 1)
    for draft in DRAFTS:
        result = model.generate(prompt, weights=_weights(model, 4), draft=draft, seed=0, max_new_tokens=new_tokens)[0]
        rows.append(Row(f"{name}/exact_n4_{draft}_tokens_per_round", len(result.tokens) / result.stats["rounds"]))
    return rows


def _calls(model: Model, base: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, Callable[[], Any]]:
    how: dict[str, Any] = {"seed": 0, "max_new_tokens": new_tokens}
    calls: dict[str, Callable[[], Any]] = {
        "eager": partial(peers.generate_eagerly, base, torch.tensor(prompts), new_tokens),
        "base": partial(model.generate, prompts, sampler="direct", target="base", **how),
    }
    for count in NUM_MODELS:
        weights = _weights(model, count)
        calls[f"direct_n{count}"] = partial(model.generate, prompts, weights=weights, sampler="direct", **how)
    for draft in DRAFTS:
        options = {"weights": _weights(model, 4), "sampler": "exact", "draft": draft}
        calls[f"exact_n4_{draft}"] = partial(model.generate, prompts, **options, **how)
    for method in ("scr", "soups"):
        calls[f"{method}_n4"] = partial(answer, model, method, prompts, _weights(model, 4), **how)
    return calls


def _weights(model: Model, count: int) -> dict[str, float]:
    """Of the first poles of so many dimensions, and then of the others."""
    names = sorted(model.models.attribute_names, key="ESTJINFP".index)
    return dict.fromkeys(names[:count], 1 / count)


def _prompts(model: Model, count: int) -> list[list[int]]:
    """Held-out questions of one length, which `generate_eagerly` wants."""
    prompts = [model.encode(question) for question in stage("smollm2").held_out]
    (length, _), *_ = Counter(map(len, prompts)).most_common(1)
    return [prompt for prompt in prompts if len(prompt) == length][:count]
