"""`mpg serve` under load beside the same requests without a server: in one batch, and one by one.

Starts the command in a process of its own and speaks to it as clients do. Texts are compared before anything is timed.
The last line is JSON, and a plot is written beside it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any

import httpx
import torch
import typer

from decoding import describe_hardware
from mpg.app.cli import arguments
from mpg.decode.run import decode
from mpg.demo.corpus import DEMO_QUESTIONS, HELD_OUT_QUESTIONS
from mpg.model import Model
from report import RESULTS

QUESTIONS = [*DEMO_QUESTIONS, *(question.text for question in HELD_OUT_QUESTIONS)]
WEIGHTS = ["E=1", "T=1", "E=1,T=0.5", "J=-0.5,S=1", "E=0.5,S=0.5,T=0.5,J=0.5"]
SHORTEST = 20  # new tokens that a request has at least, where it does not end before
REQUESTS = {"demo": (200, 400), "smollm2": (48, 80)}  # how many, and new tokens of the longest
LONGEST_PROMPT, MAX_LENGTH = 64, 512
GOAL_OF_BATCH, GOAL_OF_ONE_BY_ONE = 0.9, {"demo": 5.0, "smollm2": 3.0}
Row = dict[str, Any]


def make_requests(count: int, longest: int, sampler: str) -> list[Row]:
    rng = random.Random(0)
    return [
        {
            "model": rng.choice(WEIGHTS), "messages": [{"role": "user", "content": rng.choice(QUESTIONS)}],
            "seed": index, "max_tokens": rng.randint(SHORTEST, longest), "sampler": sampler,
        }
        for index in range(count)
    ]  # fmt: skip


@contextmanager
def started(models: str, max_rows: int) -> Iterator[str]:
    """A server process; its address."""
    command = [sys.executable, "-m", "mpg", "serve", "--models", models, "--port", "0", "--max-rows", str(max_rows)]
    command += ["--max-length", str(MAX_LENGTH)]
    process = subprocess.Popen([*command, "--max-queue", "1000"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        url = next(filter(None, (re.search(r"serving at (http://\S+)/v1", line) for line in process.stderr)))[1]
        threading.Thread(target=process.stderr.read, daemon=True).start()
        while httpx.get(f"{url}/health").json()["status"] == "loading":
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


async def load(url: str, bodies: Sequence[Row], num_clients: int) -> Row:
    """Stream the answers to all requests, so many at once: tokens a second, seconds to the first and between tokens."""
    waiting = list(reversed(bodies))
    firsts: list[float] = []
    gaps: list[float] = []
    texts: dict[int, str] = {}
    num_tokens = 0

    async def client(http: httpx.AsyncClient) -> None:
        nonlocal num_tokens
        while waiting:
            body = waiting.pop()
            begun_at = at = time.perf_counter()
            options, text = {"stream": True, "stream_options": {"include_usage": True}}, ""
            async with http.stream("POST", f"{url}/v1/chat/completions", json={**body, **options}) as answer:
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk, now = json.loads(line.removeprefix("data: ")), time.perf_counter()
                    if chunk["choices"]:
                        text += chunk["choices"][0]["delta"].get("content", "")
                        (firsts if at == begun_at else gaps).append(now - at)
                        at = now
                    else:
                        num_tokens += chunk["usage"]["completion_tokens"]
            texts[body["seed"]] = text

    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as http:
        begun_at = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(num_clients)))
        seconds = time.perf_counter() - begun_at
    return {
        "clients": num_clients, "tokens_per_second": num_tokens / seconds, "seconds": seconds, "tokens": num_tokens,
        "first_token_p50": statistics.median(firsts), "first_token_p99": sorted(firsts)[int(len(firsts) * 0.99) - 1],
        "worst_gap": max(gaps), "texts": texts,
    }  # fmt: skip


def generate(model: Model, bodies: Sequence[Row], batch_size: int) -> tuple[float, dict[int, str]]:
    """Tokens a second of the same requests without a server, so many at once; and the texts by seed."""
    calls = [
        model.read(
            body["messages"],
            weights=body["model"],
            seed=body["seed"],
            max_new_tokens=body["max_tokens"],
            sampler=body["sampler"],
        )
        for body in bodies
    ]
    options = replace(calls[0].options, batch_size=batch_size, seed=None, max_new_tokens=None)
    begun_at = time.perf_counter()
    results = decode(model.models, [call.requests[0] for call in calls], options, calls[0].eos_token_ids)
    seconds = time.perf_counter() - begun_at
    texts = {body["seed"]: result.text for body, result in zip(bodies, results, strict=True)}
    return sum(len(result.tokens) for result in results) / seconds, texts


def measure(models: str, clients: Sequence[int], sampler: str, of_all: int | None) -> Row:
    model, (count, longest) = arguments.load(models), REQUESTS[models]
    count = of_all or count
    longest = min(longest, (model.models.max_positions or longest) - LONGEST_PROMPT)
    bodies = make_requests(count, longest, sampler)
    generate(model, bodies[:4], 4)
    few = bodies[: max(count // 8, 4)]
    rows = []
    with started(models, max(clients)) as url:
        asyncio.run(load(url, few, 4))  # warm
        alone, _ = generate(model, few, 1)
        for num_clients in clients:
            in_batch, wanted = generate(model, bodies, num_clients)
            row = asyncio.run(load(url, bodies, num_clients))
            texts = row.pop("texts")
            row |= {
                "equal_texts": sum(texts[seed] == text for seed, text in wanted.items()) / len(wanted),
                "batch_tokens_per_second": in_batch, "one_by_one_tokens_per_second": alone,
                "of_batch": row["tokens_per_second"] / in_batch, "of_one_by_one": row["tokens_per_second"] / alone,
            }  # fmt: skip
            rows.append({name: round(value, 4) for name, value in row.items()})
            print(models, rows[-1], flush=True)
    return {"models": models, "requests": count, "longest": longest, "sampler": sampler, "rows": rows}


def judge(found: Sequence[Row]) -> list[Row]:
    rows = []
    for of_set in found:
        for row in of_set["rows"]:
            name = f"{of_set['models']}, {row['clients']} clients"
            rows.append({"name": f"{name}: of one batch", "value": row["of_batch"], "goal": GOAL_OF_BATCH})
            if row["clients"] == 32:
                goal = GOAL_OF_ONE_BY_ONE[of_set["models"]]
                rows.append({"name": f"{name}: of one by one", "value": row["of_one_by_one"], "goal": goal})
    return [{**row, "pass": row["value"] >= row["goal"]} for row in rows]


def plot(found: Sequence[Row], path: Any) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(5 * len(found), 3.6), squeeze=False)
    for axis, of_set in zip(axes[0], found, strict=True):
        clients = [row["clients"] for row in of_set["rows"]]
        for name, label in [
            ("tokens_per_second", "mpg serve"),
            ("batch_tokens_per_second", "one batch"),
            ("one_by_one_tokens_per_second", "one by one"),
        ]:
            axis.plot(clients, [row[name] for row in of_set["rows"]], marker="o", label=label)
        axis.set(title=of_set["models"], xlabel="clients at once", ylabel="tokens/s", xscale="log", ylim=(0, None))
        axis.set_xticks(clients, clients)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(
    models: Annotated[list[str] | None, typer.Option()] = None,
    count: Annotated[int | None, typer.Option(help="Requests. Default: each set's own number.")] = None,
    clients: str = "1,8,32,64",
    sampler: str = "direct",
    save: bool = True,
) -> None:
    """Load a server with requests of mixed weights and lengths."""
    at_once = [int(number) for number in clients.split(",")]
    found = [measure(name, at_once, sampler, count) for name in models or REQUESTS]
    report = {
        "hardware": describe_hardware("cpu", torch.get_num_threads()), "load_average": os.getloadavg()[0],
        "rows": judge(found), "sets": found,
    }  # fmt: skip
    if save:
        (RESULTS / "serving-cpu.json").write_text(json.dumps(report, indent=1) + "\n")
        plot(found, RESULTS / "serving-cpu.png")
    print(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
