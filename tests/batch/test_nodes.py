"""Jobs on clusters of `ray start`: on two nodes what one process writes; what a node lacks is told; a full disk."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

pytest.importorskip("ray", reason="needs mpg[ray]")

from clusters import cluster
from jobs import make_rows, told, write_rows
from longer import long

pytestmark = long
SECONDS = 900  # that anything here may take
HOW = ["--models", "demo", "--device", "cpu", "--dtype", "float64", "--set", "sampler=direct"]


def batch(rows, output, *arguments, before=(), **environment):
    """`mpg batch`. out: its status, what it says, and the last line that it says of an error"""
    command = [*before, sys.executable, "-m", "mpg", "batch", rows, output, *HOW, *arguments]
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, **environment}, capture_output=True, text=True, timeout=SECONDS
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("mpg: ")]
    return done.returncode, done.stdout + done.stderr, lines[-1] if lines else ""


def without(folder):
    """A command that others run behind, who find another folder, empty and small, in the place of this one."""
    hide = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = f'mount -t tmpfs -o size=64k none "{folder}" && exec "$@"'
    if subprocess.run([*hide, mount, "sh", "true"], capture_output=True).returncode:
        pytest.skip("needs namespaces of mounts")
    return [*hide, mount, "sh"]


def test_a_job_on_two_nodes_writes_what_one_process_does_and_a_node_without_the_input_is_named(tmp_path):
    for folder in ("seen", "hidden"):
        (tmp_path / folder).mkdir()
    rows = make_rows(200)
    seen = write_rows(tmp_path / "seen" / "rows.jsonl", rows)
    hidden = write_rows(tmp_path / "hidden" / "rows.jsonl", rows)
    status, said, _ = batch(seen, tmp_path / "local", "--local")
    assert status == 0, said
    with cluster() as nodes:
        nodes.start()
        nodes.start(gpus=1, before=without(tmp_path / "hidden"))  # as far as Ray knows
        how = {**nodes.environment, "RAY_ADDRESS": nodes.address}
        status, said, _ = batch(seen, tmp_path / "two", "--workers", "2", **how)
        assert status == 0, said
        assert told(tmp_path / "two") == told(tmp_path / "local")
        status, said, line = batch(hidden, tmp_path / "lacks", "--gpus-per-worker", "1", **how)
        assert status == 2, said
        assert "input: expected files that can be read" in line and "hidden/rows.jsonl" in line
        assert "No such file or directory (on the node " in line


def test_nodes_without_mpg_are_named(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(20))
    with cluster() as nodes:
        nodes.start(without=("PYTHONPATH",), before=["env", "-C", "/", "PYTHONNOUSERSITE=1"])
        found = nodes.run("python", "-c", "import mpg", PYTHONPATH="")
        if found.returncode == 0:
            pytest.skip("mpg is installed where Ray is")
        status, said, line = batch(rows, tmp_path / "out", **nodes.environment, RAY_ADDRESS=nodes.address)
        assert status == 2, said
        assert "nodes: expected mpg" in line and "got none on" in line and "pip install" in line


def test_a_port_that_is_not_rays_is_refused(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(20))
    with socket.create_server(("", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        status, said, line = batch(rows, tmp_path / "out", RAY_ADDRESS=address)
    assert status == 2 and "nothing of Ray answers there" in line, said


@pytest.mark.parametrize("arguments", [["--local"], ["--workers", "2"]])
def test_a_disk_that_is_full_ends_the_job_which_goes_on_elsewhere(tmp_path, arguments):
    """A filesystem of 64 kB, whose parts are kept when the job goes on where there is room."""
    (tmp_path / "small").mkdir()
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(400))
    status, said, _ = batch(rows, tmp_path / "whole", "--local")
    assert status == 0, said
    copied = 'cp -r "$0/out" "$0/../kept"'
    run = f'"$@"; status=$?; {copied}; exit $status'
    before = [*without(tmp_path / "small"), "sh", "-c", run, str(tmp_path / "small")]
    status, said, line = batch(rows, tmp_path / "small" / "out", *arguments, before=before, RAY_ADDRESS="local")
    assert status == 2 and "output: expected a folder that can be written" in line, said
    assert "No space left on device" in line and "the same command goes on" in said
    kept = told(tmp_path / "kept")
    assert 0 < len(kept) < 400
    status, said, _ = batch(rows, tmp_path / "kept", *arguments, RAY_ADDRESS="local")
    assert status == 0, said
    assert told(tmp_path / "kept") == told(tmp_path / "whole")
    assert not list((tmp_path / "kept").glob(".*"))


def test_a_machine_without_memory_for_a_worker_ends_the_job(tmp_path):
    """Ray kills workers where more of the memory is taken than it is told to leave: here always."""
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(40))
    limits = {"RAY_ADDRESS": "local", "RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "50"}
    status, said, line = batch(rows, tmp_path / "out", **limits)
    assert status == 2 and "nodes: expected memory for a worker, got none on" in line, said
