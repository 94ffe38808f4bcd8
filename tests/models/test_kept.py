"""Texts that begin as earlier ones did start from what was read of those, and are what they would have been."""

from __future__ import annotations

import inspect
import linecache
import sys
from contextlib import suppress

import pytest
import torch

import mpg
from longer import IS_LONG, thinned
from mpg.demo import MODELS
from mpg.models import beginnings
from mpg.models.cache import RaggedCache
from mpg.models.kept import Kept
from mpg.models.runner import ModelRunner

TALK = [{"role": "user", "content": "How do you like to spend a free weekend with your friends?"}]
WAYS = [
    {"sampler": "direct", "target": "arithmetic"},
    {"sampler": "exact"},
    {"sampler": "exact", "draft": "merged"},
    {"sampler": "exact", "draft": "lookup", "verify": "token", "adaptive": True},
    {"sampler": "scr"},
    {"sampler": "token-rs"},
    {"sampler": "seq-rs", "tries": 2},
]


@pytest.fixture
def model():
    """In double precision, in which what was read in other parts gives the same text."""
    return mpg.load(MODELS, device="cpu", dtype="float64")


@pytest.fixture
def fed(monkeypatch):
    """Positions that forwards have read, by whether a prompt's were among them."""
    positions, forward = [], ModelRunner.forward

    def watched(self, rows, layout, tokens, *args, **kwargs):
        positions.append(tokens.numel())
        return forward(self, rows, layout, tokens, *args, **kwargs)

    monkeypatch.setattr(ModelRunner, "forward", watched)
    return positions


def cache_of(tokens):
    """A cache of one row that holds a number for each token but the last."""
    cache = RaggedCache(2, 1, len(tokens))
    cache.place(slice(0, 1), torch.zeros(1, dtype=torch.int64), len(tokens), len(tokens))
    for layer in range(2):
        values = torch.tensor(tokens, dtype=torch.float32).view(1, 1, -1, 1)
        cache.update(values + layer, values - layer, layer)
    return cache


def bytes_of(num_tokens):
    return (num_tokens - 1) * cache_of([1, 2]).bytes_per_position()


def text(*ends):
    return tuple(range(100, 170)) + ends


def test_the_longest_beginning_of_the_same_reader_is_found():
    kept = Kept(max_bytes=1e9)
    for tokens in (text(1, 2, 3), text(1, 7), text(5)):
        kept.add("E", tokens, cache_of(tokens), 0)
    cache, shared = kept.find("E", text(1, 2, 9, 9))
    assert shared == 72
    assert cache.layers[1].keys[0, 0, :shared, 0].tolist() == [token + 1.0 for token in text(1, 2)]
    assert kept.find("T", text(1, 2, 3)) is None
    assert kept.find("E", (0, *text(1, 2, 3))) is None
    assert kept.find("E", text()[: beginnings.MIN_SHARED]) is None  # all but the last of which it would be


def test_a_text_takes_the_place_of_those_that_it_goes_on_from():
    kept = Kept(max_bytes=1e9)
    for tokens in (text(1), text(1, 2, 3), text(1, 2), text(1, 2, 3)):
        kept.add("E", tokens, cache_of(tokens), 0)
    assert len(kept) == 1
    assert kept.num_bytes == bytes_of(73)


def test_the_least_recently_used_goes_first_and_bytes_are_bounded():
    kept = Kept(max_bytes=2 * bytes_of(71))
    for end in (1, 2):
        kept.add(end, text(end), cache_of(text(end)), 0)
    assert kept.find(1, text(1, 1)) is not None  # used
    kept.add(3, text(3), cache_of(text(3)), 0)
    assert [kept.find(end, text(end, 1)) is not None for end in (1, 2, 3)] == [True, False, True]
    assert kept.num_bytes == kept.max_bytes
    kept.add(4, text(*range(200)), cache_of(text(*range(200))), 0)  # which alone is too much
    assert len(kept) == 2
    kept.max_bytes = bytes_of(71)  # the one that was found last stays
    assert [kept.find(end, text(end, 1)) is not None for end in (1, 3)] == [False, True]
    assert kept.clear() and not kept.clear()
    assert kept.num_bytes == 0


def test_ctrl_c_at_any_line_leaves_a_count_that_is_right_and_what_is_kept_found():
    """While a text is added in the place of one that it goes on from, and another one makes room."""

    def interrupted(at):
        kept, left = Kept(max_bytes=2 * bytes_of(71)), [at]
        for end in (1, 2):
            kept.add(end, text(end), cache_of(text(end)), 0)

        def trace(frame, event, _):
            if frame.f_code.co_filename != inspect.getfile(Kept):
                return None
            # not as a lock is let go, which Python does not make safe
            if event == "line" and not linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip().startswith(
                "with"
            ):
                left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with suppress(KeyboardInterrupt):
                kept.add(2, text(2, 3), cache_of(text(2, 3)), 0)
        finally:
            sys.settrace(before)
        sizes = {reader: found[0].capacity for reader in (1, 2) if (found := kept.find(reader, text(reader, 3, 4)))}
        assert len(sizes) == len(kept) and kept.num_bytes == sum(map(bytes_of, (size + 1 for size in sizes.values())))
        assert kept.num_bytes <= kept.max_bytes or left[0] == 0
        kept.add(3, text(3), cache_of(text(3)), 0)
        assert kept.find(3, text(3, 4)) is not None and kept.num_bytes <= kept.max_bytes
        return left[0] <= 0

    lines = 1
    while interrupted(lines):
        lines += 1
    assert lines > 20


@pytest.mark.parametrize("way", thinned(WAYS, 3), ids=lambda way: " ".join(map(str, way.values())))
def test_texts_are_those_that_are_read_from_their_first_token(way, model, monkeypatch):
    """Calls after one another, of requests that wait for rows: conversations that go on, beginnings that are shared."""
    monkeypatch.setattr(beginnings, "MIN_SHARED", 2)
    options = {"weights": {"E": 1, "T": 0.5}, "max_new_tokens": 8, "batch_size": 2, **way}

    def answers():
        talks, texts = [[*TALK], [*TALK], [{"role": "user", "content": "How do you like to work?"}]], []
        for turn in range(3 if IS_LONG else 2):
            results = model.generate(talks, seed=turn, **options)
            texts += [result.tokens for result in results]
            for talk, result in zip(talks, results, strict=True):
                talk += [{"role": "assistant", "content": result.text or "."}, {"role": "user", "content": "Why so?"}]
        return texts

    kept, once, again = model.models.kept, answers(), answers()
    assert len(kept) > 0
    model.models.kept = Kept(max_bytes=0)
    assert once == again == answers()
    assert len(model.models.kept) == 0


def test_a_second_turn_reads_what_is_new_of_each_model(model, fed, monkeypatch):
    monkeypatch.setattr(beginnings, "MIN_SHARED", 4)
    options = {"weights": {"E": 1, "T": 1}, "sampler": "direct", "max_new_tokens": 1, "seed": 0}
    prompt = list(range(10, 90))
    model.generate(prompt, **options)
    first = sum(fed)
    fed.clear()
    model.generate([*prompt, 7, 8], **options)
    assert first >= 3 * len(prompt)
    assert sum(fed) <= 3 * 4
    fed.clear()
    model.generate([*prompt, 7, 8], **options | {"weights": {"E": 1, "S": 1}})  # which has not read any of it
    assert 80 <= sum(fed) <= 80 + 3 * 4


def test_what_a_model_read_before_it_was_changed_is_not_used(tiny_model, fed, monkeypatch):
    monkeypatch.setattr(beginnings, "MIN_SHARED", 4)
    base = tiny_model()
    model = mpg.load(base, {"same": base}, device="cpu")
    options = {"target": "base", "sampler": "direct", "max_new_tokens": 3, "temperature": 0}
    prompt = list(range(3, 30))
    model.generate(prompt, **options)
    with torch.no_grad():
        base.model.layers[0].self_attn.v_proj.weight.mul_(-3)
    fed.clear()
    changed = model.generate(prompt, **options).tokens
    assert sum(fed) >= len(prompt)
    assert changed == mpg.load(base, {"same": base}, device="cpu").generate(prompt, **options).tokens


def test_an_interrupted_call_keeps_nothing_and_memory_is_made_for_caches(model, monkeypatch):
    prompt = list(range(10, 90))
    options = {"target": "base", "sampler": "direct", "seed": 0, "max_new_tokens": 4}

    def stop(token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(prompt, on_token=stop, **options)
    assert len(model.models.kept) == 0
    model.generate(prompt, **options)
    assert len(model.models.kept) == 1
    assert model.models.drop_idle() and len(model.models.kept) == 0
