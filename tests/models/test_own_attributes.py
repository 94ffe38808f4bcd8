"""Rows of a session that run attributes of their own, against sessions of each alone: entering, moving, growing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from architectures import EVERY_LINEAR
from ensembles import load
from longer import thinned
from mpg.models import graphs, runner
from mpg.models.cache import RaggedCache
from mpg.models.runner import ModelRunner
from tape import Tape

CAPACITY = 24
PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10], [11, 12, 13]]


@pytest.fixture(params=thinned(["gpt2", "llama", "mistral", "qwen2 wide", "llama wide"]))
def models(request, tiny_model, lora_folder, monkeypatch):
    architecture, *is_wide = request.param.split()
    targets, settings = (["q_proj", "o_proj"], {}) if architecture != "gpt2" else (["c_attn"], {"fan_in_fan_out": True})
    adapters = {
        name: lora_folder(name, architecture, target_modules=targets, **settings) for name in ("E", "T", "J", "P")
    }
    models = load(tiny_model(architecture), {**adapters, "full": tiny_model(architecture)}, device="cpu")
    if is_wide:  # as on a GPU
        models._models[0].stack.widen()
        monkeypatch.setattr(runner, "OWN_TOKENS", 0)
    return models


@pytest.fixture
def fed(monkeypatch):
    """The numbers of rows of all forwards that decode, with their adapters."""
    found, forward = [], ModelRunner.forward

    def record(own, fed, layout, *args, **kwargs):
        if "logits_to_keep" not in kwargs:
            found.append(layout.runs)
        return forward(own, fed, layout, *args, **kwargs)

    monkeypatch.setattr(ModelRunner, "forward", record)
    return found


def numbered(attributes):
    """The attributes of every text by their numbers, as a session takes them."""
    return [dict(enumerate(names)) for names in attributes]


def _last(session, roles, rows):
    tokens, start = torch.tensor([[row[-1]] for row in rows]), torch.tensor([len(row) - 1 for row in rows])
    return session.forward(roles, tokens, start, kv_length=max(map(len, rows)))


def _check(models, session, rows, attributes):
    """Feed the last token of every row, and compare with its models by themselves; then each row has one more."""
    most = max(map(len, attributes))
    apart = torch.cat([_last(session, ["base"], rows), _last(session, range(5), rows)])
    together = _last(session, ["base", *range(5)], rows)
    for logits in (apart, together):
        assert logits.shape[:2] == (1 + most, len(rows))
        assert logits.isfinite().all()
    for row, (text, names) in enumerate(zip(rows, attributes, strict=True)):
        for place, name in enumerate(["base", *names]):
            alone = _last(models.open([text], [name], CAPACITY), [name], [text])[0, 0]
            torch.testing.assert_close(apart[place, row], alone, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(together[place, row], alone, atol=1e-5, rtol=1e-5)
        text.append(20 + row)


def test_rows_run_their_own_attributes_and_no_others_wherever_they_move(models, fed):
    session = models.open([], ["base", *range(5)], CAPACITY, num_rows=3)
    rows, attributes = [list(prompt) for prompt in PROMPTS], [["J"], ["E", "full"], ["E", "J", "T"]]
    session.replace(range(3), rows, numbered(attributes))
    for _ in range(2):
        _check(models, session, rows, attributes)
    fed.clear()
    _last(session, ["base", *range(5)], [row[:-1] for row in rows])
    assert sorted(fed) == [((0, 1),), ((0, 3), (1, 2), (2, 1), (3, 2))]  # full; base, E, T, J

    session.keep([2, 1])  # the first ends, and the last takes its place
    rows, attributes = [rows[2], rows[1]], [attributes[2], attributes[1]]
    _check(models, session, rows, attributes)

    rows[1], attributes[1] = [30, 31], ["T"]  # another begins in the place of one, with others
    session.replace([1], [rows[1]], numbered([attributes[1]]))
    _check(models, session, rows, attributes)

    added = [[40, 41, 42], [43]]  # more than there was room for
    session.replace([2, 3], added, numbered([["E", "T", "J", "P", "full"], ["full"]]))
    rows, attributes = rows + added, [*attributes, ["E", "T", "J", "P", "full"], ["full"]]
    for _ in range(2):
        _check(models, session, rows, attributes)
    session.keep([])
    session.replace([0], [[5, 6]], numbered([["P"]]))
    _check(models, session, [[5, 6]], [["P"]])


def test_an_attribute_that_takes_the_place_of_the_base_is_run_once_and_the_base_where_another_text_needs_it(
    models, fed
):
    session = models.open([], ["base", 0, 1], CAPACITY, num_rows=3)
    attributes = numbered([["J"], ["E", "T"], ["E", "full"]])
    attributes[0]["base"], attributes[2]["base"] = "J", "full"
    rows = [list(prompt) for prompt in PROMPTS]
    session.replace(range(3), rows, attributes)
    fed.clear()
    logits = _last(session, ["base", 0, 1], rows)
    assert sorted(fed) == [((0, 1),), ((0, 1), (1, 2), (2, 1), (3, 1))]  # full; base, E, T, J
    for row, names in enumerate([["J", "J"], ["base", "E", "T"], ["full", "E", "full"]]):
        for place, name in enumerate(names):
            alone = _last(models.open([rows[row]], [name], CAPACITY), [name], [rows[row]])[0, 0]
            torch.testing.assert_close(logits[place, row], alone, atol=1e-5, rtol=1e-5)


def test_a_row_that_others_attributes_come_to_moves_one_row_of_an_adapter_at_most(models, monkeypatch):
    session = models.open([], ["base", 0], CAPACITY, num_rows=8)
    rows = [[*range(10 + row, 13 + row)] for row in range(8)]
    attributes = [["E"], ["T"], ["J"], ["P"]] * 2
    session.replace(range(8), rows, numbered(attributes))
    _check(models, session, rows, attributes)
    moved, copy = [], RaggedCache.copy

    def record(own, moves, *args, **kwargs):
        moved.append(moves.shape.numel() // 2)
        copy(own, moves, *args, **kwargs)

    rows[0], attributes[0] = [40, 41], ["P"]
    with monkeypatch.context() as patch:
        patch.setattr(RaggedCache, "copy", record)
        session.replace([0], [rows[0]], numbered([attributes[0]]))
    assert (
        sum(moved) == 3
    )  # the first of T, of J and of P go behind their last; in the order of rows 7 of 16 would move
    _check(models, session, rows, attributes)


def test_caches_have_room_for_the_largest_of_the_texts_that_are_expected_and_grow_for_others(models):
    expected = numbered([["E"], ["T", "J"], ["full", "E"], ["P"]])
    session = models.open([], ["base", 0, 1], CAPACITY, num_rows=2, expected=expected)
    of_base, of_full = (pool.runner for pool in session._pools.values())
    assert (of_base.num_rows, of_full.num_rows) == (5, 1)  # two bases and three adapters
    session.replace([0, 1], PROMPTS[:2], expected[1:3])
    assert [pool.runner for pool in session._pools.values()] == [of_base, of_full]
    session.replace([0], [[1]], numbered([["T", "J", "P"]]))
    assert [pool.runner.num_rows for pool in session._pools.values()] == [6, 1]


def test_equal_prompts_of_texts_with_other_attributes_are_read_once_by_each_model(models, monkeypatch):
    shapes, forward = [], ModelRunner.forward

    def record(own, fed, layout, tokens, *args, **kwargs):
        shapes.append((layout.runs, tokens.shape[1]))
        return forward(own, fed, layout, tokens, *args, **kwargs)

    prompt = PROMPTS[0]
    session = models.open([], ["base", 0, 1], CAPACITY, num_rows=4)
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "forward", record)
        session.replace(range(3), [prompt] * 3, numbered([["E"], ["T", "E"], ["E"]]))
        session.replace([3], [prompt], numbered([["T"]]))
    assert shapes == [(((0, 1), (1, 1), (2, 1)), len(prompt) - 1)]
    _check(models, session, [list(prompt) for _ in range(4)], [["E"], ["T", "E"], ["E"], ["T"]])


def test_what_is_not_finite_stays_with_the_row_that_it_came_from(models):
    session = models.open([], ["base", 0], CAPACITY, num_rows=3)
    rows, attributes = [list(range(20, 28)), [*range(40, 46), 10], [11, 12, 13]], [["E"], ["T"], ["E"]]
    session.replace(range(3), rows, numbered(attributes))
    hook = (
        models._models[0]
        .model.get_input_embeddings()
        .register_forward_hook(lambda module, args, out: out.masked_fill(args[0][..., None] == 10, float("nan")))
    )
    _last(session, ["base", 0], rows)
    assert session.blame(1, 6, [10], ["base", "T"]) == "the 'base' model returned NaN"
    hook.remove()
    session.keep([0, 2])
    # behind its end, and seen by the longest
    rows, attributes = [rows[0], rows[2], [14, 15]], [["E"], ["E"], ["T"]]
    session.replace([2], [rows[2]], numbered([["T"]]))
    _check(models, session, rows, attributes)


@pytest.fixture
def captured(tiny_model, lora_folder, monkeypatch):
    monkeypatch.setitem(graphs.CAPTURES, "cpu", Tape)
    adapters = {name: lora_folder(name, "llama", target_modules=["q_proj"]) for name in ("E", "T", "J", "P")}
    return load(tiny_model("llama"), adapters, device="cpu", graphs=True)


def test_captured_forwards_of_unlike_texts_have_few_sizes(captured):
    """Of 9 to 12 rows two, as spare ones run what the last does; the logits are those of each text by itself."""
    session, before = captured.open([], ["base", 0, 1, 2], CAPACITY, num_rows=4), Tape.num_recorded
    rows = [list(range(3, 7 + row)) for row in range(3)]
    for attributes in (
        [["E", "T"], ["J", "E"], ["T", "P"]],
        [["E", "T"], ["J", "E"], ["T", "P", "J"]],
        [["E", "T", "J"], ["J", "E"], ["T", "P", "J"]],
        [["T", "P"], ["J"], ["P", "E", "J"]],
    ):
        session.replace(range(3), rows, numbered(attributes))
        runs = [forward.places for forward in session.routes.of(("base", 0, 1, 2), frozenset()).forwards]
        assert [len(places) for places in runs] == [10 if sum(map(len, attributes)) < 8 else 12]
        together = _last(session, ["base", 0, 1, 2], rows)
        for row, names in enumerate(attributes):
            for place, name in enumerate(["base", *names]):
                alone = _last(captured.open([rows[row]], [name], CAPACITY), [name], [rows[row]])[0, 0]
                torch.testing.assert_close(together[place, row], alone, atol=1e-5, rtol=1e-5)
    of_one = 3 * 4  # of each text by itself: under the base and three adapters, but three lengths are one cache length
    assert Tape.num_recorded - before <= 2 + of_one


@pytest.mark.parametrize("is_known", [False, True])
def test_nan_in_a_spare_row_does_not_reach_the_text_that_gets_it(is_known, captured):
    """Whether or not the host knows by then that the last text has failed."""
    session = captured.open([], ["base", 0, 1], CAPACITY, num_rows=4)
    rows, attributes = [[*range(40, 46)], [11, 12, 13], [*range(20, 30), 10]], [["E", "T"], ["J", "E"], ["T", "P"]]
    session.replace(range(3), rows, numbered(attributes))
    hook = (
        captured._models[0]
        .model.get_input_embeddings()
        .register_forward_hook(lambda module, args, out: out.masked_fill(args[0][..., None] == 10, float("nan")))
    )
    assert _last(session, ["base", 0, 1], rows)[:, 2].isnan().all()
    if is_known:
        session.blame(2, 10, [10], ["base"])
    hook.remove()
    (pool,) = session._pools.values()
    if is_known:
        session.keep([0, 1])
        assert all(buffer.isfinite().all() for buffer in pool.runner.cache._buffers())  # another session may get them
        session.replace([2], [[20, 21]], numbered([["T", "P"]]))
    session.replace([1, 3], [[11], [14, 15]], numbered([["E"], ["P"]]))
    assert [(pair.row, pair.slot.group) for pair in pool.pairs].index((3, 4)) == 9
    sound = [place for place, pair in enumerate(pool.pairs) if is_known or pair.row != 2]
    assert all(buffer[sound].isfinite().all() for buffer in pool.runner.cache._buffers())
    assert is_known == all(buffer.isfinite().all() for buffer in pool.runner.cache._buffers())


class _Products(TorchDispatchMode):
    """Counts what a forward multiplies by."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().partition("::")[2].partition(".")[0]
        if name in ("mm", "addmm", "bmm", "baddbmm_", "lora_shrink", "lora_expand_"):
            self.counts[name] += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(("attributes", "update"), [(["E"] * 3, "baddbmm_"), (["E", "T", "T"], "lora_expand_")])
def test_a_llama_layer_with_adapters_everywhere_is_four_products_and_four_updates(
    attributes, update, tiny_model, lora_folder, tmp_path
):
    tiny_model().save_pretrained(tmp_path / "base")
    adapters = {name: lora_folder(name, target_modules=list(EVERY_LINEAR)) for name in ("E", "T")}
    models = load(tmp_path / "base", adapters, device="meta")
    session = models.open([], ["base", 0], CAPACITY, num_rows=3)
    session.replace(range(3), PROMPTS, numbered([[name] for name in attributes]))
    tokens, start = (torch.zeros(3, *shape, dtype=torch.int64, device="meta") for shape in [(1,), ()])
    with _Products() as products:
        session.forward(["base", 0], tokens, start, kv_length=20)
    num_layers = models._models[0].num_layers
    assert products.counts.pop("bmm") - 2 * num_layers in (0, 1)  # attention, and in transformers 5.17 the positions
    assert products.counts == {"mm": 4 * num_layers + 1, update: 4 * num_layers}  # with the head
