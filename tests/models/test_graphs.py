"""Captured forwards give the texts of plain ones, call after call; bugs planted in them do not go unnoticed.

On the CPU a tape stands in for the capture of CUDA, which is used where MPG_DEVICE says so.
"""

from __future__ import annotations

import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import mpg
from longer import IS_LONG, thinned
from mpg.decode import SAMPLERS
from mpg.demo import MODELS
from mpg.demo.corpus import DEMO_QUESTIONS, HELD_OUT_QUESTIONS
from mpg.models import ensemble, graphs, loading
from mpg.models.ensemble import Session
from mpg.models.idle import MAX_IDLE, Idle
from mpg.models.runner import CAPTURED_TOKENS, ModelRunner
from mpg.paper.methods import METHODS, SINGLE_METHODS, answer
from planted import plant
from tape import Tape

QUESTIONS = [*DEMO_QUESTIONS[:3], *(question.text for question in HELD_OUT_QUESTIONS[:6])]
WEIGHTS = [{"E": 1}, {"T": 0.5, "J": 1}, {"E": 1, "T": 1}, {"T": 1}, {"E": 0.5, "T": 1}, {"J": 1}, {"E": 2}, {"J": 0.5}]
WEIGHTS = [*WEIGHTS, {"E": 1, "J": 1}]
BOTH = {"E": 1, "T": 1}
WAYS = [
    {"sampler": "direct", "target": "geometric", "trace": True},
    {"sampler": "direct", "target": "geometric", "repetition_penalty": 1.3},
    {"sampler": "exact", "target": "geometric", "trace": True},
    {"sampler": "exact", "target": "geometric", "draft": "merged"},
    {"sampler": "exact", "target": "geometric", "draft": "lookup", "adaptive": True},
    {"sampler": "exact", "target": "arithmetic", "mixture_span": 3},
    {"sampler": "scr", "target": "geometric", "trace": True},
    {"sampler": "token-rs", "target": "geometric"},
    {"sampler": "seq-rs", "target": "geometric", "tries": 2},
]


DEVICE = os.environ.get("MPG_DEVICE", "cpu")


def _name(way):
    return " ".join(map(str, way.values()))


@pytest.fixture(scope="module")
def model():
    """The demo models in float32, in which texts depend on rounding too seldom to be seen, attending as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "most_by_rows", lambda model: 0)
        return mpg.load(MODELS, device=DEVICE, dtype="float32")


@pytest.fixture
def graphed(monkeypatch):
    monkeypatch.setitem(graphs.CAPTURES, "cpu", Tape)
    monkeypatch.setattr(loading, "most_by_rows", lambda model: 0)
    return mpg.load(MODELS, device=DEVICE, dtype="float32", graphs=True)


@pytest.fixture
def captures(monkeypatch):
    """A list that grows by one with every forward that is captured."""
    record, captures = graphs.Graphs._record, []

    def recorded(self, step):
        captures.append(None)
        return record(self, step)

    monkeypatch.setattr(graphs.Graphs, "_record", recorded)
    return captures


def tokens(results):
    return [result.tokens for result in results]


@pytest.mark.parametrize("way", thinned(WAYS, 3), ids=_name)
def test_texts_are_those_without_graphs(way, model, graphed, captures):
    """Nine rows are rounded up to ten, and those that are left to eight, four, two. Four requests in two rows follow
    one another, past two cache lengths."""
    for questions, max_new_tokens in ((QUESTIONS, 16), (QUESTIONS[:4], 52)):
        options = {"weights": WEIGHTS[: len(questions)], "seed": 11, "max_new_tokens": max_new_tokens, **way}
        options["batch_size"] = 32 if questions is QUESTIONS else 2
        expected = model.generate(questions, **options)
        for one, other in zip(graphed.generate(questions, **options), expected, strict=True):
            assert one.tokens == other.tokens
            for ratios, wanted in zip(one.log_ratios or (), other.log_ratios or (), strict=True):
                assert ratios == pytest.approx(wanted, abs=1e-4)
    assert captures


@pytest.mark.parametrize("method", thinned([method for method in METHODS if not method.endswith("-specialized")]))
def test_methods_answer_as_without_graphs(method, model, graphed):
    options = {"seed": 3, "max_new_tokens": 12} | ({"tries": 3} if method == "seq-rs" else {})
    plain, captured = (answer(m, method, QUESTIONS[:2], BOTH, **options) for m in (model, graphed))
    assert list(captured) == (list(BOTH) if method in SINGLE_METHODS else [""])
    assert {name: tokens(results) for name, results in captured.items()} == {
        name: tokens(results) for name, results in plain.items()
    }


def test_later_calls_of_like_sizes_capture_nothing(model, graphed, captures):
    options = {"weights": BOTH, "max_new_tokens": 32 if IS_LONG else 12, "draft": "merged"}
    for seed in (1, 2, 1, 2):  # so that all rounds have been met, and are captured
        graphed.generate(QUESTIONS, seed=seed, **options)
        graphed.generate([*QUESTIONS, "Why?"], seed=seed, **options)
    captured = len(captures)
    assert captured > 0
    for seed in (1, 2):
        results = graphed.generate([*QUESTIONS, "Why?"], seed=seed, **options)  # ten rows are nine rounded up
        assert tokens(results) == tokens(model.generate([*QUESTIONS, "Why?"], seed=seed, **options))
    assert len(captures) == captured


def test_idle_runners_are_bounded_and_the_oldest_goes_first(graphed, monkeypatch):
    made, make = [], ModelRunner.__init__

    def noting(self, *args):
        made.append(None)
        make(self, *args)

    monkeypatch.setattr(ModelRunner, "__init__", noting)

    def ask(num_rows):
        graphed.generate(QUESTIONS[:num_rows], weights={"E": 1}, seed=0, max_new_tokens=4, sampler="direct")

    kept = []
    for num_rows in (1, 2, 3, 4, 1, 5, 1, 2):
        before = len(made)
        ask(num_rows)
        kept.append(len(made) == before)
        assert all(len(loaded.idle) <= MAX_IDLE for loaded in graphed.models._models)
    assert MAX_IDLE == 4
    assert kept == [False] * 4 + [True, False, True, False]  # five rows took the place of two
    assert graphed.models.graph_bytes() > 0
    while graphed.models.drop_idle():
        pass
    assert graphed.models.graph_bytes() == 0


def test_graphs_of_a_runner_are_bounded(graphed, captures, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    options = {"weights": BOTH, "seed": 0, "max_new_tokens": 8}
    expected = graphed.generate(QUESTIONS[0], **options, draft="lookup", adaptive=True)
    for _ in range(2):
        assert graphed.generate(QUESTIONS[0], **options, draft="lookup", adaptive=True).tokens == expected.tokens
    (idle,) = graphed.models._models[0].idle
    assert len(idle.graphs) <= 2


def test_rounded_caches_take_what_is_reported(graphed):
    session = graphed.models.open([[1, 2, 3]] * 9, ("base", "E"), 70)
    (runner,) = (pool.runner for pool in session._pools.values())
    keys = runner.cache.layers[0].keys
    assert (len(keys), keys.shape[2]) == (2 * 10, 128)  # groups times rows, positions
    taken = sum(2 * layer.keys.nbytes for layer in runner.cache.layers)
    assert graphed.models.cache_bytes(("base", "E"), 9, 70) == taken


def test_idle_runners_make_room_before_memory_is_refused(model, graphed, monkeypatch, caplog):
    roles, options = ("base", "E", "T"), {"weights": BOTH, "seed": 0, "max_new_tokens": 40}
    graphed.generate(QUESTIONS[0], **options)
    needed = graphed.models.cache_bytes(roles, 2, 64)
    taken = graphed.models.graph_bytes()
    assert taken > 0
    monkeypatch.setattr(ensemble, "available_bytes", lambda device: needed + taken - 1)
    with caplog.at_level(logging.INFO, logger="mpg"):
        results = graphed.generate(QUESTIONS[:2], **options)
    assert "dropped to make room" in caplog.text
    assert tokens(results) == tokens(model.generate(QUESTIONS[:2], **options))
    monkeypatch.setattr(ensemble, "available_bytes", lambda device: needed / 2)
    with pytest.raises(MemoryError, match="batch_size, max_new_tokens"):
        graphed.generate(QUESTIONS[:3], **options)


def test_what_runs_out_of_memory_leaves_nothing_behind(graphed, monkeypatch):
    options = {"weights": BOTH, "seed": 0, "max_new_tokens": 8}
    expected = graphed.generate(QUESTIONS[0], **options)

    def run_out(self, step):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. More advice")

    with monkeypatch.context() as patch:
        patch.setattr(graphs.Graphs, "_record", run_out)
        with pytest.raises(MemoryError, match="2 rows at once are too many"):
            graphed.generate(QUESTIONS[:2], **options)
    assert graphed.models.graph_bytes() == 0
    assert graphed.generate(QUESTIONS[0], **options).tokens == expected.tokens


def poisoned_call(graphed):
    """A request whose prompt puts NaN into the cache of a runner that has graphs already; the text before and after
    it. A masked NaN would still be NaN in the weighted sum of the values."""
    short, long = [5, 6, 7], list(range(5, 60))
    options = {"weights": BOTH, "sampler": "direct", "seed": 0, "max_new_tokens": 60}

    def poison(module, args, out):
        return out * math.nan

    before = graphed.generate(short, **options)
    hook = graphed.models._models[0].model.model.layers[0].mlp.register_forward_hook(poison)
    with pytest.raises(ValueError, match="returned NaN"):
        graphed.generate(long, **options | {"max_new_tokens": 8})
    hook.remove()
    return before, graphed.generate(short, **options)


def test_a_request_that_failed_does_not_poison_the_next(graphed, captures):
    before, after = poisoned_call(graphed)
    assert before.tokens == after.tokens
    assert len(captures) == 4  # forwards and rounds: the runner that may hold NaN is taken by none


def test_threads_have_runners_of_their_own(model, graphed, captures):
    def ask(chosen, seed):
        return chosen.generate(QUESTIONS[:2], weights=BOTH, seed=seed, max_new_tokens=20, draft="merged")

    seeds = range(6 if IS_LONG else 3)
    expected = [tokens(ask(model, seed)) for seed in seeds]
    with ThreadPoolExecutor(3) as threads:
        assert [tokens(texts) for texts in threads.map(lambda seed: ask(graphed, seed), seeds)] == expected
    assert all(len(loaded.idle) <= MAX_IDLE for loaded in graphed.models._models)


def test_calls_in_and_out_of_inference_mode_follow_one_another(model, graphed):
    options = {"weights": BOTH, "seed": 0, "max_new_tokens": 8}
    expected = model.generate(QUESTIONS[0], **options).tokens
    for is_inference in (True, False, True):
        with torch.inference_mode(is_inference):
            assert graphed.generate(QUESTIONS[0], **options).tokens == expected


def test_a_model_that_waits_for_the_device_warns_once_and_goes_on(model, graphed, captures):
    def wait(module, args, out):
        assert out.isfinite().all()

    graphed.models._models[0].model.model.layers[0].register_forward_hook(wait)
    options = {"weights": BOTH, "seed": 0, "max_new_tokens": 8}
    with pytest.warns(
        UserWarning, match=r"base: its forward cannot be captured .*: aten\S* waits for the device"
    ) as seen:
        results = [graphed.generate(QUESTIONS, **options) for _ in range(2)]
    assert len(seen) == len(captures) == 1
    assert [tokens(texts) for texts in results] == [tokens(model.generate(QUESTIONS, **options))] * 2
    assert graphed.models.graph_bytes() == 0


def test_long_inputs_run_as_without_graphs(graphed, captures):
    session = graphed.models.open([[1, 2]], ("base",), 100)
    many = torch.ones(1, CAPTURED_TOKENS + 1, dtype=torch.int64, device=graphed.models.device)
    start = torch.ones(1, dtype=torch.int64, device=graphed.models.device)
    session.forward(("base",), many, start, kv_length=100)
    assert not captures
    session.forward(("base",), many[:, 1:], start, kv_length=100)
    assert len(captures) == 1


def test_graphs_are_refused_where_no_model_can_have_them():
    with pytest.raises(ValueError, match="graphs: expected a model on one device of cuda, got cpu"):
        mpg.load(MODELS, device="cpu", graphs=True)
    with pytest.raises(ValueError, match="graphs: expected True or False, got 'yes'"):
        mpg.load(MODELS, device="cpu", graphs="yes")


def test_models_that_are_split_over_devices_are_not_captured(graphed):
    devices = (torch.device("cpu"), torch.device("meta"))
    split = replace(graphed.models._models[0], devices=devices, new_capture=None)
    with pytest.raises(ValueError, match="graphs: expected a model on one device of cuda, cpu, got cpu, meta"):
        loading._allow_captures([split])


def test_sizes_are_rounded_up_by_a_quarter_at_most():
    for least in (1, 64):
        sizes = [graphs.bucket(size, least) for size in range(1, 5000)]
        assert sizes == sorted(sizes)
        assert all(size <= rounded < max(size + least, 1.25 * size + 1) for size, rounded in enumerate(sizes, 1))
        assert all(graphs.bucket(size, least) == size for size in sizes)
        assert len(set(sizes)) <= 8 * 4 + 4 * (least == 1) * 5


FORWARD, RUN = (ModelRunner, "forward"), (graphs.Graphs, "run")
MERGES = "if merge is not None:"
READ_START = "place(fed, torch.full_like(start, start.numpy()[0]),"
PLANTED = {
    "a cache length that is not in the key": (*FORWARD, "tokens.shape[1], rounded", "tokens.shape[1]"),
    "adapters that are not in the key": (*FORWARD, "len(inputs) > 2 or layout.runs", "len(inputs) > 2"),
    "adapters of the capture in every replay": (*FORWARD, "Layout(layout.runs, groups)", "layout"),
    "logits that the next replay overwrites": (*FORWARD, ".clone()", ""),
    "inputs of the capture in every replay": (*RUN, "_fill(static, inputs)\n    replay()", "replay()"),
    "a capture that overwrites the cache": (*RUN, "value.clone()", "torch.zeros_like(value)"),
    "weights of another call": (Session, "_move", MERGES, MERGES[:-1] + " and not pool.runner.merge_weights.any():"),
    "a sum of another call": (Idle, "take", "of_left == key", "of_left[1:] == key[1:]"),
    "a number that is read once": (ModelRunner, "_run", "place(fed, start,", READ_START),
}


def several_calls(model):
    """Yields the texts of calls that differ in all that graphs could have kept; they grow past a cache length."""
    prompts = [" ".join(QUESTIONS[:5]), QUESTIONS[0]]
    options = {"seed": 5, "max_new_tokens": 24, "batch_size": 1}
    for chunk_size in (1, 3):
        yield from model.generate(prompts, weights=BOTH, sampler="scr", chunk_size=chunk_size, **options)
    for weights in ({"E": 1, "T": 0.5}, {"E": -0.5, "T": 2}, {"E": 1, "J": 2}):
        yield from answer(model, "soups", prompts, weights, **options)[""]
    for names in ("ES", "TJ", "ET", "EJ"):  # each of its own, and then one alone
        yield from model.generate(
            prompts, weights=[{name: 1} for name in names], sampler="scr", **options | {"batch_size": 2, "seed": 1}
        )


@pytest.fixture(scope="module")
def expected_texts(model):
    texts = list(several_calls(model))
    assert any(text.prompt_tokens < 60 and text.prompt_tokens + len(text.tokens) > 68 for text in texts)
    return tokens(texts)


def test_several_calls_are_right(graphed, expected_texts):
    assert tokens(several_calls(graphed)) == expected_texts


@pytest.mark.parametrize("bug", thinned([*PLANTED], 4))
def test_a_planted_bug_is_noticed(bug, graphed, expected_texts, monkeypatch):
    plant(monkeypatch, *PLANTED[bug])
    try:
        noticed = any(
            text.tokens != wanted for text, wanted in zip(several_calls(graphed), expected_texts, strict=True)
        )
    except (RuntimeError, ValueError, IndexError):
        return
    assert noticed


def test_a_cache_that_holds_nan_and_is_used_again_is_noticed(graphed, monkeypatch):
    plant(monkeypatch, Session, "close", "() if is_spoiled else ", "")
    with pytest.raises(ValueError, match="returned NaN"):
        poisoned_call(graphed)


def test_the_tape_refuses_what_a_capture_refuses():
    values = torch.arange(3.0)
    for step in (values.sum().item, values.nonzero, lambda: values[values > 1], lambda: torch.tensor([1.0]) + values):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            Tape(values.device)(step)


def test_a_tape_runs_again_on_the_same_memory():
    values, kept = torch.arange(3.0), torch.zeros(3)
    scale = 2

    def step():
        kept[1:].add_(values[1:])
        return (values * scale).view(1, 3)

    replay, out, _ = Tape(values.device)(step)
    assert out.tolist() == [[0, 2, 4]]
    values.add_(1)
    scale = 3  # no Python of the step runs again
    replay()
    assert out.tolist() == [[2, 4, 6]]
    assert kept.tolist() == [0, 3, 5]


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
@pytest.mark.parametrize("way", thinned([way for way in WAYS if "repetition_penalty" not in way], first=1), ids=_name)
def test_rounds_on_a_gpu_wait_for_nothing(way, model, graphed, captures, monkeypatch):
    options = {"weights": BOTH, "seed": 0, "max_new_tokens": 60, **way}
    expected = tokens(model.generate(QUESTIONS, **options))
    assert tokens(graphed.generate(QUESTIONS, **options)) == expected
    captured, sampler = len(captures), SAMPLERS[way["sampler"]]
    run_round = sampler.round

    def watched(self):
        torch.cuda.set_sync_debug_mode("error")
        try:
            run_round(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(sampler, "round", watched)
    assert tokens(graphed.generate(QUESTIONS, **options)) == expected
    assert len(captures) == captured > 0
