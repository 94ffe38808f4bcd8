"""The op tests on the sanitized module, some planted bugs, and that the simulated kernels are what the op tests run."""

from __future__ import annotations

import platform
import re

import pytest
import torch

import mpg_ext
import mutants
import simulator
from longer import long

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="simt.h switches stacks on x86-64 only")

# Left out: what looks at torch (opcheck), and many small launches of one shape, which repeat others slowly.
SANITIZED = "simt and not opcheck and not over_rounds and not rejection_loop"


def test_kernels_run_on_cpu_tensors_while_asked_to(monkeypatch):
    module = simulator.load(simulator.build(sanitize=False))
    monkeypatch.setenv("MPG_SIMT_ORDER", "sideways")
    zeros = torch.zeros(2, dtype=torch.int64)
    mpg_ext.draw_uniforms(zeros, zeros, purpose=0, count=3)
    kernels = module.KernelsOnCpu()
    with pytest.raises(RuntimeError, match="MPG_SIMT_ORDER must be forward, reverse or random"):
        mpg_ext.draw_uniforms(zeros, zeros, purpose=0, count=3)
    del kernels
    mpg_ext.draw_uniforms(zeros, zeros, purpose=0, count=3)


@long
def test_op_tests_pass_under_the_sanitizers():
    simulator.build(sanitize=True)
    run = simulator.run_sanitized("tests/ops", "-k", SANITIZED, "--hypothesis-profile=sanitized")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 600


@long  # `make mutants` has the others
@pytest.mark.parametrize("bug", ["missing barrier before reuse of shared memory", "tail overrun"])
def test_planted_bug_is_caught(bug):
    assert mutants.caught_by(mutants.MUTANTS[bug]) is not None
