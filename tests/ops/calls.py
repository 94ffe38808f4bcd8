"""A valid call of every op, its values drawn from a number and the seed of the run. Knows no result."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from seeds import seeded

CONSTANTS = [math.log(2), math.log(1.2), 0.1]  # of the bound: log M_0, log gamma, tau


def calls(
    device: str | torch.device = "cpu", seed: int = 0, *, B: int = 2, K: int = 3, N: int = 2, V: int = 7, W: int = 4
) -> dict[str, dict[str, Any]]:
    """Arguments by name, by op. Attributes are near their anchor, so that much of what is drafted is accepted."""
    generator = seeded(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator).to(device)

    uniforms = torch.rand(B, K, dtype=torch.float64, generator=generator).to(device)
    one_uniform = torch.rand(B, dtype=torch.float64, generator=generator).to(device)
    tokens, lengths = integers(V, B, K), integers(K + 1, B)
    active = integers(4, B) > 0
    weights = normal(B, N).abs()
    log_bound = normal(B) / 2
    anchor = normal(B, K, V)
    chunk = {
        "anchor_logits": anchor,
        "attribute_logits": anchor + normal(N, B, K, V) / 5,
        "tokens": tokens,
        "lengths": lengths,
        "weights": weights,
        "uniforms": uniforms,
    }
    # written in place: window, num_scores, num_rounds, log_bound, frozen
    bound = [normal(B, W) / 5, integers(2 * W, B), integers(2 * W, B), log_bound, integers(2, B) > 0]
    block = {
        "target_probs": normal(B, K + 1, V).softmax(-1),
        "draft_probs": normal(B, K, V).softmax(-1),
        "tokens": tokens,
        "lengths": lengths,
    }
    return {
        "gather_logprobs": {"logits": anchor, "tokens": tokens, "temperature": 0.5},
        "score_prefixes": {
            "attribute_logprobs": -normal(N, B, K).abs(),
            "anchor_logprobs": -normal(B, K).abs(),
            "weights": weights,
            "score": "arithmetic",
        },
        "accept_prefixes": {
            "scores": normal(B, K),
            "log_bound": log_bound,
            "uniforms": uniforms,
            "lengths": lengths,
        },
        "update_bound_": {"bound": bound, "scores": normal(B, 2), "active": active, "constants": CONSTANTS},
        "verify_chunks": {**chunk, "bound": bound, "score": "geometric", "constants": CONSTANTS},
        "draw_fallback": {
            "anchor_logits": anchor[:, 0],
            "attribute_logits": chunk["attribute_logits"][:, :, 0],
            "draft_probs": block["draft_probs"][:, 0],
            "weights": weights,
            "log_bound": log_bound,
            "uniforms": one_uniform,
            "active": active,
            "score": "arithmetic",
        },
        "draw_uniforms": {"seeds": integers(2**40, B), "rounds": lengths, "purpose": 1, "count": 5, "first": 3},
        "combine_rows": {
            "attribute_logits": chunk["attribute_logits"],
            "weights": normal(B, K, N),
            "base_logits": normal(B, K, V),
            "anchor_logits": anchor,
            "target": "geometric",
        },
        "warp_rows": {"log_rows": normal(B, V), "temperature": 0.7, "top_k": 4, "top_p": 0.9, "min_p": 0.1},
        "draw_tokens": {"probs": normal(B, V).abs(), "uniforms": one_uniform},
        "verify_block": {**block, "uniforms": uniforms},
        "draw_residual": {
            **block,
            "accepted": lengths // 2,
            "carry": normal(B).abs().clamp(max=1),
            "uniforms": one_uniform,
        },
        "count_usable_": {
            "rows": [active, integers(5, B) == 0],
            "lengths": lengths,
            "limits": lengths + integers(5, B),
            "eos_token_ids": integers(V, 2),
            "chunk": tokens,
            "draft_probs": block["draft_probs"],
            "most": integers(K + 1, B),
        },
        "commit_block_": {
            "rows": [
                integers(V, B, 9),
                integers(6, B) + 1,
                integers(V, B),
                integers(9, B),
                active,
                integers(5, B) == 0,
                integers(5, B) == 0,
            ],
            "limits": integers(4, B) + 6,
            "eos_token_ids": integers(V, 2),
            "chunk": tokens,
            "accepted": integers(K + 2, B) - 1,
            "token": integers(V + 1, B) - 1,
            "log_totals": normal(B, K + 1),
        },
        "lora_shrink": {"x": normal(B, K, V), "down": normal(3, N, V), "groups": integers(3, B).sort()[0]},
        "lora_expand_": {
            "out": normal(B, K, V),
            "hidden": normal(B, K, N),
            "up": normal(3, N, V),
            "groups": integers(3, B).sort()[0],
        },
        "attend_rows": {
            "query": normal(B, 4, 3, 7),
            "key": normal(B, 2, 5, 7),
            "value": normal(B, 2, 5, 6),
            "positions": integers(5, B, 3),
        },
        "linear_panels": {
            "x": normal(B, K, V),
            "panels": normal(2, V, 16),
            "bias": normal(21),
            "down": normal(3, N, V),
            "up": normal(3, N, 21),
            "groups": integers(3, B).sort()[0],
            "out_features": 21,
        },
        "rms_norm": {"x": normal(B, K, V), "weight": normal(V), "eps": 1e-6, "offset": 1.0, "rounds_first": True},
    }


OPS = list(calls("meta"))
ON_CPU_ALONE = ("attend_rows", "linear_panels", "rms_norm")


def clone(call: dict[str, Any]) -> dict[str, Any]:
    return tree_map_only(Tensor, Tensor.clone, call)


def outputs_of(result: Any) -> list[Tensor]:
    """What an op returned, as a list: of nothing for an op that works in place alone."""
    return [] if result is None else list(result) if isinstance(result, tuple) else [result]


def written_by(call: dict[str, Any]) -> list[Tensor]:
    """The arguments that an op writes in place."""
    return [*call.get("bound", []), *call.get("rows", []), *([call["out"]] if "out" in call else [])]
