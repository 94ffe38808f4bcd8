"""A server of the demo models, and OpenAI's client of it."""

from __future__ import annotations

import os

import openai
import pytest

import mpg
from mpg.demo import MODELS
from serving import serving


@pytest.fixture(scope="package")
def precise_model():
    """In double precision, where a draw beside a boundary is as good as impossible."""
    return mpg.load(MODELS, device=os.environ.get("MPG_DEVICE", "cpu"), dtype="float64")


@pytest.fixture(scope="module")
def served(precise_model):
    with serving(precise_model, max_rows=8, prefill_tokens=32) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
