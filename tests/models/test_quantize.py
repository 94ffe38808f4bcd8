"""Layers of four-bit weights against plain ones that have the values these stand for."""

from __future__ import annotations

import copy
import re
from functools import partial

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import nn

import mpg
from ensembles import load
from mpg.models import linear, quantize
from mpg.models.linear import TIMED_ROWS
from mpg.models.quantize import GROUP, Int4, Int4Linear
from mpg.models.stack import LoraLinear

EPS = torch.finfo(torch.bfloat16).eps
CAN_PACK = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
SECOND = pytest.mark.skipif(not CAN_PACK, reason="no second weights without oneDNN's bfloat16")
TIMES = [(1, 2), (1, 2), (1, 2), (2, 2), (4, 2)]  # at 1, 2, 3, 8 and 40 rows, in four bits and in bfloat16
FIRST_ROWS = [None, pytest.param(6, marks=SECOND)]


@pytest.fixture
def adapted(tiny_model):
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(tiny_model(tie_word_embeddings=True, attention_bias=True), settings, adapter_name="E").eval()


def run(ensemble, num_rows=1):
    """Logits (2, num_rows, 3, V) of the base and of E."""
    roles = ["base", "E"]
    session = ensemble.open([[3]] * num_rows, roles, 8)
    return session.forward(roles, torch.tensor([[3, 4, 5]] * num_rows), torch.zeros(num_rows).long(), kv_length=8)


def quantised(ensemble, place=0):
    return [layer for layer in ensemble._models[place].model.modules() if isinstance(layer, Int4Linear)]


def adapted_layers(ensemble):
    model = ensemble._models[0].model
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}


@pytest.mark.parametrize("first_rows", FIRST_ROWS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (5, 1), (3, 7)])
def test_a_layer_equals_a_plain_one_of_its_values(shape, bias, first_rows):
    layer = nn.Linear(320, 1008, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(*shape, 640).bfloat16()[..., ::2]  # of rows that are not whole
    assert is_product(Int4Linear(layer, first_rows)(x), x, Int4.of(layer.weight.detach()), layer.bias)


def is_product(out, x, int4, bias):
    """Whether `out` is x (..., in) times a weight but for roundings: of a sum of in terms in float32, of that to
    bfloat16, and once more with the bias. Processors differ in whether values are rounded to bfloat16 first."""
    x = x.double()
    scale, offset = int4.scales.double().transpose(0, 1)[..., None].unbind(2)
    values = (int4.numbers.unflatten(1, (-1, GROUP)) - 8) * scale + offset
    is_within = []
    for weight in (values.flatten(1), values.flatten(1).bfloat16().double()):
        product, size = x @ weight.T, x.abs() @ weight.abs().T
        expected = product if bias is None else product + bias.detach().double()
        of_sum = size * (weight.shape[1] + 2) * torch.finfo(torch.float32).eps  # a value itself takes two operations
        rounded = of_sum + EPS / 2 * ((product.abs() + of_sum) * (1 + EPS) + expected.abs())
        is_within.append((out - expected).abs() <= rounded)
    return (is_within[0] | is_within[1]).all()


def test_values_of_q4_1_come_back():
    steps, low = torch.rand(48, 4, 1).half().float() * 0.01, torch.randn(48, 4, 1).half().float() * 0.1
    numbers = torch.randint(16, (48, 4, GROUP))
    numbers[..., 0], numbers[..., 1] = 0, 15
    weight = (steps * numbers + low).flatten(1).bfloat16()
    range = (15 * steps + low.abs()).expand(-1, -1, GROUP).flatten(1)
    assert ((Int4.of(weight).dequantize() - weight).abs() <= EPS * range).all()


def test_other_values_go_to_the_nearest_and_broken_ones_stay_so():
    weight = torch.randn(16, 4 * GROUP).bfloat16()
    weight[3, GROUP : 2 * GROUP] = 0.125
    weight[5, 7] = torch.nan
    got = Int4.of(weight).dequantize().unflatten(1, (-1, GROUP))
    groups = weight.unflatten(1, (-1, GROUP)).float()
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    assert got[5, 0].isnan().all()
    assert torch.equal(got[3, 1], groups[3, 1].bfloat16())
    is_whole = ~groups.isnan().any(-1)
    error = (got - groups).abs().amax(-1)
    assert (error <= step / 2 + 2 * EPS * groups.abs().amax(-1))[is_whole].all()


@pytest.mark.parametrize("first_rows", FIRST_ROWS)
@pytest.mark.parametrize("num_rows", [1, 4])
def test_a_model_with_adapters_equals_one_of_its_values_and_the_callers_stays(
    num_rows, first_rows, adapted, monkeypatch
):
    monkeypatch.setattr(linear, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(quantize, "choose", lambda times: first_rows)
    before = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    monkeypatch.setattr(linear, "choose", lambda *given: None)  # the head, and what of bfloat16 is beside it
    ensemble = load(adapted, device="cpu", quantize="int4")
    assert all(torch.equal(weight, before[name]) for name, weight in adapted.state_dict().items())
    assert len(quantised(ensemble)) == 2 * 3  # q, k, v joined, o, and gate, up; not down of 48 inputs, and not the head
    values = copy.deepcopy(adapted)
    for module, layer in values.named_modules():
        if module.endswith("base_layer") and not re.search("lm_head|down_proj", module):
            layer.weight.data = Int4.of(layer.weight.data.bfloat16()).dequantize().float()
    assert ensemble.dtype == torch.bfloat16

    own = {name: layer for name, layer in adapted_layers(ensemble).items() if isinstance(layer.base, Int4Linear)}
    assert len(own) == len(quantised(ensemble))
    products = []
    for layer in own.values():
        hook = partial(lambda layer, _, given, out: products.append((layer, *given, out.clone())), layer)
        layer.base.register_forward_hook(hook)
    logits = run(ensemble, num_rows)
    for layer, x, out in products:
        plain = [adapted.get_submodule(f"base_model.model.{name}.base_layer") for name in layer.sizes]
        bias = None if plain[0].bias is None else torch.cat([part.bias for part in plain]).bfloat16()
        assert is_product(out, x, Int4.of(torch.cat([part.weight.detach() for part in plain]).bfloat16()), bias)
    # all else is the plain model's, bit for bit, once its layers make these products
    plain, left = load(values, dtype="bfloat16", device="cpu"), iter(products)
    for name in own:
        adapted_layers(plain)[name].base.register_forward_hook(lambda *_: next(left)[-1])
    assert torch.equal(run(plain, num_rows), logits)
    assert next(left, None) is None


def test_second_weights_are_kept_from_the_rows_on_where_they_are_faster_and_while_both_fit(adapted, monkeypatch):
    monkeypatch.setattr(linear, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(linear, "_time", lambda weights, other: {kind: TIMES for kind in weights})
    monkeypatch.setattr(linear, "_times", {})

    def first_rows():
        layers = quantised(load(adapted, device="cpu", quantize="int4"))
        found = {layer.first_rows: layer.packed is None for layer in layers}
        return found, {kind[-1] for kind in linear._times}

    assert first_rows() == (({8: False}, {"int4", "plain"}) if CAN_PACK else ({None: True}, set()))
    monkeypatch.setattr(linear, "MAX_SHARE", 0)
    assert first_rows()[0] == {None: True}


@pytest.mark.parametrize(
    ("times", "first_rows"),
    [
        (TIMES, 8),
        ([(1, 2), (1, 2), (1, 2), (2, 3), (5, 2)], 16),
        ([(1, 2), (1, 2), (3, 2), (1, 2), (2, 1)], 24),  # one that is faster by chance does not count
        ([(2, 1), (2, 1), (2, 1), (3, 1), (9, 2)], 1),
        ([(1, 2), (1, 2), (1, 2), (1, 2), (1, 2)], None),
    ],
)
def test_second_weights_are_used_from_where_they_are_faster(times, first_rows):
    assert quantize.choose(times) == first_rows


@pytest.mark.skipif(not CAN_PACK, reason="no second weights to time")
def test_ways_are_timed(monkeypatch):
    monkeypatch.setattr(linear, "_times", {})
    monkeypatch.setattr(linear, "TIMED_SECONDS", 0)
    monkeypatch.setattr(linear, "TIMED_WEIGHTS", 2**15)  # several parts
    [times] = linear.time_layers([nn.Linear(320, 1008, dtype=torch.bfloat16)], quantize.INT4)
    assert len(times) == len(TIMED_ROWS)
    assert all(0 < seconds < 60 for pair in times for seconds in pair)


def test_changes_of_the_callers_model_are_followed(adapted):
    ensemble = load(adapted, device="cpu", quantize="int4")
    before = run(ensemble)
    for parameter in adapted.parameters():
        parameter.data *= 1.1
    after = run(ensemble)
    assert not torch.equal(after, before)
    assert torch.equal(after, run(load(adapted, device="cpu", quantize="int4")))


def test_traced_layers_give_the_same():
    layer = Int4Linear(nn.Linear(64, 48, dtype=torch.bfloat16))
    compiled = torch.compile(layer, backend="eager", dynamic=True, fullgraph=True)
    for shape in ((2, 64), (3, 5, 64)):
        x = torch.randn(shape).bfloat16()
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.filterwarnings("ignore")
def test_merged_adapters_are_quantised_with_their_base(tiny_model, lora_folder, tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    folder = lora_folder("E", base=base, use_dora=True, target_modules=["q_proj", "down_proj"])
    how = {"merge_adapters": True, "allow_other_base": True, "device": "cpu"}
    ensemble = load(tmp_path / "base", {"E": folder}, quantize="int4", **how)
    assert quantised(ensemble, 0) and quantised(ensemble, 1)
    assert run(ensemble).isfinite().all()


@pytest.mark.parametrize("own_draft", [False, True])
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_draft_alone_in_four_bits_leaves_the_others_and_the_law_as_they_are(
    in_memory, own_draft, adapted, tiny_model, tmp_path
):
    source, draft = adapted, tiny_model(tie_word_embeddings=True, attention_bias=True) if own_draft else None
    if not in_memory:
        copy.deepcopy(adapted).unload().save_pretrained(tmp_path / "base")
        adapted.save_pretrained(tmp_path / "base/adapters")
        source = tmp_path / "base"
        if draft is not None:
            draft.save_pretrained(tmp_path / "draft")
            draft = tmp_path / "draft"
    how = {"device": "cpu", "draft": draft, "quantize": "int4-draft"}
    model, plain = mpg.load(source, **how), mpg.load(source, device="cpu")
    assert [len(quantised(model.models, place)) for place in range(2)] == [0, 2 * 2 + 2]
    assert (model.precision, model.models.dtype) == ("float32", torch.float32)
    assert torch.equal(run(model.models), run(plain.models))
    options = {"weights": {"E": 1}, "max_new_tokens": 12, "temperature": 0}
    drafted = model.generate([3, 4, 5], draft="model", **options)
    assert drafted.tokens == plain.generate([3, 4, 5], sampler="direct", **options).tokens
    assert own_draft or drafted.stats["accepted_per_round"] > 0


def test_a_draft_in_four_bits_reads_the_text_that_it_is_named_after(adapted):
    calm = mpg.Context(prompt=[9, 8, 7, 4, 5])
    model = mpg.load(adapted, {"E": "E", "calm": calm}, draft="calm", device="cpu", quantize="int4-draft")
    options = {"weights": {"calm": 1}, "max_new_tokens": 12, "temperature": 0}
    drafted = model.generate([3, 4, 5], draft="model", **options)
    assert drafted.tokens == model.generate([3, 4, 5], sampler="direct", **options).tokens
    merged = model.models.merge(["E"], torch.ones(1), is_draft=True)
    assert merged._slots["merged"].model is merged._slots["draft"].model
    other = mpg.load(adapted, {"E": "E", "calm": calm}, device="cpu", quantize="int4-draft")
    rate = other.generate([3, 4, 5], draft="model", **options).stats["accept_rate"]
    assert drafted.stats["accept_rate"] > max(0.5, rate)  # where the target is that text's alone


def test_a_draft_in_four_bits_is_the_sum_of_adapters_too(adapted):
    def logits(ensemble, **how):
        session = ensemble.merge(["E"], torch.tensor([0.7]), **how).open([[3]], ["merged"], 8)
        return session.forward(["merged"], torch.tensor([[3, 4, 5]]), torch.zeros(1).long(), kv_length=8)

    model = mpg.load(adapted, device="cpu", quantize="int4-draft")
    with torch.no_grad():
        for place in range(2):  # the second time the caller has gone on training
            whole, plain = (load(adapted, device="cpu", quantize=quantize) for quantize in ("int4", None))
            assert torch.equal(logits(model.models, is_draft=True), logits(whole))
            assert torch.equal(logits(model.models), logits(plain))  # of a target, as it is without a draft
            options = {"weights": {"E": 0.7}, "max_new_tokens": 12, "temperature": 0}
            drafted = model.generate([3, 4, 5], draft="merged", **options)
            assert drafted.tokens == model.generate([3, 4, 5], sampler="direct", **options).tokens
            assert drafted.stats["accepted_per_round"] > 0
            projection = adapted.base_model.model.model.layers[place].self_attn.v_proj
            projection.lora_B["E"].weight *= 3
            projection.base_layer.weight *= 2


def test_a_draft_that_cannot_be_in_four_bits_is_refused(adapted, tiny_model, tmp_path):
    for draft in ("E", adapted):
        with pytest.raises(ValueError, match=r"^draft: expected a model beside quantize='int4-draft', got an adapter"):
            load(adapted, draft=draft, device="cpu", quantize="int4-draft")
    with pytest.raises(ValueError, match=r"^draft: expected the base's vocabulary"):
        load(adapted, draft=tiny_model(vocab_size=96), device="cpu", quantize="int4-draft")
    with pytest.raises(ValueError, match=r"^quantize: expected base on the CPU, got meta"):
        load(adapted, device="meta", quantize="int4-draft")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"quantize": "int8"}, "quantize: expected 'none' or 'int4' or 'int4-draft', got 'int8'"),
        ({"quantize": True}, "quantize: expected 'none' or 'int4' or 'int4-draft', got True"),
        ({"dtype": "float32"}, "dtype: expected bfloat16 beside quantize='int4', which computes in it, got torch.f"),
        ({"device": "meta"}, "quantize: expected base on the CPU, got meta; device='cpu' puts it there"),
        ({"device_map": {"base": "meta"}}, "quantize: expected base on the CPU, got meta"),
        ({"device_map": {"base": "auto"}}, "quantize: expected base on the CPU, got auto"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("in_memory", [False, True])
def test_what_cannot_be_had_is_refused_by_name(how, message, in_memory, adapted, tmp_path):
    if in_memory and how.get("device_map", {}).get("base") == "auto":
        pytest.skip("a loaded model is refused for that alone")
    source, attributes = adapted, None
    if not in_memory:
        adapted.get_base_model().save_pretrained(tmp_path / "base")
        adapted.save_pretrained(tmp_path / "base/adapters")
        source = tmp_path / "base"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        mpg.load(source, attributes, **{"quantize": "int4", "device": None if "device_map" in how else "cpu"} | how)


def test_a_model_without_a_layer_that_fits_is_refused(tiny_model, lora_folder):
    base = tiny_model("gpt2")
    folder = lora_folder("E", "gpt2", base=copy.deepcopy(base), target_modules=["c_attn"])
    with pytest.raises(ValueError, match=r"^quantize: expected linear layers of 32 inputs and 16 outputs"):
        load(base, {"E": folder}, device="cpu", quantize="int4")


def test_a_recipe_has_it_and_a_caller_goes_before(adapted, tmp_path):
    adapted.get_base_model().save_pretrained(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "base/adapters")
    mpg.load(tmp_path / "base", device="cpu", quantize="int4").save_pretrained(tmp_path / "mpg.yaml")
    assert yaml.safe_load((tmp_path / "mpg.yaml").read_text())["quantize"] == "int4"
    loaded = mpg.load(tmp_path, device="cpu")
    assert quantised(loaded.models)
    assert loaded.precision == "bfloat16, int4 weights"
    other = mpg.load(tmp_path, device="cpu", quantize="none")
    assert not quantised(other.models)
    assert other.precision == "float32"
    text = (tmp_path / "mpg.yaml").read_text().replace("int4", "int5")
    (tmp_path / "mpg.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path / 'mpg.yaml'))}: quantize: expected 'none' or"):
        mpg.load(tmp_path, device="cpu")
