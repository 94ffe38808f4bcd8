"""The role "merged": adapters added up with weights of every row's own, against models whose weights are merged."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ensembles import load
from mpg.models import runner
from mpg.models.ensemble import Cost

PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10, 11]]
SHARES = {"E": [0.7, 1.0, -0.5], "T": [0.3, 0.0, 2.0], "J": [0.0, 0.0, 0.25]}  # per row
ADAPTERS = {  # different ranks and layers, so that some factors are padding
    "llama": {
        "E": dict(target_modules=["q_proj", "v_proj"], r=4),
        "T": dict(target_modules=["v_proj", "down_proj", "lm_head"], r=2, lora_alpha=3),
        "J": dict(target_modules=["q_proj"], r=3, use_rslora=True),
    },
    "gpt2": {
        "E": dict(target_modules=["c_attn"], fan_in_fan_out=True, r=4),
        "T": dict(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, r=2),
        "J": dict(target_modules=["c_proj"], fan_in_fan_out=True, r=3),
    },
}


@pytest.fixture
def peft_model(tiny_model):
    def make(model_type: str = "llama") -> PeftModel:
        model = get_peft_model(tiny_model(model_type), _config("E", model_type), adapter_name="E")
        for name in ("T", "J"):
            model.add_adapter(name, _config(name, model_type))
        return model.eval()

    return make


def _config(name: str, model_type: str) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **ADAPTERS[model_type][name])


def _merge(ensemble):
    return ensemble.merge(list(SHARES), torch.tensor(list(SHARES.values())).T)


def _continue(ensemble, roles, draft):
    """Logits of (roles, rows, tokens) after each prompt's last token and each of `draft`."""
    session = ensemble.open(PROMPTS, roles, 16)
    tokens = torch.cat([torch.tensor([[prompt[-1]] for prompt in PROMPTS]), draft], 1)
    start = torch.tensor([len(prompt) - 1 for prompt in PROMPTS])
    return session.forward(roles, tokens, start, kv_length=16), session


@pytest.mark.parametrize("own_tokens", [0, 3 * 9, 100])  # all batched, the fed ones alone, prompts too
@pytest.mark.parametrize("model_type", ADAPTERS)
def test_every_row_runs_the_model_with_its_own_weights_merged(
    model_type, own_tokens, peft_model, full_logits, monkeypatch
):
    monkeypatch.setattr(runner, "OWN_TOKENS", own_tokens)
    model, draft = peft_model(model_type), torch.randint(61, (3, 2))
    (logits,), _ = _continue(_merge(load(model, device="cpu")), ["merged"], draft)
    for row, (prompt, tail) in enumerate(zip(PROMPTS, draft.tolist(), strict=True)):
        merged = _with_merged_weights(model, {name: shares[row] for name, shares in SHARES.items()})
        expected = full_logits(merged, prompt + tail)[len(prompt) - 1 :]
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-5)


def test_merged_equals_pefts_own_combination(peft_model, full_logits):
    model, draft = peft_model(), torch.randint(61, (3, 3))
    (logits,), _ = _continue(_merge(load(model, device="cpu")), ["merged"], draft)
    model.add_weighted_adapter(["E", "T"], [0.7, 0.3], "sum", combination_type="cat")
    expected = full_logits(model, PROMPTS[0] + draft[0].tolist(), "sum")[len(PROMPTS[0]) - 1 :]
    torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=1e-5)


def test_merged_runs_beside_the_others_as_one_more_call_on_a_cache_of_its_own(peft_model):
    ensemble, draft = load(peft_model(), device="cpu"), torch.randint(61, (3, 3))
    merged = _merge(ensemble)
    together, _ = _continue(merged, ["merged", "E", "base"], draft)
    assert merged.cost({(("merged", "E", "base"), 1): 1}, ("merged", "E", "base")) == Cost(3, 2, 3)
    alone, _ = _continue(merged, ["merged"], draft)
    assert merged.cost({(("merged",), 1): 1}, ("merged",)) == Cost(1, 1, 1)
    others, _ = _continue(ensemble, ["E", "base"], draft)
    torch.testing.assert_close(together[:1], alone)
    torch.testing.assert_close(together[1:], others)


def test_one_adapter_of_weight_one_is_that_adapter(peft_model):
    ensemble, draft = load(peft_model(), device="cpu"), torch.randint(61, (3, 3))
    only = ensemble.merge(["T", "E"], torch.tensor([1.0, 0.0]))
    assert not only.is_same("merged", "T")
    logits, _ = _continue(only, ["merged", "T"], draft)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)


def test_merged_rows_keep_the_models_dtype(peft_model):
    ensemble = _merge(load(peft_model(), dtype="bfloat16", device="cpu"))
    logits, _ = _continue(ensemble, ["merged"], torch.randint(61, (3, 1)))
    assert logits.dtype == torch.bfloat16


def test_roles_can_be_given_to_other_models_and_leave_the_first_ensemble_alone(peft_model):
    ensemble, draft = load(peft_model(), device="cpu"), torch.randint(61, (3, 2))
    twin = ensemble.with_roles(base="T", draft="T")
    assert twin.is_same("base", "T")
    assert not twin.is_same("base", "anchor")
    assert ensemble.is_same("base", "anchor")
    (base, anchor), _ = _continue(twin, ["base", "anchor"], draft)
    expected, _ = _continue(ensemble, ["T", "base"], draft)
    torch.testing.assert_close(torch.stack([base, anchor]), expected)
    soup = _merge(ensemble).with_roles(base="merged")
    assert soup.is_same("base", "merged")
    assert soup.describe()["base"]["source"].endswith("with the sum of E, T, J")
    assert soup.describe()["base"]["adapter"] is None


def test_attributes_that_are_no_adapters_of_one_model_are_refused(peft_model, tiny_model):
    model = peft_model()
    ensemble = load(model, {"E": "E", "full": tiny_model()}, device="cpu")
    with pytest.raises(ValueError, match=r"'merged'.*'soups'.*expected .*LoRA adapters of one model, 'full' is"):
        ensemble.merge(["E", "full"], torch.ones(3, 2))
    with pytest.raises(ValueError, match="got none"):
        ensemble.merge([], torch.ones(3, 0))


def _with_merged_weights(model: PeftModel, shares: dict[str, float]):
    """A plain model whose weights are W + sum_i a_i (B_i A_i) scaling_i, written into the full matrices."""
    merged = copy.deepcopy(model.get_base_model())
    for name, layer in list(merged.named_modules()):
        if hasattr(layer, "get_delta_weight"):
            plain = layer.get_base_layer()
            with torch.no_grad():
                for adapter in layer.lora_A:
                    plain.weight += shares[adapter] * layer.get_delta_weight(adapter)
            merged.set_submodule(name, plain)
    return merged
