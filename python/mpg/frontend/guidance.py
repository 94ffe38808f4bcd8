"""Classifier-free guidance as transformers has it: a context of weight 1 - guidance_scale in the geometric target.

log v = log base + (1 - g) (log negative - log base), which is transformers' g log base + (1 - g) log negative. (Sanchez
et al., "Stay on topic with Classifier-Free Guidance", 2023.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpg.context import Context
from mpg.frontend.prompts import as_list, unpad
from mpg.options import MAX_WEIGHT, MIN_WEIGHT, is_finite

NAME = "negative prompt"  # of the attribute
ARGUMENTS = ("negative_prompt", "negative_prompt_ids", "negative_prompt_attention_mask")


def guide(
    scale: Any,
    negative: Mapping[str, Any],
    target: str,
    prompts: Sequence[Sequence[int]],
    weights: Sequence[Mapping[str, float] | None],
    contexts: Sequence[Mapping[str, Context]],
) -> tuple[list[Any], list[dict[str, Context]]]:
    """Weights and contexts of every prompt with the guidance that a call asks for.

    scale     guidance_scale, None or 1 for no guidance
    negative  those of `ARGUMENTS` that are given: text or another prompt, or ids with their mask; one for all prompts,
              or one per prompt; without any it is each prompt's last token
    prompts   token ids

    Raises ValueError, naming the argument, for a scale that is no number or too far from 1, for another target than
    "geometric", and for a negative prompt that is empty, without a scale, given twice, or not one per prompt.
    """
    given = {name: value for name, value in negative.items() if value is not None}
    if scale is None:
        if given:
            raise ValueError(f"{next(iter(given))}: expected guidance_scale beside it, got none")
        return list(weights), [dict(of_prompt) for of_prompt in contexts]
    if not is_finite(scale):
        raise ValueError(f"guidance_scale: expected a number, got {scale!r}")
    if scale == 1:
        return list(weights), [dict(of_prompt) for of_prompt in contexts]
    if not MIN_WEIGHT <= abs(1 - scale) <= MAX_WEIGHT:
        raise ValueError(f"guidance_scale: expected 1, or {MIN_WEIGHT:g} to {MAX_WEIGHT:g} from it, got {scale!r}")
    if target != "geometric":
        raise ValueError(f"guidance_scale: expected target 'geometric', which it is of, got {target!r}")
    if "negative_prompt" in given and "negative_prompt_ids" in given:
        raise ValueError("negative_prompt: expected text or negative_prompt_ids, got both")
    if set(given) == {"negative_prompt_attention_mask"}:
        raise ValueError("negative_prompt_attention_mask: expected negative_prompt_ids beside it, got none")
    for argument, of_prompts in (("contexts", contexts), ("weights", weights)):
        if any(NAME in (of_prompt or {}) for of_prompt in of_prompts):
            raise ValueError(f"{argument}: expected another name than {NAME!r}, which guidance_scale has, got it")
    negatives: list[Any] = [prompt[-1:] for prompt in prompts]
    try:
        if "negative_prompt_ids" in given:
            negatives, _, _ = unpad(given["negative_prompt_ids"], given.get("negative_prompt_attention_mask"), None)
        elif "negative_prompt" in given:
            negatives, _ = as_list(given["negative_prompt"])
    except ValueError as error:
        raise ValueError(f"{next(iter(given))}: {error}") from None
    if len(negatives) == 1:
        negatives *= len(prompts)
    if len(negatives) != len(prompts):
        raise ValueError(f"negative_prompt: expected one, or one per prompt ({len(prompts)}), got {len(negatives)}")
    guided = [{**(of_prompt or {}), NAME: 1 - scale} for of_prompt in weights]
    own = [
        {**of_prompt, NAME: Context.of(next(iter(given), NAME), {"prompt": negative})}
        for of_prompt, negative in zip(contexts, negatives, strict=True)
    ]
    return guided, own
