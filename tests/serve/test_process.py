"""`mpg serve` as a process: its signals, its start and its end, and what documents show of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from typer.testing import CliRunner

from mpg.app.cli.command import app

TEXT = "/v1/completions"
BODY = {"model": "E", "prompt": [5, 6, 7], "max_tokens": 200, "seed": 3, "sampler": "direct"}


@contextmanager
def started(*arguments):
    """The command in a process of its own, and the address that it says it serves at."""
    command = [sys.executable, "-m", "mpg", "serve", "--models", "demo", "--port", "0", "--device", "cpu", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        for line in process.stderr:
            if found := re.search(r"serving at (http://\S+)/v1", line):
                break
        url = found.group(1)
        while httpx.get(f"{url}/health").json()["status"] == "loading":
            time.sleep(0.02)
        yield process, url
    finally:
        process.kill()
        process.communicate()


def test_sigterm_loses_no_answer_that_is_finished_in_time_and_exits_0():
    with started("--grace", "20") as (process, url), ThreadPoolExecutor(6) as pool:
        wanted = httpx.post(f"{url}{TEXT}", json=BODY, timeout=60).json()["choices"][0]["text"]
        ask = lambda stream: httpx.post(f"{url}{TEXT}", json={**BODY, "stream": stream}, timeout=60)  # noqa: E731
        answers = [pool.submit(ask, index >= 3) for index in range(6)]
        while "mpg_rows 6.0" not in httpx.get(f"{url}/metrics").text and not all(a.done() for a in answers):
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        for index, answer in enumerate(answers):
            got = answer.result()
            assert got.status_code == 200
            if index < 3:
                assert got.json()["choices"][0]["text"] == wanted
            else:
                lines = [line.removeprefix("data: ") for line in got.text.splitlines() if line.startswith("data: {")]
                assert "".join(json.loads(line)["choices"][0]["text"] for line in lines) == wanted
                assert got.text.endswith("data: [DONE]\n\n")
        assert process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_what_outlasts_the_grace_is_told_so_and_a_killed_server_serves_again():
    with started("--grace", "0") as (process, url), ThreadPoolExecutor(8) as pool:
        bodies = [{**BODY, "n": 8, "seed": index, "max_tokens": 250} for index in range(8)]
        answers = [pool.submit(lambda body: httpx.post(f"{url}{TEXT}", json=body, timeout=60), body) for body in bodies]
        while "mpg_rows 32.0" not in httpx.get(f"{url}/metrics").text:
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        statuses = [answer.result().status_code for answer in answers]
        assert set(statuses) <= {200, 503} and 503 in statuses
        assert process.wait(30) == 0
    port = url.rsplit(":", 1)[1]
    with started("--port", port) as (process, again):
        assert again == url
        assert httpx.get(f"{url}/v1/models").status_code == 200
        process.kill()
        process.wait()
    with started("--port", port) as (_, again):
        assert httpx.post(f"{again}{TEXT}", json={**BODY, "max_tokens": 2}, timeout=60).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "host: expected a loopback address"),
        (["--models", "nowhere"], "models: expected"),
        (["--set", "temperature=hot"], "temperature: expected a number"),
        (["--max-rows", "0"], "max_rows: expected"),
        (["--attribute-folder", "nowhere"], "attribute_folder: expected a folder"),
    ],
)
def test_mistakes_on_the_command_line_are_told_before_anything_is_loaded(arguments, message):
    done = CliRunner().invoke(app, ["serve", *arguments])
    assert done.exit_code == 2
    assert message in done.stderr
