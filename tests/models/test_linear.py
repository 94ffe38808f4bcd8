"""Packed linear layers against torch's own."""

from __future__ import annotations

import copy
import math
from collections import Counter
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import mpg_ext
from ensembles import load
from mpg.models import linear, quantize, timings
from mpg.models.linear import EVERY, PackedLinear, choose, pack_linears

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def _packed(model):
    return [name for name, layer in model.named_modules() if isinstance(layer, PackedLinear)]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_onednn)])
@pytest.mark.parametrize("rows", [EVERY, range(6, EVERY.stop), range(1, 6)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (5, 1), (3, 7)])
def test_a_packed_layer_equals_torchs_own(shape, bias, rows, dtype):
    layer = nn.Linear(300, 1000, bias=bias, dtype=dtype)
    x = torch.randn(*shape, 300, dtype=dtype)
    got, own = PackedLinear(layer, rows)(x), layer(x)
    expected = copy.deepcopy(layer).double()(x.double())
    size = copy.deepcopy(layer).double().weight.abs() @ x.double().abs().flatten(0, -2).T  # of the terms that are added
    eps = torch.finfo(torch.float32).eps * 300 * size.T.reshape(got.shape) + torch.finfo(dtype).eps * expected.abs()
    assert ((got - expected).abs() <= eps + 1e-6).all()
    if x[..., 0].numel() not in rows:
        assert torch.equal(got, own)


def from_on(first):
    return range(first, EVERY.stop)


TIMES = {  # seconds plain and packed at 1, 2, 3, 8 and 40 rows, and at how many rows it is packed
    "packed is faster": ([(2, 1), (2, 1), (2, 1), (2, 1), (2, 1)], EVERY, EVERY),
    "plain is faster": ([(1, 2), (1, 2), (1, 2), (1, 2), (1, 2)], None, None),
    "plain is faster for one row": ([(1, 1.5), (3, 2), (4, 2), (8, 3), (9, 5)], from_on(2), EVERY),
    "they are alike for one row": ([(1, 0.99), (3, 2), (4, 2), (8, 3), (9, 5)], from_on(2), EVERY),
    "plain is faster for two rows": ([(1, 2), (1, 1.5), (4, 2), (8, 3), (9, 5)], from_on(3), None),
    "plain is faster for few rows": ([(1, 4), (1, 4), (1, 4), (4, 2), (6, 3)], from_on(8), None),
    "only prompts are faster": ([(1, 2), (1, 2), (1, 2), (1, 2), (4, 1)], from_on(40), None),
    "they are alike": ([(1, 0.99), (1, 1), (1, 1), (1, 0.95), (1, 1.01)], None, None),
    "they are alike for prompts": ([(2, 1), (2, 1), (2, 1), (2, 1), (1, 1.05)], EVERY, EVERY),
    "plain is faster for prompts": ([(2, 1), (2, 1), (2, 1), (2, 1), (1, 2)], range(1, 40), EVERY),
    "plain is faster for one row and for many": ([(1, 2), (2, 1), (2, 1), (1, 2), (1, 2)], range(2, 8), None),
}


@pytest.mark.parametrize("name", TIMES)
def test_the_faster_way_is_used_and_a_second_weight_only_where_it_pays(name):
    times, both, one = TIMES[name]
    assert (choose(times), choose(times, may_keep_both=False)) == (both, one)


def test_plain_and_packed_are_timed_once_a_process_for_each_kind_of_layer_that_can_be_packed(monkeypatch):
    """Two loads of one process then round alike, whatever else the machine was doing."""
    monkeypatch.setattr(linear, "_times", {})
    monkeypatch.setattr(linear, "TIMED_SECONDS", 0)
    model = nn.Sequential(*(nn.Linear(256, size, bias=False) for size in (512, 512, 640)), nn.Linear(512, 4))
    model.append(nn.Linear(256, 512, dtype=torch.float16)).append(nn.Linear(256, 512, device="meta"))
    pack_linears(model)
    kept = dict(linear._times)
    assert {kind[:3] for kind in kept} == {(512, 256, torch.float32), (640, 256, torch.float32)}
    assert all(0 < seconds < math.inf for times in kept.values() for pair in times for seconds in pair)
    pack_linears(nn.Sequential(nn.Linear(256, 512), nn.Linear(256, 768)))
    assert len(linear._times) == 3
    assert all(linear._times[kind] == times for kind, times in kept.items())


class Clock:
    """Time that passes while ways are timed alone, as long at each product."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds, self.products = 0.0, seconds, Counter()
        clock = SimpleNamespace(perf_counter=lambda: self.now, thread_time=lambda: self.now)
        monkeypatch.setattr(linear, "time", clock)
        monkeypatch.setattr(linear, "_times", {})
        timings.file().unlink(missing_ok=True)
        for module, name in ((linear, "PLAIN"), (linear, "PACKED"), (quantize, "INT4")):
            monkeypatch.setattr(module, name, self._slow(getattr(module, name)))

    def _slow(self, way):
        def multiply(x, weight):
            self.now += self.seconds
            self.products[way.name, x.shape[1], len(x)] += 1
            return way.multiply(x, weight)

        return way._replace(multiply=multiply)


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("num_kinds", [1, 2, 7])
def test_all_kinds_of_a_model_are_timed_together_in_a_quarter_of_a_second(num_kinds, num_layers, monkeypatch):
    layers = [nn.Linear(512 + 16 * kind, 64) for kind in range(num_kinds) for _ in range(num_layers)]
    products_of_turn = 2 * len(linear.TIMED_ROWS) * len(layers)
    clock = Clock(monkeypatch, 0.045 / products_of_turn)
    pack_linears(nn.Sequential(*layers))
    assert linear.TIMED_SECONDS <= clock.now < 0.25
    ways = product(("plain", "packed"), (layer.in_features for layer in layers), linear.TIMED_ROWS)
    assert set(clock.products) == set(ways)
    [count] = set(clock.products.values())  # a kind and number of rows takes part in every turn, first with one layer
    assert (count - 1) % num_layers == 0
    clock.now = 0.0
    pack_linears(nn.Sequential(*layers))
    assert clock.now == 0


def test_a_machine_that_is_slow_has_two_turns_and_a_fast_one_ten(monkeypatch):
    for seconds, turns in ((9.0, 2), (1e-6, linear.MAX_TURNS)):
        clock = Clock(monkeypatch, seconds)
        pack_linears(nn.Sequential(nn.Linear(512, 64)))
        assert set(clock.products.values()) == {turns}


def test_a_turn_that_is_interrupted_at_one_part_times_the_others(monkeypatch):
    """Every seventh product takes a thousand times as long: of eight parts one at least in each turn, in turn."""
    clock = Clock(monkeypatch, 1e-6)
    for name in ("PLAIN", "PACKED"):
        way = getattr(linear, name)

        def interrupted(x, weight, multiply=way.multiply):
            clock.now += 1e-3 * (clock.products.total() % 7 == 0)
            return multiply(x, weight)

        monkeypatch.setattr(linear, name, way._replace(multiply=interrupted))
    layers = [nn.Linear(512, 64) for _ in range(8)]
    times = linear.time_layers(layers, linear.PLAIN)[0]
    assert [seconds for pair in times for seconds in pair] == pytest.approx([8e-6] * 2 * len(linear.TIMED_ROWS))


@needs_onednn
def test_both_ways_of_four_bits_are_timed_in_half_a_second_together(tiny_model, monkeypatch):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("nothing is timed without second weights")
    monkeypatch.setattr(linear, "MIN_WEIGHTS", 0)
    clock, spent = Clock(monkeypatch, 0.001), {}
    time_kinds = linear._time

    def time_apart(weights, other):
        begun = clock.now
        found = time_kinds(weights, other)
        spent[other.name] = clock.now - begun
        return found

    monkeypatch.setattr(linear, "_time", time_apart)
    load(tiny_model(), {}, device="cpu", quantize="int4")
    assert set(spent) == {"int4", "plain"}  # of the layers in four bits, and of the others
    assert spent["int4"] >= linear.TIMED_SECONDS
    assert spent["plain"] > 0
    assert sum(spent.values()) < 0.5
    assert sum(clock.products.values()) * clock.seconds == pytest.approx(sum(spent.values()))


@pytest.mark.parametrize(("share", "rows"), [(0.25, from_on(2)), (0.0, EVERY)])
def test_second_weights_are_kept_only_where_the_machine_has_room(share, rows, monkeypatch):
    kind = 512, 256, torch.float32, torch.get_num_threads(), "plain"
    monkeypatch.setattr(linear, "_times", {kind: TIMES["plain is faster for one row"][0]})
    monkeypatch.setattr(linear, "MAX_SHARE", share)
    model = nn.Sequential(nn.Linear(256, 512))
    weight = model[0].weight
    pack_linears(model)
    assert model[0].rows == rows
    assert model[0].plain is (None if rows == EVERY else weight)


@pytest.mark.parametrize(("rows", "num_adapted"), [(EVERY, 2 * 4), (from_on(2), 2 * 4), (from_on(5), 0)])
def test_a_model_with_packed_layers_equals_the_callers_which_stays_as_it_was(
    rows, num_adapted, tiny_model, full_logits, monkeypatch
):
    monkeypatch.setattr(linear, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(linear, "choose", lambda *given: rows)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(tie_word_embeddings=True), config, adapter_name="E")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ensemble = load(model, device="cpu")
    assert len(_packed(ensemble._models[0].model)) == 2 * 4 + 1  # q, k, v joined, and gate, up
    session, in_one_op = ensemble.open([[3, 4, 5]], ["base", "E"], 8), []
    multiply = mpg_ext.linear_panels
    monkeypatch.setattr(
        mpg_ext, "linear_panels", lambda *given, **more: in_one_op.append(len(given) > 3) or multiply(*given, **more)
    )
    logits = session.forward(["base", "E"], torch.tensor([[5, 6]]), torch.tensor([2]), kv_length=4)
    assert sum(in_one_op) == num_adapted  # with the adapters
    for role, of_role in zip((None, "E"), logits, strict=True):
        torch.testing.assert_close(of_role[0], full_logits(model, [3, 4, 5, 6], role)[2:], atol=1e-4, rtol=1e-5)
    assert not _packed(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    num_parameters = tiny_model(tie_word_embeddings=True).num_parameters()
    assert ensemble.describe()["base"]["parameters"] == num_parameters
