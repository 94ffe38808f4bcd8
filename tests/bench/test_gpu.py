"""`make gpu` where there is no GPU, and what it makes of the output of compute-sanitizer where there is one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from longer import long

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import gpu  # noqa: E402

PASSED = "42 passed, 7 skipped, 900 deselected in 31.02s\n"
FAILED = "FAILED tests/ops/test_warp_rows.py::test_each_warp_by_hand[cuda]\n1 failed, 41 passed in 31.02s\n"
BANNER = "========= COMPUTE-SANITIZER\n"
FINDING = """\
========= Invalid __global__ read of size 4 bytes
=========     at void mpg::cuda::<unnamed>::reduce_slices_kernel<float>(mpg::ModelLogits, float, float *)+0x1f0
=========     by thread (3,0,0) in block (0,0,0)
=========     Access at 0x7f2d3a000200 is out of bounds
"""
# As compute-sanitizer 2025.3 printed it where no driver is.
REFUSED = """\
========= Error: Target application terminated before first instrumented API call
========= Error: couldn't find exit code.
"""
UNSUPPORTED = """\
========= Error: Device not supported. Please refer to the "Supported Devices" section of the sanitizer documentation
========= Program hit CUDA_ERROR_UNKNOWN (error 999) due to "unknown error" on CUDA API call to cuMemAlloc_v2.
========= ERROR SUMMARY: 1 error
"""


@pytest.mark.parametrize(
    ("exit_status", "output", "verdict", "detail"),
    [
        (0, BANNER + PASSED + "========= ERROR SUMMARY: 0 errors\n", "clean", "42 passed"),
        (
            0,
            BANNER + PASSED + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
            "clean",
            "42 passed",
        ),
        (99, BANNER + FINDING + PASSED + "========= ERROR SUMMARY: 1 error\n", "errors", "reduce_slices_kernel"),
        (
            99,
            BANNER + PASSED + "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n",
            "errors",
            "1 hazard",
        ),
        (255, BANNER + REFUSED, "unavailable", "terminated before first instrumented API call"),
        (99, BANNER + UNSUPPORTED + FAILED, "unavailable", "Device not supported"),
        (1, BANNER + "========= Internal Sanitizer Error: The Sanitizer is out of memory\n", "unavailable", "Internal"),
        (0, PASSED, "unavailable", "no summary of the tool, exit status 0"),
        (-9, BANNER, "unavailable", "exit status -9"),
        (
            1,
            BANNER
            + FAILED
            + "========= Error: process didn't terminate successfully\n========= ERROR SUMMARY: 0 errors\n",
            "tests failed",
            "1 failed, 41 passed",
        ),
        (5, BANNER + "900 deselected in 1.0s\n========= ERROR SUMMARY: 0 errors\n", "tests failed", "exit status 5"),
        (0, BANNER + "7 skipped in 1.0s\n========= ERROR SUMMARY: 0 errors\n", "tests failed", "7 skipped"),
        (0, BANNER + PASSED + "========= ERROR SUMMARY: unreadable\n", "errors", "unreadable"),
    ],
)
def test_only_a_watched_run_free_of_errors_is_clean(exit_status, output, verdict, detail):
    judged = gpu.judge(exit_status, output)
    assert judged["verdict"] == verdict
    assert detail in judged["detail"]


@pytest.fixture
def fake_sanitizer(tmp_path, monkeypatch):
    """A compute-sanitizer that prints what the test wrote for it instead of running anything."""
    program = tmp_path / "compute-sanitizer"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)

    def write(body: str) -> None:
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)

    return write


def test_each_tool_is_run_and_judged_by_itself(fake_sanitizer):
    fake_sanitizer(
        'case "$2" in\n'
        f"  racecheck) printf '%s' '{BANNER + FINDING}========= ERROR SUMMARY: 1 error'; exit 99;;\n"
        f'  synccheck) printf "%s" "{BANNER}========= Error: Device not supported."; exit 255;;\n'
        f"  *) printf '%s' '{BANNER + PASSED}========= ERROR SUMMARY: 0 errors';;\n"
        "esac"
    )
    *_, found = gpu.run_sanitizers("cuda", 60)
    verdicts = {tool: judged["verdict"] for tool, judged in found["tools"].items()}
    assert verdicts == {"memcheck": "clean", "racecheck": "errors", "initcheck": "clean", "synccheck": "unavailable"}
    assert not found["passed"]


def test_first_light_ends_with_a_look_for_races_each_written_before_the_next(fake_sanitizer, monkeypatch):
    fake_sanitizer(f"printf '%s' '{BANNER + PASSED}========= ERROR SUMMARY: 0 errors'; echo \"$@\" >> asked")
    monkeypatch.setitem(sys.modules, "light", SimpleNamespace(first_light=lambda device: iter([{"passed": True}])))
    clean = {"verdict": "clean", "detail": PASSED.strip()}
    assert list(gpu.run_first_light("cuda", 60)) == [
        {"passed": True},
        {"passed": True, "racecheck": {"warp_rows": clean}},
        {"passed": True, "racecheck": {"warp_rows": clean, "draws": clean}},
    ]
    asked = (gpu.ROOT / "asked").read_text().splitlines()
    assert [selected in line for selected, line in zip(gpu.RACES.values(), asked, strict=True)] == [True, True]


def test_a_card_is_built_for_alone(monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "get_device_capability", lambda: (9, 0))
    assert gpu.environment("cuda")["MPG_CUDA_ARCHS"] == "90-real"
    assert "MPG_CUDA_ARCHS" not in gpu.environment("cpu")


def test_a_tool_that_does_not_end_is_not_clean(fake_sanitizer):
    fake_sanitizer("exec sleep 60")
    assert gpu.run_sanitizer("memcheck", 0.2)["verdict"] == "unfinished"
    *_, found = gpu.run_sanitizers("cuda", 0.8)
    assert not found["passed"]


def test_a_machine_without_the_tool_is_not_clean(monkeypatch):
    monkeypatch.setattr(gpu, "SANITIZER", "compute-sanitizer-that-is-not-there")
    *_, found = gpu.run_sanitizers("cuda", 60)
    assert {judged["verdict"] for judged in found["tools"].values()} == {"unavailable"}


def test_op_bench_is_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser): parser.addoption('--device'), parser.addoption('--so-far')\n"
        "def pytest_unconfigure(config): print('a table', '{\"goals\": []}', sep='\\n')\n"
    )
    suite = tmp_path / "bench" / "test_ops.py"
    suite.write_text("def test_op(pytestconfig): assert pytestconfig.getoption('--device') == 'cuda'\n")
    assert list(gpu.run_op_bench("cuda", 60)) == [{"passed": True, "goals": []}]
    suite.write_text("def test_op(): assert False\n")
    assert not next(gpu.run_op_bench("cuda", 60))["passed"]
    suite.write_text(
        "def test_op(pytestconfig):\n"
        "    open(pytestconfig.getoption('--so-far'), 'w').write('{\"times\": [1]}')\n"
        "    assert False\n"
    )
    found = next(gpu.run_op_bench("cuda", 60))
    assert not found["passed"] and found["times"] == [1]


def test_a_stopped_command_has_printed_what_it_has():
    status, output = gpu.run(["sh", "-c", "echo first; exec sleep 60"], 0.5)
    assert status == gpu.STOPPED and output.splitlines()[0] == "first"
    assert output.splitlines()[-1].startswith("stopped after")


TOLD = {
    "by one process": """\
tests/a.py::test_one[x - y] PASSED                                         [ 33%]
tests/a.py::test_two FAILED                                                [ 66%]
tests/b.py::test_three SKIPPED (no GPU)                                    [100%]
stopped after 340 s
""",
    "by several": """\
tests/a.py::test_one[x - y]
tests/a.py::test_two
[gw0] [ 33%] PASSED tests/a.py::test_one[x - y]
[gw1] [ 66%] FAILED tests/a.py::test_two
tests/b.py::test_three
[gw0] [100%] SKIPPED tests/b.py::test_three
stopped after 340 s
""",
}


@pytest.mark.parametrize("told", TOLD)
def test_a_suite_that_is_stopped_has_told_which_tests_failed(told, monkeypatch):
    monkeypatch.setattr(gpu, "run", lambda command, limit_s: (gpu.STOPPED, TOLD[told]))
    assert list(gpu.run_suite("cuda", 340)) == [{
        "passed": False, "tests": {"passed": 1, "failed": 1, "skipped": 1}, "failed": ["tests/a.py::test_two"],
        "summary": "stopped after 340 s",
    }]  # fmt: skip


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A command on a machine without a GPU, and not as part of this run of tests: a worker of xdist times nothing."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = own | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_gpu_without_a_gpu_says_so_and_fails():
    finished = run("make", "gpu", f"PYTHON={sys.executable}", "PART=decode")
    assert finished.returncode != 0
    assert "sees no CUDA device here. Nothing was run." in finished.stderr


def test_make_gpu_without_torch_says_so_and_fails():
    finished = run(sys.executable, "-S", "bench/gpu.py")  # -S: without installed packages
    assert finished.returncode == 1
    assert finished.stderr.startswith(f"make gpu: {sys.executable} has no torch; name a Python that has")


def test_unknown_part_is_named():
    with pytest.raises(SystemExit, match="PART must be one of light, ops, decode, tests, sanitize, got 'everything'"):
        gpu.main(["everything"])


def test_models_that_a_stopped_part_has_written_are_removed(tmp_path, monkeypatch):
    written = []

    def stopped(command, limit_s, variables):
        written.append(Path(variables["TMPDIR"], "model"))
        written[0].write_text("of many GB")
        return gpu.STOPPED, ""

    (tmp_path / "build").mkdir()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "run", stopped)
    assert not gpu.run_part("decode", "cpu", 20)
    assert written and not written[0].exists()


def test_what_was_found_before_a_part_was_stopped_is_kept(tmp_path):
    def findings():
        yield {"passed": True, "first": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gpu.keep(findings(), tmp_path / "part.json", {"part": "light"})
    report = json.loads((tmp_path / "part.json").read_text())
    assert (report["part"], report["first"]) == ("light", 1)


@long
def test_every_part_but_sanitizers_can_be_rehearsed(tmp_path):
    """From the command to the file, each on the CPU's stand-ins."""
    finished = run(sys.executable, "bench/gpu.py", "--rehearse", "light", "decode", "ops", "tests")
    assert finished.returncode == 0, finished.stderr
    reports = {report["part"]: report for report in map(json.loads, finished.stdout.splitlines())}
    assert all(report["passed"] for report in reports.values())
    light = reports["light"]
    assert light["ops"]["ops"] == 19 and not light["ops"]["wrong"]
    assert light["stream"]["passed"] and {*light["racecheck"]} == {*gpu.RACES}
    for step in ("rounds", "compiled"):
        assert {row["graphs"] for row in light[step]["rows"]} == {True, False}
        assert light[step]["graph_bytes"] > 0
    assert all(light["attention"]["kernels"].values())
    assert all(row["value"] > 0 for row in reports["decode"]["rows"])
    assert reports["tests"]["tests"]["passed"] > 0 and not reports["tests"]["failed"]
