"""What the op tests share: the devices they run on. Knows no op."""

from __future__ import annotations

import os
import platform
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import mpg_ext
import profiles  # noqa: F401 - also where tests/conftest.py is cut off, under the sanitizers
import seeds

sys.path.insert(0, str(Path(__file__).parents[1] / "simt"))
import simulator

has_cuda = torch.cuda.is_available() and mpg_ext.build_info()["cuda"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if seeds.NUM_SEEDS > 1:
        metafunc.parametrize("seed_of_inputs", range(seeds.SEED, seeds.SEED + seeds.NUM_SEEDS), indirect=True)


@pytest.fixture(autouse=True)
def seed_of_inputs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "SEED", getattr(request, "param", seeds.SEED))


@pytest.fixture(scope="session")
def simulated_kernels() -> ModuleType:
    if os.environ.get(simulator.SANITIZE_VARIABLE):  # what was built last, perhaps with a fault planted
        return simulator.load(simulator.module_path(sanitize=True))
    return simulator.load(simulator.build(sanitize=False))


@pytest.fixture(
    params=[
        "cpu",
        # CPU tensors, but the CUDA source executed by tests/simt/simt.h
        pytest.param("simt", marks=pytest.mark.skipif(platform.machine() != "x86_64", reason="see simt.h")),
        pytest.param("cuda", marks=pytest.mark.skipif(not has_cuda, reason="no CUDA build or no GPU")),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    if request.param != "simt":
        yield torch.device(request.param)
        return
    # One schedule for each case; the cases of a test spread over all three.
    schedules = ("forward", "reverse", "random")
    if "MPG_SIMT_ORDER" not in os.environ:
        monkeypatch.setenv("MPG_SIMT_ORDER", schedules[zlib.crc32(request.node.name.encode()) % 3])
    kernels = request.getfixturevalue("simulated_kernels").KernelsOnCpu()
    yield torch.device("cpu")
    del kernels
