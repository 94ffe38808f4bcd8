"""What a machine with a GPU can show, part by part: suite on CUDA, sanitizers, op times, a short decode.

Needs no network and no installation: it uses the torch that is there and builds in place. Arguments name the parts,
none means all; after the build each ends inside 6 minutes and leaves one JSON file under bench/results/.
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
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

try:
    import torch
except ModuleNotFoundError:
    sys.exit(f"make gpu: {sys.executable} has no torch; name a Python that has: make gpu PYTHON=... Nothing was run.")

ROOT = Path(__file__).resolve().parent.parent
BUILD_LIMIT_S, PART_LIMIT_S = 180, 350
TOTAL_LIMIT_S = 560  # of all parts: one command on a shared machine seldom gets more than 10 minutes
DEVICE = "cuda"
ENVIRONMENT = os.environ | {
    "MPG_CUDA": "ON",
    "MPG_DEVICE": DEVICE,
    "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
}


def main(parts: list[str]) -> None:
    if parts[:1] == ["--run"]:  # this file again, where the packages of this tree are found
        print(json.dumps(PARTS[parts[1]](float(parts[2]))))
        return
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        sys.exit(f"make gpu: PART must be one of {', '.join(PARTS)}, got {unknown[0]!r}. Nothing was run.")
    if not torch.cuda.is_available():
        sys.exit(f"make gpu: torch {torch.__version__} sees no CUDA device here. Nothing was run.")
    started = time.perf_counter()
    build()
    failed = []
    for part in parts or PARTS:
        left_s = TOTAL_LIMIT_S - (time.perf_counter() - started)
        if left_s < 60 and not parts:
            print(f"make gpu: no time is left for PART={part}; run it by itself", file=sys.stderr)
            failed.append(f"{part} (not run)")
        elif not run_part(part, min(PART_LIMIT_S, left_s)):
            failed.append(part)
    if failed:
        sys.exit(f"make gpu: not passed on this device: {', '.join(failed)}")


def build() -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    try:
        subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, timeout=BUILD_LIMIT_S)
    except subprocess.TimeoutExpired:
        sys.exit(f"make gpu: the build was stopped after {BUILD_LIMIT_S} s; run it again to go on from there")


def run_part(part: str, limit_s: float) -> bool:
    """Runs a part in a process of its own and writes what it found; whether it passed."""
    started = time.perf_counter()
    status, output = run([sys.executable, __file__, "--run", part, str(limit_s - 10)], limit_s, ENVIRONMENT)
    found = json.loads(output.splitlines()[-1]) if status == 0 else {"passed": False, "exit_status": status}
    device = torch.cuda.get_device_name()
    report = {
        "part": part,
        "device": device,
        "torch": torch.__version__,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 1),
    } | found
    name = re.sub(r"\W+", "-", device.lower())
    path = ROOT / "bench" / "results" / f"gpu-{part}-{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    print(f"written to {path.relative_to(ROOT)}", file=sys.stderr)
    return bool(found["passed"])


STOPPED = 124  # the exit status that timeout(1) gives


def run(command: list[str], limit_s: float, environment: Mapping[str, str] = os.environ) -> tuple[int, str]:
    """Exit status and standard output of a command. At the limit it is stopped with all that it has started."""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return STOPPED, f"stopped after {limit_s:.0f} s"
        return process.returncode, output


def run_pytest(limit_s: float, *arguments: str) -> tuple[bool, str]:
    """Whether pytest passed, and the last line of its output."""
    status, output = run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments], limit_s)
    if status != 0:
        print(output[-8000:], file=sys.stderr)
    return status == 0, (output.strip().splitlines() or [""])[-1]


def run_suite(limit_s: float) -> dict[str, Any]:
    elsewhere = ["--ignore=tests/test_build.py", "--ignore=tests/simt"]
    passed, summary = run_pytest(limit_s, "-k", "not simt and not cpu", *elsewhere)
    return {"passed": passed, "summary": summary}


SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def run_sanitizers(limit_s: float) -> dict[str, Any]:
    """The op tests on small inputs under each tool of compute-sanitizer. Passed: each is clean, or unavailable here."""
    verdicts: dict[str, dict[str, str]] = {}
    deadline = time.perf_counter() + limit_s
    for number, tool in enumerate(TOOLS):
        tool_limit_s = (deadline - time.perf_counter()) / (len(TOOLS) - number)
        verdicts[tool] = run_sanitizer(tool, tool_limit_s)
        print(f"{tool}: {verdicts[tool]}", file=sys.stderr)
    passed = all(verdict["verdict"] in ("clean", "unavailable") for verdict in verdicts.values())
    return {"passed": passed, "tools": verdicts}


def run_sanitizer(tool: str, limit_s: float) -> dict[str, str]:
    found = shutil.which(SANITIZER, path=os.environ["PATH"] + os.pathsep + "/usr/local/cuda/bin")
    if found is None:
        return {"verdict": "unavailable", "detail": f"{SANITIZER} is not installed"}
    command = [found, "--tool", tool, "--error-exitcode", "99", "--launch-timeout", "120"]
    if tool != "initcheck":  # which has to see the kernels of torch write what ours read
        command += ["--kernel-name", "kernel_substring=mpg"]
    command += [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/ops", "--confcutdir=tests/ops"]
    command += ["-m", "not hypothesis", "-k", "cuda and not law and not opcheck and not beyond_32_bits"]
    # Small inputs, each in an allocation of its own: in one of torch's large blocks an overrun would stay inside.
    environment = os.environ | {"MPG_MAX_ELEMENTS": str(2**12), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status, output = run(command, limit_s, environment)
    return {"verdict": "unfinished", "detail": output} if status == STOPPED else judge(status, output)


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


def run_op_bench(limit_s: float) -> dict[str, Any]:
    """bench/test_ops.py, whose last line is its report. Passed: every answer was right; a goal may be missed."""
    passed, last_line = run_pytest(limit_s, "bench/test_ops.py", "--device", DEVICE)
    return {"passed": True} | json.loads(last_line) if passed else {"passed": False, "summary": last_line}


def time_decode(_limit_s: float) -> dict[str, Any]:
    """The demo models, far too small to fill a GPU: that decoding runs, and what a round costs beside the kernels,
    forwards launched one by one and replayed from graphs. Passed: both give the same texts."""
    import mpg
    from mpg.demo import MODELS
    from mpg.demo.corpus import DEMO_QUESTIONS

    models = {graphs: mpg.load(MODELS, device=DEVICE, dtype="float32", graphs=graphs) for graphs in (False, True)}
    rows = []
    for options in (
        {"sampler": "direct", "target": "geometric"},
        {"sampler": "exact", "target": "geometric"},
        {"sampler": "scr", "target": "arithmetic"},
    ):
        for graphs, model in models.items():
            model.generate(DEMO_QUESTIONS[0], weights={"E": 1, "T": 1}, seed=0, **options)
            result = model.generate(DEMO_QUESTIONS[0], weights={"E": 1, "T": 1}, seed=0, **options)
            rows.append(options | {"graphs": graphs, "text": result.text, **result.stats})
    passed = all(plain["text"] == replayed["text"] for plain, replayed in zip(rows[::2], rows[1::2], strict=True))
    return {"passed": passed, "graph_bytes": models[True].models.graph_bytes(), "rows": rows}


PARTS: dict[str, Callable[[float], dict[str, Any]]] = {
    "tests": run_suite,
    "sanitize": run_sanitizers,
    "ops": run_op_bench,
    "decode": time_decode,
}

if __name__ == "__main__":
    main(sys.argv[1:])
