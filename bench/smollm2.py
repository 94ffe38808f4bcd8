"""The real model that the demo has, in every type: beside transformers' `generate` and llama.cpp, under every sampler
and draft, and what it loses.

Knows what is compared and wanted; how calls take turns is `turns`'s. Texts do not end before their length.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import peers
from mpg.demo.stages import stage
from mpg.model import Model, load
from mpg.models import gguf
from mpg.models.sources import CONVERTED
from mpg.paper.methods import answer
from mpg.results import Result
from turns import Row, Say, shares, take_turns

TYPES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32, "quantize": "int4-draft"},
    "bfloat16": {"dtype": torch.bfloat16, "quantize": "int4-draft"},
    "int4": {"quantize": "int4"},
}
# Own call, other call, batch, how many times as fast by the processor's time on a CPU
GOALS = (
    ("base", "eager", 1, 1.0),
    ("base", "eager", 8, 1.5),
    ("direct_n2", "base", 1, 0.85),
    ("direct_n4", "base", 1, 0.75),
)
EXACT_GOAL = 1.1  # times as fast as `direct`, of the best draft
LLAMA_CPP_GOAL = 0.5  # of its tokens a second, by the base of four bits that both have
MAX_KL = 0.005  # nats a token that a type may lose against float32
NUM_MODELS = (1, 2, 4, 8)
DRAFTS = ("reference", "merged", "lookup", "model")  # "merged" and "model" in four bits beside models that are not
NUM_DRAFTED = 8  # texts by each draft: how much of one is accepted is luck
NUM_TEXTS, STEP = 12, 4  # that are compared, so many tokens at once: few, as when a token is decoded


def measure(new_tokens: int, runs: int, say: Say, models: str = "smollm2") -> list[Row]:
    """Shares of times as far as goals name them (those of float32), tokens a second of every call (at batch 8 of the
    base's alone) by the processor's time, the drafts of `exact`, and nats a token that a type loses.

    models: a set of the demo's
    """
    loaded = {name: load(models, **how) for name, how in TYPES.items()}
    base = gguf.resolve("base", loaded["float32"].recipe.base)
    own = {
        name: Model(model.models) for name, model in loaded.items()
    }  # without the recipe's options: calls say theirs
    eager = {name: AutoModelForCausalLM.from_pretrained(base, dtype=name).eval() for name in ("float32", "bfloat16")}
    for model in own.values():
        model.models.eos_token_ids = ()
    for plain in eager.values():
        plain.generation_config.eos_token_id = None
    llama_cpp = _llama_cpp(Path(base), _prompts(own["float32"], models, 1)[0], new_tokens)
    rows, seconds = [], {}
    for batch in (1, 8):
        say(f"{models}, batch {batch}")
        prompts = _prompts(own["float32"], models, batch)
        calls: dict[str, Callable[[], Any]] = {}
        for name, model in own.items():
            if name in eager:
                calls[f"{name}/eager"] = partial(peers.generate_eagerly, eager[name], torch.tensor(prompts), new_tokens)
            of_type = _calls(model, prompts, new_tokens)
            # at batch 8 minutes for each of the others, and no goal
            calls |= {f"{name}/{call}": of_type[call] for call in (of_type if batch == 1 else ["base"])}
        if batch == 1 and not isinstance(llama_cpp, str):
            calls["llama.cpp/base"] = llama_cpp
        seconds[batch] = take_turns(calls, runs, "cpu")
        for call, times in seconds[batch].items():
            speed = batch * new_tokens / median(of_run.processor for of_run in times)
            rows.append(Row(f"{models}, {call}_b{batch}_tokens_per_second", speed))
    for name in own:
        for call, other, batch, goal in GOALS:
            times = seconds[batch]
            if f"{name}/{other}" in times:
                share = shares(times[f"{name}/{other}"], times[f"{name}/{call}"]).processor
                row = f"{models}, {name}/{call}_vs_{other}_b{batch}"
                rows.append(Row(row, share, goal if name == "float32" else None))
    name = f"{models}, int4/base_vs_llama.cpp_b1"
    if isinstance(llama_cpp, str):
        rows.append(Row(name, None, LLAMA_CPP_GOAL, why=llama_cpp))
    else:
        share = shares(seconds[1]["llama.cpp/base"], seconds[1]["int4/base"]).processor
        rows.append(Row(name, share, LLAMA_CPP_GOAL))
    prompts = [own["float32"].encode(question) for question in stage(models).held_out[:NUM_TEXTS]]
    for name, model in own.items():
        say(f"{models}, {name}, drafts")
        goal = EXACT_GOAL if name == "float32" else None
        rows += compare_drafts(f"{models}, {name}/exact_n4", model, prompts[:NUM_DRAFTED], new_tokens, goal)
    say(f"{models}, what types lose")
    for name in ("bfloat16", "int4"):
        kl = mean_kl(own["float32"], own[name], prompts, new_tokens)
        rows.append(Row(f"{models}, {name}/kl_per_token", kl, MAX_KL, is_limit=True))
    return rows


def compare_drafts(
    name: str, model: Model, prompts: Sequence[list[int]], new_tokens: int, goal: float | None
) -> list[Row]:
    """`exact` with each draft, four attributes combined, on prompts one at a time: tokens a second and a round, and how
    many times as fast as `direct` on the same prompts the best one is."""
    results: dict[str, list[Result]] = {call: [] for call in ("direct", *_drafts(model))}

    def over(call: str) -> Callable[[], None]:
        options = {"sampler": "direct"} if call == "direct" else {"sampler": "exact", "draft": call}
        asked = cycle(enumerate(prompts))

        def ask() -> None:
            seed, prompt = next(asked)
            how = {"weights": _weights(model, 4), "seed": seed, "max_new_tokens": new_tokens, **options}
            results[call] += model.generate([prompt], **how)

        return ask

    seconds = take_turns({call: over(call) for call in results}, len(prompts), "cpu")
    rows, found = [], []
    for draft in _drafts(model):
        speed = new_tokens / median(of_text.processor for of_text in seconds[draft])
        rounds = [result.stats["rounds"] for result in results[draft]]
        rows.append(Row(f"{name}_{draft}_b1_tokens_per_second", speed))
        rows.append(Row(f"{name}_{draft}_tokens_per_round", new_tokens * len(rounds) / sum(rounds)))
        found.append(shares(seconds["direct"], seconds[draft]).processor)
    return [*rows, Row(f"{name}_vs_direct_n4_b1", max(found), goal)]


def mean_kl(model: Model, other: Model, prompts: Sequence[list[int]], new_tokens: int) -> float:
    """KL(model's base || other's base) a token, in nats, over the texts that the first one's base writes."""
    texts = model.generate(prompts, target="base", sampler="direct", seed=0, max_new_tokens=new_tokens)
    total = torch.zeros((), dtype=torch.float64)
    for prompt, text in zip(prompts, texts, strict=True):
        own, others = (_logprobs(each, prompt, text.tokens) for each in (model, other))
        total += (own.exp() * (own - others)).sum()
    return float(total / sum(len(text.tokens) for text in texts))


def _logprobs(model: Model, prompt: list[int], text: Sequence[int]) -> Tensor:
    """The base's row at every position of a text, (len(text), V) float64."""
    session = model.models.open([prompt], ["base"], len(prompt) + len(text))
    fed, parts = torch.tensor([[prompt[-1], *text[:-1]]]), []
    for first in range(0, len(text), STEP):
        tokens, start = fed[:, first : first + STEP], len(prompt) - 1 + first
        logits = session.forward(["base"], tokens, torch.tensor([start]), kv_length=start + tokens.shape[1])
        parts.append(logits[0, 0].double().log_softmax(-1))
    return torch.cat(parts)


def _calls(model: Model, prompts: list[list[int]], new_tokens: int) -> dict[str, Callable[[], Any]]:
    how: dict[str, Any] = {"seed": 0, "max_new_tokens": new_tokens}
    calls: dict[str, Callable[[], Any]] = {
        "base": partial(model.generate, prompts, sampler="direct", target="base", **how)
    }
    for count in NUM_MODELS:
        if count <= len(model.models.attribute_names):
            weights = _weights(model, count)
            calls[f"direct_n{count}"] = partial(model.generate, prompts, weights=weights, sampler="direct", **how)
    for method in ("scr", "soups"):
        calls[f"{method}_n4"] = partial(answer, model, method, prompts, _weights(model, 4), **how)
    return calls


def _drafts(model: Model) -> list[str]:
    return [draft for draft in DRAFTS if draft != "model" or not model.models.is_same("draft", "base")]


def _llama_cpp(base: Path, prompt: list[int], new_tokens: int) -> Callable[[], Any] | str:
    """A call of llama.cpp on the file that the base was converted from, or why there is none."""
    if find_spec("xllamacpp") is None:
        return "the wheel xllamacpp is not installed"
    facts = json.loads((base / CONVERTED).read_text()) if (base / CONVERTED).is_file() else {}
    if not Path(facts.get("source", "")).is_file():
        return "the GGUF file that the base was converted from is not there"
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = facts["source"]
    settings.n_ctx, settings.n_parallel, settings.verbosity = 1024, 1, -1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    asked = {
        "prompt": prompt, "n_predict": new_tokens, "ignore_eos": True, "cache_prompt": False, "seed": 0,
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
    }  # fmt: skip
    return partial(xllamacpp.Server(settings).handle_completions, asked)


def _weights(model: Model, count: int) -> dict[str, float]:
    """Equal weights of the first poles of so many dimensions, and then of the others."""
    names = [pole for pole in "ESTJINFP" if pole in model.models.attribute_names]
    return peers.equal_weights(names[:count])


def _prompts(model: Model, models: str, count: int) -> list[list[int]]:
    """Held-out questions of one length, which `generate_eagerly` wants."""
    prompts = [model.encode(question) for question in stage(models).held_out]
    (length, _), *_ = Counter(map(len, prompts)).most_common(1)
    return [prompt for prompt in prompts if len(prompt) == length][:count]
