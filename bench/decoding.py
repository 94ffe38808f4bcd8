"""`make bench-decode`: decoding against its goals, against the loops of `peers`, and against its own forwards.

Knows what is run, counted and wanted; nothing of how a forward or a peer works. Peers take turns, run by run, so that
a busy machine slows all of them; what is reported is a median.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console, Group
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

import peers
import smollm2
from mpg.decode.request import Request
from mpg.decode.run import Scheduler
from mpg.demo import MODELS as DEMO_MODELS
from mpg.demo.corpus import DEMO_QUESTIONS
from mpg.files import check_writable, whole_file
from mpg.model import Model, load
from mpg.options import Options
from mpg.paper.methods import METHODS, answer
from mpg.paper.report import check_plot
from mpg.results import Result, Token
from peers import Shape
from turns import Row, Say, shares, take_turns

KL = 0.1  # nats a token between each attribute and the base of the random models
PROMPT_TOKENS = 32
ALL_LINEARS, QUERY_VALUE = "all-linear", ("q_proj", "v_proj")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is run. `new_tokens`, `prompts`: of the table of methods; `peer_tokens`: of a call of a peer.

    graphs: whether our own rounds are captured, in calls that do not count
    """

    graphs: bool = False
    runs: int = 3
    prompts: int = 2
    new_tokens: int = 32
    peer_tokens: int = 64
    growth_tokens: int = 8
    num_models: tuple[int, ...] = (1, 2, 4, 8, 16)
    chunk_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    contexts: tuple[int, ...] = (128, 512, 1024)

    @property
    def calls(self) -> int:
        """The number of calls that are timed, and before them one that meets rounds, and one that captures them."""
        return self.runs + 2 * self.graphs


FULL = Plan(prompts=100, new_tokens=128, growth_tokens=32, contexts=(128, 512, 1024, 2048, 4096, 8192))


@dataclass
class Report:
    """What one run of the benchmark found.

    methods: per model set and method, the entries of `time_method`; growth: per quantity, points of tokens a second
    """

    hardware: dict[str, Any]
    plan: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    peers: list[dict[str, Any]] = field(default_factory=list)
    methods: list[dict[str, Any]] = field(default_factory=list)
    growth: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [row.as_json() for row in self.rows]}


class Part(StrEnum):
    """What can be run by itself."""

    BASE, SMOLLM2, ROWS = "base", "smollm2", "rows"
    PEERS, GPU, METHODS, GROWTH = "peers", "gpu", "methods", "growth"


def run(
    plan: Plan,
    device: str = "cpu",
    threads: int = 1,
    say: Say = lambda stage: None,
    parts: Collection[Part] = tuple(Part),
) -> Report:
    """All of it: own base beside `generate`, the peers, the paper's Table 3, growth; on a GPU its goals too.

    device:  "cpu" or "cuda"; the CPU's goals are for "cpu", those of an H200 for "cuda"
    threads: of torch's products
    say:     called with the name of every stage
    parts:   what is run of it

    Raises ValueError if the loops that are compared do not give the same text.
    """
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        report = Report(describe_hardware(device, threads), asdict(plan))
        if Part.BASE in parts:
            report.rows += measure_base(peers.SMOLLM2_135M, plan, device, say)
        if Part.SMOLLM2 in parts and device == "cpu":
            report.rows += smollm2.measure(plan.peer_tokens, plan.runs, say)
        if Part.ROWS in parts:
            report.rows += measure_rows(peers.SMALL, plan, device, say)
        if Part.GPU in parts:
            if device == "cpu":
                report.rows += [Row(name, None, goal) for name, goal in GPU_GOALS.items()]
            else:
                report.rows += measure_gpu(peers.LLAMA_8B, peers.LLAMA_1B, plan, device, say)
        if Part.PEERS in parts or Part.METHODS in parts:
            say("random Llama, hidden 512")
            adapted = peers.add_adapters(peers.random_llama(peers.SMALL, device, torch.float32), 4, KL, ALL_LINEARS)
            kl_per_token = {name: round(peers.mean_kl(adapted, name), 4) for name in adapted.peft_config}
            report.hardware["kl_per_token"] = kl_per_token
        for batch in (1, 8) if Part.PEERS in parts else ():
            say(f"peers, batch {batch}")
            report.peers.append(compare_peers(adapted, batch, plan))
        report.rows += judge_peers(report.peers, on_cpu=device == "cpu")
        for name, model, prompts, methods in open_model_sets(adapted, plan, device) if Part.METHODS in parts else ():
            say(f"methods, {name}")
            report.methods += time_methods(name, model, prompts, methods, plan)
        report.rows += [
            Row(f"{entry['models']}/{entry['method']}/{key}", entry[key])
            for entry in report.methods
            for key in HEADLINES
            if entry[key] is not None
        ]
        if Part.GROWTH in parts:
            say("growth")
            report.growth = measure_growth(plan, device)
    finally:
        torch.set_num_threads(threads_before)
    return report


def describe_hardware(device: str, threads: int) -> dict[str, Any]:
    """What the figures were taken on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name() if device != "cpu" else None,
        "torch": torch.__version__,
    }


# Forwards and rounds of a call, seen from outside


class Watch:
    """Times every model forward, and the rounds by when their tokens reach the host. While it does none is captured.

    device:     whose forwards are waited for, each by itself; None does not wait, and then forwards are not timed right
    forward_s:  seconds in forwards, reading the prompts included
    gaps:       of every round but the first: (seconds since the one before, seconds of them in forwards)
    """

    def __init__(self, device: str | None) -> None:
        self.synchronise = torch.cuda.synchronize if (device or "").startswith("cuda") else lambda: None
        self.forward_s, self.num_forwards = 0.0, 0
        self.gaps: list[tuple[float, float]] = []
        self._last: tuple[float, float, int] | None = None

    @contextmanager
    def watching(self, model: Model) -> Iterator[None]:
        """See the calls of a model, and of those that are made of it meanwhile."""
        model.models.observer = self._time
        try:
            yield
        finally:
            model.models.observer = nullcontext

    @contextmanager
    def _time(self, reads_prompts: bool) -> Iterator[None]:
        self.synchronise()
        started = time.perf_counter()
        yield
        self.synchronise()
        self.forward_s += time.perf_counter() - started
        self.num_forwards += 1
        if reads_prompts:
            self._last = None

    def see(self, token: Token) -> None:
        """What `generate` calls with every token; those with no forward between them are one round's."""
        now = time.perf_counter(), self.forward_s, self.num_forwards
        if self._last is None:
            self._last = now
        elif self._last[2] != self.num_forwards:
            self.gaps.append((now[0] - self._last[0], now[1] - self._last[1]))
            self._last = now


def loop_overhead(gaps: Sequence[tuple[float, float]]) -> float:
    """Share of the rounds' time that is not in model forwards."""
    return 1 - sum(forward for _, forward in gaps) / sum(seconds for seconds, _ in gaps)


# Own base

BASE_GOALS = {"base_vs_eager_b1": 1.0, "base_vs_eager_b8": 1.5, "direct_n2_vs_base_b1": 0.85}


def measure_base(shape: Shape, plan: Plan, device: str, say: Say = lambda stage: None) -> list[Row]:
    """Whole calls of own base beside `generate`, and of `direct` with N = 2 beside own base, of a random Llama with
    adapters on all linear layers and of mbti-tiny.

    The base is run with two adapters loaded, and without any ("base_alone"); on the CPU also with compile=True
    ("compiled"); `direct` also with weights that sum to one ("of_one"), for which the base is not run. The goals, which
    are the CPU's, are for the processor's time; rows by the clock on the wall end "_wall".
    """
    random = peers.add_adapters(peers.random_llama(shape, device, torch.float32), 2, None, ALL_LINEARS)
    sources: dict[str, tuple[Any, Any, list[str]]] = {shape.name: (random, peers.plain(random), ["a0", "a1"])}
    if os.environ.get("MPG_MODELS"):
        folder = Path(os.environ["MPG_MODELS"], "mbti-tiny")
        sources["mbti-tiny"] = folder, AutoModelForCausalLM.from_pretrained(folder).to(device).eval(), ["E", "T"]
    rows = []
    for name, (source, base, attributes) in sources.items():
        models = {"base": load(source, device=device), "base_alone": load(base, {"same": base})}
        if device == "cpu":
            models["base_compiled"] = load(source, device=device, compile=True)
        base.generation_config.eos_token_id, model = None, models["base"]
        for each in models.values():
            each.models.eos_token_ids = ()
        weights = {"direct_n2": peers.equal_weights(attributes), "direct_n2_of_one": dict.fromkeys(attributes, 0.5)}
        options: dict[str, Any] = {"sampler": "direct", "seed": 0, "max_new_tokens": plan.peer_tokens}
        for batch in (1, 8):
            say(f"base, {name}, batch {batch}")
            prompts = random_prompts(batch, PROMPT_TOKENS, model.models.vocab_size).to(device)
            contestants: dict[str, Callable[[], Any]] = {
                "eager": partial(peers.generate_eagerly, base, prompts, plan.peer_tokens),
            }
            for own, each in models.items():
                contestants[own] = partial(each.generate, prompts.tolist(), target="base", **options)
                for direct in weights if batch == 1 and own != "base_alone" else ():
                    how = {"weights": weights[direct], **options}
                    contestants[own.replace("base", direct)] = partial(each.generate, prompts.tolist(), **how)
            seconds = take_turns(contestants, plan.runs, device)
            for own in list(contestants)[1:]:
                other = own.replace("direct_n2", "base").replace("_of_one", "") if own.startswith("direct") else "eager"
                found, row = shares(seconds[other], seconds[own]), f"{own}_vs_{other}_b{batch}"
                goal = BASE_GOALS.get(re.sub("_alone|_compiled|_of_one", "", row)) if device == "cpu" else None
                rows += [Row(f"{name}/{row}", found.processor, goal), Row(f"{name}/{row}_wall", found.wall)]
    return rows


# Rows that pay for what they use

ROW_GOALS = {
    "own_attributes_time": 1.15, "own_attributes_cache": 1.15,
    "one_active_of_32_direct": 1.15, "one_active_of_32_exact": 1.15,
}  # fmt: skip


def measure_rows(shape: Shape, plan: Plan, device: str, say: Say = lambda stage: None) -> list[Row]:
    """What 16 requests that weigh 2 of 8 adapters take, each 2 others than its neighbours, beside as many in a model
    that has just 2; and a round of the demo models in which one request of 32 still runs, beside one of it alone.

    Times are the processor's; those by the clock on the wall are in the rows that end "_wall".
    """
    say("rows, 8 adapters")
    adapted = peers.add_adapters(peers.random_llama(shape, device, torch.float32), 8, None, ALL_LINEARS)
    names = list(adapted.peft_config)
    many, few = (load(adapted, {name: name for name in some}, graphs=plan.graphs) for some in (names, names[:2]))
    prompts = random_prompts(16, PROMPT_TOKENS, shape.vocab).tolist()
    own = [peers.equal_weights((names[i % 8], names[(i + 1 + i // 8) % 8])) for i in range(16)]
    options: dict[str, Any] = {"sampler": "direct", "seed": 0, "max_new_tokens": plan.peer_tokens}
    weights = {"many": own, "few": [peers.equal_weights(names[:2])] * 16}
    calls = {name: partial(model.generate, prompts, weights=weights[name], **options) for name, model in
             (("many", many), ("few", few))}  # fmt: skip
    seconds = take_turns(calls, plan.runs, device)
    taken = {name: caches_of(model, prompts, weights[name]) for name, model in (("many", many), ("few", few))}
    found = {"own_attributes_time": shares(seconds["many"], seconds["few"])}
    rows = [Row("own_attributes_cache", taken["many"] / taken["few"], ROW_GOALS["own_attributes_cache"], is_limit=True)]
    demo = load(DEMO_MODELS, device=device, graphs=plan.graphs)
    for sampler in ("direct", "exact"):
        say(f"rows, one active of 32, {sampler}")
        alone, of_32 = (open_rounds(demo, sampler, num_ended) for num_ended in (0, 31))
        seconds = take_turns({"alone": alone.step, "of 32": of_32.step}, 10 * plan.runs, device)
        found[f"one_active_of_32_{sampler}"] = shares(seconds["of 32"], seconds["alone"])
        alone.close(), of_32.close()
    for name, ratio in found.items():
        rows += [Row(name, ratio.processor, ROW_GOALS[name], is_limit=True), Row(f"{name}_wall", ratio.wall)]
    return rows


def caches_of(model: Model, prompts: Sequence[Sequence[int]], weights: Sequence[dict[str, float]]) -> int:
    """Bytes that the caches of a call for 32 tokens take."""
    names = model.models.attribute_names
    requests = [
        Request(list(prompt), tuple(own.get(name, 0.0) for name in names), own, 32, 0)
        for prompt, own in zip(prompts, weights, strict=True)
    ]
    options = Options(sampler="direct")
    scheduler = Scheduler(model.models, options, (), **Scheduler.sizes(model.models, requests, options))
    for request in requests:
        scheduler.add(request)
    scheduler.step()
    room = scheduler.session.room
    runners = [pool.runner for pool in room.pools.values()]
    num_bytes = sum(runner.loaded.cache_bytes(runner.num_rows, room.positions) for runner in runners)
    scheduler.close()
    return num_bytes


def open_rounds(model: Model, sampler: str, num_ended: int) -> Scheduler:
    """A scheduler in which as many requests have ended and one goes on."""
    alpha = tuple(float(name in ("E", "T")) for name in model.models.attribute_names)
    limits = [1] * num_ended + [model.models.max_positions - PROMPT_TOKENS]
    prompt = random_prompts(1, PROMPT_TOKENS, model.models.vocab_size).tolist()[0]
    requests = [Request(prompt, alpha, {}, limit, seed) for seed, limit in enumerate(limits)]
    options = Options(sampler=sampler)
    scheduler = Scheduler(model.models, options, (), **Scheduler.sizes(model.models, requests, options))
    for request in requests:
        scheduler.add(request)
    for _ in range(3):
        scheduler.step()
    return scheduler


# Peers


def compare_peers(adapted: Any, batch: int, plan: Plan) -> dict[str, Any]:
    """Tokens a second of mpg and of every peer, all adapters of `adapted` in use; and mpg's own loop."""
    names = tuple(adapted.peft_config)
    base, device = peers.plain(adapted), str(adapted.device)
    model = load(adapted, {name: name for name in names}, graphs=plan.graphs)
    prompts = random_prompts(batch, PROMPT_TOKENS, model.models.vocab_size).to(device)
    weights = peers.equal_weights(names)
    each = list(weights.values())
    check_peers(model, adapted, prompts, weights)
    count = plan.peer_tokens

    def direct(watch: Watch | None = None, **options: Any) -> Any:
        return model.generate(
            prompts.tolist(), sampler="direct", max_new_tokens=count, seed=0, on_token=watch and watch.see, **options
        )

    contestants: dict[str, Callable[[], Any]] = {
        "direct": lambda: direct(weights=weights),
        "base": lambda: direct(target="base"),
        "eager": lambda: peers.generate_eagerly(base, prompts, count),
        "adapter_names": lambda: peers.run_adapter_names(adapted, names, prompts, each, count, False),
        "sequential": lambda: peers.run_adapters_in_turn(adapted, names, prompts, each, count, False),
    }
    if device.startswith("cuda"):
        contestants["compiled"] = lambda: peers.generate_eagerly(base, prompts, count, "static")
    seconds = take_turns(contestants, plan.runs, device)
    watch = Watch(device)
    with watch.watching(model):
        for _ in range(plan.runs):
            direct(watch, weights=weights)
    return {
        "models": f"{peers.SMALL.name}, N = {len(names)}",
        "batch": batch,
        "new_tokens": count,
        "tokens_per_second": {name: batch * count / median(t.wall for t in times) for name, times in seconds.items()},
        "times_as_fast": {name: shares(times, seconds["direct"]).wall for name, times in seconds.items()},
        "loop_overhead": loop_overhead(watch.gaps),
    }


def check_peers(model: Model, adapted: Any, prompts: Tensor, weights: dict[str, float], count: int = 4) -> None:
    """Raise ValueError unless mpg and the loops give the same greedy text, with the same log-ratios."""
    names, shares = tuple(weights), list(weights.values())
    results = model.generate(
        prompts.tolist(), weights=weights, sampler="direct", temperature=0, max_new_tokens=count, trace=True
    )
    tokens = torch.tensor([result.tokens for result in results])
    ratios = torch.tensor([[[of[name] for of in result.log_ratios] for result in results] for name in names])
    for loop in (peers.run_adapters_in_turn, peers.run_adapter_names):
        other_tokens, other_ratios = loop(adapted, names, prompts, shares, count, True)
        error = (other_ratios.cpu() - ratios).abs().max()
        if not torch.equal(other_tokens.cpu(), tokens) or error > 1e-3 * ratios.abs().max():
            raise ValueError(f"{loop.__name__}: expected the text of sampler 'direct', got another ({error=:.2g})")


def judge_peers(comparisons: Sequence[dict[str, Any]], *, on_cpu: bool) -> list[Row]:
    """The issue's rows: how many times as fast `direct` is as each loop, and what its own loop takes of a round."""
    goals = {"adapter_names": {1: 1.25, 8: 1.25}, "sequential": {1: 3.0, 8: 2.3}}
    rows = []
    for found in comparisons:
        batch, ratios = found["batch"], found["times_as_fast"]
        for peer in ("sequential", "adapter_names", "eager", "base"):
            goal = goals.get(peer, {}).get(batch) if on_cpu else None
            rows.append(Row(f"direct_vs_{peer}_b{batch}", ratios[peer], goal))
        rows.append(Row("loop_overhead" + f"_b{batch}" * (batch > 1), found["loop_overhead"], 0.10, is_limit=True))
    return rows


def random_prompts(batch: int, length: int, vocab_size: int) -> Tensor:
    """out: (batch, length) int64, the same in every run"""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(batch))


# The paper's Table 3

HEADLINES = ("tokens_per_second", "model_calls_per_token", "depth_per_token", "reject_rate")


def open_model_sets(adapted: Any, plan: Plan, device: str) -> Iterator[tuple[str, Model, list[Any], tuple[str, ...]]]:
    """Names, models, prompts and methods: the shipped set, the one in $MPG_MODELS if any, the random Llama.

    The specialised base of the last is its base with the adapter a0 merged in.
    """
    specialised = tuple(method for method in METHODS if method.endswith("-specialized"))
    plain = tuple(method for method in METHODS if method not in specialised)
    folders = {"demo": DEMO_MODELS}
    if os.environ.get("MPG_MODELS"):
        folders["mbti-tiny"] = Path(os.environ["MPG_MODELS"], "mbti-tiny")
    for name, folder in folders.items():
        model = load(folder, device=device, graphs=plan.graphs)
        questions = [DEMO_QUESTIONS[index % len(DEMO_QUESTIONS)] for index in range(plan.prompts)]
        for count in sorted({2, min(4, len(model.models.attribute_names))}):
            yield f"{name}, N = {count}", first_attributes(model, count), questions, plain
    merged = copy.deepcopy(adapted).merge_and_unload(adapter_names=["a0"])
    prompts = random_prompts(plan.prompts, PROMPT_TOKENS, adapted.config.vocab_size).tolist()
    for count in (2, 4):
        name, attributes = f"{peers.SMALL.name}, N = {count}", {f"a{i}": f"a{i}" for i in range(count)}
        yield name, load(adapted, attributes, graphs=plan.graphs), prompts, plain
        yield name, load(merged, attributes, anchor=adapted, graphs=plan.graphs), prompts, specialised


def first_attributes(model: Model, count: int) -> Model:
    """The same models with the first attributes alone."""
    twin = model.models.with_roles()
    twin.attribute_names = twin.attribute_names[:count]
    return Model(twin)


def time_methods(
    name: str, model: Model, prompts: Sequence[Any], methods: Sequence[str], plan: Plan
) -> list[dict[str, Any]]:
    """One entry a method, medians over the runs; `why` says what a method lacks that was not run."""
    weights = peers.equal_weights(model.models.attribute_names)
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    missing: dict[str, str] = {}
    for seed in range(plan.runs):
        for method in methods:
            if method not in missing:
                try:
                    runs[method].append(time_method(model, method, prompts, weights, plan, seed))
                except ValueError as error:
                    missing[method] = str(error)
    entries = []
    for method, found in runs.items():
        figures = {key: median(run[key] for run in found) for key in found[0]} if found else {}
        entry = {"models": name, "method": method, "why": missing.get(method), **dict.fromkeys(HEADLINES), **figures}
        entries.append({key: None if value != value else value for key, value in entry.items()})
    return entries


def time_method(
    model: Model, method: str, prompts: Sequence[Any], weights: dict[str, float], plan: Plan, seed: int
) -> dict[str, float]:
    """One run over the prompts, one at a time; K = 4, as every sampler has it.

    out: tokens_per_second; seconds_per_sequence; ideal_seconds_per_sequence, of them in model forwards alone;
    time_to_first_token; round_p50_ms and round_p99_ms, between two rounds; loop_overhead; call_overhead_ms, of a call
    for one token without its forwards; and the mean of the statistics of `Result.stats` that `STATISTICS` below names
    """
    device = str(model.models.device)
    watch, call = Watch(device), Watch(device)
    results, seconds = [], 0.0
    with watch.watching(model):
        for index, prompt in enumerate(prompts):
            started = time.perf_counter()
            options: dict[str, Any] = {"seed": 1000 * seed + index, "max_new_tokens": plan.new_tokens}
            answers = answer(model, method, [prompt], weights, on_token=watch.see, **options)
            seconds += time.perf_counter() - started
            results += [result for of_name in answers.values() for result in of_name]
    with call.watching(model):
        started = time.perf_counter()
        num_calls = len(answer(model, method, [prompts[0]], weights, seed=seed, max_new_tokens=1))
        call_s = (time.perf_counter() - started - call.forward_s) / num_calls
    gaps_ms = [1000 * gap for gap, _ in watch.gaps] or [math.nan, math.nan]
    percentiles = quantiles(gaps_ms, n=100, method="inclusive") if len(gaps_ms) > 1 else gaps_ms * 99
    return {
        "tokens_per_second": sum(len(result.tokens) for result in results) / seconds,
        "seconds_per_sequence": seconds / len(results),
        "ideal_seconds_per_sequence": watch.forward_s / len(results),
        "time_to_first_token": median(result.stats["time_to_first_token"] for result in results),
        "round_p50_ms": percentiles[49],
        "round_p99_ms": percentiles[98],
        "loop_overhead": loop_overhead(watch.gaps) if watch.gaps else math.nan,
        "call_overhead_ms": 1000 * call_s,
        **{key: sum(result.stats.get(key, math.nan) for result in results) / len(results) for key in STATISTICS},
    }


STATISTICS = ("model_calls_per_token", "depth_per_token", "positions_per_token", "reject_rate", "accept_rate")


# Growth


def measure_growth(plan: Plan, device: str) -> dict[str, list[dict[str, Any]]]:
    """Tokens a second, reading the prompt left out, of direct against N, batch and context, of scr and exact against K.

    What does not grow is N = 4, batch 1, a prompt of 32 tokens.
    """
    base = peers.random_llama(peers.SMALL, device, torch.float32)
    crowd = peers.add_adapters(base, max(plan.num_models), KL, ALL_LINEARS)
    model = load(crowd, {name: name for name in crowd.peft_config}, graphs=plan.graphs)
    few, more = plan.growth_tokens, max(plan.growth_tokens, 3 * max(plan.chunk_sizes))  # some rounds of every K
    quantities: dict[str, tuple[str, Sequence[int], int, Sequence[str]]] = {
        "N": ("num_models", plan.num_models, few, ("direct",)),
        "batch": ("batch", plan.batch_sizes, few, ("direct",)),
        "context": ("context", plan.contexts, few, ("direct",)),
        "K": ("chunk_size", plan.chunk_sizes, more, ("exact", "scr")),
    }
    growth = {}
    for quantity, (setting, values, new_tokens, samplers) in quantities.items():
        runs: dict[tuple[int, str], list[float]] = {(x, sampler): [] for x in values for sampler in samplers}
        for seed in range(plan.runs):
            for (x, sampler), speeds in runs.items():
                options: dict[str, Any] = {setting: x, "sampler": sampler, "max_new_tokens": new_tokens, "seed": seed}
                speeds.append(decode_speed(model, **options))
        growth[quantity] = [{"x": x, **{name: median(runs[x, name]) for name in samplers}} for x in values]
    return growth


def decode_speed(
    model: Model, *, num_models: int = 4, batch: int = 1, context: int = PROMPT_TOKENS, **options: Any
) -> float:
    """Tokens a second of all rounds but the first of each request. Nothing watches, as no round would be captured."""
    prompts = random_prompts(batch, context, model.models.vocab_size).tolist()
    if options.get("target") != "base":
        options["weights"] = peers.equal_weights(model.models.attribute_names[:num_models])
    results = model.generate(prompts, **{"seed": 0, "batch_size": batch, **options})
    num_tokens = sum(len(result.tokens) * (1 - 1 / result.stats["rounds"]) for result in results)
    return num_tokens / max(map(seconds_of_rounds, results))


def seconds_of_rounds(result: Result) -> float:
    """Seconds from the first token of a request, which began with its call, to its last."""
    return len(result.tokens) / result.stats["tokens_per_second"] - result.stats["time_to_first_token"]


def render(report: Report) -> Group:
    """Three tables: the goals, the peers, the methods."""
    goals = Table(
        title=", ".join(f"{k} {v}" for k, v in report.hardware.items() if v is not None), title_justify="left"
    )
    for header in ("row", "value", "goal", "pass"):
        goals.add_column(header, justify="left" if header == "row" else "right")
    for row in report.rows:
        if row.goal is not None:
            wanted = f"{'<=' if row.is_limit else '>='} {row.goal:g}"
            passed = {True: "yes", False: "NO", None: row.why or "not measured here"}[row.as_json()["pass"]]
            goals.add_row(row.name, "" if row.value is None else f"{row.value:.2f}", wanted, passed)
    against = Table(title="tokens/s of the peers", title_justify="left")
    for header in ("models", "batch", *(report.peers[0]["tokens_per_second"] if report.peers else ())):
        against.add_column(header, justify="right")
    for found in report.peers:
        speeds = (f"{speed:.1f}" for speed in found["tokens_per_second"].values())
        against.add_row(found["models"], str(found["batch"]), *speeds)
    methods = Table(title="methods, one prompt at a time, K = 4", title_justify="left")
    columns = {
        "tokens_per_second": "tokens/s", "seconds_per_sequence": "s/sequence", "ideal_seconds_per_sequence": "forwards",
        "time_to_first_token": "first token s", "round_p50_ms": "p50 ms", "round_p99_ms": "p99 ms",
        "call_overhead_ms": "call ms", "model_calls_per_token": "calls/token", "depth_per_token": "depth/token",
        "positions_per_token": "positions/token", "reject_rate": "rejected",
    }  # fmt: skip
    for header in ("models", "method", *columns.values()):
        methods.add_column(header, justify="left" if header in ("models", "method") else "right")
    for entry in report.methods:
        if entry["why"] is None:
            figures = ("" if entry[key] is None else f"{entry[key]:.3g}" for key in columns)
            methods.add_row(entry["models"], entry["method"], *figures)
    return Group(*(table for table in (goals, against, methods) if table.rows))


def plot_growth(report: Report, path: Path) -> None:
    """Draw the four curves. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3), layout="constrained")
    for axes, (quantity, points) in zip(figure.subplots(1, 4), report.growth.items(), strict=True):
        for sampler in [key for key in points[0] if key != "x"]:
            axes.plot([p["x"] for p in points], [p[sampler] for p in points], marker="o", label=sampler)
        axes.set(xscale="log", xlabel=quantity, ylabel="tokens/s", ylim=(0, None))
        axes.set_xticks([p["x"] for p in points], [str(p["x"]) for p in points])
        axes.minorticks_off()
        axes.legend()
    figure.suptitle(f"{peers.SMALL.name}, {report.hardware['gpu'] or report.hardware['cpu']}")
    figure.savefig(path, dpi=120)


# The goals for one H200

TOKENS_A_ROUND = 3.2  # exact, k = 4, a noisy small draft at KL .1: enumerated, see docs/drafts.md
GPU_GOALS = {
    "gpu_base_vs_bandwidth": 0.75,
    "gpu_base_vs_eager": 5.0,
    "gpu_base_vs_compiled": 1.0,
    "gpu_compiled_vs_captured": 1.0,
    "gpu_direct_vs_base_all_linears": 0.85,
    "gpu_direct_vs_base_qv": 0.95,
    "gpu_scr_vs_ideal": 0.95,
    "gpu_exact_synthetic_vs_base": 1.4,
    "gpu_direct_b32_vs_b1": 12.0,
}


# What is measured of every batch and context, beside the goals; a round of `exact`, as its acceptance is not to be had
GPU_CALLS: dict[str, dict[str, Any]] = {
    "base": {"target": "base"},
    "direct_n2": {"num_models": 2},
    "direct_n4": {"num_models": 4},
    "exact_n4": {"num_models": 4, "sampler": "exact", "draft": "model"},
    "scr_n4": {"num_models": 4, "sampler": "scr"},
}


def measure_gpu(
    large: Shape,
    small: Shape,
    plan: Plan,
    device: str,
    say: Say,
    *,
    batches: Sequence[int] = (1, 8, 32),
    contexts: Sequence[int] = (512, 4096),
) -> Iterator[Row]:
    """The rows of `GPU_GOALS`, and then those of `GPU_CALLS` at every batch and context, each as soon as it is there.

    Models are loaded from folders, as products are joined and widened where their weights are nobody else's. The bound
    of the base is the copy bandwidth over the weights that a token reads. The round of the synthetic row is measured,
    with `small` for a draft; how many tokens it commits is not, the weights being random. A row that does not fit into
    the GPU's memory has no value; one of ours that misses its goal says what the time of a call goes to.
    """
    say(f"goals of a GPU, {large.name}")

    def row(name: str, value: float) -> Row:
        return Row(name, value, GPU_GOALS[name])

    prompts = random_prompts(1, PROMPT_TOKENS, large.vocab)
    weights = peers.equal_weights([f"a{index}" for index in range(4)])
    own_base: dict[str, Any] = {"sampler": "direct", "target": "base"}
    settings: dict[str, Any] = {"max_new_tokens": plan.peer_tokens, "seed": 0}

    def seconds(call: Callable[[], Any]) -> float:
        return median(run.wall for run in take_turns({"": call}, plan.runs, device)[""])

    def rounds(sampler: str) -> tuple[float, float]:
        """Rounds of a call but the first, and their seconds, the least of the runs."""
        calls = [
            model.generate(prompts.tolist(), weights=weights, sampler=sampler, **settings)[0] for _ in range(plan.calls)
        ]
        return calls[-1].stats["rounds"] - 1, min(map(seconds_of_rounds, calls[-plan.runs :]))

    with TemporaryDirectory() as name:
        folder = Path(name)
        peers.random_llama(small, device, torch.bfloat16).save_pretrained(folder / "draft")
        base = _save_adapted(peers.random_llama(large, device, torch.bfloat16), folder)

        def open_model(adapters: str, **switches: Any) -> Model:
            attributes = {name: folder / adapters / name for name in weights}
            switches = {"device": device, "dtype": "bfloat16", "graphs": plan.graphs, **switches}
            return load(folder / "base", attributes, draft=folder / "draft", **switches)

        model = open_model("all linears")
        own, direct = _speed(model, plan, target="base"), _speed(model, plan)

        def explained(row: Row, batch: int = 1, **options: Any) -> Row:
            if row.as_json()["pass"] is not False:
                return row
            options = {"sampler": "direct", "batch": batch, "max_new_tokens": plan.peer_tokens, **options}
            return replace(row, why=name_kernels(lambda: decode_speed(model, **options), device))

        of_bound = own / (copy_bandwidth(device) / peers.num_bytes(base))
        yield explained(row("gpu_base_vs_bandwidth", of_bound), target="base")
        yield explained(row("gpu_direct_vs_base_all_linears", direct / own))
        for held in (Watch(device), Watch(device)):  # the first one's forwards are captured
            with held.watching(model):
                model.generate(prompts.tolist(), weights=weights, sampler="scr", on_token=held.see, **settings)
        ideal = sum(forward for _, forward in held.gaps)
        yield explained(row("gpu_scr_vs_ideal", ideal / rounds("scr")[1]), sampler="scr")
        num_rounds, of_rounds = rounds("exact")
        speed = TOKENS_A_ROUND * num_rounds / of_rounds
        yield explained(row("gpu_exact_synthetic_vs_base", speed / own), sampler="exact")
        short = min(contexts)
        many = _speed(model, plan, batch=32, context=short)
        yield explained(row("gpu_direct_b32_vs_b1", many / _speed(model, plan, context=short)), batch=32, context=short)
        other = open_model("query and value")
        yield row("gpu_direct_vs_base_qv", _speed(other, plan) / _speed(other, plan, target="base"))
        del other
        whole = seconds(lambda: model.generate(prompts.tolist(), **own_base, **settings))
        for peer, implementation in (("eager", None), ("compiled", "static")):
            call = partial(peers.generate_eagerly, base, prompts.to(device), plan.peer_tokens, implementation)
            yield row(f"gpu_base_vs_{peer}", seconds(call) / whole)
        del base, call
        try:
            both = _speed(open_model("all linears", compile=True), plan)
            yield row("gpu_compiled_vs_captured", both / direct)
        except Exception as error:  # whatever a compiler raises: the rows to come do not need it
            yield replace(row("gpu_compiled_vs_captured", 0), value=None, why=f"{type(error).__name__}: {error}")
    gc.collect()
    for context, batch, (name, options) in product(contexts, batches, GPU_CALLS.items()):
        say(f"{name}, batch {batch}, context {context}")
        value = None
        with suppress(MemoryError):
            value = _speed(model, replace(plan, runs=1), batch=batch, context=context, **options)
        yield Row(f"gpu_{name}_b{batch}_c{context}_tokens_per_second", value)


def _speed(model: Model, plan: Plan, **settings: Any) -> float:
    settings = {"sampler": "direct", "max_new_tokens": plan.peer_tokens, **settings}
    return median([decode_speed(model, **settings) for _ in range(plan.calls)][-plan.runs :])


def _save_adapted(base: Any, folder: Path) -> Any:
    """Write a base, and two sets of four adapters of it, of the same names. out: the base, without any"""
    base.save_pretrained(folder / "base")
    for name, modules in (("query and value", QUERY_VALUE), ("all linears", ALL_LINEARS)):
        adapted = peers.add_adapters(base, 4, KL, modules)
        adapted.save_pretrained(str(folder / name), save_embedding_layers=False)
        base = adapted.unload()
    return base


def name_kernels(call: Callable[[], Any], device: str, most: int = 8) -> str:
    """The kernels (on the CPU the operators) that a call runs the longest, their shares of its time, and how often."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if device.startswith("cuda") else activity.CPU]) as profile:
        call()
    times = {
        f"{event.key[:60]} x {event.count}": event.self_device_time_total or event.self_cpu_time_total
        for event in profile.key_averages()
    }
    longest = sorted(times, key=lambda name: times[name], reverse=True)[:most]
    return "; ".join(f"{times[name] / sum(times.values()):.0%} {name}" for name in longest)


def copy_bandwidth(device: str, size: int = 2**30) -> float:
    """Bytes a second that a copy on the device reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = take_turns({"copy": lambda: target.copy_(source)}, 9, device)["copy"]
    return 2 * size / median(seconds.wall for seconds in times)


def main(
    full: Annotated[bool, typer.Option("--full", help="The paper's size: hours on a CPU.")] = False,
    out: Annotated[Path | None, typer.Option(help="A folder for the whole report: bench-DEVICE.json and .png.")] = None,
    device: Annotated[str, typer.Option(help="cpu | cuda, with the goals of either.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Of torch's products on the CPU.")] = 1,
    graphs: Annotated[bool, typer.Option("--graphs", help="Capture rounds as CUDA graphs.")] = False,
    only: Annotated[list[Part] | None, typer.Option(help="A part to run, or several of them; default all.")] = None,
) -> None:
    """Measure decoding against its goals, the loops one would write without mpg, and its own forwards.

    The tables go to standard error; the last line, on standard output, is JSON.
    """
    err = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        check_writable("out", out / f"bench-{device}.json")
        check_plot(out / f"bench-{device}.png")
    plan, say = replace(FULL if full else Plan(), graphs=graphs), partial(err.print, style="dim")
    report = run(plan, device, threads, say, only or tuple(Part))
    if out is not None:
        with whole_file("out", out / f"bench-{device}.json") as file:
            file.write_text(json.dumps(report.as_json(), indent=1) + "\n")
        if report.growth:
            with whole_file("out", out / f"bench-{device}.png") as file:
                plot_growth(report, file)
    err.print(render(report))
    print(json.dumps({"rows": report.as_json()["rows"]}, allow_nan=False))


if __name__ == "__main__":
    typer.run(main)
