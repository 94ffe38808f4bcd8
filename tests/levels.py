"""The op tests at every level of this processor, torch's and ours, and for 50 seeds of their random inputs.

Prints a line a run, and one for each level that is not here; exits with 1 where a run fails. Argument: the number of
seeds (50). Hypothesis's own inputs are varied by `make fuzz`.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS, TORCHS = "MPG_CPU_CAPABILITY", "ATEN_CPU_CAPABILITY"
# With the largest vocabulary; with the next, and the most requests in small ones
SMALLER, SMALLEST = ({"MPG_MAX_ELEMENTS": str(2**n)} for n in (18, 17))
SEEDS_A_RUN = 5
LEVELS = {OURS: ("portable", "avx2", "avx512"), TORCHS: ("default", "avx2", "avx512")}


def run_python(*arguments: str, environment: Mapping[str, str]) -> tuple[bool, str]:
    """Whether a Python succeeds, and what it prints."""
    run = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return run.returncode == 0, run.stdout.strip()


def levels_here(variable: str) -> list[str]:
    """Ours refuse to load where the processor lacks them; torch would run into an illegal instruction."""
    if variable == OURS:
        found = {level: run_python("-c", "import mpg_ext", environment={OURS: level}) for level in LEVELS[OURS]}
        missing = {level: message.splitlines()[-1] for level, (is_here, message) in found.items() if not is_here}
    else:
        _, best = run_python("-c", "import torch; print(torch.backends.cpu.get_cpu_capability())", environment={})
        at = LEVELS[TORCHS].index(best.lower()) if best.lower() in LEVELS[TORCHS] else 0
        missing = {level: f"torch finds {best}" for level in LEVELS[TORCHS][at + 1 :]}
    for level, reason in missing.items():
        print(f"{variable}={level}: not here: {reason}", flush=True)
    return [level for level in LEVELS[variable] if level not in missing]


def test(environment: dict[str, str], *arguments: str) -> bool:
    passed, output = run_python(
        "-m", "pytest", "-p", "no:cacheprovider", "tests/ops", *arguments, environment=environment
    )
    setting = " ".join(f"{name}={value}" for name, value in environment.items())
    print(f"{setting}: {output.splitlines()[-1]}" if passed else f"{setting}: FAILED\n{output[-4000:]}", flush=True)
    return passed


def main(num_seeds: int = 50) -> int:
    ours, torchs = (levels_here(variable) for variable in LEVELS)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        runs = [
            pool.submit(test, {OURS: level, TORCHS: torch_level} | SMALLER, "-k", "not simt")
            for level, torch_level in itertools.product(ours, torchs)
        ]
        # Our levels are those of the CPU side; the simulated kernels have none.
        runs += [pool.submit(test, {TORCHS: level} | SMALLER, "-k", "simt") for level in torchs]
        for seed in range(1, num_seeds + 1, SEEDS_A_RUN):
            seeds = {"MPG_SEED": seed, "MPG_NUM_SEEDS": min(SEEDS_A_RUN, num_seeds + 1 - seed)}
            environment = {name: str(number) for name, number in seeds.items()} | SMALLEST
            runs.append(pool.submit(test, environment, "-k", "not opcheck", "-m", "not hypothesis"))
    return sum(not run.result() for run in runs)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])) > 0)
