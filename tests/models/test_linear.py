"""Packed linear layers against torch's own."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ensembles import load
from mpg.models import linear
from mpg.models.linear import PackedLinear, pack_linears

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def _packed(model):
    return [name for name, layer in model.named_modules() if isinstance(layer, PackedLinear)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (5, 1), (3, 7)])
def test_a_packed_layer_equals_torchs_own(shape, bias):
    layer = nn.Linear(300, 1000, bias=bias)
    x = torch.randn(*shape, 300)
    expected = layer.double()(x.double())
    layer.float()
    error, own_error = (PackedLinear(layer)(x) - expected).abs().max(), (layer(x) - expected).abs().max()
    assert error <= 2 * own_error + 1e-6


def test_only_large_float32_layers_are_packed():
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 511), nn.Linear(512, 512, dtype=torch.bfloat16))
    model.append(nn.Linear(512, 512, device="meta"))
    pack_linears(model)
    assert _packed(model) == ["0"]


def test_a_model_with_packed_layers_equals_the_callers_which_stays_as_it_was(tiny_model, full_logits, monkeypatch):
    monkeypatch.setattr(linear, "MIN_WEIGHTS", 0)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(tie_word_embeddings=True), config, adapter_name="E")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ensemble = load(model, device="cpu")
    assert len(_packed(ensemble._models[0].model)) == 2 * 7 + 1
    logits = ensemble.open([[3, 4, 5]], ["base", "E"], 8).forward(
        ["base", "E"], torch.tensor([[5, 6]]), torch.tensor([2]), kv_length=4
    )
    for role, of_role in zip((None, "E"), logits, strict=True):
        torch.testing.assert_close(of_role[0], full_logits(model, [3, 4, 5, 6], role)[2:], atol=1e-4, rtol=1e-5)
    assert not _packed(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    num_parameters = tiny_model(tie_word_embeddings=True).num_parameters()
    assert ensemble.describe()["base"]["parameters"] == num_parameters
