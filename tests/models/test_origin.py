"""A model that goes on changing after it was loaded, and callers whose types are not the model's."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ensembles import load
from mpg.models import linear

ROLES = ["base", "E"]
TOKENS = [3, 4, 5, 6]


@pytest.fixture
def adapted(tiny_model):
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(tiny_model(tie_word_embeddings=True, attention_bias=True), settings, adapter_name="E").eval()


def run(ensemble):
    session = ensemble.open([[3]], ROLES, 8)
    return session.forward(ROLES, torch.tensor([TOKENS]), torch.zeros(1, dtype=torch.int64), kv_length=8)[:, 0].float()


def train(model):
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    model(torch.tensor([TOKENS]), labels=torch.tensor([TOKENS])).loss.backward()
    optimizer.step()


def through_data(model):
    for parameter in model.parameters():
        parameter.data *= 1.1


def by_other_tensors(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1


def laid_out_otherwise(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.T.contiguous().T if parameter.dim() == 2 else parameter.data


def merge_for_a_while(model):
    model.merge_adapter(["E"])
    through_data(model)
    model.unmerge_adapter()


def rescale(model):
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["E"] *= 2


@pytest.mark.parametrize("change", [train, through_data, by_other_tensors, merge_for_a_while, rescale])
@pytest.mark.parametrize("first_rows", [None, 1, 3], ids=["plain", "packed", "both"])
@pytest.mark.parametrize("dtype", [None, "float64"])
def test_what_is_changed_after_loading_is_followed(change, first_rows, dtype, adapted, full_logits, monkeypatch):
    monkeypatch.setattr(linear, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(linear, "choose", lambda *given: first_rows)
    ensemble = load(adapted, dtype=dtype, device="cpu")
    before = run(ensemble)
    change(adapted)
    after = run(ensemble)
    assert (after - before).abs().amax() > 0.01
    expected = torch.stack([full_logits(adapted, TOKENS, adapter) for adapter in (None, "E")])
    torch.testing.assert_close(after, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("first", [train, by_other_tensors, laid_out_otherwise])
def test_a_second_change_is_followed_too(first, adapted, full_logits):
    ensemble = load(adapted, {"E": "E"})
    for change in (first, through_data, through_data):
        change(adapted)
        expected = torch.stack([full_logits(adapted, TOKENS, adapter) for adapter in (None, "E")])
        torch.testing.assert_close(run(ensemble), expected, atol=1e-3, rtol=1e-3)


def test_a_change_of_one_value_through_data_is_followed_on_refresh(adapted, full_logits, monkeypatch):
    monkeypatch.setattr(linear, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(linear, "choose", lambda *given: 1)
    ensemble = load(adapted, device="cpu")
    adapted.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight.data[0, 1] += 50
    ensemble.refresh()
    torch.testing.assert_close(run(ensemble)[0], full_logits(adapted, TOKENS), atol=1e-3, rtol=1e-4)


def test_a_merged_adapter_is_refused_until_it_is_taken_out(adapted):
    ensemble = load(adapted)
    before = run(ensemble)
    adapted.merge_adapter(["E"])
    with pytest.raises(ValueError, match=r"^base: expected adapters .*, got \['E'\] merged .*call unmerge_adapter"):
        run(ensemble)
    adapted.unmerge_adapter()
    torch.testing.assert_close(run(ensemble), before, atol=1e-3, rtol=1e-4)


def test_other_layers_than_those_that_were_loaded_are_refused(tiny_model, lora_folder):
    base = tiny_model()
    ensemble = load(base, {"E": lora_folder("E")})
    base.lm_head = nn.Linear(32, 61)
    with pytest.raises(ValueError, match=r"^base: expected the weights .*, got others at lm_head.bias; load again$"):
        run(ensemble)


@pytest.mark.parametrize("first_rows", [None, 1])
def test_autocast_of_the_caller_changes_nothing(first_rows, adapted, monkeypatch):
    monkeypatch.setattr(linear, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(linear, "choose", lambda *given: first_rows)
    expected = run(load(adapted, device="cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(load(adapted, device="cpu")), expected)


def test_a_model_that_prefers_no_token_is_refused_for_that(tiny_model, lora_folder):
    base = tiny_model()
    nn.init.zeros_(base.lm_head.weight)
    with pytest.raises(ValueError, match="its logits are the same for every token"):
        load(base, {"E": lora_folder("E")})
