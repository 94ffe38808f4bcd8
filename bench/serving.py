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
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from itertools import cycle
from operator import itemgetter
from typing import Annotated, Any

import httpx
import psutil
import torch
import typer

from decoding import describe_hardware
from mpg.app.cli import arguments
from mpg.decode.call import decode
from mpg.demo.corpus import DEMO_QUESTIONS, HELD_OUT_QUESTIONS
from mpg.model import Model
from report import RESULTS

QUESTIONS = [*DEMO_QUESTIONS, *(question.text for question in HELD_OUT_QUESTIONS)]
WEIGHTS = ["E=1", "T=1", "E=1,T=0.5", "J=-0.5,S=1", "E=0.5,S=0.5,T=0.5,J=0.5"]
SHORTEST = 20  # new tokens that a request has at least, where it does not end before
COUNT, LONGEST = 200, 400  # requests, and new tokens of the longest
ONE_BY_ONE = {"demo": 200, "smollm2": 40}  # the first of them, where there is one client
TURNS = {"demo": 9, "smollm2": 1}  # of both sides one after the other, whose medians count
LONGEST_PROMPT = 64
LONG_PROMPT, AFTER_IT = 1000, 60  # tokens, where there are positions for both
REPEATS = 3  # of a system prompt
GOAL_OF_BATCH, GOAL_OF_ONE_BY_ONE, GOAL_OF_REUSE = 0.9, {"demo": 5.0, "smollm2": 3.0}, 5.0
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
def started(models: str, *options: str) -> Iterator[tuple[str, int]]:
    """A server process: its address and its number."""
    command = [sys.executable, "-m", "mpg", "serve", "--models", models, "--port", "0", "--max-queue", "1000"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        url = next(filter(None, (re.search(r"serving at (http://\S+)/v1", line) for line in process.stderr)))[1]
        threading.Thread(target=process.stderr.read, daemon=True).start()
        while httpx.get(f"{url}/health").json()["status"] == "loading":
            time.sleep(0.1)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


@contextmanager
def apart(pid: int) -> Iterator[None]:
    """The models of a server on all cores but one, which its HTTP and this process, the clients, then share: they are
    elsewhere otherwise, and do not take the models' core now and then."""
    cores = sorted(os.sched_getaffinity(0))
    for process in family(pid):
        for thread in process.threads():
            os.sched_setaffinity(thread.id, cores[:-1] or cores if process.pid == pid else cores[-1:])
    os.sched_setaffinity(0, cores[-1:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def processor_seconds(pid: int) -> float:
    """Seconds of a process and its children, all their threads together."""
    return sum(sum(process.cpu_times()[:2]) for process in family(pid))


def memory(pid: int) -> float:
    """GiB that a process and its children have."""
    return sum(process.memory_info().rss for process in family(pid)) / 2**30


def family(pid: int) -> list[psutil.Process]:
    return [process := psutil.Process(pid), *process.children()]


class Client:
    """One connection to a server. Takes a quarter of httpx's time, on processors that the server runs on as well."""

    def __init__(self, url: str) -> None:
        self.host, _, self.port = url.removeprefix("http://").partition(":")

    async def __aenter__(self) -> Client:
        self._reader, self._writer = await asyncio.open_connection(self.host, int(self.port))
        return self

    async def __aexit__(self, *error: object) -> None:
        self._writer.close()

    async def stream(self, body: Row) -> tuple[list[float], str, int]:
        """Ask for one answer: seconds from before each of its events to it, its text, and its tokens."""
        at, seconds, text, num_tokens = time.perf_counter(), list[float](), "", 0
        async for event in self._events({**body, "stream": True, "stream_options": {"include_usage": True}}):
            chunk, now = json.loads(event), time.perf_counter()
            if chunk["choices"]:
                text += chunk["choices"][0]["delta"].get("content", "")
                seconds.append(now - at)
                at = now
            else:
                num_tokens = chunk["usage"]["completion_tokens"]
        return seconds, text, num_tokens

    async def _events(self, body: Row) -> AsyncIterator[bytes]:
        """What the events of an answer hold, each as soon as it comes."""
        sent = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {self.host}\r\ncontent-type: application/json\r\n"
        self._writer.write(f"{head}content-length: {len(sent)}\r\n\r\n".encode() + sent)
        status, _, _ = (await self._reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")
        assert status.endswith(b" 200 OK"), status
        while num_bytes := int(await self._reader.readline(), 16):
            part = await self._reader.readexactly(num_bytes + len(b"\r\n"))  # whole events, as the server writes them
            for event in part.split(b"\n\n"):
                if event.startswith(b"data: {"):
                    yield event.removeprefix(b"data: ")
        await self._reader.readline()


async def load(url: str, bodies: Sequence[Row], num_clients: int) -> Row:
    """Stream the answers to all requests, so many at once: tokens a second, seconds to the first and between tokens."""
    waiting = list(reversed(bodies))
    firsts: list[float] = []
    gaps: list[float] = []
    texts: dict[int, str] = {}
    num_tokens = 0

    async def work() -> None:
        nonlocal num_tokens
        async with Client(url) as client:
            while waiting:
                body = waiting.pop()
                (first, *others), texts[body["seed"]], count = await client.stream(body)
                firsts.append(first)
                gaps.extend(others)
                num_tokens += count

    begun_at = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(num_clients)))
    seconds = time.perf_counter() - begun_at
    return {
        "clients": num_clients, "tokens_per_second": num_tokens / seconds, "seconds": seconds, "tokens": num_tokens,
        "first_token_p50": statistics.median(firsts), "first_token_p99": sorted(firsts)[int(len(firsts) * 0.99) - 1],
        "worst_gap": max(gaps), "texts": texts,
    }  # fmt: skip


async def read_long(url: str, model: Model) -> Row:
    """Seconds to the first token behind a system prompt that is repeated, and the longest gap between two tokens of a
    stream while a long prompt is read."""
    positions = model.models.max_positions or LONG_PROMPT * 2
    size = min(LONG_PROMPT, positions - LONGEST_PROMPT - AFTER_IT)
    ask = {"model": "E=1", "sampler": "direct", "seed": 0}

    def messages(first: str, size: int, question: str) -> list[Row]:
        text, words = first, cycle(" ".join(QUESTIONS).split())
        while len(model.tokenizer.encode(text)) < size:
            text += f" {next(words)}"
        return [{"role": "system", "content": text}, {"role": "user", "content": question}]

    async with Client(url) as client, Client(url) as other:
        repeated = [messages("Be brief.", size, question) for question in QUESTIONS[: REPEATS + 1]]
        firsts = [(await client.stream({**ask, "messages": one, "max_tokens": 2}))[0][0] for one in repeated]
        short = [{"role": "user", "content": QUESTIONS[0]}]
        running = asyncio.create_task(client.stream({**ask, "messages": short, "max_tokens": AFTER_IT, "seed": 1}))
        await asyncio.sleep(0.3)
        await other.stream({**ask, "messages": messages("Be kind.", size, QUESTIONS[1]), "max_tokens": 2})
        gaps = (await running)[0][1:]
    return {
        "prompt": size, "first_of_all": firsts[0], "first_token": statistics.median(firsts[1:]),
        "worst_gap": max(gaps), "median_gap": statistics.median(gaps),
    }  # fmt: skip


def measure_long(models: str, model: Model) -> Row:
    """`read_long` with what the server does of itself, and without reuse and parts."""
    found = {}
    for name, options in [("served", ()), ("plain", ("--max-kept", "0", "--prefill-tokens", "100000"))]:
        with started(models, *options) as (url, _):
            asyncio.run(load(url, make_requests(4, SHORTEST, "direct"), 4))  # warm
            found[name] = {key: round(value, 4) for key, value in asyncio.run(read_long(url, model)).items()}
            print(models, name, found[name], flush=True)
    return {"long_prompts": found}


def generate(model: Model, bodies: Sequence[Row], batch_size: int) -> tuple[float, dict[int, str], float]:
    """Tokens a second of the same requests without a server, so many at once; the texts by seed; processor time. That
    they are read counts, as it does in `Model.generate`."""
    begun_at, worked = time.perf_counter(), time.process_time()
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
    results = decode(model.models, [call.requests[0] for call in calls], options, calls[0].eos_token_ids)
    seconds, worked = time.perf_counter() - begun_at, time.process_time() - worked
    texts = {body["seed"]: result.text for body, result in zip(bodies, results, strict=True)}
    return sum(len(result.tokens) for result in results) / seconds, texts, worked


def measure(models: str, model: Model, clients: Sequence[int], sampler: str, count: int) -> Row:
    longest = min(LONGEST, (model.models.max_positions or LONGEST) - LONGEST_PROMPT)
    bodies = make_requests(count, longest, sampler)
    one = bodies[: ONE_BY_ONE[models]]
    generate(model, bodies[:4], 4)
    rows = []
    with started(models, "--max-rows", str(max(clients))) as (url, pid):
        asyncio.run(load(url, bodies[:8], 4))  # warm
        alone = 0.0 if 1 in clients else generate(model, one, 1)[0]
        for num_clients in sorted(clients):
            turns, asked = [], one if num_clients == 1 else bodies
            for _ in range(TURNS[models]):
                in_batch, wanted, worked = generate(model, asked, num_clients)
                before = processor_seconds(pid)
                with apart(pid):
                    row = asyncio.run(load(url, asked, num_clients))
                served = processor_seconds(pid) - before
                texts = row.pop("texts")
                row |= {
                    "equal_texts": sum(texts[seed] == text for seed, text in wanted.items()) / len(wanted),
                    "batch_tokens_per_second": in_batch, "of_batch": row["tokens_per_second"] / in_batch,
                    "processor_seconds": served, "batch_processor_seconds": worked,
                    "of_batch_by_processor": worked / served, "memory_gib": memory(pid),
                }  # fmt: skip
                turns.append(row)
            found = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
            alone = found["batch_tokens_per_second"] if num_clients == 1 else alone
            found |= {
                "one_by_one_tokens_per_second": alone, "of_one_by_one": found["tokens_per_second"] / alone
            }  # fmt: skip
            rows.append({name: round(value, 4) for name, value in found.items()})
            print(models, rows[-1], flush=True)
    return {"requests": count, "longest": longest, "sampler": sampler, "rows": rows}


def judge(found: Sequence[Row]) -> list[Row]:
    rows = []
    for of_set in found:
        for row in of_set.get("rows", ()):
            name = f"{of_set['models']}, {row['clients']} clients"
            rows.append({"name": f"{name}: of one batch", "value": row["of_batch"], "goal": GOAL_OF_BATCH})
            if row["clients"] == 32:
                goal = GOAL_OF_ONE_BY_ONE[of_set["models"]]
                rows.append({"name": f"{name}: of one by one", "value": row["of_one_by_one"], "goal": goal})
        if of_set.get("long_prompts", {"served": {"prompt": 0}})["served"]["prompt"] < LONG_PROMPT:
            continue  # the goal is of so long a prompt
        served, plain = of_set["long_prompts"]["served"], of_set["long_prompts"]["plain"]
        name = f"{of_set['models']}, {served['prompt']} tokens read again: first token without reuse, of with"
        rows.append({"name": name, "value": plain["first_token"] / served["first_token"], "goal": GOAL_OF_REUSE})
    return [{**row, "pass": row["value"] >= row["goal"]} for row in rows]


def plot(found: Sequence[Row], path: Any) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [of_set for of_set in found if "rows" in of_set]
    if not found:
        return
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
        axis.minorticks_off()
        axis.set_xticks(clients, clients)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(
    models: Annotated[list[str] | None, typer.Option()] = None,
    count: Annotated[int, typer.Option(help="Requests.")] = COUNT,
    clients: Annotated[str, typer.Option(help="At once; '' for long prompts alone.")] = "1,8,32,64",
    long: Annotated[bool, typer.Option(help="Measure long prompts.")] = True,
    sampler: str = "direct",
    save: bool = True,
) -> None:
    """Load a server with requests of mixed weights and lengths, and with long prompts. What is not measured keeps its
    latest figures, each with the time and the load of the machine that it had."""
    arguments.leave_a_core()  # as the server: both sides have as many threads
    at_once, path = [int(number) for number in clients.split(",") if number], RESULTS / "serving-cpu.json"

    def latest() -> dict[str, Row]:
        return {of_set["models"]: of_set for of_set in json.loads(path.read_text())["sets"]} if path.exists() else {}

    report: Row = {}
    for name in models or ONE_BY_ONE:
        model, of_set = arguments.load(name), latest().get(name, {"models": name})
        parts = [lambda: measure_long(name, model)] if long else []  # noqa: B023
        parts += [lambda: measure(name, model, at_once, sampler, count)] if at_once else []  # noqa: B023
        for part in parts:
            found = part()
            when = datetime.now(timezone.utc).isoformat(timespec="minutes")
            if "rows" in found:
                kept = [row for row in of_set.get("rows", ()) if row["clients"] not in at_once]
                of_now = [{**row, "time": when} for row in found["rows"]]
                found["rows"] = sorted(kept + of_now, key=itemgetter("clients"))
            of_set |= found
            of_set[f"machine_of_{'rows' if 'rows' in found else 'long_prompts'}"] = {
                **describe_hardware("cpu", torch.get_num_threads()), "load_average": os.getloadavg()[0], "time": when,
            }  # fmt: skip
            sets = latest() | {name: of_set}
            report = {"rows": judge(list(sets.values())), "sets": list(sets.values())}
            if save:
                path.write_text(json.dumps(report, indent=1) + "\n")
                plot(report["sets"], path.with_suffix(".png"))
    print(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
