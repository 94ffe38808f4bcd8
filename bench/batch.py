"""`mpg batch` on Ray by one worker and by two, beside the same job in one process: rows a second, in turns.

Runs the command as users do. Rates are those of the job itself, from its first chunk to its last: starting Ray and
loading models, which the seconds of the whole command hold, is told beside them. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from decoding import describe_hardware
from report import RESULTS
from serving import make_requests

WAYS = {"local": ["--local"], "1 worker": ["--workers", "1"], "2 workers": ["--workers", "2"]}
LONGEST = 64  # new tokens; the shortest answer has 20
GOAL_OF_LOCAL = 0.9  # Ray may take a tenth at one worker
Row = dict[str, Any]


def write_rows(path: Path, count: int) -> None:
    asked = make_requests(count, LONGEST, "direct")
    rows = (
        {"id": row["seed"], "messages": row["messages"], "weights": row["model"], "max_new_tokens": row["max_tokens"]}
        for row in asked
    )
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def run(rows: Path, output: Path, way: str) -> Row:
    """One job: seconds of the command, of what was between its first part and its last, and its rates in these."""
    command = [sys.executable, "-m", "mpg", "batch", str(rows), str(output), "--models", "demo", "--device", "cpu"]
    begun_at = time.time()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local"}
    done = subprocess.run(
        [*command, "--set", "sampler=direct", *WAYS[way]], env=environment, capture_output=True, text=True,
        start_new_session=True,  # by which Linux shares a busy machine: Ray's processes have one of their own, too
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    seconds = time.time() - begun_at
    parts = sorted(output.glob("part-*"), key=lambda part: part.stat().st_mtime)
    told = [json.loads(line) for part in parts for line in part.open()]
    first, last = parts[0].stat().st_mtime, parts[-1].stat().st_mtime
    tokens = sum(len(json.loads(line)["tokens"]) for part in parts[1:] for line in part.open())
    texts = {row["id"]: row["text"] for row in told}
    return {"seconds": seconds, "start": first - begun_at, "tokens_per_second": tokens / (last - first), "texts": texts}


def main(
    count: Annotated[int, typer.Option(help="Rows.")] = 1000,
    repeats: Annotated[int, typer.Option(help="Jobs of each way, in turns.")] = 3,
    save: bool = True,
) -> None:
    """Time one job in one process, by one worker of Ray and by two, in turns, and compare what they wrote."""
    found: dict[str, list[Row]] = {way: [] for way in WAYS}
    loads = []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        write_rows(rows, count)
        for turn in range(repeats):
            for way in WAYS:
                loads.append(os.getloadavg()[0])
                found[way].append(run(rows, Path(folder, f"{way} {turn}"), way))
                told = {name: round(value, 4) for name, value in found[way][-1].items() if name != "texts"}
                print(way, told, f"load {loads[-1]:.1f}", flush=True)
    expected = found["local"][0]["texts"]
    ways = {
        way: {
            **{
                name: round(statistics.median(job[name] for job in jobs), 4)
                for name in ("tokens_per_second", "start", "seconds")
            },
            "equal_texts": statistics.mean(
                job["texts"][row_id] == text for job in jobs for row_id, text in expected.items()
            ),
        }
        for way, jobs in found.items()
    }
    speeds = {way: of_way["tokens_per_second"] for way, of_way in ways.items()}
    share = round(speeds["1 worker"] / speeds["local"], 4)
    goal = {"name": "1 worker: of local", "value": share, "goal": GOAL_OF_LOCAL, "pass": share >= GOAL_OF_LOCAL}
    twice = {"name": "2 workers: of 1 worker", "value": round(speeds["2 workers"] / speeds["1 worker"], 4)}
    report = {
        "rows": [goal, twice],
        "models": "demo", "count": count, "longest": LONGEST, "repeats": repeats, "ways": ways,
        "machine": {
            **describe_hardware("cpu", 1), "load_average": [round(load, 1) for load in loads],
            "time": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        },
    }  # fmt: skip
    if save:
        (RESULTS / "batch-cpu.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
