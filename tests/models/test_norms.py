"""Which modules of a model compute by `mpg_ext.rms_norm`, and that they go on computing what they did."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import mpg_ext
from architectures import ARCHITECTURES
from ensembles import load
from mpg.models.norms import fuse_norms

NAMES = [architecture.model_type for architecture in ARCHITECTURES]


def _fused(model):
    return {name: module for name, module in model.named_modules() if "forward" in vars(module)}


@pytest.fixture
def calls(monkeypatch):
    """Grows by the options of every call of the op."""
    made, norm = [], mpg_ext.rms_norm
    monkeypatch.setattr(mpg_ext, "rms_norm", lambda x, weight, **given: made.append(given) or norm(x, weight, **given))
    return made


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", NAMES)
def test_rms_norms_of_every_architecture_are_fused_and_equal_their_own(architecture, dtype, tiny_model, calls):
    model = tiny_model(architecture).to(dtype)
    norms = {name for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")}
    fuse_norms(model)
    fused = _fused(model)
    assert fused.keys() == {name for name in norms if "weight" in model.get_submodule(name)._parameters}
    calls.clear()
    for module in fused.values():
        weight = module.weight.normal_()  # as it is when the module is called
        x = torch.randn(2, 3, len(weight), dtype=dtype) * torch.tensor([0.001, 3, 50])[:, None].to(dtype)
        own, out = type(module).forward(module, x), module(x)
        is_rounding = (out.double() - own).abs() <= (torch.finfo(dtype).eps * 2 + 1e-6) * own.double().abs()
        assert is_rounding.all()
        assert (out == own).float().mean() > (0.1 if dtype == torch.float32 else 0.95)  # a sum's last digit moves few
    assert len(calls) == len(fused)


class Centred(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class OfAnotherEps(LlamaRMSNorm):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 2 * self.variance_epsilon)


class OfAllTokens(LlamaRMSNorm):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean((-2, -1), keepdim=True) + self.variance_epsilon)


class Gated(LlamaRMSNorm):
    def forward(self, x, gate):
        return super().forward(x * gate)


class InFloat64(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x).double()


@pytest.mark.parametrize("kind", [Centred, OfAnotherEps, OfAllTokens, Gated, InFloat64, nn.LayerNorm])
def test_what_is_no_such_norm_stays(kind):
    assert not _fused_of(kind(64))


def _fused_of(*modules):
    model = nn.Sequential(*modules)
    fuse_norms(model)
    return _fused(model)


def test_a_norm_that_someone_listens_to_or_of_another_device_or_type_stays():
    hooked = LlamaRMSNorm(64)
    hooked.register_forward_hook(lambda *given: pytest.fail("was run"))
    assert _fused_of(LlamaRMSNorm(64), nn.RMSNorm(64, eps=1e-5)).keys() == {"0", "1"}
    assert not _fused_of(hooked, LlamaRMSNorm(64).to("meta"), LlamaRMSNorm(64).double())


def test_what_has_another_type_than_the_weight_is_computed_as_before(calls):
    norm, x = LlamaRMSNorm(64).bfloat16(), torch.randn(3, 64)
    own = norm(x)
    assert _fused_of(norm)
    calls.clear()
    assert torch.equal(norm(x), own)
    assert not calls


def test_a_loaded_model_computes_by_the_op_and_follows_the_callers_which_stays_as_it_was(
    tiny_model, full_logits, calls
):
    model, tokens = tiny_model(), [3, 4, 5, 6]
    ensemble = load(model, {"E": copy.deepcopy(model)}, device="cpu")
    for factor in (1, 3):
        model.model.layers[1].input_layernorm.weight.data *= factor
        model.model.norm.weight.data = model.model.norm.weight.data * factor
        ensemble.refresh()
        session = ensemble.open([tokens[:-1]], ["base"], 8)
        calls.clear()
        logits = session.forward(["base"], torch.tensor([tokens[-2:]]), torch.tensor([2]), kv_length=4)
        assert len(calls) == 2 * 2 + 1
        torch.testing.assert_close(logits[0, 0], full_logits(model, tokens)[2:], atol=1e-3, rtol=1e-4)
    assert not _fused(model)


def test_compiled_layers_keep_their_norms_as_they_are(tiny_model):
    ensemble = load(tiny_model(), {"E": tiny_model()}, device="cpu", compile=True)
    assert _fused(ensemble._models[0].model).keys() == {"model.layers.0", "model.layers.1"}


def test_a_copy_of_a_fused_model_reads_its_own_weights(tiny_model):
    model = tiny_model()
    fuse_norms(model)
    twin = copy.deepcopy(model)
    assert len(_fused(twin)) == 5
    assert all(module.forward.args[0] is module for module in _fused(twin).values())
