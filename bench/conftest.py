"""Options of the op bench, and its report, written after everything that pytest prints: the last line is JSON.

Knows no op. --device cpu|cuda, --threads, --save, --so-far, and the options of pytest-benchmark.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from report import Report

REPORT = pytest.StashKey[Report]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu")
    parser.addoption("--threads", type=int, default=2, help="of torch and the ops, on the CPU")
    parser.addoption("--so-far", type=Path, help="a file that has what is measured as soon as it is")
    parser.addoption("--save", action="store_true", help="write bench/results/cpu-ops-*.json or gpu-ops-*.json")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        pytest.exit(f"bench: torch {torch.__version__} sees no CUDA device here. Nothing was run.", returncode=1)
    torch.set_num_threads(config.getoption("--threads"))
    config.stash[REPORT] = Report(config.getoption("--device"), config.getoption("--so-far"))


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    return pytestconfig.stash[REPORT]


def pytest_unconfigure(config: pytest.Config) -> None:
    if REPORT in config.stash and config.stash[REPORT].times:
        config.stash[REPORT].write(config.getoption("--save"))
