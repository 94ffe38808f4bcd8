"""Log-probabilities of finished texts, in one pass over them. Knows models; nothing of what is made of the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

import mpg_ext
from mpg.models.ensemble import Ensemble
from mpg.options import MAX_CHUNK


@torch.inference_mode()
def token_logprobs(
    models: Ensemble,
    roles: Sequence[str],
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    contexts: Sequence[Mapping[str, Sequence[int]]] | None = None,
) -> torch.Tensor:
    """log p(token | prompt, the text before it) of every token of every text, by R models.

    roles:          "base", "anchor", "draft" or attributes
    prompts, texts: B sequences of token ids each; no text is empty
    contexts:       of every prompt, what roles of these names read in its place

    out: (R, B, longest text) float64 on the models' device; 0 beyond the end of a text
    """
    longest_prompt, longest = max(map(len, prompts)), max(map(len, texts))
    own = (
        [{"": prompt} for prompt in prompts]
        if contexts is None
        else [{"": p, **c} for p, c in zip(prompts, contexts, strict=True)]
    )
    capacity = max(len(text) + max(map(len, read.values())) for read, text in zip(own, texts, strict=True))
    session = models.open(prompts, roles, capacity, contexts=contexts)
    start = torch.tensor([len(prompt) - 1 for prompt in prompts], device=models.device)
    padded = [[prompt[-1], *text, *[0] * (longest - len(text))] for prompt, text in zip(prompts, texts, strict=True)]
    tokens = torch.tensor(padded, device=models.device)
    lengths = torch.tensor([len(text) for text in texts], device=models.device)
    parts = []
    for first in range(0, longest, MAX_CHUNK):  # slice by slice, so that the logits of a long text need not fit at once
        scored = tokens[:, first + 1 : first + 1 + MAX_CHUNK]
        width = scored.shape[1]
        kv_length = min(longest_prompt - 1 + first + width, capacity)
        logits = session.forward(roles, tokens[:, first : first + width], start + first, kv_length=kv_length)
        logprobs = mpg_ext.gather_logprobs(logits.flatten(0, 1), scored.repeat(len(roles), 1))
        is_text = first + torch.arange(width, device=models.device) < lengths[:, None]
        parts.append(torch.where(is_text, logprobs.view(len(roles), *scored.shape).double(), 0))
    return torch.cat(parts, -1)
