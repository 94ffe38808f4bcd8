"""Tiny random models and adapters, and the slow, obviously right way to run them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from architectures import ARCHITECTURES
from mpg.models import timings

SETTINGS = {architecture.model_type: architecture.settings for architecture in ARCHITECTURES}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def timings_file(monkeypatch, tmp_path_factory):
    """Where times of products are kept: by no test for another one."""
    path = tmp_path_factory.mktemp("timings") / "products.json"
    monkeypatch.setattr(timings, "file", lambda: path)
    return path


@pytest.fixture(autouse=True)
def _no_model_cards(monkeypatch):
    """PEFT fills a page for every adapter that it saves, which takes four times as long as the adapter."""
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda self, folder: None)


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """tiny_model(model_type, **settings) makes a random float32 model whose logits depend clearly on every token."""

    def make(model_type: str = "llama", **settings: object) -> PreTrainedModel:
        config = AutoConfig.for_model(model_type, **{**SETTINGS[model_type], **settings})
        # Eager attention is the reference: transformers 5.17 drops Gemma 2's soft cap in its default one.
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        return model.eval()

    return make


@pytest.fixture
def lora_folder(tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]) -> Callable[..., Path]:
    """lora_folder(name, model_type, **settings of LoraConfig) saves a random adapter as PEFT does."""

    def save(name: str, model_type: str = "llama", *, base: PreTrainedModel | None = None, **settings: object) -> Path:
        base = tiny_model(model_type) if base is None else base
        config = LoraConfig(**{"task_type": "CAUSAL_LM", "init_lora_weights": False, "r": 4, **settings})
        get_peft_model(base, config).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def full_logits() -> Callable[..., Tensor]:
    """full_logits(model, tokens, adapter=None): one row, no cache, the model's own attention: (len(tokens), V)."""

    @torch.no_grad()
    def run(model: PreTrainedModel | PeftModel, tokens: list[int], adapter: str | None = None) -> Tensor:
        ids = torch.tensor([tokens])
        if not isinstance(model, PeftModel):
            return model(ids, use_cache=False).logits[0]
        if adapter is None:
            with model.disable_adapter():
                return model(ids, use_cache=False).logits[0]
        model.set_adapter(adapter)
        return model(ids, use_cache=False).logits[0]

    return run
