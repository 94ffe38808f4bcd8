"""A round never waits for the device: it runs on `meta`, where there is no value to wait for."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from mpg import ensemble
from mpg.batch import Batch
from mpg.config import Options
from mpg.decode import SAMPLERS
from mpg.rng import KeyedGenerator

OPTIONS = [
    {"sampler": "exact", "target": "geometric", "verify": "token", "adaptive": True},
    {"sampler": "exact", "target": "arithmetic", "mixture_span": 3, "trace": True},
    {"sampler": "exact", "target": "anchored", "draft": "lookup", "top_p": 0.9},
    {"sampler": "scr", "target": "arithmetic", "trace": True},
    {"sampler": "scr", "target": "geometric", "empty": "base"},
    {"sampler": "token-rs", "target": "arithmetic", "trace": True},
    {"sampler": "seq-rs", "target": "geometric", "trace": True},
    {"sampler": "direct", "target": "arithmetic", "trace": True},
    {"sampler": "direct", "target": "geometric", "top_p": 0.9},
    {"sampler": "direct", "target": "geometric", "temperature": 0},
]


@pytest.fixture(scope="module")
def meta_models():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=50, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    with torch.device("meta"):
        lora = LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(LlamaForCausalLM(config), lora, adapter_name="E")
        model.add_adapter("T", lora)
    return ensemble.load(model, device="meta")


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(map(str, options.values())))
def test_round_runs_without_a_value(meta_models, options):
    checked = Options(**options)
    weights = torch.ones(3, 2, device="meta")
    seeds = torch.zeros(3, dtype=torch.int64, device="meta")
    prompts = [[1, 2, 3], [4], [5, 6]]
    batch = Batch(prompts, [8, 8, 8], weights, seeds, [0])
    sampler = SAMPLERS[checked.sampler](meta_models, ("E", "T"), checked)
    sampler.start(meta_models.open(prompts, sampler.roles, batch.capacity), batch, KeyedGenerator(seeds, batch.rounds))
    for _ in range(2):
        sampler.round()
    assert batch.lengths.device.type == "meta"
    assert batch.lengths.shape == (3,)
    for values in sampler.statistics().values():
        assert values.shape == (3,)
