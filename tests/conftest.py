"""The shipped demo models, loaded once, on the device that MPG_DEVICE names (default cpu)."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import signal
import ssl

import pytest
import typer.testing

import mpg
import profiles  # noqa: F401
from mpg.demo import MODELS

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # where a shell has put the tests into its background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # so that it reaches the processes that they start
# a CliRunner makes the tree of all commands anew for every call, which takes longer than most of the calls
typer.testing._get_command = functools.cache(typer.testing._get_command)
# every client of HTTP reads a file of certificates anew, which takes 20 ms
ssl.create_default_context = functools.cache(ssl.create_default_context)
# of BLAS and OpenMP beside torch, here and in the processes of tests: theirs would spin while the other worker computes
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
gc.disable()  # while modules are imported and tests collected: a fifth of that time


def pytest_collection() -> None:
    """Of workers alone: what hands tests out to them would import torch before any of them starts. In a new environment
    imports are compiled, by two workers twice: every second begins with what the first comes to last."""
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0")[-1] in "13579":
        for name in ("sympy", "sklearn.metrics", "datasets", "openai.types", "matplotlib.figure", "fastapi"):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    import torch

    torch.set_num_threads(1)  # the models here are small: more threads only wait for one another


def pytest_collection_finish() -> None:
    gc.freeze()  # what the imports have made stays: every collection would look through it again
    gc.set_threshold(50_000, 10, 10)  # for 700, Python's own, collections take a twelfth of the suite's time
    gc.enable()


@pytest.fixture(scope="session")
def model() -> mpg.Model:
    return mpg.load(MODELS, device=os.environ.get("MPG_DEVICE", "cpu"))
