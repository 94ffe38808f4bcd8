"""`exact` samples its target whatever drafts: every branch of the production loop, against the target enumerated."""

from __future__ import annotations

import itertools

import pytest
import torch

import reference
from fakes import FakeModels, enumerate_sampler, total_variation
from laws import target_law
from longer import IS_LONG

EOS = 2
BOTH = {"E": 0.7, "T": 0.6}
SHARED, OWN = ("anchor",), ()  # is the anchor the base, or a model of its own?
TARGETS = {
    "arithmetic": (BOTH, SHARED, {"target": "arithmetic"}),
    "arithmetic, spans of 2": (BOTH, SHARED, {"target": "arithmetic", "mixture_span": 2}),
    "arithmetic, whole sequence": (BOTH, SHARED, {"target": "arithmetic", "mixture_span": "sequence"}),
    "arithmetic, signed": ({"E": 1.4, "T": -0.5}, SHARED, {"target": "arithmetic"}),
    "arithmetic, signed spans": ({"E": 1.4, "T": -0.3}, SHARED, {"target": "arithmetic", "mixture_span": 3}),
    "arithmetic, own anchor": (BOTH, OWN, {"target": "arithmetic"}),
    "anchored": ({"E": 0.5, "T": -0.4}, SHARED, {"target": "anchored"}),
    "anchored, own anchor": ({"E": 0.5, "T": 0.8}, OWN, {"target": "anchored"}),
    "geometric": (BOTH, SHARED, {"target": "geometric"}),
    "geometric, signed, own anchor": ({"E": 1.2, "T": -0.8}, OWN, {"target": "geometric"}),
    "geometric, warped": (BOTH, SHARED, {"target": "geometric", "temperature": 0.7, "top_p": 0.9}),
    "arithmetic, truncated": (BOTH, SHARED, {"target": "arithmetic", "top_k": 2, "min_p": 0.2}),
}
DRAFTS = {
    "reference": ({}, "reference"),
    "model": ({"draft": 0.3}, "model"),  # noise of the small model around the base
    "unrelated model": ({"draft": 5.0}, "model"),
    "merged": ({"merged": 1.0}, "merged"),
    "lookup": ({}, "lookup"),
}
LENGTHS = {  # prompt, tokens to add, how much is drafted, tokens that end a text
    "end of sequence inside a chunk": ([1, 0, 1], 4, {"chunk_size": 2}, [EOS]),
    "limit inside a chunk": ([1], 2, {"chunk_size": 3}, []),
    "one token a chunk": ([0, 3], 4, {"chunk_size": 1}, [EOS]),
    "adapted chunks": ([1], 4, {"chunk_size": 1, "adaptive": True}, [EOS]),
}


def cases():
    """Every target with every other draft; verifications and lengths in turn, so that every two of them and the drafts
    meet, and every target and verification. In the long form, which `make law` is, all with all."""
    numbered = itertools.product(*map(enumerate, (TARGETS, DRAFTS, ("block", "token"), LENGTHS)))
    for (i, target), (j, draft), (k, verify), (m, lengths) in numbered:
        turn = ((i // 2 + i // 4 + j // 2) % 2, ((i + j) // 2 + j) % len(LENGTHS))
        if IS_LONG or ((i + j) % 2 == 0 and (k, m) == turn):
            yield target, draft, verify, lengths


@pytest.mark.parametrize(("target", "draft", "verify", "lengths"), [*cases()])
def test_exact_samples_its_target(target, draft, verify, lengths, record_property):
    weights, same, options = TARGETS[target]
    others, name = DRAFTS[draft]
    prompt, max_new_tokens, drafted, eos = LENGTHS[lengths]
    models = FakeModels(4, same=same, others=others, eos_token_ids=eos, seed=1)
    sampler = {"sampler": "exact", "draft": name, "verify": verify, **drafted}
    law = enumerate_sampler(models, prompt, max_new_tokens, weights, **sampler, **options)
    defect = total_variation(law, target_law(models, prompt, max_new_tokens, weights, **options))
    record_property("defect", defect)
    assert defect < 1e-12


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_what_a_round_commits_and_what_follows_add_up_to_the_target(k, record_property):
    """sum_j c(z_1..j) P(z_j+1..m | z_1..j) = P(z) for every text z of m = k + 1 tokens, on random rows.

    c(z_1..j) is the probability that a round of block verification commits exactly z_1..j, and every row depends on all
    tokens before it. Texts of d tokens are numbered in base V.
    """
    vocab_size, instances = 3, 9000 // 3**k
    random = torch.Generator().manual_seed(k)

    def random_rows(sharpness: float) -> list[torch.Tensor]:
        rows = [
            torch.rand(instances, vocab_size**d, vocab_size, generator=random, dtype=torch.float64)
            for d in range(k + 1)
        ]
        return [row**sharpness / (row**sharpness).sum(-1, keepdim=True) for row in rows]

    def continued(law: torch.Tensor, rows: list[torch.Tensor]) -> torch.Tensor:
        for row in rows:
            law = (law[..., None] * row).flatten(1)
        return law

    target, draft = random_rows(4), random_rows(2)
    prefix = [torch.arange(vocab_size**k) // vocab_size ** (k - d) for d in range(k + 1)]  # of every chunk, its first d
    chunks = torch.stack([prefix[d + 1] % vocab_size for d in range(k)], 1).repeat(instances, 1)
    target_probs = torch.stack([target[d][:, prefix[d]] for d in range(k + 1)], 2).flatten(0, 1)
    draft_probs = torch.stack([draft[d][:, prefix[d]] for d in range(k)], 2).flatten(0, 1)
    lengths = torch.full((len(chunks),), k)
    accept_probs, carry = reference.block_accept_probs(target_probs, draft_probs, chunks, lengths)

    left = draft_probs.gather(2, chunks[..., None])[..., 0].prod(1)  # probability of the chunk, and of each rejection
    law = torch.zeros(instances, vocab_size ** (k + 1), dtype=torch.float64)
    for i in range(k, -1, -1):
        accept_prob = accept_probs[:, i - 1] if i else torch.ones_like(left)
        rows = reference.residual_rows(
            target_probs, draft_probs, chunks, lengths, torch.full_like(lengths, i), carry[:, i].contiguous()
        )
        committed = (left * accept_prob)[:, None] * (rows / rows.sum(-1, keepdim=True)).nan_to_num()
        left = left * (1 - accept_prob)
        merged = torch.zeros(instances, vocab_size**i, vocab_size, dtype=torch.float64)
        merged.index_add_(1, prefix[i], committed.unflatten(0, (instances, -1)))
        law += continued(merged.flatten(1), target[i + 1 :])
    defect = (law - continued(target[0][:, 0], target[1:])).abs().max().item()
    record_property("defect", defect)
    assert defect < 1e-14
