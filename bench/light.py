"""The first things to ask of a GPU that mpg has never run on, each a step of `make gpu PART=light`.

On the device "cpu" the same steps run on stand-ins that are small: a rehearsal, whose numbers mean nothing.
"""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import mpg
import mpg_ext
from cases import Cases
from mpg.demo import MODELS
from mpg.demo.corpus import DEMO_QUESTIONS
from mpg.models.attention import ragged_attention
from mpg.models.graphs import CAPTURES
from mpg.models.lengths import both_ways, difference, most_queries
from test_ops import ON_FEATURES, ON_LOGITS, ON_ROWS, ON_SCORES

ROUNDS: tuple[dict[str, Any], ...] = (
    {"sampler": "direct", "target": "geometric"},
    {"sampler": "exact", "target": "geometric"},
    {"sampler": "exact", "target": "geometric", "draft": "merged"},
    {"sampler": "exact", "target": "arithmetic", "draft": "lookup", "adaptive": True},
    {"sampler": "exact", "target": "geometric", "draft": "model", "verify": "token"},
    {"sampler": "scr", "target": "arithmetic"},
    {"sampler": "token-rs", "target": "geometric"},
    {"sampler": "seq-rs", "target": "geometric", "tries": 2},
)
WAYS = ("mask", "lengths")  # of attention
WEIGHTS = ({"E": 1, "T": 1}, {"T": 0.5, "J": 1}, {"J": 1})  # of the prompts, two of which run at once


@dataclass(frozen=True)
class Sizes:
    """The ops' vocabulary, and of attention the heads, key/value heads, and positions of the cache."""

    vocab: int = 128_256
    heads: int = 32
    kv_heads: int = 8
    contexts: tuple[int, ...] = (512, 4096)


def first_light(device: str) -> Iterator[dict[str, Any]]:
    """What was found so far, after every step; `passed` says that all of them did. A step that raises is no end."""
    sizes = Sizes() if device == "cuda" else Sizes(999, 4, 2, (32,))
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "loads": lambda: {"passed": True, **mpg_ext.build_info()},
        "stream": partial(check_stream, device),
        "ops": partial(check_ops, device, sizes),
        "rounds": partial(compare_rounds, device, ROUNDS),
        "attention": partial(name_attention_kernels, device, sizes),
        "compiled": partial(compare_rounds, device, ROUNDS[:2], compile=True),
    }
    found: dict[str, Any] = {"passed": True}
    for name, step in steps.items():
        started = time.perf_counter()
        try:
            result = step()
        except Exception:  # whatever a kernel that never ran may raise
            result = {"passed": False, "error": traceback.format_exc(limit=-3)}
        found[name] = result | {"seconds": round(time.perf_counter() - started, 2)}
        found["passed"] = found["passed"] and result["passed"]
        yield found


def check_stream(device: str) -> dict[str, Any]:
    """Whether an op waits for what was launched before it on the stream that torch is on, and not on another."""
    with torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext():
        seeds = torch.zeros(4, dtype=torch.int64, device=device)
        if device == "cuda":
            torch.cuda._sleep(10**8)  # cycles, some 60 ms
        seeds += 7
        found = mpg_ext.draw_uniforms(seeds, seeds, purpose=1, count=4).cpu()
    wanted = mpg_ext.draw_uniforms(*[torch.full((4,), 7)] * 2, purpose=1, count=4)
    return {"passed": torch.equal(found, wanted)}


def check_ops(device: str, sizes: Sizes) -> dict[str, Any]:
    """Every op once against its twin, one sequence of logits in bfloat16, from a stream that is not the default."""
    wrong, names = {}, ON_SCORES + ON_LOGITS + ON_ROWS + ON_FEATURES
    for name in names:
        try:
            with torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext():
                getattr(Cases(1, sizes.vocab, torch.bfloat16, device), name)().check()
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"
    return {"passed": not wrong, "ops": len(names), "wrong": wrong}


def compare_rounds(device: str, ways: Sequence[dict[str, Any]], **switches: bool) -> dict[str, Any]:
    """The demo models, far too small to fill a GPU: that decoding runs, what a round costs beside the kernels, and that
    rounds replayed whole from graphs, and loaded with `switches`, give the texts that rounds launched kernel by kernel
    give. `captured`: the graphs of rounds that a call has left, none where a capture failed, of which `warnings` tell.
    """
    can_capture = device in CAPTURES
    switches_of = {False: {}, True: {"graphs": True, **switches}}
    models = {
        graphs: mpg.load(MODELS, draft=MODELS, device=device, dtype="float32", **switches_of[graphs])
        for graphs in (False, *[True] * can_capture)
    }
    rows, differing = [], []
    for options in ways:
        texts = {}
        settings = {"weights": list(WEIGHTS), "seed": 0, "max_new_tokens": 24, "batch_size": 2} | options
        for graphs, model in models.items():
            with warnings.catch_warnings(record=True) as caught:
                for _ in range(3):  # forwards are captured, then rounds, which then run
                    results = model.generate(DEMO_QUESTIONS[: len(WEIGHTS)], **settings)
            texts[graphs] = [result.tokens for result in results]
            captured = [len(idle.rounds.graphs) for idle in model.models.idle][-1:]
            told = {"captured": sum(captured), "warnings": [str(warning.message) for warning in caught]}
            rows.append(options | {"graphs": graphs, "text": results[0].text, **told, **results[0].stats})
        if any(tokens != texts[False] for tokens in texts.values()):
            differing.append(options)
    is_captured = all(row["captured"] for row in rows if row["graphs"])
    graph_bytes = models[True].models.graph_bytes() if can_capture else None
    passed = not differing and is_captured
    return {"passed": passed, "differing": differing, "graph_bytes": graph_bytes, "rows": rows}


def name_attention_kernels(device: str, sizes: Sizes) -> dict[str, Any]:
    """The kernels that attention of a chunk of one and of five tokens runs, by time, and microseconds of a call: by a
    mask and, on a GPU, by lengths; how far the two are apart, and up to how many tokens mpg would choose lengths."""
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CUDA] if device == "cuda" else [activity.CPU]
    attend = partial(ragged_attention, torch.nn.Identity())
    keys = torch.empty(1, sizes.kv_heads, 1, 128, device=device, dtype=torch.bfloat16)
    kernels, apart, refused, by_lengths = {}, {}, None, 0
    for context in sizes.contexts:
        for num_tokens in (1, 5):
            case = f"context {context}, tokens {num_tokens}"
            calls = dict(zip(WAYS, both_ways(attend, 1, num_tokens, context, sizes.heads, keys), strict=True))
            if device != "cuda":
                del calls["lengths"]
            for way, call in calls.items():
                try:
                    call()
                except (TypeError, RuntimeError) as error:
                    if way == "mask":
                        raise
                    refused = str(error)
                    continue
                with torch.profiler.profile(activities=activities) as profile:
                    call()
                events = sorted(profile.key_averages(), key=_microseconds, reverse=True)
                kernels[f"{case}, {way}"] = {event.key: round(_microseconds(event), 1) for event in events[:5]}
            if device == "cuda" and refused is None:
                apart[case] = difference(*calls.values())
    if device == "cuda" and refused is None:
        by_lengths = most_queries(attend, sizes.heads, keys)
    return {"passed": True, "kernels": kernels, "apart": apart, "by_lengths": by_lengths, "refused": refused}


def _microseconds(event: Any) -> float:
    return float(event.self_device_time_total or event.self_cpu_time_total)
