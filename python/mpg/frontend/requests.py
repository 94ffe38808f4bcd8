"""The requests of a call, checked: what each prompt is asked with, and whether there is room for it.

Knows what models say of themselves; runs none.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpg.context import Context
from mpg.decode.request import Request
from mpg.frontend.hf_generate import HFGenerationConfig
from mpg.models.ensemble import ANCHOR, ROLES, Ensemble
from mpg.options import DEFAULT_NEW_TOKENS, Options, check_weights


@dataclass(frozen=True)
class Call:
    """What a call asks for.

    models         with the contexts that it brings
    options        those of its sampler; each request's own are the same
    eos_token_ids  what ends a text
    contexts       that each prompt brings, by name, beside those of the models
    is_many        whether a list is to be returned
    """

    models: Ensemble
    requests: list[Request]
    options: Options
    eos_token_ids: tuple[int, ...]
    contexts: Sequence[Mapping[str, Context]]
    is_many: bool


def check_requests(
    models: Ensemble,
    prompts: list[list[int]],
    widths: list[int],
    weights: Sequence[Any],
    read: Callable[[str, int], list[int]],
    options: Options,
    hf_config: HFGenerationConfig,
) -> list[Request]:
    """One request for every prompt, or as many as a call asks for of each.

    prompts, widths: token ids, and their number with the padding that came with them
    weights:         by attribute, of every prompt, or None
    read:            what an attribute, or the anchor, of this name reads in place of the prompt of this index

    Raises ValueError that names the argument, as `Model.generate` says.
    """
    copies = hf_config.num_return_sequences
    first = secrets.randbits(32) if options.seed is None else options.seed
    seeds = first if isinstance(first, Sequence) else [int(first) + i * copies for i in range(len(prompts))]
    if len(seeds) != len(prompts):
        raise ValueError(f"seed: expected one number, or one per prompt ({len(prompts)}), got {len(seeds)}")
    requests: list[Request] = []
    for index, (token_ids, width, chosen) in enumerate(zip(prompts, widths, weights, strict=True)):
        alpha = check_weights(chosen, models.attribute_names, options.target)
        weighed = {name for name, weight in zip(models.attribute_names, alpha, strict=True) if weight}
        contexts = {name: read(name, index) for name in models.contexts_of({*ROLES, *weighed})}
        texts = {f"prompt {index}": token_ids} | {f"the context {name!r}": ids for name, ids in contexts.items()}
        longest = max(texts, key=lambda name: len(texts[name]))
        room = math.inf if models.max_positions is None else models.max_positions - len(texts[longest])
        positions = f"the model has {models.max_positions} positions and {longest} takes {len(texts[longest])}"
        if room < 1:
            context = next((name for name, ids in contexts.items() if ids is texts[longest]), None)
            argument = "prompt" if context is None else ANCHOR if context == ANCHOR else f"contexts[{context!r}]"
            raise ValueError(f"{argument}: {positions}, expected at least one left for a new token")
        asked = options.max_new_tokens or hf_config.max_new_tokens(index, width)
        max_new_tokens = int(asked or min(DEFAULT_NEW_TOKENS, room))
        if max_new_tokens > room:
            raise ValueError(f"max_new_tokens: {positions}, expected at most {room}, got {max_new_tokens}")
        asked_weights = {name: float(weight) for name, weight in (chosen or {}).items()}
        for copy in range(copies):
            seed = (int(seeds[index]) + copy) % 2**63
            padding = width - len(token_ids)
            processor = hf_config.processor(len(requests), token_ids, padding, max_new_tokens, models.device)
            ends = hf_config.ends(token_ids, models.device)
            requests.append(Request(token_ids, alpha, asked_weights, max_new_tokens, seed, processor, ends, contexts))
    return requests
