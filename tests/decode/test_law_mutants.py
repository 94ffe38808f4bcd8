"""The enumeration notices the classical mistakes of speculative sampling: each is planted, each must be flagged."""

from __future__ import annotations

import pytest
import torch

import reference
from fakes import FakeModels, enumerate_sampler, rounds_of, total_variation
from laws import target_law
from mpg.decode.batch import Batch
from mpg.decode.exact import Exact
from mpg.options import Options
from replaying import RecordingComposed

WEIGHTS = {"E": 0.7, "T": 0.6}
PROMPT, MAX_NEW_TOKENS = [1, 0], 4  # a text longer than a chunk of two
block_accept_probs, residual_rows = reference.block_accept_probs, reference.residual_rows


def law_defect() -> float:
    """Of `exact` with a dense draft and k = 2, as the twins stand."""
    models = FakeModels(3, others={"draft": 1.0}, eos_token_ids=[2], seed=1)
    sampler = {"sampler": "exact", "draft": "model", "chunk_size": 2, "target": "geometric"}
    law = enumerate_sampler(models, PROMPT, MAX_NEW_TOKENS, WEIGHTS, **sampler)
    return total_variation(law, target_law(models, PROMPT, MAX_NEW_TOKENS, WEIGHTS, target="geometric"))


def row_after(rows, index):
    """rows[b, index[b]]"""
    return rows.gather(1, index.view(-1, 1, 1).expand(-1, 1, rows.shape[2]))[:, 0]


def residual_is_target(target, draft, tokens, lengths, accepted, carry):
    return row_after(target, accepted)


def residual_is_absolute(target, draft, tokens, lengths, accepted, carry):
    gap = carry[:, None] * row_after(target, accepted) - row_after(draft, accepted.clamp_max(draft.shape[1] - 1))
    return torch.where((accepted == lengths)[:, None], row_after(target, accepted), gap.abs())


def residual_ignores_carry(target, draft, tokens, lengths, accepted, carry):
    return residual_rows(target, draft, tokens, lengths, accepted, torch.ones_like(carry))


def rejected_token_is_only_removed(target, draft, tokens, lengths, accepted, carry):
    rejected = tokens.gather(1, accepted.clamp_max(tokens.shape[1] - 1)[:, None])
    without = row_after(target, accepted).scatter(1, rejected, 0)
    return torch.where((accepted == lengths)[:, None], row_after(target, accepted), without)


def bonus_from_draft(target, draft, tokens, lengths, accepted, carry):
    last = row_after(draft, (lengths - 1).clamp_min(0))
    rows = residual_rows(target, draft, tokens, lengths, accepted, carry)
    return torch.where((accepted == lengths)[:, None], last, rows)


def accepts_by_square_root(target, draft, tokens, lengths):
    probs, carry = block_accept_probs(target, draft, tokens, lengths)
    return probs.sqrt(), carry


def accepts_by_carry(target, draft, tokens, lengths):
    probs, carry = block_accept_probs(target, draft, tokens, lengths)
    return torch.where(probs > 0, carry[:, 1:], probs), carry


def carry_is_not_clipped(target, draft, tokens, lengths):
    """P as the plain product of the ratios, clipped only where it is used."""
    steps = torch.arange(tokens.shape[1])
    p = target[:, :-1].gather(2, tokens[..., None])[..., 0]
    q = draft.gather(2, tokens[..., None])[..., 0]
    product = torch.where(steps < lengths[:, None], p / q, 1).cumprod(1)
    carry = torch.cat([torch.ones_like(product[:, :1]), product], 1).clamp_max(1)
    shrunk = (carry[:, 1:-1, None] * target[:, 1:-1] - draft[:, 1:]).clamp_min(0).sum(-1)
    inner = torch.cat([shrunk / (shrunk + 1 - carry[:, 1:-1]), torch.zeros_like(carry[:, :1])], 1).nan_to_num(1.0)
    probs = torch.where(steps + 1 == lengths[:, None], carry[:, 1:], inner) * (steps < lengths[:, None])
    return probs, carry


MUTANTS = {
    "residual = p": {"residual_rows": residual_is_target},
    "residual = |p - q|": {"residual_rows": residual_is_absolute},
    "residual ignores P": {"residual_rows": residual_ignores_carry},
    "rejected token merely removed": {"residual_rows": rejected_token_is_only_removed},
    "bonus from q": {"residual_rows": bonus_from_draft},
    "square-root accept": {"block_accept_probs": accepts_by_square_root},
    "h = P": {"block_accept_probs": accepts_by_carry},
    "no running clip": {"block_accept_probs": carry_is_not_clipped},
}


def test_without_a_mutant_the_law_is_the_target():
    assert law_defect() < 1e-12


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_flagged(name, monkeypatch, record_property):
    for twin, mutant in MUTANTS[name].items():
        monkeypatch.setattr(reference, twin, mutant)
    defect = law_defect()
    record_property("mutant_flagged", defect > 1e-6)
    assert defect > 1e-6


def test_key_reused_after_a_rejection_is_flagged(record_property):
    """Keys by position: the round of a key is the place of its token, so a position drafted anew has old keys."""

    class KeysByPosition(RecordingComposed):
        def __init__(self, batch: Batch):
            super().__init__(batch.seeds, batch.rounds)
            self.batch = batch

        def record(self, purpose, index, active):
            rounds, self.rounds = self.rounds, self.batch.lengths + index
            super().record(purpose, 0, active)
            self.rounds = rounds

    models = FakeModels(4, others={"draft": 1.0}, seed=1)
    options = Options(sampler="exact", draft="model", chunk_size=3)
    batch = Batch([[1, 0]] * 8, [30] * 8, torch.tensor([[0.7, 0.6]] * 8, dtype=torch.float64), torch.arange(8), [])
    sampler = Exact(models, ("E", "T"), options)
    sampler.start(models.open([[1, 0]] * 8, sampler.roles, batch.capacity), batch, KeysByPosition(batch))

    with pytest.raises(AssertionError, match="used twice"):
        list(rounds_of(sampler, batch))
    record_property("mutant_flagged", True)
