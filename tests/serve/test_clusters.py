"""The file of --print-config on a cluster of `ray start`: deployed, asked, and scaled up and down by its queue."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from mpg.app.cli.command import app

pytest.importorskip("ray", reason="needs mpg[ray]")

from clusters import cluster, free_port
from longer import long

pytestmark = long
SECONDS = 600  # that anything here may take
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "How was your weekend?"}]
BODY = {"model": "E=1", "messages": MESSAGES, "max_tokens": 100, "seed": 3, "sampler": "direct"}


def text_of(answer):
    return answer.json()["choices"][0]["message"]["content"]


def wait_until(is_so):
    ends_at = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < ends_at, "it did not come to pass"
        time.sleep(0.5)


def test_a_file_is_deployed_and_replicas_come_and_go_with_the_queue(tmp_path):
    port = free_port()
    how = ["--device", "cpu", "--dtype", "float64", "--max-rows", "1", "--port", str(port)]
    printed = CliRunner().invoke(app, ["serve", "--print-config", "serve", "--max-replicas", "2", *how])
    assert printed.exit_code == 0, printed.stderr
    file = yaml.safe_load(printed.stdout)
    [replica] = file["applications"][0]["deployments"]
    assert replica["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1}
    # Ray's own are half a minute up and ten minutes down
    replica["autoscaling_config"] |= {
        "upscale_delay_s": 2, "downscale_delay_s": 5, "look_back_period_s": 4, "metrics_interval_s": 2
    }  # fmt: skip
    (tmp_path / "mpg.yaml").write_text(yaml.safe_dump(file))
    url, key = f"http://127.0.0.1:{port}", {"Authorization": "Bearer secret"}
    with cluster() as nodes, ThreadPoolExecutor(4) as pool:
        nodes.environment["MPG_API_KEY"] = "secret"
        nodes.start(cpus=2)

        def running():
            found = yaml.safe_load(nodes.run("serve", "status", "-a", nodes.dashboard).stdout) or {}
            deployments = found.get("applications", {}).get("mpg", {}).get("deployments", {})
            return deployments.get("Replica", {}).get("replica_states", {}).get("RUNNING", 0)

        done = nodes.run("serve", "deploy", "-a", nodes.dashboard, tmp_path / "mpg.yaml")
        assert done.returncode == 0, done.stdout + done.stderr
        wait_until(lambda: running() == 1)
        assert httpx.post(f"{url}{CHAT}", json=BODY, timeout=SECONDS).status_code == 401
        first = httpx.post(f"{url}{CHAT}", json=BODY, headers=key, timeout=SECONDS)
        assert first.status_code == 200, first.text
        command = ["python", "-m", "mpg", "serve", "--replicas", "1", "--port", free_port(), *how[:2]]
        beside = nodes.run(*command, RAY_ADDRESS=nodes.address)
        assert beside.returncode == 2, beside.stderr
        assert "replicas: expected a cluster that serves nothing yet, got mpg; 'serve shutdown'" in beside.stderr
        statuses, counts, is_over = [], [], threading.Event()

        def ask_on():
            while not is_over.is_set():
                found = httpx.post(f"{url}{CHAT}", json=BODY, headers=key, timeout=SECONDS)
                assert found.status_code in (200, 429, 503), found.text
                statuses.append(found.status_code)
                assert found.status_code != 200 or text_of(found) == text_of(first)

        asking = [pool.submit(ask_on) for _ in range(4)]
        try:
            wait_until(lambda: counts.append(running()) or 2 in counts or any(one.done() for one in asking))
        finally:
            is_over.set()
        for one in asking:
            one.result()
        assert 2 in counts
        assert statuses.count(200) > 4
        wait_until(lambda: running() == 1)
        again = httpx.post(f"{url}{CHAT}", json=BODY, headers=key, timeout=SECONDS)
        assert text_of(again) == text_of(first)
