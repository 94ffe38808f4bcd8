"""The type that the demo's real model computes in is the one that answers sooner here, where it loses nothing."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch

import mpg
from mpg.demo import MODELS
from mpg.demo.precision import TOKENS, TURNS, quicker
from mpg.models.sources import CONVERTED


@pytest.fixture
def converted(tmp_path):
    """The tiny models as if their base had been a GGUF file."""
    shutil.copytree(MODELS, tmp_path / "models")
    (tmp_path / "models" / CONVERTED).write_text("{}")
    return tmp_path / "models"


INT4 = "bfloat16, int4 weights"
SPEEDS = {("float32", 2): 12, ("float32", 1): 14, (INT4, 2): 9, (INT4, 1): 11}


@pytest.fixture
def threads(monkeypatch):
    """Torch's number of threads, which is two, and then what it is told."""
    numbers = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: numbers[-1])
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    return numbers


@pytest.mark.parametrize("best", SPEEDS, ids=str)
def test_the_quickest_way_is_taken_whichever_warms_up_longer(best, converted, threads, monkeypatch):
    model, turns, speeds = mpg.load(converted, device="cpu"), [], SPEEDS | {best: 29.4}
    steps, words = [], lambda precision: precision.replace(", int4", " with int4")

    def on_step(text):
        steps.append(("four bits" in text, len(turns)))

    def generate(self, question, **how):
        turns.append((self.precision, threads[-1]))
        assert (question, how["max_new_tokens"]) == ("Why?", TOKENS)
        return SimpleNamespace(stats={"tokens_per_second": 99.0 if len(turns) <= 4 else speeds[turns[-1]]})

    monkeypatch.setattr(mpg.Model, "generate", generate)
    found, why = quicker(model, lambda: mpg.load(converted, device="cpu", quantize="int4"), "Why?", on_step)
    assert (found.precision, threads[-1]) == best
    assert (found is model) == (best[0] == "float32")
    assert turns == list(SPEEDS) * TURNS
    told = f"{words(best[0])} on {'1 thread' if best[1] == 1 else '2 threads'}, which wrote 29 tokens/s"
    assert why.startswith(f"The answers are computed in {told} in a trial on this machine (")
    assert sum(f"{words(precision)} on {number}" in why for precision, number in SPEEDS) == 4
    assert steps == [(True, 0), *((False, 4 * turn) for turn in range(TURNS))]  # each is told before it is done


def test_four_bits_are_tried_and_say_how_fast_they_were(converted, threads):
    model = mpg.load(converted, device="cpu")
    int4 = mpg.load(converted, device="cpu", quantize="int4")
    found, why = quicker(model, lambda: int4, "Why?", str)
    assert found in (model, int4)
    assert "float32" in why and "bfloat16 with int4 weights" in why


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_where_four_bits_lose_or_are_not_to_be_had_they_are_not_tried(device, converted):
    (converted / CONVERTED).unlink() if device == "cpu" else None
    model = mpg.load(converted, device=device)
    found, why = quicker(model, lambda: pytest.fail("it was loaded"), "Why?", pytest.fail)
    assert (found, why) == (model, f"The answers are computed in {model.precision}.")
