"""In float32 on the CPU a text comes from the same numbers, to the last bit, whatever else runs."""

from __future__ import annotations

import pytest

import mpg
from mpg.models import linear

SIZES = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32}
PROMPT, OTHERS = [3, 4, 5, 6, 7], [[8], list(range(20, 61)), [9] * 12, list(range(10, 60))]


@pytest.fixture
def model(tiny_model, lora_folder, monkeypatch):
    """Two adapters of a base whose layers are large enough to be packed, and are at all numbers of rows."""
    monkeypatch.setattr(linear, "choose", lambda times, may_keep_both=True: linear.EVERY)
    folders = {
        name: lora_folder(name, base=tiny_model(**SIZES), target_modules="all-linear", r=8) for name in ("E", "T")
    }
    return mpg.load(tiny_model(**SIZES), folders)


@pytest.mark.parametrize("weights", [{"E": 0.7, "T": 0.2}, {"E": 0.5, "T": 0.5}, {"T": 1.0}])
@pytest.mark.parametrize("sampler", ["direct", "exact"])
def test_a_text_does_not_depend_on_its_company(sampler, weights, model):
    options = {"weights": weights, "max_new_tokens": 12, "sampler": sampler, "trace": True}
    alone = model.generate([PROMPT], seed=5, **options)[0]
    for others in (OTHERS, OTHERS[1:2], OTHERS * 3):
        among = model.generate([PROMPT, *others], seed=5, **options)[0]
        assert (among.tokens, among.log_ratios) == (alone.tokens, alone.log_ratios)
