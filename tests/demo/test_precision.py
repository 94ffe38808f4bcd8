"""The type that the demo's real model computes in is the one that answers sooner here, where it loses nothing."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

import mpg
from mpg.demo import MODELS
from mpg.demo.precision import TOKENS, TURNS, quicker
from mpg.models import gguf


@pytest.fixture
def converted(tmp_path):
    """The tiny models as if their base had been a GGUF file."""
    shutil.copytree(MODELS, tmp_path / "models")
    (tmp_path / "models" / gguf.COMPLETE).write_text("{}")
    return tmp_path / "models"


@pytest.mark.parametrize(("plain", "int4", "chosen"), [(11, 18, "bfloat16, int4 weights"), (18.6, 11, "float32")])
def test_the_quicker_one_is_taken_whichever_warms_up_longer(plain, int4, chosen, converted, monkeypatch):
    model, turns = mpg.load(converted, device="cpu"), []

    def generate(self, question, **how):
        turns.append((self.precision, question, how["max_new_tokens"]))
        speed = 1.0 if len(turns) <= 2 else plain if self is model else int4
        return SimpleNamespace(stats={"tokens_per_second": speed})

    monkeypatch.setattr(mpg.Model, "generate", generate)
    found, why = quicker(model, lambda: mpg.load(converted, device="cpu", quantize="int4"), "Why?")
    assert found.precision == chosen
    assert (found is model) == (chosen == "float32")
    assert turns == [("float32", "Why?", TOKENS), ("bfloat16, int4 weights", "Why?", TOKENS)] * TURNS
    assert why.startswith(f"Computed in {chosen}, which wrote {max(plain, int4):.0f} tokens/s")


def test_four_bits_are_tried_and_say_how_fast_they_were(converted):
    model = mpg.load(converted, device="cpu")
    int4 = mpg.load(converted, device="cpu", quantize="int4")
    found, why = quicker(model, lambda: int4, "Why?")
    assert found in (model, int4)
    assert "float32" in why and "bfloat16, int4 weights" in why


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_where_four_bits_lose_or_are_not_to_be_had_they_are_not_tried(device, converted):
    (converted / gguf.COMPLETE).unlink() if device == "cpu" else None
    model = mpg.load(converted, device=device)
    found, why = quicker(model, lambda: pytest.fail("it was loaded"), "Why?")
    assert (found, why) == (model, f"Computed in {model.precision}.")
