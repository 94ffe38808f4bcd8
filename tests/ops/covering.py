"""The sizes, storage types and layouts that ops are tested at, in cases where every two values of two of them meet.

Knows what an op takes, not what it computes. Pairwise, because all values together would be thousands of cases an op.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from longer import IS_LONG

# Of the logits or rows of a case. Larger in the long form, smaller where a sanitizer watches every access.
MAX_ELEMENTS = int(os.environ.get("MPG_MAX_ELEMENTS", 2**23 if IS_LONG else 2**19))

V = (1, 2, 31, 32, 33, 111, 4096, 32_000, 128_256)
K = (1, 3, 4, 31, 32)
N = (1, 2, 4, 16)
B = (0, 1, 3, 99)
SCORES = ("arithmetic", "geometric")
STORED: dict[str, Sequence[Any]] = {
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "layout": ("contiguous", "strided", "misaligned"),
}
LORA = {  # B rows of K tokens; features that go in or come out
    "features": (1, 7, 8, 100, 2064),
    "rank": (1, 2, 5, 16, 35),
    "K": (1, 3, 8, 9),
    "B": (0, 1, 3, 19),
    **STORED,
}
FACTORS: dict[str, dict[str, Sequence[Any]]] = {
    "gather_logprobs": {"V": V, "K": K, "B": B, **STORED},
    "score_prefixes": {"K": K, "N": N, "B": B, "score": SCORES},
    "accept_prefixes": {"K": K, "B": B},
    "update_bound_": {"K": (*K, 33), "B": B, "W": (1, 2, 5, 20)},
    "verify_chunks": {"V": V, "K": K, "N": N, "B": B, **STORED, "score": SCORES},
    "draw_fallback": {"V": V, "N": N, "B": B, **STORED, "score": SCORES},
    "draw_uniforms": {"K": K, "B": B},
    "combine_rows": {"V": V, "K": (*K, 33), "N": N, "B": B, **STORED, "target": ("mixture", *SCORES)},
    "warp_rows": {
        "V": V,
        "B": B,
        "layout": STORED["layout"],
        "temperature": (0.0, 0.7, 1.0, 3.0),
        "top_k": (0, 5, 10**6),
        "top_p": (1.0, 0.9),
        "min_p": (0.0, 0.05),
    },
    "draw_tokens": {"V": V, "B": B, "layout": STORED["layout"]},
    "verify_block": {"V": V, "K": K, "B": B, "layout": STORED["layout"], "has_draft": (True, False)},
    "draw_residual": {"V": V, "K": K, "B": B, "layout": STORED["layout"], "has_draft": (True, False)},
    "count_usable_": {"K": K, "V": (1, 33, 1000), "B": B, "is_drawn": (True, False), "has_most": (True, False)},
    "commit_block_": {"K": (0, 1, 4, 32, 70), "B": B, "has_token": (True, False), "has_totals": (True, False)},
    "lora_shrink": LORA,
    "lora_expand_": {**LORA, "is_of_all": (False, True), "num_blocks": (1, 3)},
    "attend_rows": {
        "features": (1, 7, 48, 64, 100),
        "keys": (1, 5, 64, 512, 513, 1100),
        "K": (1, 2, 5),
        "groups": (1, 3),
        "scale": ("default", "given"),
        "B": (0, 1, 3, 19),
        **STORED,
    },
    "linear_panels": {
        "features": (1, 7, 192, 1024, 1025, 3000),
        "outputs": (1, 15, 16, 33, 100, 576),
        "B": (0, 1, 2, 3, 4, 5, 8, 9, 19),
        "has_bias": (False, True),
        "layout": STORED["layout"],
    },
    "rms_norm": {
        "features": (1, 7, 16, 192, 576, 1025),
        "B": (0, 1, 2, 8, 19),
        "offset": (0.0, 1.0),
        "rounds_first": (False, True),
        **STORED,
    },
}


def cases_of(op: str) -> pytest.MarkDecorator:
    """Runs a test once for each case of the op; the test takes the factors as its arguments."""
    factors = FACTORS[op]
    cases = covering_array(factors)
    ids = ["-".join(f"{name}={case[name]}".replace("torch.", "") for name in factors) for case in cases]
    return pytest.mark.parametrize(tuple(factors), [tuple(case.values()) for case in cases], ids=ids)


def num_elements(case: Mapping[str, Any]) -> Any:
    """Elements of a case, for numbers or tensors of them. A row is work for a block of threads: at least 256."""
    lengths = case.get("V", case.get("features", 1))
    at_least_256 = lengths.clamp(min=256) if isinstance(lengths, Tensor) else max(lengths, 256)
    num_models = 2 if "has_draft" in case else 1 + case.get("N", 0)
    return at_least_256 * num_models * case.get("K", 1) * case["B"]


def covering_array(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Cases that hold every pair of values that a case of at most MAX_ELEMENTS can hold; always the same ones.

    A case of B = 0 computes nothing, so it counts for the pairs of B alone. Greedy: next comes the case with the most
    pairs that none so far holds, in proportion to its cost.
    """
    places = torch.cartesian_prod(*(torch.arange(len(values)) for values in factors.values())).view(-1, len(factors))
    columns = dict(zip(factors, places.T, strict=True))
    is_number = {name: not isinstance(values[0], (str, torch.dtype)) for name, values in factors.items()}
    sizes = {name: torch.tensor(factors[name])[columns[name]] for name in factors if is_number[name]}
    pairs, num_pairs = [], 1  # number 0 is held by every case that counts for nothing
    for first, second in itertools.combinations(factors, 2):
        pair = num_pairs + columns[first] * len(factors[second]) + columns[second]
        pairs.append(pair.where((sizes["B"] > 0) | ("B" in (first, second)), 0))
        num_pairs += len(factors[first]) * len(factors[second])
    is_admitted = num_elements(sizes) <= MAX_ELEMENTS
    places, held = places[is_admitted], torch.stack(pairs, dim=1)[is_admitted]
    cost = num_elements(sizes)[is_admitted] + 2**22  # of a case whatever its size, so that there are not too many

    is_missing = torch.zeros(num_pairs, dtype=torch.bool)
    is_missing[held.flatten()] = True
    is_missing[0] = False
    cases = []
    while is_missing.any():
        best = int((is_missing[held].sum(1) / cost).argmax())
        is_missing[held[best]] = False
        cases.append({name: factors[name][place] for name, place in zip(factors, places[best].tolist(), strict=True)})
    return cases
