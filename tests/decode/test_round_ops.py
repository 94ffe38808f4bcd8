"""How many ops a round takes beside the models' forwards: on a GPU each is a launch, and they are what is not fused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from ensembles import load
from longer import thinned
from mpg.context import Context
from mpg.decode import SAMPLERS
from mpg.decode.batch import Batch
from mpg.decode.request import Request
from mpg.decode.rng import Decisions
from mpg.decode.run import Scheduler
from mpg.models.runner import ModelRunner
from mpg.options import Options

MOST = [  # ops of aten and of mpg, at batch 1 and k = 4, and the launches that these are on a GPU
    ({"sampler": "direct", "target": "geometric"}, 5, 9),
    ({"sampler": "exact", "target": "geometric"}, 26, 35),
    ({"sampler": "exact", "target": "geometric", "verify": "token"}, 36, 44),
    ({"sampler": "exact", "target": "geometric", "draft": "lookup"}, 65, 70),
    ({"sampler": "scr"}, 52, 88),
    ({"sampler": "token-rs"}, 51, 59),
    ({"sampler": "seq-rs"}, 54, 63),
]
LAUNCHES = {  # kernels of an op, where it is not one (csrc/kernels)
    "mpg.gather_logprobs.default": 2,
    "mpg.verify_chunks.default": 2,
    "mpg.draw_fallback.default": 4,
    "mpg.combine_rows.default": 4,
    "mpg.draw_tokens.default": 2,
    "mpg.verify_block.default": 2,
    "mpg.draw_residual.default": 2,
}


class CountOps(TorchDispatchMode):
    """Counts what is run but for views, and but for what `paused` runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.num_launches = 0
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
            self.num_launches += _launches(str(func), kwargs or {})
        return func(*args, **(kwargs or {}))


def _launches(name: str, options: dict[str, Any]) -> int:
    if name == "mpg.warp_rows.default":  # three, and five for each cut
        return 3 + 5 * (options.get("top_k", 0) > 0) + 5 * (options.get("top_p", 1) < 1)
    return LAUNCHES.get(name, 1)


@pytest.fixture(scope="module")
def models():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=50, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    lora = LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(config), lora, adapter_name="E")
        model.add_adapter("T", lora)
    return load(model, device="meta")


@torch.no_grad()
def ops_of_a_round(models, options: Options, monkeypatch) -> CountOps:
    batch = Batch([[1, 2, 3]], [40], torch.ones(1, 2, device="meta"), [0], [49])
    sampler = SAMPLERS[options.sampler](models, ("E", "T"), options)
    session = models.open([[1, 2, 3]], sampler.roles, batch.capacity)
    sampler.start(session, batch, Decisions(batch.seeds, batch.rounds))
    for _ in range(2):  # the first ones prepare what the others find
        sampler.round()
    ops = CountOps()
    monkeypatch.setattr(ModelRunner, "forward", ops.paused(ModelRunner.forward))
    with ops:
        sampler.round()
    return ops


@pytest.mark.parametrize(("options", "most_ops", "most_launches"), MOST)
def test_a_round_takes_no_more_than_it_must(options, most_ops, most_launches, models, monkeypatch):
    ops = ops_of_a_round(models, Options(**options), monkeypatch)
    print(f"{options}: {ops.counts.total()} ops, {ops.num_launches} launches, {ops.counts}")
    assert ops.counts.total() <= most_ops
    assert ops.num_launches <= most_launches
    assert ops.counts["mpg.draw_uniforms.default"]  # the round did run, and under the counter


class CountUploads(TorchDispatchMode):
    """Notes what is copied from the host to `meta`: whether the host goes on meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.are_free: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_copy = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if is_copy and out.is_meta and any(isinstance(value, Tensor) and value.is_cpu for value in args):
            self.are_free.append(bool((kwargs or {}).get("non_blocking") or args[2:] == (True,)))
        return out


def request(weights: dict[str, float], prompt: Sequence[int] = (1, 2, 3, 4), **more: Any) -> Request:
    names = ("E", "T", "C") if "C" in weights else ("E", "T")
    return Request(list(prompt), tuple(weights.get(name, 0.0) for name in names), weights, 8, 0, **more)


BOTH = {"E": 1.0, "T": 1.0}
GEOMETRIC = {"target": "geometric"}
WARM, CUT, WIDE, SHARP = (
    Options(sampler="exact", target="geometric", **own)
    for own in ({"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5, "temperature": 2.0}, {"temperature": 0})
)
ALIKE = [request(BOTH)] * 4
UNEVEN = [request({"E": 1.0}), request(BOTH, [5, 6]), request({"T": 0.5}, [7]), request({"T": -1.0, "E": 0.5})]
UNLIKE = [replace(one, options=own) for one, own in zip(UNEVEN, (WARM, CUT, WIDE, SHARP), strict=True)]
MIXED = {
    "one": (GEOMETRIC, ALIKE[:1]),
    "alike": (GEOMETRIC, ALIKE),
    "of other attributes and lengths": (GEOMETRIC, UNEVEN),
    "cut in other ways": (GEOMETRIC, UNLIKE),
    "merged": (GEOMETRIC | {"draft": "merged"}, UNEVEN),
    "merged by shares": ({"target": "arithmetic", "draft": "merged"}, UNEVEN),
    "direct": (GEOMETRIC | {"sampler": "direct"}, [replace(one, options=None) for one in UNLIKE]),
    "scr": ({"sampler": "scr"}, UNEVEN),
    "beside a context": (GEOMETRIC, [*UNEVEN[:3], request({"E": 1.0, "C": 1.0}, contexts={"C": [8, 9, 10, 11, 12]})]),
}


@torch.no_grad()
@pytest.mark.parametrize("name", thinned([*MIXED]))
def test_requests_come_and_go_with_one_upload_whatever_their_number_and_the_layers(name, models, monkeypatch):
    """Their numbers, weights, cuts and prompts, which rows read what others do, and where rows are that move; the host
    waits for none. The round that follows, which finds all of that on the device, is watched too."""
    own, requests = MIXED[name]
    make = torch.tensor  # which copies where no mode sees it
    monkeypatch.setattr(torch, "tensor", lambda values, device="cpu", **kwargs: make(values, **kwargs).to(device))
    options = Options(**{"sampler": "exact"} | own)
    scheduler = Scheduler(
        models, options, (49,), num_rows=8, capacity=40, attributes=("E", "T"), most=3, rounds_ahead=0
    )

    def uploads() -> list[bool]:
        with CountUploads() as found:
            scheduler._admit()
            scheduler.rounds.run()
        return found.are_free

    for _ in range(2):  # the second ones beside the first
        for one in requests:
            contexts = {name: Context(prompt=[5], source="base") for name in one.contexts}
            scheduler.add(one, contexts=contexts)
        assert uploads() == [True]
    for more in ([], requests[:1]):  # one goes, and the last row moves there; one goes and another comes
        with CountUploads() as stopped:
            scheduler.cancel(scheduler.rows[0])
        assert not stopped.are_free
        for one in more:
            scheduler.add(one)
        assert uploads() == [True]


@torch.no_grad()
def test_which_requests_have_processors_is_in_their_one_upload(models, monkeypatch):
    make = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda values, device="cpu", **kwargs: make(values, **kwargs).to(device))
    options = Options(sampler="exact", target="geometric")
    scheduler = Scheduler(models, options, (49,), num_rows=8, capacity=40, attributes=("E", "T"), rounds_ahead=0)
    for one in UNEVEN:
        scheduler.add(replace(one, processor=lambda ids, scores: scores))
    with CountUploads() as found:
        scheduler._admit()
        assert scheduler.batch.has_processor is not None and scheduler.batch.has_processor.is_meta
    assert found.are_free == [True]
