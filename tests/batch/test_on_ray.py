"""Jobs on Ray: the texts of one process whatever the workers, and whatever is killed on the way."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest

import mpg
from jobs import make_rows, make_task, told, write_rows
from longer import long
from mpg.batch.job import begin, describe
from mpg.batch.parts import UNFINISHED
from mpg.demo import MODELS
from mpg.recipe import Recipe

pytest.importorskip("ray", reason="needs mpg[ray]")
pytestmark = long

COUNT, KILLS = 5000, 10
SECONDS = 1200  # that anything here may take
HOW = ["--models", "demo", "--device", "cpu", "--dtype", "float64", "--set", "sampler=direct"]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """A Ray of our own, whatever else runs on this machine."""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    paths = [*map(str, Path(__file__).parents[:2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))  # where workers find this file and what it imports


def start(rows, output, *arguments):
    command = [sys.executable, "-m", "mpg", "batch", str(rows), str(output), *HOW, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(rows, output, *arguments):
    process = start(rows, output, *arguments)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    return out


def test_one_two_and_no_workers_of_ray_write_the_same(tmp_path):
    name = write_rows(tmp_path / "rows.jsonl", make_rows(100))
    finish(name, tmp_path / "local", "--local")
    expected = told(tmp_path / "local")
    for workers in "12":
        assert "100 of 100 rows" in finish(name, tmp_path / workers, "--workers", workers)
        assert told(tmp_path / workers) == expected
        files = sorted(part.name for part in (tmp_path / workers).iterdir())
        assert files == sorted(part.name for part in (tmp_path / "local").iterdir())


def test_more_workers_come_while_rows_wait(tmp_path):
    name = write_rows(tmp_path / "rows.jsonl", make_rows(1000))
    finish(name, tmp_path / "local", "--local")
    process, counts = start(name, tmp_path / "out", "--workers", "2", "--min-workers", "1"), {0}
    while process.poll() is None:
        counts.add(len(workers_of(family(process))))
        time.sleep(0.1)
    assert process.returncode == 0, process.communicate()[1]
    assert counts == {0, 1, 2}
    assert told(tmp_path / "out") == told(tmp_path / "local")


# The command on a machine so busy that a thread of Ray Data is four seconds inside Ray each time, with an input that is
# gone when the workers read it.
BUSY = """
import os, sys, time, ray
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from mpg.app.cli.command import app
from mpg.batch import on_ray
step, shutdown, connect = StreamingExecutor._scheduling_loop_step, ray.shutdown, on_ray.connect
def slow_step(*arguments):
    inside = ray._private.worker.global_worker.core_worker
    time.sleep(4)
    inside.get_current_task_id()
    return step(*arguments)
def shut_down_and_stay():
    shutdown()
    time.sleep(6)
def connect_and_lose():
    os.remove(sys.argv[2])
    return connect()
StreamingExecutor._scheduling_loop_step = slow_step
ray.shutdown, on_ray.connect = shut_down_and_stay, connect_and_lose
app()
"""


def test_what_went_wrong_is_told_on_a_busy_machine(tmp_path):
    """Ray ends a process without a word in which a thread asks it for something behind its shutdown."""
    name = write_rows(tmp_path / "rows.jsonl", make_rows(400))
    command = [sys.executable, "-c", BUSY, "batch", name, str(tmp_path / "out"), *HOW]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2, done.stderr
    assert "mpg: input: expected files that can be read" in done.stderr


def load_mortal():
    """The demo, in a process that dies of one prompt."""
    model = mpg.load(MODELS, device="cpu")
    read = model.read

    def read_or_die(prompt, **how):
        if "poison" in prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(prompt, **how)

    model.read = read_or_die
    return model


def fail(error):
    raise error


@pytest.fixture
def ray_job(tmp_path):
    """A task of some rows on Ray with another way to load: what it wrote, or how it failed."""
    from mpg.batch.on_ray import run_on_ray

    def run(rows, load, **how):
        task = replace(make_task(None, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"), load=load)
        left = begin(task, describe(task, Recipe.of(MODELS), {}))
        run_on_ray(task, left, lambda done: None, **{"workers": 1, "min_workers": 1, "cpus": 1, "gpus": 0, **how})
        return told(tmp_path / "out")

    return run


def test_rows_that_kill_their_workers_are_rows_with_an_error(ray_job):
    rows = make_rows(64)
    for number in (20, 21):
        rows[number]["prompt"] = "poison"
    found = ray_job(rows, load_mortal)
    assert [row_id for row_id, row in found.items() if row["error"]] == ["row 20", "row 21"]
    assert "the worker died 2 times while it had no other row" in found["row 20"]["error"]


def test_workers_that_cannot_start_end_the_job_with_the_reason(ray_job):
    with pytest.raises(ValueError, match=r"workers: they cannot start: .*no memory for the models"):
        ray_job(make_rows(20), partial(fail, MemoryError("no memory for the models")))
    with pytest.raises(ValueError, match=r"workers: expected as many as there are CPUs for"):
        ray_job(make_rows(20), load_mortal, workers=1000, min_workers=1000)
    with pytest.raises(ValueError, match=r"workers: they cannot start: .*died 2 times while it loaded the models"):
        ray_job(make_rows(20), die)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_still_loads_when_the_job_ends_leaves_nothing_behind(ray_job, tmp_path):
    ray_job(make_rows(400), partial(load_once, tmp_path), workers=2, min_workers=2)
    assert (tmp_path / "second").exists()
    assert not [part.name for part in (tmp_path / "out").iterdir() if part.name.startswith(UNFINISHED)]


def load_once(folder):
    """The demo, in the first worker that loads it; the next one never ends."""
    try:
        (folder / "first").touch(exist_ok=False)
    except FileExistsError:
        (folder / "second").touch()
        time.sleep(SECONDS)
    return mpg.load(MODELS, device="cpu")


def family(process):
    """A process and all below it, some of whom may be gone."""
    with suppress(psutil.NoSuchProcess):
        return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return []


def find(processes, word):
    found = []
    for process in processes:
        with suppress(psutil.Error):
            if word in " ".join(process.cmdline()):
                found.append(process)
    return found


def workers_of(processes):
    return find(find(processes, "ray::"), "MapWorker")


def kill(process, kind, rng):
    """Kill a worker, the driver, both, or all of Ray here; or interrupt the driver. out: whether there was one"""
    everybody = family(process)
    workers, raylets = workers_of(everybody), find(everybody, "raylet/raylet")
    if not workers or process.poll() is not None:
        return False
    for victim in [rng.choice(workers)] if kind in ("worker", "both") else raylets if kind == "node" else []:
        with suppress(psutil.Error):
            victim.kill()
    if kind in ("driver", "both"):
        process.kill()
    if kind == "interrupt":
        process.send_signal(signal.SIGINT)
    if kind != "worker":
        _, err = process.communicate(timeout=SECONDS)
        assert "the same command goes on" in err, (kind, process.returncode, err)
        psutil.wait_procs([*workers, *raylets], timeout=60)
    return True


def disturb(name, output, kills, seed=0):
    """Run jobs of these rows, killing something at random moments until it has been done so often. out: what was
    killed, and the jobs' folders"""
    rng, done, folders = random.Random(seed), [], []
    kinds = ["worker", "driver", "both", "node", "interrupt"]
    while len(done) < kills:
        folders.append(output / str(len(folders)))
        while True:
            process = start(name, folders[-1], "--workers", "2")
            while process.poll() is None and len(done) < kills:
                before = len(list(folders[-1].glob("part-*")))
                ends_at = time.monotonic() + SECONDS
                while process.poll() is None and len(list(folders[-1].glob("part-*"))) == before:
                    assert time.monotonic() < ends_at, "nothing is written"
                    time.sleep(0.05)
                time.sleep(rng.uniform(0, 5))
                kind = kinds[len(done) % len(kinds)]
                if process.poll() is None and kill(process, kind, rng):
                    done.append(kind)
            err = process.communicate(timeout=SECONDS)[1] if process.poll() is None else ""
            if process.returncode == 0:
                break
            assert process.returncode < 0 or process.returncode in (1, 2, 130), err
    return done, folders


def test_jobs_whose_workers_drivers_and_nodes_are_killed_write_what_undisturbed_ones_do(tmp_path):
    name = write_rows(tmp_path / "rows.jsonl", make_rows(COUNT, longest=12))
    finish(name, tmp_path / "undisturbed", "--local")
    expected = told(tmp_path / "undisturbed")
    done, folders = disturb(name, tmp_path, KILLS)
    assert len(done) == KILLS
    for folder in folders:
        assert told(folder) == expected
        assert not list(Path(folder).glob(".*"))
