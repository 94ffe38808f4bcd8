"""A round never waits for the device: it runs on `meta`, where there is no value to wait for; and it keeps its state in
the tensors that it began with."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ensembles import load
from mpg.decode import SAMPLERS
from mpg.decode.batch import Batch
from mpg.decode.bound import Bound
from mpg.decode.rng import Decisions
from mpg.decode.rows import TargetRows
from mpg.options import Options

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
    return load(model, device="meta")


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(map(str, options.values())))
def test_round_runs_without_a_value(meta_models, options):
    checked = Options(**options)
    weights = torch.ones(3, 2, device="meta")
    seeds = [0, 0, 0]
    prompts = [[1, 2, 3], [4], [5, 6]]
    batch = Batch(prompts, [8, 8, 8], weights, seeds, [0])
    batch.is_traced = checked.trace
    sampler = SAMPLERS[checked.sampler](meta_models, ("E", "T"), checked)
    sampler.start(meta_models.open(prompts, sampler.roles, batch.capacity), batch, Decisions(batch.seeds, batch.rounds))
    state = [dict(_tensors_of(owner)) for owner in (batch, sampler)]
    for _ in range(2):
        sampler.round()
    for owner, before in zip((batch, sampler), state, strict=True):  # as a captured graph needs it
        after = dict(_tensors_of(owner))
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert after[name] is tensor, f"{name} is another tensor after a round"
    assert batch.lengths.device.type == "meta"
    assert batch.lengths.shape == (3,)
    for values in sampler.statistics().values():
        assert values.shape == (3,)


def _tensors_of(owner):
    """What an object remembers from round to round: its tensors, and those of what it is made of."""
    for name, value in vars(owner).items():
        if isinstance(value, torch.Tensor):
            if name != "chunk_weights":  # of one round
                yield name, value
        elif isinstance(value, dict):
            yield from ((f"{name}[{key}]", tensor) for key, tensor in value.items())
        elif isinstance(value, Bound | TargetRows):
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in _tensors_of(value))
