"""Memory: the caches are reported before they are taken, too much is refused with sizes, and the model stays usable."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref

import pytest
import torch

from mpg.demo.corpus import DEMO_QUESTIONS
from mpg.model import Model
from mpg.models import ensemble, loading
from mpg.models.runner import ModelRunner

QUESTION = DEMO_QUESTIONS[0]
OPTIONS = {"weights": {"E": 1, "T": 1}, "seed": 0, "max_new_tokens": 8}


def test_caches_take_what_is_reported_before_they_are_taken(model, caplog):
    roles = ("base", "E", "T")
    with caplog.at_level(logging.INFO, logger="mpg"):
        session = model.models.open([[1, 2, 3], [4]], roles, 40)
    buffers = [
        buffer for pool in session._pools.values() for layer in pool.runner.cache.layers
        for buffer in (layer.keys, layer.values)
    ]  # fmt: skip
    taken = sum(buffer.numel() * buffer.element_size() for buffer in buffers)
    assert model.models.cache_bytes(roles, 2, 40) == taken > 0
    assert f"6 rows (one for each model or adapter of a text) x 40 positions: {taken / 2**20:.1f} MiB" in caplog.text


def test_caches_of_a_dropped_session_are_freed_without_the_garbage_collector(model):
    gc.disable()
    try:
        session = model.models.open([[1, 2, 3]], ("base",), 40)
        keys = weakref.ref(next(iter(session._pools.values())).runner.cache.layers[0].keys)
        del session
        assert keys() is None
    finally:
        gc.enable()


def test_what_is_stacked_for_a_dropped_model_is_freed_without_the_garbage_collector(model):
    """As a server stacks it anew whenever an attribute is added or removed."""
    other = Model(loading.load(model.recipe, device=model.models.device, beside=model.models), model.recipe)
    assert other.generate(QUESTION, **OPTIONS).text
    stack = other.models._models[0].stack
    factors = [weakref.ref(tensor) for of_layer in stack.factors for tensor in of_layer]
    gc.collect()
    gc.disable()
    try:
        del other, stack
        assert [own() for own in factors] == [None] * len(factors)
    finally:
        gc.enable()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_a_model_that_is_copied_or_pickled_says_how_to_have_another(duplicate, model):
    with pytest.raises(TypeError, match=r"cannot be copied or pickled: call mpg\.load .*save_pretrained\(\)"):
        duplicate(model)
    assert copy.copy(model).generate(QUESTION, **OPTIONS).tokens == model.generate(QUESTION, **OPTIONS).tokens


def test_too_large_caches_are_refused_before_they_are_taken_and_smaller_ones_work(model, monkeypatch):
    one_row = model.models.cache_bytes(("base", "E", "T"), 1, model.models.max_positions)
    monkeypatch.setattr(ensemble, "available_bytes", lambda device: one_row * 2)
    with pytest.raises(MemoryError, match=r"batch_size, max_new_tokens: .*24 rows .* take .*expected at most .*lower"):
        model.generate([QUESTION] * 8, **OPTIONS | {"max_new_tokens": 100})
    assert len(model.generate([QUESTION] * 8, **OPTIONS, batch_size=1)) == 8


def test_forward_that_runs_out_of_memory_is_a_clear_error_and_the_model_stays_usable(model, monkeypatch):
    expected = model.generate(QUESTION, **OPTIONS)
    forward, calls = ModelRunner.forward, []

    def fail_later(self, *arguments, **options):
        calls.append(None)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. More advice")
        return forward(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "forward", fail_later)
        with pytest.raises(
            MemoryError, match=r"1 rows at once are too many \(CUDA out of memory. Tried .* MiB\); lower"
        ):
            model.generate(QUESTION, **OPTIONS)
    assert model.generate(QUESTION, **OPTIONS).tokens == expected.tokens
