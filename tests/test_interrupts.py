"""Calls that are cut off anywhere, threads that share a model, forks of its process: texts stay what they were."""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product

import pytest
from torch.utils.data import DataLoader

import mpg
from longer import IS_LONG
from mpg.demo import MODELS
from mpg.models import graphs
from tape import Tape

WAYS = [
    {"sampler": "direct", "target": "anchored", "trace": True},
    {"sampler": "exact"},
    {"sampler": "exact", "draft": "merged", "verify": "token"},
    {"sampler": "exact", "draft": "lookup", "adaptive": True, "target": "arithmetic"},
    {"sampler": "scr"},
    {"sampler": "token-rs", "tries": 4},
    {"sampler": "seq-rs", "tries": 2},
]
CUTS = 40 if IS_LONG else 2  # of a kind, by way
BEGINNING = list(range(10, 90))  # that is kept for the next text


class Stop(BaseException):
    """No Exception, as KeyboardInterrupt is none."""


def ask(model, way, first=100):
    prompts = [[*BEGINNING, first + index] for index in range(3)]
    results = model.generate(prompts, weights={"E": 1, "T": 0.5}, seed=3, max_new_tokens=3, batch_size=2, **way)
    return [result.tokens for result in results]


@contextmanager
def interrupted(model, place):
    """Ctrl-C at the call of this number of any Python function, of which each looks for signals first."""
    counted = []

    def count(frame, event, argument):
        if event == "call":
            counted.append(frame.f_code)
            if len(counted) == place:
                sys.setprofile(None)
                raise Stop

    sys.setprofile(count)
    try:
        yield counted
    finally:
        sys.setprofile(None)


@contextmanager
def failing(model, place):
    """A layer in the middle of a forward raises, at its call of this number."""
    counted = []

    def count(module, args):
        counted.append(module)
        if len(counted) == place:
            raise Stop

    layer = model.models._models[0].model.model.layers[-1]
    handle = layer.register_forward_pre_hook(count)
    try:
        yield counted
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("way", "cut_off"),
    [
        pytest.param(way, cut_off, id=f"{' '.join(map(str, way.values()))} {cut_off.__name__}")
        for (i, way), (j, cut_off) in product(enumerate(WAYS), enumerate((interrupted, failing)))
        if IS_LONG or (i + j) % 2 == 0
    ],
)
def test_a_call_cut_off_anywhere_leaves_the_model_as_it_was(model, way, cut_off):
    """With what is kept of texts, and with nothing kept, as the call that was cut off begins."""
    expected, kept, draw = ask(model, way), model.models.kept, random.Random(str(way))
    with cut_off(model, None) as counted:
        assert ask(model, way) == expected
    for place in draw.sample(range(1, len(counted)), min(CUTS, len(counted) - 1)):
        if draw.random() < 0.5:
            kept.clear()
        try:
            with cut_off(model, place):
                ask(model, way)
        except Stop:  # but for one within a generator that is being closed
            pass
        assert ask(model, way) == expected, place


def test_threads_that_share_a_model_get_the_texts_of_calls_alone(model):
    """Those of one beginning and those of others, while it is kept, found and dropped."""
    kept = model.models.kept
    asked = [(way, first) for way in (*WAYS, {"sampler": "direct"}, {"sampler": "exact"}) for first in (100, 200)]
    expected = [ask(model, way, first) for way, first in asked]
    before, kept.max_bytes = kept.max_bytes, kept.num_bytes // 2
    try:
        with ThreadPoolExecutor(len(asked)) as pool:
            for _ in range(20 if IS_LONG else 1):
                assert list(pool.map(lambda of: ask(model, *of), asked)) == expected
    finally:
        kept.max_bytes = before


def _refusal(model):
    try:
        return f"{ask(model, WAYS[0])}"
    except RuntimeError as error:
        return str(error)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("is_graphed", [False, True])
def test_a_fork_of_the_process_is_refused_and_waits_for_nothing(is_graphed, model, monkeypatch):
    """A lock that another thread held as the process was forked is held for ever there."""
    if is_graphed:
        monkeypatch.setitem(graphs.CAPTURES, "cpu", Tape)
        model = mpg.load(MODELS, device="cpu", graphs=True)
        ask(model, WAYS[0])
        assert len(model.models.idle)  # a call after it takes what is left, and opens nothing
    reader, writer = multiprocessing.Pipe(duplex=False)
    with model.models._models[0].lock, model.models.kept._lock:
        child = multiprocessing.get_context("fork").Process(target=lambda: writer.send(_refusal(model)))
        child.start()
        assert reader.poll(60)
        wanted = (
            f"model: expected the process {os.getpid()} that loaded it, got {child.pid}, a fork of it; load it there"
        )
        assert reader.recv().startswith(wanted)
        child.join()
    [told] = DataLoader([0], num_workers=1, multiprocessing_context="fork", collate_fn=lambda _: _refusal(model))
    assert told.startswith(f"model: expected the process {os.getpid()}")
    assert ask(model, WAYS[0])
