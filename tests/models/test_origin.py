"""A model that goes on changing after it was loaded, and callers whose types are not the model's."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

import mpg
from ensembles import load
from longer import thinned
from mpg.models import linear
from mpg.models.linear import EVERY

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
@pytest.mark.parametrize(
    ("rows", "dtype"),
    thinned(
        [
            (None, "float64"),
            (None, None),
            (range(3, 8), None),
            (range(3, 8), "float64"),
            (EVERY, "float64"),
            (EVERY, None),
        ]
    ),
)
def test_what_is_changed_after_loading_is_followed(change, rows, dtype, adapted, full_logits, monkeypatch):
    monkeypatch.setattr(linear, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(linear, "choose", lambda *given: rows)
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
    monkeypatch.setattr(linear, "choose", lambda *given: EVERY)
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


def replace_adapter(model, **settings):
    model.delete_adapter("E")
    target_modules = settings.pop("target_modules", "all-linear")
    model.add_adapter("E", LoraConfig(task_type="CAUSAL_LM", target_modules=target_modules, **settings))


GONE = r"attributes\['E'\]: expected the adapter 'E' in memory, got a model without it"
OTHER = "expected the modules and weights that it was loaded with, got"
REFUSED = {
    "unloaded": (lambda model: model.unload(), GONE),
    "merged for good": (lambda model: model.merge_and_unload(), GONE),
    "deleted": (lambda model: model.delete_adapter("E"), GONE),
    "of another rank": (lambda model: replace_adapter(model, r=4), rf"attributes\['E'\]: {OTHER} others at model"),
    "of fewer layers": (
        lambda model: replace_adapter(model, target_modules=["q_proj"]),
        rf"attributes\['E'\]: {OTHER} others at model",
    ),
    "of another vocabulary": (
        lambda model: model.get_base_model().resize_token_embeddings(70, mean_resizing=False),
        f"base: {OTHER} others at lm_head",
    ),
    "with another activation": (
        lambda model: setattr(model.get_base_model().model.layers[0].mlp, "act_fn", nn.GELU()),
        f"base: {OTHER} others at model.layers.0.mlp.act_fn",
    ),
    "without weights": (lambda model: model.to("meta"), rf"base: {OTHER} none \(on the meta device\)"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_must_be_loaded_again_is_refused_at_every_call(kind, adapted):
    model, tokens = mpg.load(adapted, device="cpu"), []
    change, message = REFUSED[kind]
    change(adapted)
    for _ in range(3):
        with pytest.raises(ValueError, match=f"^{message}.*; load again$"):
            model.generate([3, 4], weights={"E": 1.0}, max_new_tokens=2, on_token=tokens.append)
    assert not tokens


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: list(model.generate([[3, 4]] * 2, weights={"E": 1.0}, max_new_tokens=2)),
        lambda model: model.generate([3, 4], weights={"E": 1.0}, max_new_tokens=2, sampler="auto"),
        lambda model: model.generate([3, 4], weights={"E": 1.0}, max_new_tokens=2, draft="merged", sampler="exact"),
        lambda model: model.generate([3, 4], target="base", max_new_tokens=2),
    ],
    ids=["many", "auto", "merged draft", "base"],
)
def test_every_way_to_ask_refuses_a_model_that_must_be_loaded_again(ask, adapted):
    model = mpg.load(adapted, device="cpu")
    ask(model)
    adapted.unload()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^{GONE}"):
            ask(model)


def test_a_peft_model_whose_adapters_were_unloaded_has_none_to_load(adapted):
    adapted.unload()
    with pytest.raises(
        ValueError, match=r"^attributes\['E'\]: expected layers of the adapter 'E' .*, got none: it was"
    ):
        load(adapted, device="cpu")


def test_a_model_without_weights_is_not_moved_to_where_it_would_need_some(tiny_model):
    with pytest.raises(ValueError, match=r"^base: expected a model with weights, got one on the meta device$"):
        load(tiny_model().to("meta"), {}, device="cpu")


def test_other_layers_than_those_that_were_loaded_are_refused(tiny_model, lora_folder):
    base = tiny_model()
    ensemble = load(base, {"E": lora_folder("E")})
    base.lm_head = nn.Linear(32, 61)
    with pytest.raises(
        ValueError, match=r"^base: expected the modules and weights .*, got others at lm_head.bias; load again$"
    ):
        run(ensemble)


@pytest.mark.parametrize("rows", [None, EVERY])
def test_autocast_of_the_caller_changes_nothing(rows, adapted, monkeypatch):
    monkeypatch.setattr(linear, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(linear, "choose", lambda *given: rows)
    expected = run(load(adapted, device="cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(load(adapted, device="cpu")), expected)


def test_a_model_that_prefers_no_token_is_refused_for_that(tiny_model, lora_folder):
    base = tiny_model()
    nn.init.zeros_(base.lm_head.weight)
    with pytest.raises(ValueError, match="its logits are the same for every token"):
        load(base, {"E": lora_folder("E")})
