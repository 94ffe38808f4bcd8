"""Plants known kinds of bugs in the sources, one at a time, and says which test catches each under the sanitizers.

The tests have to pass without a bug first. Prints one line a bug, then one line of JSON; exits with 1 where a bug is
not caught. Names as arguments pick bugs.
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
    tests: str  # those to run: a file under tests/, then what -k selects in it


MUTANTS = {
    "missing barrier after a reduction": Mutant(
        "csrc/kernels/launch.cuh",
        "  __syncthreads();  // every warp reads what all wrote\n",
        "",
        "ops/test_gather_logprobs.py exact_to_rounding",
    ),
    "missing barrier before reuse of shared memory": Mutant(
        "csrc/kernels/launch.cuh",
        "  __syncthreads();  // the result of the call before has been read\n",
        "",
        "ops/test_warp_rows.py op_keeps",
    ),
    "divergent barrier": Mutant(
        "csrc/kernels/combine_rows.cu",
        "  }\n  __syncthreads();  // all threads read the normaliser\n",
        "    __syncthreads();\n  }\n",
        "ops/test_combine_rows.py exact_to_rounding",
    ),
    "half mask": Mutant(
        "csrc/kernels/verify_chunks.cu",
        "__ballot_sync(kAllLanes, accepts)",
        "__ballot_sync(kAllLanes >> 16, accepts)",
        "ops/test_verify_chunks.py Acceptance",
    ),
    "lanes leaving before a shuffle": Mutant(
        "csrc/kernels/verify_block.cu",
        "  const bool accepts = counts",
        "  if (!counts) return;\n  const bool accepts = counts",
        "ops/test_verify_block.py by_hand",
    ),
    "misaligned vector load": Mutant(
        "csrc/kernels/logsumexp.cu",
        "reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T)",
        "0",
        "ops/test_gather_logprobs.py every_misalignment",
    ),
    "tail overrun": Mutant(
        "csrc/kernels/logsumexp.cu",
        "num_packed = (size - head) / kSize",
        "num_packed = (size - head + kSize - 1) / kSize",
        "ops/test_gather_logprobs.py every_misalignment",
    ),
    "shared-memory overrun": Mutant(
        "csrc/kernels/launch.cuh",
        "of_warp[lane % kCount]",
        "of_warp[lane]",
        "ops/test_draw_fallback.py op_draws",
    ),
    "too little dynamic shared memory": Mutant(  # no kernel of the library uses any: planted in one of the simulator's
        "tests/simt/harness.cpp",
        "sizeof(float[kThreads])",
        "sizeof(float[kThreads - 1])",
        "simt/test_harness.py right_kernels and sanitized",
    ),
    "int32 row offset": Mutant(
        "csrc/storage.h",
        "b * rows.stride_sequence +",
        "int32_t(b * rows.stride_sequence) +",
        "ops/test_far_rows.py gather_logprobs",
    ),
    "scan off by one": Mutant(
        "csrc/kernels/verify_block.cu",
        "counts && j < i; ++j",
        "counts && j < i - 1; ++j",
        "ops/test_verify_block.py by_hand",
    ),
    "unchecked token": Mutant(
        "csrc/kernels/verify_chunks.cu",
        "is_token = token >= 0 && token < logits.V",
        "is_token = true",
        "ops/test_gather_logprobs.py outside_the_vocabulary",
    ),
    "swapped grid dimensions": Mutant(
        "csrc/kernels/draw_fallback.cu",
        "slices(unsigned(logits.B), unsigned(num_slices(logits.V)))",
        "slices(unsigned(num_slices(logits.V)), unsigned(logits.B))",
        "ops/test_draw_fallback.py op_draws",
    ),
    "wrong identity element": Mutant(
        "csrc/numerics.h",
        "  A max = -A(INFINITY);\n  A sum = 0;\n",
        "  A max = 0;\n  A sum = 0;\n",
        "ops/test_gather_logprobs.py far_from_zero",
    ),
    "missing -inf guard": Mutant(
        "csrc/kernels/logsumexp.cu",
        "shift = sum.max == -INFINITY ? 0 : sum.max",
        "shift = sum.max",
        "ops/test_gather_logprobs.py lone_token",
    ),
    "acceptance with <= for <": Mutant(
        "csrc/numerics.h",
        "std::log(uniform) < double(score)",
        "std::log(uniform) <= double(score)",
        "ops/test_verify_chunks.py strict",
    ),
    "stale bound after freeze": Mutant(
        "csrc/numerics.h",
        "bound.frozen[b] = variance < bound.tau;",
        "bound.frozen[b] = bound.frozen[b] || variance < bound.tau;",
        "ops/test_update_bound.py phases_by_hand",
    ),
    "uniform index shared by two prefixes": Mutant(
        "csrc/kernels/verify_chunks.cu",
        "args.uniforms[b * args.K + lane]",
        "args.uniforms[b * args.K + lane / 2]",
        "ops/test_verify_chunks.py Acceptance and twin",
    ),
    "one token more than the limit": Mutant(
        "csrc/round.h",
        "stop > kept && kept < room",
        "stop > kept",
        "ops/test_round.py by_hand",
    ),
    "an end that only its own lane knows of": Mutant(
        "csrc/round.h",
        "return min_of_lanes(end);",
        "min_of_lanes(end);\n  return end;",
        "ops/test_round.py by_hand",
    ),
    "commit behind the end of a row": Mutant(
        "csrc/round.h",
        "(kept < room ? kept : room)",
        "kept",
        "ops/test_round.py no_room",
    ),
    "packed load behind the end of a row": Mutant(
        "csrc/kernels/combine_rows.cu",
        "count >= kTokens && ",
        "",
        "ops/test_combine_rows.py exact_to_rounding",
    ),
    "packed load of tokens that do not lie on it": Mutant(
        "csrc/kernels/combine_rows.cu",
        " && reinterpret_cast<uintptr_t>(x) % sizeof(P) == 0",
        "",
        "ops/test_combine_rows.py exact_to_rounding",
    ),
    "packed store behind the end of a row": Mutant(
        "csrc/kernels/packed.cuh",
        "count >= kCount && ",
        "",
        "ops/test_combine_rows.py exact_to_rounding",
    ),
    "packed store of numbers that do not lie on it": Mutant(
        "csrc/kernels/packed.cuh",
        " && reinterpret_cast<uintptr_t>(out) % sizeof(P) == 0",
        "",
        "ops/test_combine_rows.py exact_to_rounding",
    ),
    "slices of another size where they are merged": Mutant(
        "csrc/kernels/verify_chunks.cu",
        "args.partials, row, logits.num_slices()",
        "args.partials, row, num_slices(logits.V)",
        "ops/test_gather_logprobs.py exact_to_rounding",
    ),
    "carry lost between the words of a sum": Mutant(
        "csrc/kernels/warp_rows.cu",
        "uint32_t(weight >> 32) + carry",
        "uint32_t(weight >> 32) + 0 * carry",
        "ops/test_warp_rows.py long_rows",
    ),
    "ties counted from the start of a slice": Mutant(
        "csrc/kernels/warp_rows.cu",
        "num_before + number <=",
        "number <=",
        "ops/test_warp_rows.py long_rows",
    ),
    "missing barrier between zeroing and adding": Mutant(
        "csrc/kernels/warp_rows.cu",
        "  __syncthreads();  // before others add\n",
        "",
        "ops/test_warp_rows.py op_keeps",
    ),
    "top-p of all that was there before top-k": Mutant(
        "csrc/kernels/warp_rows.cu",
        "kept_after(row, row.num_stages(1)).mass",
        "kept_after(row, 0).mass",
        "ops/test_warp_rows.py counts_what_top_k_left",
    ),
    "draw in a run with the mass before it": Mutant(
        "csrc/kernels/inverse_cdf.cuh",
        "__shfl_sync(kAllLanes, sum - mass, lane)",
        "0",
        "ops/test_verify_block.py Draw or draw",
    ),
    "tile across a boundary of groups": Mutant(
        "csrc/kernels/lora.cu",
        "i % most_rows != 0 && rows.groups[i - 1] == rows.groups[i]",
        "i % most_rows != 0",
        "ops/test_lora_rows.py runs_of_unequal",
    ),
    "missing barrier before restaging": Mutant(
        "csrc/kernels/lora.cu",
        "    __syncthreads();  // what was staged before has been read\n",
        "",
        "ops/test_lora_rows.py expand_adds",
    ),
    "ranks of another group": Mutant(
        "csrc/kernels/lora.cu",
        "[own + first + j]",
        "[first + j]",
        "ops/test_lora_rows.py expand_adds",
    ),
    "sum given to the wrong lane": Mutant(
        "csrc/kernels/lora.cu",
        "(lane & kHalf) != 0",
        "(lane & kHalf) == 0",
        "ops/test_lora_rows.py shrink_is_exact",
    ),
    "packed load of rows that do not lie on it": Mutant(
        "csrc/kernels/lora.cu",
        "address % 16 == 0 && ",
        "",
        "ops/test_lora_rows.py joined_product",
    ),
    "group outside used as an address": Mutant(
        "csrc/ops.h",
        "group >= 1 && group < G",
        "group != 0",
        "ops/test_lora_rows.py outside",
    ),
}


def run_tests(tests: str) -> subprocess.CompletedProcess[str]:
    file, selected = tests.split(" ", 1)
    if file.startswith("ops/"):
        selected = f"simt and {selected}"
    return simulator.run_sanitized("-vv", "-x", f"tests/{file}", "-k", selected, PYTHONUNBUFFERED="1")


def caught_by(mutant: Mutant) -> str | None:
    """The first test that fails, or ends the process, with this bug planted; None where all of them pass."""
    simulator.build(sanitize=True, edits={mutant.file: (mutant.old, mutant.new)})
    run = run_tests(mutant.tests)
    file = mutant.tests.split(" ", 1)[0]
    started = re.findall(rf"^tests/{file}::(.*?)(?: [A-Z]+ .*)?$", run.stdout, flags=re.MULTILINE)
    assert started, f"no test of {mutant.tests!r} ran: {run.stdout[-2000:]}{run.stderr[-2000:]}"
    return started[-1].strip() if run.returncode != 0 else None


def main() -> None:
    names = sys.argv[1:] or list(MUTANTS)
    simulator.build(sanitize=True)
    for tests in dict.fromkeys(MUTANTS[name].tests for name in names):  # else every bug would seem caught
        run = run_tests(tests)
        if run.returncode != 0:
            sys.exit(f"{tests!r} fails without any bug: {run.stdout[-2000:]}{run.stderr[-2000:]}")
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
