"""That the simulator of tests/simt reports the faults it is there to find, each shown by a kernel of harness.cpp."""

from __future__ import annotations

import fcntl
import math
import os
import platform
import subprocess
from pathlib import Path

import pytest

# mutants.py tests a copy in which it has planted a bug.
HERE = Path(os.environ.get("MPG_SIMT_SOURCE", Path(__file__).parents[2])) / "tests" / "simt"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="simt.h switches stacks on x86-64 only")


@pytest.fixture(scope="module", params=[[], SANITIZERS], ids=["plain", "sanitized"])
def harness(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled once, by whichever worker needs it first."""
    folder = tmp_path_factory.getbasetemp()
    program = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / f"harness-{len(request.param)}"
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-Wall", "-Wextra", "-fdata-sections"]
    command += [*request.param, str(HERE / "harness.cpp"), "-o", str(program), f"-Wl,-T,{HERE / 'shared.ld'}"]
    with open(f"{program}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            subprocess.run(command, check=True)
    return program


def run(program: Path, kernel: str, order: str = "forward") -> str:
    environment = os.environ | {"MPG_SIMT_ORDER": order}
    return subprocess.run([program, kernel], env=environment, capture_output=True, text=True, check=True).stdout


def numbers(text: str) -> list[float]:
    return [float(number) for number in text.split()]


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("divergent_barrier", "divergent barrier, threads wait at two"),
        ("barrier_after_exit", "divergent barrier, a thread left before it"),
        ("half_mask", "lane outside its own mask"),
        ("shuffle_after_exit", ", which has left"),
        ("shuffle_against_barrier", "deadlock, a warp operation never completes"),
        ("block_too_large", "1 to 1024 threads in x alone, got 1025, 1, 1"),
        ("grid_too_tall", "the grid is over the limits: 1, 65536, 1"),
        ("grid_empty", "the grid is over the limits: 0, 1, 1"),
        ("grid_too_deep", "the grid is over the limits: 1, 1, 65536"),
        ("block_empty", "1 to 1024 threads in x alone, got 0, 1, 1"),
        ("block_of_two_dimensions", "1 to 1024 threads in x alone, got 32, 2, 1"),
        ("too_much_dynamic_shared_memory", "at most 48 KiB of dynamic shared memory, got 49153 bytes"),
    ],
)
def test_fault_is_reported(harness, kernel, message, order):
    assert message in run(harness, kernel, order)


def test_unknown_order_is_refused(harness):
    assert "must be forward, reverse or random, got sideways" in run(harness, "barrier", "sideways")


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_right_kernels_compute_what_hardware_does(harness, order):
    for kernel in ("barrier", "dynamic_shared_memory"):
        assert numbers(run(harness, kernel, order)) == [i ^ 32 for i in range(64)]
    assert numbers(run(harness, "warp_barrier", order)) == [i ^ 1 for i in range(64)]
    assert numbers(run(harness, "shuffle", order)) == [i if i % 32 == 31 else i + 1 for i in range(64)]
    assert numbers(run(harness, "shuffle_after_half_a_warp", order)) == [i ^ 16 for i in range(64)]
    assert numbers(run(harness, "ballot", order)) == [3] * 64
    assert numbers(run(harness, "blocks_grow_after_an_error", order))[:31] == list(range(1, 32))


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_without_its_barrier_a_whole_warp_reads_uninitialised_shared_memory(harness, order):
    is_nan = [math.isnan(x) for x in numbers(run(harness, "missing_barrier", order))]
    assert sum(is_nan) == 32
    assert is_nan[:32] == [is_nan[0]] * 32


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_without_a_barrier_of_the_warp_half_the_lanes_read_uninitialised_shared_memory(harness, order):
    is_nan = [math.isnan(x) for x in numbers(run(harness, "missing_warp_barrier", order))]
    assert is_nan == [order == "forward", order == "reverse"] * 32


@pytest.mark.parametrize("harness", [SANITIZERS], ids=["sanitized"], indirect=True)
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("shared_memory_overrun", "index 69 out of bounds"),
        ("too_little_dynamic_shared_memory", "heap-buffer-overflow"),
    ],
)
def test_sanitizers_see_overruns_of_shared_memory(harness, kernel, message):
    finished = subprocess.run([harness, kernel], capture_output=True, text=True)
    assert finished.returncode != 0
    assert message in finished.stderr


def test_shuffle_from_a_lane_outside_the_mask_is_nan(harness):
    assert all(math.isnan(x) for x in numbers(run(harness, "shuffle_from_outside_mask"))[:16])


def test_orders_differ_and_random_repeats(harness):
    forward, reverse, random = (numbers(run(harness, "order", order)) for order in ("forward", "reverse", "random"))
    assert forward == list(range(64))
    assert reverse == forward[::-1]
    assert sorted(random) == forward
    assert random not in (forward, reverse)
    assert random == numbers(run(harness, "order", "random"))
