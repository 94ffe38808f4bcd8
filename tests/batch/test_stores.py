"""Jobs whose input and output lie in a store of objects, without folders and new names: S3, as moto has it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from clusters import TOOLS, free_port
from jobs import make_rows
from longer import long

fs = pytest.importorskip("pyarrow.fs")

pytestmark = long
SECONDS = 600  # that anything here may take
HOW = ["--models", "demo", "--device", "cpu", "--dtype", "float64", "--set", "sampler=direct"]


@pytest.fixture(scope="module")
def store():
    """A function from a path in a bucket to what pyarrow calls it."""
    tool, port = TOOLS / "moto_server", free_port()
    if not tool.exists():
        pytest.skip("needs moto[s3], flask and flask-cors")
    server = subprocess.Popen([tool, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    make_bucket, ends_at = (
        urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT"),
        time.monotonic() + 60,
    )
    while True:
        try:
            urllib.request.urlopen(make_bucket).close()
            break
        except OSError:
            assert time.monotonic() < ends_at
            time.sleep(0.1)
    yield lambda path: f"s3://key:secret@bucket/{path}?scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"
    server.terminate()
    server.wait()


def open_at(uri):
    return fs.FileSystem.from_uri(uri)


def names_in(uri):
    store, path = open_at(uri)
    return sorted(info.base_name for info in store.get_file_info(fs.FileSelector(path, allow_not_found=True)))


def rows_in(uri):
    store, path = open_at(uri)
    found = []
    for name in names_in(uri):
        if name.startswith("part-"):
            with store.open_input_stream(f"{path}/{name}") as stream:
                found += [json.loads(line) for line in stream.read().splitlines()]
    return [(row["id"], row["text"], row["error"]) for row in found]


def start(*arguments):
    command = [sys.executable, "-m", "mpg", "batch", *arguments, *HOW]
    environment = {**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*arguments):
    process = start(*arguments)
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out + err


@pytest.mark.parametrize("way", [["--local"], ["--workers", "2"]])
def test_a_job_in_a_store_goes_on_where_it_was_killed(store, way, tmp_path):
    if way != ["--local"]:
        pytest.importorskip("ray", reason="needs mpg[ray]")
    name = "-".join(way).strip("-")
    source, output, whole = (store(f"{name}/{part}") for part in ("rows", "out", "whole"))
    rows = make_rows(600, longest=12)
    filesystem, path = open_at(store(f"{name}/rows/rows.jsonl"))
    with filesystem.open_output_stream(path) as stream:
        stream.write("".join(f"{json.dumps(row)}\n" for row in rows).encode())
    status, said = finish(source, whole, "--local")
    assert status == 0, said
    assert [row[0] for row in rows_in(whole)] == [row["id"] for row in rows]
    process, ends_at = start(source, output, *way), time.monotonic() + SECONDS
    while not rows_in(output):
        assert process.poll() is None and time.monotonic() < ends_at, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=SECONDS)
    begun = len(rows_in(output))
    assert 0 < begun < len(rows)
    status, said = finish(source, output, "--seed", "1", *way)
    assert status == 2 and "holds another job: seed: 0 there, 1 here" in said
    status, said = finish(source, output, *way)
    assert status == 0 and f"{len(rows)} of {len(rows)} rows" in said, said
    assert rows_in(output) == rows_in(whole)
    assert [name for name in names_in(output) if not name.startswith("part-")] == ["job.json"]
