"""What a target gives the tokens of texts that are there already: log-probabilities in its combined rows.

Knows targets, models and texts; draws nothing. A single model's are `mpg.paper.scoring`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from mpg.decode.batch import Logprobs
from mpg.decode.request import Request
from mpg.decode.rows import TargetRows
from mpg.models.ensemble import Ensemble
from mpg.options import MAX_CHUNK, Options

NOTHING = Logprobs(*[torch.zeros(0, 0)] * 3)  # of no position, while prompts are read


@torch.no_grad()
def score_texts(
    models: Ensemble,
    requests: Sequence[Request],
    texts: Sequence[Sequence[int]],
    options: Options,
    num_top: int = 0,
    ensembles: Sequence[Ensemble] | None = None,
    part: Callable[[], int | None] = lambda: None,
) -> Iterator[Logprobs]:
    """Log-probabilities of B texts behind the prompts of as many requests, some positions of all texts at a time.

    requests   of which prompt, weights and contexts count
    texts      token ids; those of a context follow what it reads in place of the prompt
    options    of which the target counts; a mixture spans one token
    num_top    tokens of each row beside the text's own, the likeliest first
    ensembles  of every request, the models with contexts that it brings
    part       asked whenever something is to be read: tokens over all texts and models, at most, but one position of
               all texts at least; None for MAX_CHUNK positions, and prompts at once

    out: on the CPU, up to MAX_CHUNK positions each, in order, and NOTHING behind each part of the prompts; behind the
    end of a text nothing meaningful. NaN where a model's logits are unusable, -inf where the target excludes the token

    Raises ValueError for an empty text and for a mixture that spans more than a token.
    """
    if options.span != 1:
        raise ValueError(f"mixture_span: expected 'token' where texts are scored, got {options.mixture_span!r}")
    if not all(texts):
        raise ValueError("texts: expected at least one token each, got a text without any")
    knowing = ensembles or [models] * len(requests)
    attributes = [request.attributes(own, options) for request, own in zip(requests, knowing, strict=True)]
    prompts, contexts = [request.token_ids for request in requests], [request.contexts for request in requests]
    alphas = [[alpha for alpha in request.alpha if alpha] for request in requests]
    most, device = max(map(len, alphas)), models.device
    dtype = torch.promote_types(models.dtype, torch.float32)
    weights = torch.tensor([[*own, *[0.0] * (most - len(own))] for own in alphas], dtype=dtype, device=device)
    longest, longest_prompt = max(map(len, texts)), max(map(len, prompts))
    read = [max(map(len, [request.token_ids, *request.contexts.values()])) for request in requests]
    capacity = max(length + len(text) for length, text in zip(read, texts, strict=True))

    target = TargetRows(models, tuple(range(most)), options)
    session = models.open([], target.roles, capacity, num_rows=len(texts), expected=attributes)
    try:
        every = zip(prompts, attributes, contexts, knowing, strict=True)
        asked = [one for text in every for one in session.asked(*text)]  # as many as cache rows
        if (limit := part()) is not None:
            for _ in session.ahead.read(asked, limit):
                yield NOTHING
        session.replace(range(len(texts)), prompts, attributes, contexts, knowing)
        if limit is not None:  # prompts of one length are read with their last tokens
            yield NOTHING
        padded = [
            [prompt[-1], *text, *[0] * (longest - len(text))] for prompt, text in zip(prompts, texts, strict=True)
        ]
        tokens = torch.tensor(padded, device=device)
        start = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        first = 0
        while first < longest:
            limit = part()
            most_fed = MAX_CHUNK if limit is None else min(max(limit // len(asked), 1), MAX_CHUNK)
            scored = tokens[:, first + 1 : first + 1 + most_fed]
            width = scored.shape[1]
            kv_length = min(longest_prompt - 1 + first + width, capacity)
            logits = session.forward(target.roles, tokens[:, first : first + width], start + first, kv_length=kv_length)
            target.chunk_weights = weights[:, None].expand(-1, width, -1)
            yield Logprobs(*(of_rows.cpu() for of_rows in target.logprobs(logits, scored, num_top)))
            first += width
    finally:
        session.close()
