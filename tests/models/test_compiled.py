"""Compiled decoder layers against the layers as they are, and how often code is made."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode

import mpg
from architectures import ARCHITECTURES
from ensembles import load
from longer import IS_LONG, long
from mpg.demo import MODELS
from mpg.demo.corpus import DEMO_QUESTIONS
from mpg.models import compiled, graphs, linear
from mpg.models.compiled import compile_layers
from tape import Tape

PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10], [11, 12, 13]]


@pytest.fixture(autouse=True)
def _no_code_yet():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def quick(monkeypatch):
    """What is traced runs as it is, without the seconds that machine code takes to be made."""
    compile, backend = torch.compile, "aot_eager" if IS_LONG else "eager"
    monkeypatch.setattr(torch, "compile", lambda f, *, dynamic, options: compile(f, dynamic=dynamic, backend=backend))


@pytest.fixture
def quick_but_in_the_long_form(request):
    if not IS_LONG:
        request.getfixturevalue("quick")


@pytest.fixture
def load_both(tiny_model):
    """The same models twice: as they are, and compiled."""

    def load_both():
        settings = dict(task_type="CAUSAL_LM", init_lora_weights=False)
        config = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4, **settings)
        model = get_peft_model(tiny_model(num_hidden_layers=3), config, adapter_name="E")
        model.add_adapter("T", LoraConfig(target_modules=["k_proj", "o_proj", "lm_head"], r=2, **settings))
        return [load(model, device="cpu", compile=compile) for compile in (False, True)]

    return load_both


def _forward(sessions, roles, start, num_tokens, kv_length):
    """The logits of the same forward by either session."""
    tokens = torch.randint(61, (len(start), num_tokens))
    return [session.forward(roles, tokens, torch.tensor(start), kv_length=kv_length) for session in sessions]


def test_one_code_for_all_layers_and_rounds_gives_the_same_logits(quick, load_both, monkeypatch):
    monkeypatch.setattr(linear, "MIN_WEIGHTS", 0)  # so that packed layers, plain for one row, are among them
    monkeypatch.setattr(linear, "choose", lambda *given: range(2, 100))
    ensembles, everything = load_both(), ["base", "E", "T"]

    def compare(*calls):
        codes = []
        for call in calls:
            eager, compiled = _forward(*call)
            torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-5)
            codes.append(counters["stats"]["unique_graphs"])
        return codes

    sessions = [ensemble.open(PROMPTS, everything, 20) for ensemble in ensembles]
    assert counters["stats"]["unique_graphs"] == 0  # prompts are read as without
    assert compare(
        (sessions, everything, [6, 0, 2], 4, 10),
        (sessions, everything, [8, 1, 3], 4, 13),  # some of the tokens were rejected
        (sessions, everything, [9, 2, 6], 1, 10),
        (sessions, everything, [10, 3, 7], 1, 11),
        (sessions, ["base"], [11, 4, 8], 1, 12),
        (sessions, ["base"], [12, 5, 9], 1, 13),
    ) == [1, 1, 2, 2, 3, 3]
    for session in sessions:
        session.replace([1], [[20, 21, 22, 23]])
    others = [ensemble.open([[5, 6], [7, 8, 9], [1], [2], [3, 4]], everything, 30) for ensemble in ensembles]
    assert (
        compare(
            (sessions, everything, [13, 3, 10], 2, 15),
            (others, everything, [1, 2, 0, 0, 1], 4, 6),
            (others, everything, [2, 5, 1, 2, 3], 1, 6),
            (others, ["base"], [3, 6, 2, 3, 4], 1, 7),
            (others, everything, [3, 6, 2, 3, 4], 3, 29),
        )
        == [3] * 5
    )
    assert not counters["graph_break"]


def test_unlike_texts_of_any_number_run_their_packed_layers_and_adapters_compiled(quick, load_both, monkeypatch):
    monkeypatch.setattr(linear, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(linear, "choose", lambda *given: linear.EVERY)
    ensembles = load_both()
    for names in (["E", "T", "E"], ["T", "E"], ["E", "E", "T", "E", "T"]):
        sessions = [ensemble.open([], ["base", 0], 20, num_rows=len(names)) for ensemble in ensembles]
        for session in sessions:
            texts = [[3 + row, 4] for row in range(len(names))]
            session.replace(range(len(names)), texts, [{0: name} for name in names])
        eager, compiled = _forward(sessions, ["base", 0], [1] * len(names), 1, 4)
        torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@long
def test_widened_products_give_the_same_texts_compiled_captured_and_both(tape_of_compiled):
    """As on a GPU, with requests that weigh the same and with such as do not."""
    weights = [[{"E": 1, "J": 0.5}] * 2, [{"E": 1}, {"T": 1, "J": 1}]]
    texts = []
    for is_wide, settings in product((False, True), ({}, {"compile": True}, {"graphs": True, "compile": True})):
        model = mpg.load(MODELS, dtype="float32", **settings)
        if is_wide:
            model.models._models[0].stack.widen()
        texts.append([
            [result.tokens for result in model.generate(DEMO_QUESTIONS[:2], weights=own, seed=3, max_new_tokens=12)]
            for own in [*weights, *weights]
        ])  # fmt: skip
    assert texts == [texts[0]] * 6


@long
def test_a_merged_model_with_weights_of_every_row_is_compiled(quick_but_in_the_long_form, load_both):
    shares = torch.tensor([[1.0, 0.0], [0.3, -0.5], [2.0, 1.0]])
    sessions = [ensemble.merge(["E", "T"], shares).open(PROMPTS, ["merged"], 20) for ensemble in load_both()]
    eager, compiled = _forward(sessions, ["merged"], [6, 0, 2], 1, 10)
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-5)
    shares *= -1
    eager, compiled = _forward(sessions, ["merged"], [7, 1, 3], 1, 11)
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@long
def test_a_forward_that_a_mode_watches_does_not_keep_later_ones_from_being_compiled(quick, load_both):
    """So are forwards looked at before they are captured."""

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    session = load_both()[1].open(PROMPTS, ["base"], 20)
    with Watching():
        _forward([session], ["base"], [6, 0, 2], 1, 10)
    assert counters["stats"]["unique_graphs"] == 0
    _forward([session], ["base"], [6, 0, 2], 1, 10)
    assert counters["stats"]["unique_graphs"] == 1


@long
def test_a_layer_that_fails_leaves_the_cache_to_the_next_forward(quick, load_both):
    """The cache says which layer is running, in place of the layers."""
    ensemble = load_both()[1]
    session = ensemble.open(PROMPTS, ["base"], 20)
    layers = ensemble._models[0].model.model.layers
    hook = layers[0].mlp.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _forward([session], ["base"], [6, 0, 2], 1, 10)
    hook.remove()
    (runner,) = (pool.runner for pool in session._pools.values())
    assert runner.cache.current is None


@long
@pytest.mark.parametrize("model_type", [architecture.model_type for architecture in ARCHITECTURES])
def test_layers_of_other_architectures_are_traced_whole_and_shared(model_type, quick, tiny_model):
    """Most have one kind of layer, some two (dense and sparse, with rotation and without)."""
    model = tiny_model(model_type)
    ensembles = [load(model, {"E": model}, device="cpu", compile=compile) for compile in (False, True)]
    sessions = [ensemble.open(PROMPTS, ["base"], 20) for ensemble in ensembles]
    for start, kv_length in (([6, 0, 2], 11), ([8, 1, 3], 13), ([9, 2, 6], 16)):
        eager, compiled = _forward(sessions, ["base"], start, 4, kv_length)
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("compile", ["yes", 1, None])
def test_another_value_than_a_boolean_is_refused(compile, tiny_model):
    with pytest.raises(ValueError, match=f"compile: expected True or False, got {compile!r}"):
        load(tiny_model(), {"E": tiny_model()}, compile=compile)


def test_a_model_whose_layers_are_not_found_is_refused(tiny_model):
    model = tiny_model()
    model.model.layers = nn.ModuleList(model.model.layers[:1])  # as if the other were of a class of its own
    with pytest.raises(ValueError, match=r"compile: expected 2 decoder layers in base, got 1"):
        compile_layers("base", model, None)


class WarmTape(Tape):
    """A tape that, as a capture of CUDA, is no mode to compiled layers, which run once before they are recorded."""

    num_compiled = 0  # runs of compiled code that tapes have recorded

    def __call__(self, step):
        step()
        made = counters["stats"]["unique_graphs"]
        captured = super().__call__(step)
        assert counters["stats"]["unique_graphs"] == made  # compiling while CUDA captures would end the capture
        return captured

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.float64:
            return func(*args)  # a layer's own number, which its code gets as a tensor of the host
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture
def tape_of_compiled(monkeypatch):
    """Lets a tape, which torch.compile would refuse as a mode, see what compiled code runs."""
    tapes = []

    def backend(graph, inputs):
        def run(*args):
            if tapes[-1] is None:
                return graph(*args)
            WarmTape.num_compiled += 1
            with tapes[-1]:
                return graph(*args)

        return run

    def compile(function, *, dynamic, options, compile=torch.compile):
        run = compile(function, dynamic=dynamic, backend=backend)

        def unwatched(*args):
            tapes.append(_get_current_dispatch_mode())
            try:
                with _disable_current_modes():
                    return run(*args)
            finally:
                tapes.pop()

        return unwatched

    def current_mode():
        mode = _get_current_dispatch_mode()
        return None if isinstance(mode, WarmTape) else mode

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(compiled, "_get_current_dispatch_mode", current_mode)
    monkeypatch.setitem(graphs.CAPTURES, "cpu", WarmTape)


@long  # either without the other is in the short form
def test_compiled_layers_are_captured_and_give_the_same_texts(tape_of_compiled, recwarn):
    """Forwards of a token and of a chunk, of the base and of adapters that lie apart; and all of them once more."""
    plain, model = (mpg.load(MODELS, dtype="float32", graphs=captured, compile=captured) for captured in (False, True))
    settings = dict(weights={"E": 1, "J": 0.5}, seed=4, max_new_tokens=16, trace=True)
    expected = plain.generate(DEMO_QUESTIONS[:1], **settings)
    for _ in range(3):  # forwards are captured, then whole rounds
        before = WarmTape.num_compiled
        for text, wanted in zip(model.generate(DEMO_QUESTIONS[:1], **settings), expected, strict=True):
            assert text.tokens == wanted.tokens
            torch.testing.assert_close(text.log_ratios, wanted.log_ratios, atol=1e-4, rtol=1e-4)
    assert WarmTape.num_compiled == before > 0  # the third time all was replayed
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]
    assert not [warning for warning in recwarn if "captured" in str(warning.message)]
