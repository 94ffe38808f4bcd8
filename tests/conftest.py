"""The shipped demo models, loaded once, on the device that MPG_DEVICE names (default cpu); and how long hypothesis
looks for a counterexample."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

import mpg
from mpg.demo import MODELS

torch.set_num_threads(1)  # the models here are small: more threads only wait for one another

# Chosen by --hypothesis-profile. A test's device stays what it is from example to example.
settings.register_profile("fuzz", deadline=None, max_examples=1000, suppress_health_check=list(HealthCheck))
settings.register_profile("test", settings.get_profile("fuzz"), max_examples=25, derandomize=True, database=None)
settings.register_profile("sanitized", settings.get_profile("test"), max_examples=8)
settings.load_profile("test")


def pytest_collection_finish() -> None:
    gc.freeze()  # what the imports have made stays: every collection would look through it again


@pytest.fixture(scope="session")
def model() -> mpg.Model:
    return mpg.load(MODELS, device=os.environ.get("MPG_DEVICE", "cpu"))
