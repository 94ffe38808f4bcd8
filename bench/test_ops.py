"""Times every op beside plain torch and beside what its bytes cost: `make bench`, or on a GPU `--device cuda`.

An answer is checked before it is timed. One round calls the op and its rivals once each, so that whatever else the
machine does falls on all of them; reported are medians over the rounds. Rivals: plain torch (bench/plain.py), the same
under torch.compile (on the CPU at B = 1 alone, since a graph takes seconds, and one for both vocabularies; on a GPU
logits in bfloat16 alone), and on a GPU op and plain torch once more as captured graphs. "cold" rounds overwrite the
cache before every call; "warm" ones call twice and time the second. The floor is what copying as many bytes takes on
this device with these threads: an op that finds its arguments in the cache may beat it. On the CPU most of what large
batches cost plain torch is fresh memory for its temporaries, which the ops do not have.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from cases import Case, Cases, K, N
from report import Report, Row

# On a GPU the largest alone: its time is short.
VOCABULARIES = {"cpu": (32_000, 128_256), "cuda": (128_256,)}
NUM_FEATURES = 2048
BATCHES = {"cpu": (1, 16, 64), "cuda": (1, 64)}
# Elements of the logits, (1 + N) B K V: 160 MiB of float32 on the CPU, where more would only take longer.
MOST_LOGITS = {"cpu": 2**25 + 2**23, "cuda": 2**28}
SECONDS, FEWEST_ROUNDS, MOST_ROUNDS = 0.4, 5, 50  # of one measurement
MORE_THAN_CACHE = {"cpu": 2**26, "cuda": 2**28}  # bytes

ON_LOGITS = ("gather_logprobs", "verify_chunks", "draw_fallback", "combine_geometric", "combine_arithmetic")
ON_ROWS = ("warp_temperature", "warp_top_p", "draw_tokens", "draw_top_p", "verify_block", "draw_residual")
ON_FEATURES = ("lora_shrink", "lora_expand_")
ON_KEYS, NUM_KEYS = ("attend_rows",), (256, 2048)  # on the CPU alone
ON_PANELS, ON_NORMS, FEW_ROWS = ("linear_panels",), ("rms_norm",), (1, 3, 8, 40)  # too; of tokens
ON_SCORES = (
    "score_prefixes",
    "accept_prefixes",
    "update_bound_",
    "draw_uniforms",
    "count_usable_",
    "commit_block_",
)


@dataclass(frozen=True)
class Goal:
    """A goal: at least (or at most) `limit` for `metric` of every measurement on `device` that agrees with `where`."""

    name: str
    device: str
    where: Row
    metric: str
    limit: float
    at_most: bool = False


FLOOR = {"op": "verify_chunks", "B": 64, "V": 128_256, "dtype": "bfloat16", "cache": "cold"}
GOALS = (
    Goal("times as fast as plain torch", "cpu", {"op": "verify_chunks", "dtype": "float32"}, "speedup", 1.8),
    Goal("times as fast as plain torch", "cpu", {"op": "verify_chunks", "dtype": "bfloat16"}, "speedup", 3),
    Goal("times as fast as plain torch", "cuda", {"op": "verify_chunks", "B": 1}, "speedup", 8),
    Goal("times as fast as torch.compile", "cuda", {"op": "verify_chunks", "B": 1}, "speedup_compiled", 2),
    Goal("times as fast, both replayed", "cuda", {"op": "verify_chunks", "B": 1}, "speedup_replayed", 1.2),
    Goal("times its floor, at most", "cuda", FLOOR, "floors", 1.5, at_most=True),
    Goal("times as fast as a sort", "cuda", {"op": "draw_top_p", "B": 64, "V": 128_256}, "speedup", 10),
)
MOST_OVERHEAD_US = 10  # of a call on the CPU


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = metafunc.config.getoption("--device")
    if "timed" not in metafunc.fixturenames:
        return
    parameters = []
    for name in ON_LOGITS + ON_ROWS:
        dtypes = (torch.float32, torch.bfloat16) if name in ON_LOGITS else (torch.float32,)
        parameters += [
            (name, B, V, dtype)
            for dtype in dtypes
            for B in BATCHES[device]
            for V in VOCABULARIES[device]
            if MOST_LOGITS[device] >= (1 + N) * B * K * V
        ]
    dtypes = (torch.float32, torch.bfloat16)
    parameters += [(name, B, NUM_FEATURES, dtype) for name in ON_FEATURES for dtype in dtypes for B in (1, 4, 16)]
    for V in NUM_KEYS if device == "cpu" else ():
        parameters += [(name, B, V, dtype) for name in ON_KEYS for dtype in dtypes for B in (1, 4, 16)]
    for B in FEW_ROWS if device == "cpu" else ():
        parameters += [(name, B, NUM_FEATURES, torch.float32) for name in ON_PANELS]
        parameters += [(name, B, NUM_FEATURES, dtype) for name in ON_NORMS for dtype in dtypes]
    parameters += [(name, B, 1, torch.float32) for name in ON_SCORES for B in (1, 64)]
    metafunc.parametrize("timed", parameters, ids=label, indirect=True, scope="module")


def label(parameter: Any) -> str:
    name, B, V, dtype = parameter
    return f"{name} B={B}" + (f" V={V} {str(dtype).removeprefix('torch.')}" if V > 1 else "")


@dataclass
class Timed:
    row: Row
    calls: dict[str, Callable[[], Any]]  # the op is "us"
    device: str


@pytest.fixture(scope="module")
def timed(request: pytest.FixtureRequest, report: Report, copy_bytes_per_us: float) -> Timed:
    """A case whose answer is right, and its rivals."""
    name, B, V, dtype = request.param
    case: Case = getattr(Cases(B, V, dtype, report.device), name)()
    case.check()
    plain = partial(case.run, case.plain)
    calls = {"us": partial(case.run, case.op), "plain_us": plain}
    on_gpu = report.device == "cuda"
    is_compiled = (dtype == torch.bfloat16 or name in ON_ROWS) if on_gpu else B == 1
    if name in ON_LOGITS + ON_ROWS and is_compiled:
        calls["compiled_us"] = partial(case.run, torch.compile(case.plain, dynamic=not on_gpu))
    if on_gpu:
        calls["replayed_us"], calls["plain_replayed_us"] = capture(calls["us"]), capture(plain)
    num_bytes = case.num_bytes()
    row = {"name": label(request.param), "op": name, "B": B, "bytes": num_bytes}
    if V > 1:
        row |= {"V": V, "dtype": str(dtype).removeprefix("torch.")}
    return Timed(row | {"floor_us": num_bytes / copy_bytes_per_us}, calls, report.device)


def capture(call: Callable[[], Any]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_op(benchmark: Any, timed: Timed, cache: str, report: Report) -> None:
    times: dict[str, list[float]] = {name: [] for name in timed.calls}
    overwritten = torch.empty(MORE_THAN_CACHE[timed.device], dtype=torch.uint8, device=timed.device)

    def prepare(name: str) -> None:
        overwritten.zero_() if cache == "cold" else timed.calls[name]()

    def time_call(name: str) -> None:
        times[name].append(elapsed_us(timed.calls[name], timed.device))

    def rivals_first() -> None:
        for name in times:
            if name != "us":
                prepare(name)
                time_call(name)
        prepare("us")

    rivals_first()  # compiles, and shows how long a round takes
    began = time.perf_counter()
    rivals_first()
    rounds = int(SECONDS / (time.perf_counter() - began))
    rounds = min(max(rounds, FEWEST_ROUNDS), MOST_ROUNDS)
    for taken in times.values():
        taken.clear()
    benchmark.pedantic(time_call, args=("us",), setup=rivals_first, rounds=rounds)
    if benchmark.disabled:
        return

    row = timed.row | {"cache": cache, "rounds": rounds}
    row |= {name: statistics.median(taken) for name, taken in times.items()}
    row |= {"name": f"{row['name']} {cache}", "speedup": row["plain_us"] / row["us"]}
    row |= {"floors": row["us"] / row["floor_us"], "floor_share": row["floor_us"] / row["us"]}
    if "compiled_us" in row:
        row["speedup_compiled"] = row["compiled_us"] / row["us"]
    if "replayed_us" in row:
        row["speedup_replayed"] = row["plain_replayed_us"] / row["replayed_us"]
    benchmark.extra_info |= row
    report.add(row)


@pytest.mark.parametrize("name", ON_SCORES + ON_LOGITS + ON_ROWS + ON_FEATURES)
def test_call_overhead(benchmark: Any, name: str, report: Report) -> None:
    """What a call costs where there is next to nothing to compute: B = 1, V = 64."""
    case: Case = getattr(Cases(1, 64, torch.float32, report.device), name)()
    benchmark(case.run, case.op)
    if benchmark.disabled or report.device != "cpu":
        return
    value = benchmark.stats.stats.median * 1e6
    row = {"name": f"{name}, us a call, at most", "value": value, "goal": MOST_OVERHEAD_US}
    report.rows.append(row | {"pass": value <= MOST_OVERHEAD_US})


def test_goals(report: Report) -> None:
    """Every goal has its rows: one that is missed keeps its number and fails nothing, that of other devices is null."""
    for goal in GOALS:
        measured = [
            t
            for t in report.times
            if report.device == goal.device and goal.where.items() <= t.items() and goal.metric in t
        ]
        for times in measured:
            value = times[goal.metric]
            reached = value <= goal.limit if goal.at_most else value >= goal.limit
            report.rows.append(
                {"name": f"{times['name']}, {goal.name}", "value": value, "goal": goal.limit, "pass": reached}
            )
        if not measured:
            where = " ".join(f"{key}={value}" for key, value in goal.where.items())
            name = f"{goal.device} {where}, {goal.name}"
            report.rows.append({"name": name, "value": None, "goal": goal.limit, "pass": None})


def elapsed_us(call: Callable[[], Any], device: str) -> float:
    """Microseconds of a call; on a GPU between events, which leaves out how long the host waits for the second."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) * 1e3


@pytest.fixture(scope="session")
def copy_bytes_per_us(report: Report) -> float:
    """Read and written by a copy between buffers that no cache holds."""
    source = torch.ones(2 * MORE_THAN_CACHE[report.device], dtype=torch.uint8, device=report.device)
    target = torch.ones_like(source)
    taken = [elapsed_us(partial(target.copy_, source), report.device) for _ in range(20)]
    report.machine["copy_gb_per_s"] = 2 * source.numel() / statistics.median(taken) / 1e3
    return report.machine["copy_gb_per_s"] * 1e3
