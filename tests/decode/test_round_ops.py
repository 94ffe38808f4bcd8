"""How many ops a round takes beside the models' forwards: on a GPU each is a launch, and they are what is not fused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from ensembles import load
from mpg.decode import SAMPLERS
from mpg.decode.batch import Batch
from mpg.decode.rng import Decisions
from mpg.models.runner import ModelRunner
from mpg.options import Options

MOST_OPS = [  # aten's and mpg's, at batch 1 and k = 4
    ({"sampler": "direct", "target": "geometric"}, 30),
    ({"sampler": "exact", "target": "geometric"}, 81),
    ({"sampler": "exact", "target": "geometric", "verify": "token"}, 91),
    ({"sampler": "exact", "target": "geometric", "draft": "lookup"}, 110),
    ({"sampler": "scr"}, 105),
    ({"sampler": "token-rs"}, 69),
    ({"sampler": "seq-rs"}, 71),
]


class CountOps(TorchDispatchMode):
    """Counts what is run but for views, and but for what `paused` runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.is_paused = False

    def paused(self, run: Any) -> Any:
        def without_counting(*arguments: Any, **options: Any) -> Any:
            self.is_paused = True
            try:
                return run(*arguments, **options)
            finally:
                self.is_paused = False

        return without_counting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
        if not is_view and not self.is_paused:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def models():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=50, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    lora = LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora, adapter_name="E")
    model.add_adapter("T", lora)
    return load(model, device="cpu")


@torch.no_grad()
def ops_of_a_round(models, options: Options, monkeypatch) -> Counter[str]:
    batch = Batch([[1, 2, 3]], [40], torch.ones(1, 2), torch.tensor([0]), [49])
    sampler = SAMPLERS[options.sampler](models, ("E", "T"), options)
    session = models.open([[1, 2, 3]], sampler.roles, batch.capacity)
    sampler.start(session, batch, Decisions(batch.seeds, batch.rounds))
    sampler.round()  # the first may prepare what the others find
    batch.snapshot().read()
    ops = CountOps()
    monkeypatch.setattr(ModelRunner, "forward", ops.paused(ModelRunner.forward))
    with ops:
        sampler.round()
        batch.snapshot()
    return ops.counts


@pytest.mark.parametrize(("options", "most"), MOST_OPS)
def test_a_round_takes_no_more_ops_than_it_must(options, most, models, monkeypatch):
    counts = ops_of_a_round(models, Options(**options), monkeypatch)
    print(f"{options}: {counts.total()} ops, {counts}")
    assert counts.total() <= most
    assert counts["mpg.draw_uniforms.default"]  # the round did run, and under the counter
