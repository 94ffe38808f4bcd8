"""Plants known kinds of bugs in the sources, one at a time, and says which op test catches each under the sanitizers.

Prints one line a bug, then one line of JSON; exits with 1 where a bug is not caught. Names as arguments pick bugs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import NamedTuple

import simulator


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    tests: str  # the op tests to run: a file, then what -k selects in it


# "too little dynamic shared memory" has no place here: no kernel uses any, and simt.h refuses a launch with it.
MUTANTS = {
    "missing barrier after a reduction": Mutant(
        "csrc/kernels/logsumexp.cuh",
        "  __syncthreads();  // warp 0 reads what the others wrote\n",
        "",
        "gather_logprobs accurate_as_plain",
    ),
    "missing barrier before reuse of shared memory": Mutant(
        "csrc/kernels/warp_rows.cu",
        "  __syncthreads();  // the result of the call before has been read\n",
        "",
        "warp_rows op_equals_twin",
    ),
    "divergent barrier": Mutant(
        "csrc/kernels/combine_rows.cu",
        "  }\n  __syncthreads();  // all threads read the normaliser\n",
        "    __syncthreads();\n  }\n",
        "combine_rows op_equals_twin",
    ),
    "half mask": Mutant(
        "csrc/kernels/verify_chunks.cu",
        "__ballot_sync(kAllLanes, accepts)",
        "__ballot_sync(kAllLanes >> 16, accepts)",
        "verify_chunks Acceptance",
    ),
    "lanes leaving before a shuffle": Mutant(
        "csrc/kernels/verify_block.cu",
        "  const bool accepts = counts",
        "  if (!counts) return;\n  const bool accepts = counts",
        "verify_block by_hand",
    ),
    "misaligned vector load": Mutant(
        "csrc/kernels/logsumexp.cu",
        "reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T)",
        "0",
        "gather_logprobs every_misalignment",
    ),
    "tail overrun": Mutant(
        "csrc/kernels/logsumexp.cu",
        "num_packed = (size - head) / kSize",
        "num_packed = (size - head + kSize - 1) / kSize",
        "gather_logprobs every_misalignment",
    ),
    "shared-memory overrun": Mutant(
        "csrc/kernels/warp_rows.cu",
        "w < kRowThreads / kWarp; ++w",
        "w <= kRowThreads / kWarp; ++w",
        "warp_rows op_equals_twin",
    ),
    "int32 row offset": Mutant(
        "csrc/storage.h",
        "b * rows.stride_sequence +",
        "int32_t(b * rows.stride_sequence) +",
        "gather_logprobs offsets_beyond",
    ),
    "scan off by one": Mutant(
        "csrc/kernels/verify_block.cu",
        "counts && j < i; ++j",
        "counts && j < i - 1; ++j",
        "verify_block by_hand",
    ),
    "unchecked token": Mutant(
        "csrc/kernels/logsumexp.cuh",
        "is_token = token >= 0 && token < logits.V",
        "is_token = true",
        "gather_logprobs outside_the_vocabulary",
    ),
    "swapped grid dimensions": Mutant(
        "csrc/kernels/draw_fallback.cu",
        "slices(unsigned(logits.B), unsigned(num_slices(logits.V)))",
        "slices(unsigned(num_slices(logits.V)), unsigned(logits.B))",
        "draw_fallback op_equals_twin",
    ),
    "wrong identity element": Mutant(
        "csrc/kernels/logsumexp.cuh",
        "  sum = LogSum<float>();\n",
        "  sum = LogSum<float>{0.f, 0.f};\n",
        "gather_logprobs far_from_zero",
    ),
    "missing -inf guard": Mutant(
        "csrc/kernels/logsumexp.cu",
        "shift = sum.max == -INFINITY ? 0 : sum.max",
        "shift = sum.max",
        "gather_logprobs lone_token",
    ),
    "acceptance with <= for <": Mutant(
        "csrc/numerics.h",
        "std::log(uniform) < double(score)",
        "std::log(uniform) <= double(score)",
        "verify_chunks strict",
    ),
    "stale bound after freeze": Mutant(
        "csrc/numerics.h",
        "bound.frozen[b] = variance < bound.tau;",
        "bound.frozen[b] = bound.frozen[b] || variance < bound.tau;",
        "update_bound phases_by_hand",
    ),
    "uniform index shared by two prefixes": Mutant(
        "csrc/kernels/verify_chunks.cu",
        "args.uniforms[b * args.K + lane]",
        "args.uniforms[b * args.K + lane / 2]",
        "verify_chunks Acceptance and twin",
    ),
}


def caught_by(mutant: Mutant) -> str | None:
    """The first op test that fails, or ends the process, with this bug planted; None where all of them pass."""
    name, selected = mutant.tests.split(" ", 1)
    simulator.build(sanitize=True, edits={mutant.file: (mutant.old, mutant.new)})
    run = simulator.run_sanitized(
        "-vv", "-x", f"tests/ops/test_{name}.py", "-k", f"simt and {selected}", PYTHONUNBUFFERED="1"
    )
    started = re.findall(rf"^tests/ops/test_{name}\.py::(.*?)(?: [A-Z]+ .*)?$", run.stdout, flags=re.MULTILINE)
    assert started, f"no test of {mutant.tests!r} ran: {run.stdout[-2000:]}{run.stderr[-2000:]}"
    return started[-1] if run.returncode != 0 else None


def main() -> None:
    names = sys.argv[1:] or list(MUTANTS)
    by = {}
    for name in names:
        by[name] = caught_by(MUTANTS[name])
        print(f"{name}: {by[name] or 'NOT CAUGHT'}", flush=True)
    caught = {name: test for name, test in by.items() if test is not None}
    print(json.dumps({"total": len(names), "caught": len(caught), "by": caught}))
    sys.exit(len(caught) < len(names))


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error}\n{error.stdout}{error.stderr}")
