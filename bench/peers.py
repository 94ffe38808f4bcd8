"""The loops that a user would write without mpg, and random models of any size to run them on.

Knows transformers and PEFT as their documentation shows them; nothing of mpg but `share`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mpg.models.reuse import share


@dataclass(frozen=True)
class Shape:
    """A Llama by its sizes. Weights are random, and no token ends a text."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    positions: int = 16_384
    tied: bool = False  # the head is the input embedding


SUM_OF_WEIGHTS = 0.9  # not 1, where the base would cancel out of `direct` and not be run
SMALL = Shape("llama-512x8", 512, 1376, 8, 8, 8, 32_000)
SMOLLM2_135M = Shape("smollm2-135m", 576, 1536, 30, 9, 3, 49_152, 8192, tied=True)
LLAMA_8B = Shape("llama-3-8b", 4096, 14_336, 32, 32, 8, 128_256)
LLAMA_1B = Shape("llama-3.2-1b", 2048, 8192, 16, 32, 8, 128_256)


def equal_weights(names: Sequence[str]) -> dict[str, float]:
    return dict.fromkeys(names, SUM_OF_WEIGHTS / len(names))


def random_llama(shape: Shape, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama of this shape with transformers' initial weights, but a head whose logits have standard deviation 2."""
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=None,
        dtype=dtype,
    )
    with torch.device(device):
        model: Any = LlamaForCausalLM(config).to(dtype)  # type: ignore[arg-type]  # its annotation lost the arguments
        torch.nn.init.normal_(model.lm_head.weight, std=2 / shape.hidden**0.5)
    return model.eval()


def add_adapters(model: PreTrainedModel, count: int, kl: float | None, modules: str | Sequence[str]) -> PeftModel:
    """LoRA adapters "a0", "a1", ... (r = 8) of random weights on these modules, `kl` nats a token from the base.

    All take the one scale that gives the first of them this mean KL(adapter || base) on random tokens, by bisection;
    with None they stay as PEFT draws them.
    """
    config = LoraConfig(
        r=8,
        target_modules=modules if isinstance(modules, str) else list(modules),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config, adapter_name="a0")
    for index in range(1, count):
        adapted.add_adapter(f"a{index}", config)
    adapted.to(model.dtype).eval()
    if kl is None:
        return adapted
    ups = {name: weight for name, weight in adapted.named_parameters() if ".lora_B." in name}
    own = {name: weight.detach().clone() for name, weight in ups.items()}
    low, high = -12.0, 12.0  # log2 of the scale
    for _ in range(16):
        middle = (low + high) / 2
        for name, weight in ups.items():
            weight.data.copy_(own[name] * 2**middle)
        low, high = (middle, high) if mean_kl(adapted, "a0") < kl else (low, middle)
    return adapted


@torch.no_grad()
def mean_kl(model: PeftModel, name: str) -> float:
    """Mean KL(adapter || base) a token, in nats, over 4 texts of 32 random tokens."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (4, 32), generator=random).to(model.device)
    with model.disable_adapter():
        base = model(tokens).logits.float().log_softmax(-1)
    model.set_adapter(name)
    row = model(tokens).logits.float().log_softmax(-1)
    return float((row.exp() * (row - base)).sum(-1).mean())


@torch.no_grad()
def generate_eagerly(model: Any, prompts: Tensor, new_tokens: int, cache_implementation: str | None = None) -> Tensor:
    """transformers' `generate` of one model, sampling. out: (B, new_tokens) int64

    cache_implementation: "static" lets transformers compile the forward on a GPU
    """
    tokens: Tensor = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        cache_implementation=cache_implementation,
    )
    return tokens[:, prompts.shape[1] :]


@torch.no_grad()
def run_adapters_in_turn(
    model: PeftModel, names: Sequence[str], prompts: Tensor, weights: Sequence[float], new_tokens: int, greedy: bool
) -> tuple[Tensor, Tensor]:
    """One forward of the base and of every adapter a token, each with its cache; combined as `geometric` has it.

    out: tokens (B, new_tokens) int64; log pi_i - log base of each under every adapter (N, B, new_tokens)
    """
    caches = [DynamicCache() for _ in range(1 + len(names))]
    fed, tokens, ratios = prompts, [], []
    for _ in range(new_tokens):
        with model.disable_adapter():
            rows = [model(fed, past_key_values=caches[0], use_cache=True, logits_to_keep=1).logits]
        for name, cache in zip(names, caches[1:], strict=True):
            model.set_adapter(name)
            rows.append(model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits)
        fed, ratio = _combine(torch.cat(rows, 1).movedim(1, 0), weights, greedy)
        tokens.append(fed)
        ratios.append(ratio)
    return torch.cat(tokens, 1), torch.stack(ratios, -1)


@torch.no_grad()
def run_adapter_names(
    model: PeftModel, names: Sequence[str], prompts: Tensor, weights: Sequence[float], new_tokens: int, greedy: bool
) -> tuple[Tensor, Tensor]:
    """The same in one forward a token of a batch of mixed adapters, PEFT's `adapter_names`. out: as above"""
    count = 1 + len(names)
    adapter_names = [name for name in ("__base__", *names) for _ in range(len(prompts))]
    cache, fed, tokens, ratios = DynamicCache(), prompts, [], []
    for _ in range(new_tokens):
        output = model(
            fed.repeat(count, 1), past_key_values=cache, use_cache=True, logits_to_keep=1, adapter_names=adapter_names
        )
        fed, ratio = _combine(output.logits[:, 0].unflatten(0, (count, len(prompts))), weights, greedy)
        tokens.append(fed)
        ratios.append(ratio)
    return torch.cat(tokens, 1), torch.stack(ratios, -1)


def _combine(logits: Tensor, weights: Sequence[float], greedy: bool) -> tuple[Tensor, Tensor]:
    """logits (1 + N, B, V), the base's first. out: tokens (B, 1), their log-ratios (N, B)"""
    base, *attributes = logits.float().log_softmax(-1)
    row = base + sum(w * (attribute - base) for w, attribute in zip(weights, attributes, strict=True))
    token = row.argmax(-1, keepdim=True) if greedy else torch.multinomial(row.softmax(-1), 1)
    return token, torch.stack([(attribute - base).gather(1, token)[:, 0] for attribute in attributes])


def plain(model: PeftModel) -> PreTrainedModel:
    """The base under a PeftModel, without PEFT's layers, over the same weights."""
    return share("base", model)


def num_bytes(model: PreTrainedModel) -> int:
    """Weights that one forward reads: all but the input embedding."""
    embedding = model.get_input_embeddings().weight
    read = {id(weight): weight for weight in model.parameters() if weight is not embedding}
    return sum(weight.numel() * weight.element_size() for weight in read.values())
