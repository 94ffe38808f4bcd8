"""What a machine with a GPU can show, part by part: first light, op times, large models, suite, sanitizers.

Needs no network and no installation: it uses the torch that is there and builds in place. Arguments name the parts,
none means all; after the build each ends inside 6 minutes and leaves one JSON file under bench/results/, which holds
what a part has found so far from its first step on. With --rehearse the same parts run on the CPU, on small stand-ins,
and write to build/: that they run to their ends is all that this shows.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

try:
    import torch
except ModuleNotFoundError:
    sys.exit(f"make gpu: {sys.executable} has no torch; name a Python that has: make gpu PYTHON=... Nothing was run.")

ROOT = Path(__file__).resolve().parent.parent
BUILD_LIMIT_S, PART_LIMIT_S = 180, 350
TOTAL_LIMIT_S = 560  # of all parts: one command on a shared machine seldom gets more than 10 minutes

Found = dict[str, Any]  # by a part so far; "passed" says whether all is well


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--run"]:  # this file again, in a process of its own
        part, device, limit_s, path = arguments[1:]
        keep(PARTS[part](device, float(limit_s)), Path(path), {"part": part, **describe(device)})
        return
    rehearses = "--rehearse" in arguments
    parts, device = [part for part in arguments if part != "--rehearse"], "cpu" if rehearses else "cuda"
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        sys.exit(f"make gpu: PART must be one of {', '.join(PARTS)}, got {unknown[0]!r}. Nothing was run.")
    if not rehearses and not torch.cuda.is_available():
        sys.exit(f"make gpu: torch {torch.__version__} sees no CUDA device here. Nothing was run.")
    started = time.perf_counter()
    build(device)
    failed = []
    for part in parts or PARTS:
        left_s = TOTAL_LIMIT_S - (time.perf_counter() - started)
        if left_s < 60 and not parts:
            print(f"make gpu: no time is left for PART={part}; run it by itself", file=sys.stderr)
            failed.append(f"{part} (not run)")
        elif not run_part(part, device, min(PART_LIMIT_S, left_s)):
            failed.append(part)
    if failed:
        sys.exit(f"make gpu: not passed on this device: {', '.join(failed)}")


def environment(device: str) -> dict[str, str]:
    """Where this tree is found, its twins and stand-ins too, for a device."""
    folders = [str(ROOT / folder) for folder in ("python", "", "tests", "tests/ops")]
    path = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    own = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}  # what is stopped has printed what it knew
    if device == "cuda":  # built for this card alone, in a quarter of the time
        own = {"MPG_CUDA": "ON", "MPG_CUDA_ARCHS": "{}{}-real".format(*torch.cuda.get_device_capability())}
    return os.environ | {"MPG_DEVICE": device, "PYTHONPATH": path} | own


def describe(device: str) -> Found:
    name = torch.cuda.get_device_name() if device == "cuda" else "rehearsal on a CPU"
    time_now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"device": name, "torch": torch.__version__, "time": time_now}


def build(device: str) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    try:
        subprocess.run(command, cwd=ROOT, env=environment(device), check=True, timeout=BUILD_LIMIT_S, stdout=sys.stderr)
    except subprocess.TimeoutExpired:
        sys.exit(f"make gpu: the build was stopped after {BUILD_LIMIT_S} s; run it again to go on from there")


def run_part(part: str, device: str, limit_s: float) -> bool:
    """Runs a part in a process of its own, which writes what it finds; whether all of it passed."""
    name = re.sub(r"\W+", "-", describe(device)["device"].lower())
    path = ROOT / ("bench/results" if device == "cuda" else "build") / f"gpu-{part}-{name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--run", part, device, str(limit_s - 10), str(path)]
    with TemporaryDirectory(dir=roomy_folder()) as scratch:  # a part that is stopped removes nothing
        own = {"TMPDIR": scratch} if part == "decode" else {}
        status, _ = run(command, limit_s, environment(device) | own)
    report = json.loads(path.read_text()) if path.exists() else {"part": part, **describe(device), "passed": False}
    if status != 0:
        report |= {"passed": False, "ended": "at its time limit" if status == STOPPED else f"with status {status}"}
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    print(f"written to {path.relative_to(ROOT)}", file=sys.stderr)
    return bool(report["passed"])


def roomy_folder() -> str | None:
    """Where models of a few dozen GB are written and read the fastest; None for the default."""
    memory = "/dev/shm"
    return memory if os.path.isdir(memory) and shutil.disk_usage(memory).free > 2**35 else None


def keep(findings: Iterator[Found], path: Path, header: Found) -> None:
    """Write what a part has found whenever there is more of it."""
    started = time.perf_counter()
    for found in findings:
        report = header | {"seconds": round(time.perf_counter() - started, 1)} | found
        path.write_text(json.dumps(report, indent=1) + "\n")


STOPPED = 124  # the exit status that timeout(1) gives


def run(command: list[str], limit_s: float, variables: Mapping[str, str] = os.environ) -> tuple[int, str]:
    """Exit status and standard output of a command. At the limit it is stopped with all that it has started, and the
    last line says so."""
    with subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return STOPPED, f"{output}\nstopped after {limit_s:.0f} s"
        return process.returncode, output


def run_pytest(limit_s: float, *arguments: str) -> tuple[bool, str]:
    """Whether pytest passed, and the last line of its output."""
    status, output = run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments], limit_s)
    if status != 0:
        print(output[-8000:], file=sys.stderr)
    return status == 0, (output.strip().splitlines() or [""])[-1]


def run_suite(device: str, limit_s: float) -> Iterator[Found]:
    """What the suite has for a device, test by test on several processes; a rehearsal runs the demo's tests alone."""
    chosen = ["--ignore=tests/test_build.py", "--ignore=tests/simt", "-k", "not simt and not cpu"]
    workers = ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"] if find_spec("xdist") else []
    options = ["-m", "pytest", "-p", "no:cacheprovider", "-vv", *workers]
    status, output = run([sys.executable, *options, *(chosen if device == "cuda" else ["tests/demo"])], limit_s)
    if status != 0:
        print(output[-8000:], file=sys.stderr)
    yield {"passed": status == 0, **tell_tests(output)}


def tell_tests(output: str) -> Found:
    """How many tests pytest's -vv has told of, by verdict, which failed, and its last line."""
    told = re.findall(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED) (\S.*?) *$", output, flags=re.MULTILINE)
    found = re.findall(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", output, flags=re.MULTILINE)
    verdicts = told + [(verdict, name) for name, verdict in found]
    counts = Counter(verdict.lower() for verdict, _ in verdicts)
    failed = sorted({name for verdict, name in verdicts if verdict in ("FAILED", "ERROR")})
    return {"tests": dict(counts), "failed": failed, "summary": (output.strip().splitlines() or [""])[-1]}


SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def run_sanitizers(_device: str, limit_s: float) -> Iterator[Found]:
    """The op tests on small inputs under each tool of compute-sanitizer. Passed: each is clean, or unavailable here."""
    verdicts: dict[str, dict[str, str]] = {}
    deadline = time.perf_counter() + limit_s
    for number, tool in enumerate(TOOLS):
        tool_limit_s = (deadline - time.perf_counter()) / (len(TOOLS) - number)
        verdicts[tool] = run_sanitizer(tool, tool_limit_s)
        passed = all(verdict["verdict"] in ("clean", "unavailable") for verdict in verdicts.values())
        yield {"passed": passed, "tools": verdicts}


def run_sanitizer(tool: str, limit_s: float, of_ops: str = "") -> dict[str, str]:
    """What a tool says of the op tests, or of those whose names agree with an expression of pytest's -k."""
    found = shutil.which(SANITIZER, path=os.environ["PATH"] + os.pathsep + "/usr/local/cuda/bin")
    if found is None:
        return {"verdict": "unavailable", "detail": f"{SANITIZER} is not installed"}
    command = [found, "--tool", tool, "--error-exitcode", "99", "--launch-timeout", "120"]
    if tool != "initcheck":  # which has to see the kernels of torch write what ours read
        command += ["--kernel-name", "kernel_substring=mpg"]
    command += [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/ops", "--confcutdir=tests/ops"]
    command += ["-m", "not hypothesis", "-k", "cuda and not law and not opcheck and not beyond_32_bits" + of_ops]
    # Small inputs, each in an allocation of its own: in one of torch's large blocks an overrun would stay inside.
    variables = os.environ | {"MPG_MAX_ELEMENTS": str(2**12), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status, output = run(command, limit_s, variables)
    return {"verdict": "unfinished", "detail": output[-2000:]} if status == STOPPED else judge(status, output)


def judge(exit_status: int, output: str) -> dict[str, str]:
    """What a run of pytest under compute-sanitizer showed: "clean", "errors", "tests failed" or "unavailable".

    Clean is only what passed at least one test, was watched to the end and summed up as free of errors. The tool's own
    failures, a device that it does not support for one, are "unavailable" whatever else went wrong because of them.
    """
    lines = [line.removeprefix("=========").strip() for line in output.splitlines() if line.startswith("=========")]
    own_failures = [
        line
        for line in lines
        if re.match(r"Error: (?!process didn't terminate)|Internal Sanitizer Error|.*not supported|.*unsupported", line)
    ]
    if own_failures:
        return {"verdict": "unavailable", "detail": own_failures[0]}
    summaries = [line for line in lines if re.match(r"(ERROR|RACECHECK) SUMMARY:", line)]
    if not summaries:
        return {"verdict": "unavailable", "detail": f"no summary of the tool, exit status {exit_status}"}
    counts = [int(count) for count in re.findall(r"(\d+) (?:error|hazard|warning)", summaries[-1])]
    if sum(counts) or not counts:
        where = sorted({line for line in lines if line.startswith("at ")})
        return {"verdict": "errors", "detail": "; ".join([summaries[-1], *where[:20]])}
    tests = re.findall(
        r"^.*\d (?:passed|failed|errors?|deselected|skipped)\b.* in [\d.]+s.*$", output, flags=re.MULTILINE
    )
    summary = tests[-1].strip("= ") if tests else "no summary of pytest"
    if exit_status != 0 or not re.search(r"\b[1-9]\d* passed", summary):
        return {"verdict": "tests failed", "detail": f"{summary}, exit status {exit_status}"}
    return {"verdict": "clean", "detail": summary}


def run_op_bench(device: str, limit_s: float) -> Iterator[Found]:
    """bench/test_ops.py, whose last line is its report, and which leaves what it has measured as it goes. Passed: every
    answer was right; a goal may be missed."""
    few = [] if device == "cuda" else ["-k", "draw_tokens"]
    path = ROOT / "build" / "ops-so-far.json"
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    passed, last_line = run_pytest(limit_s, "bench/test_ops.py", "--device", device, "--so-far", str(path), *few)
    so_far = json.loads(path.read_text()) if path.exists() else {}
    yield {"passed": True} | json.loads(last_line) if passed else {"passed": False, "summary": last_line, **so_far}


# The ops that are looked at for races first, by the files of their tests
RACES = {"warp_rows": "test_warp_rows", "draws": "(test_draw_fallback or test_verify_block)"}


def run_first_light(device: str, limit_s: float) -> Iterator[Found]:
    """The steps of bench/light.py, and in what time is left a look for races."""
    deadline = time.perf_counter() + limit_s
    from light import first_light

    if device == "cpu":
        capture_on_tapes()
    for found in first_light(device):
        yield found
    races: dict[str, dict[str, str]] = {}
    for number, (name, tests) in enumerate(RACES.items()):
        limit_of_one_s = (deadline - time.perf_counter()) / (len(RACES) - number)
        races = races | {name: run_sanitizer("racecheck", limit_of_one_s, f" and {tests}")}
        passed = found["passed"] and all(each["verdict"] in ("clean", "unavailable") for each in races.values())
        yield found | {"racecheck": races, "passed": passed}


def capture_on_tapes() -> None:
    """Let a rehearsal have graphs: by the tests' stand-in."""
    from mpg.models.graphs import CAPTURES
    from tape import Tape

    CAPTURES["cpu"] = Tape


def time_large_models(device: str, _limit_s: float) -> Iterator[Found]:
    """The GPU's rows of bench/decoding.py, one after another. Passed: they ran; a goal may be missed."""
    import peers
    from decoding import Plan, measure_gpu

    large, small, plan, sizes = peers.LLAMA_8B, peers.LLAMA_1B, Plan(graphs=True, peer_tokens=32), {}
    if device == "cpu":
        capture_on_tapes()
        large = small = peers.Shape("stand-in", 64, 128, 2, 4, 2, 500)
        plan, sizes = Plan(graphs=True, runs=1, peer_tokens=6), {"batches": (1, 2), "contexts": (8,)}
    rows: list[Found] = []
    for row in measure_gpu(large, small, plan, device, partial(print, file=sys.stderr), **sizes):
        rows.append(row.as_json())
        yield {"passed": True, "rows": rows}


PARTS: dict[str, Callable[[str, float], Iterator[Found]]] = {
    "light": run_first_light,
    "ops": run_op_bench,
    "decode": time_large_models,
    "tests": run_suite,
    "sanitize": run_sanitizers,
}

if __name__ == "__main__":
    main(sys.argv[1:])
