"""What a machine with a GPU can show, in one command: build, suite on CUDA, a short decode, op times; one JSON file.

Needs no network and no installation: it uses the torch that is there and builds in place. Ends inside 9 minutes.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
BUILD_LIMIT_S, SUITE_LIMIT_S = 180, 270  # of 540; the rest takes well under 90
DEVICE = "cuda"
SCORE = "arithmetic"
ENVIRONMENT = os.environ | {
    "MPG_CUDA": "ON",
    "MPG_DEVICE": DEVICE,
    "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
}


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit(f"make gpu: torch {torch.__version__} sees no CUDA device here. Nothing was run.")
    if len(sys.argv) == 1:  # build, then start again where the packages of this tree are found
        os.execve(sys.executable, [sys.executable, __file__, f"{build():.1f}"], ENVIRONMENT)
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "build_s": float(sys.argv[1]),
        "suite": run_suite(),
        "decode": time_decode(),
        "ops": time_ops(),
    }
    name = re.sub(r"\W+", "-", report["device"].lower())
    path = ROOT / "bench" / "results" / f"gpu-{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    print(f"written to {path.relative_to(ROOT)}", file=sys.stderr)
    if report["suite"]["exit_status"] != 0:
        sys.exit("make gpu: the suite failed on this device")


def build() -> float:
    started = time.perf_counter()
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    try:
        subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, timeout=BUILD_LIMIT_S)
    except subprocess.TimeoutExpired:
        sys.exit(f"make gpu: the build was stopped after {BUILD_LIMIT_S} s; run it again to go on from there")
    return time.perf_counter() - started


def run_suite() -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "not simt"]
    command += ["--ignore=tests/test_build.py", "--ignore=tests/simt"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SUITE_LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"exit_status": 124, "summary": f"stopped after {SUITE_LIMIT_S} s"}
    if done.returncode:
        print(done.stdout[-8000:], file=sys.stderr)
    return {"exit_status": done.returncode, "summary": done.stdout.strip().splitlines()[-1]}


def time_decode() -> list[dict[str, Any]]:
    """The demo models, far too small to fill a GPU: that decoding runs, and what a round costs beside the kernels."""
    import mpg
    from mpg.demo import MODELS
    from mpg.demo.corpus import DEMO_QUESTIONS

    model = mpg.load(MODELS, device=DEVICE)
    rows = []
    for options in ({"sampler": "direct", "target": "geometric"}, {"sampler": "scr", "target": "arithmetic"}):
        model.generate(DEMO_QUESTIONS[0], weights={"E": 1, "T": 1}, seed=0, **options)
        result = model.generate(DEMO_QUESTIONS[0], weights={"E": 1, "T": 1}, seed=0, **options)
        rows.append(options | {"text": result.text, **result.stats})
    return rows


def time_ops() -> dict[str, Any]:
    """verify_chunks and draw_fallback against plain torch: the answer first, then medians from a cold cache."""
    import mpg_ext
    from mpg_ext import reference

    copy_tb_s = measure_copy()
    sizes = {"N": 4, "K": 4, "V": 128_256}
    rows = []
    for batch_size in (1, 16, 64):
        verify, constants = verify_arguments(batch_size, **sizes)
        fallback = fallback_arguments(verify)
        check_verify(verify, constants)
        check_fallback(fallback)
        for name, arguments, options, num_read in (
            ("verify_chunks", verify, constants, 2),
            ("draw_fallback", fallback, {"score": SCORE}, 3),
        ):
            fused, plain = getattr(mpg_ext, name), getattr(reference, name)
            num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in arguments[:num_read])
            rows.append({
                "op": name, "B": batch_size, **sizes, "dtype": "bfloat16", "bytes": num_bytes,
                "floor_us": num_bytes / copy_tb_s / 1e6,
                "us": median_us(partial(fused, *arguments, **options)),
                "plain_torch_us": median_us(partial(plain, *arguments, **options)),
            })  # fmt: skip
    return {"copy_tb_s": copy_tb_s, "rows": rows}


def check_verify(arguments: tuple[Tensor, ...], constants: dict[str, Any]) -> None:
    import mpg_ext
    from mpg_ext import reference

    fused = mpg_ext.verify_chunks(*clone(arguments), **constants)
    plain = reference.verify_chunks(*clone(arguments), **constants)
    for got, expected in zip(fused, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def check_fallback(arguments: tuple[Tensor, ...]) -> None:
    """Not token by token: at so many tokens, rounding may well take the neighbour of the one it should be."""
    import mpg_ext
    from mpg_ext import reference

    tokens, _, accept_probs = mpg_ext.draw_fallback(*arguments, score=SCORE)
    masses, _ = reference.fallback_masses(*arguments[:5], score=SCORE)
    cumulated = masses.cumsum(-1)
    totals = cumulated[:, -1]
    up_to = cumulated.gather(1, tokens[:, None])[:, 0]
    before = up_to - masses.gather(1, tokens[:, None])[:, 0]
    assert ((before / totals <= arguments[5] + 1e-4) & (arguments[5] - 1e-4 <= up_to / totals)).all()
    torch.testing.assert_close(accept_probs.double(), totals, rtol=1e-4, atol=1e-6)


def verify_arguments(B: int, N: int, K: int, V: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    random = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=DEVICE)

    anchor = normal(B, K, V).bfloat16()
    attributes = (anchor + 0.1 * normal(N, B, K, V)).bfloat16()
    tokens = torch.randint(V, (B, K), generator=random, device=DEVICE)
    lengths = torch.full((B,), K, device=DEVICE)
    uniforms = torch.rand(B, K, generator=random, device=DEVICE, dtype=torch.float64)
    window, counts = torch.zeros(B, 20, device=DEVICE), torch.zeros(2, B, dtype=torch.int64, device=DEVICE)
    bound = (
        window,
        counts[0],
        counts[1],
        torch.full((B,), 0.7, device=DEVICE),
        torch.zeros(B, dtype=torch.bool, device=DEVICE),
    )
    weights = torch.full((B, N), 1 / N, device=DEVICE)
    constants = {"score": SCORE, "log_initial_bound": 0.7, "log_gamma": 0.18, "tau": 0.01}
    return (anchor, attributes, tokens, lengths, weights, uniforms, *bound), constants


def fallback_arguments(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    anchor, attributes, _, _, weights, uniforms, *_, log_bound, _ = arguments
    draft = anchor[:, 0].float().softmax(-1)
    active = torch.ones(len(draft), dtype=torch.bool, device=DEVICE)
    return anchor[:, 0], attributes[:, :, 0], draft, weights, log_bound, uniforms[:, 0].contiguous(), active


def clone(arguments: tuple[Tensor, ...]) -> list[Tensor]:
    return [argument.clone() for argument in arguments]


def measure_copy() -> float:
    """Device-to-device copy, bytes read and written, in TB/s: the bound that op times are held against."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_us(lambda: target.copy_(source)) / 1e6


def median_us(call: Callable[[], Any], repeats: int = 50) -> float:
    """Median time of a call that finds nothing of its arguments in the cache."""
    more_than_l2 = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        more_than_l2.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return statistics.median(times)


if __name__ == "__main__":
    main()
