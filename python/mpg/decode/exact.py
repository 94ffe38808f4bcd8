"""Speculative sampling of the target, lossless: any draft proposes, and the text has the target's law.

Block verification: Sun et al., "Block Verification Accelerates Speculative Decoding" (2024). Token verification:
Leviathan et al. (2023). No bound and no loop; one to K + 1 tokens a round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

import mpg_ext
from mpg.decode.batch import Batch
from mpg.decode.drafts import make_draft
from mpg.decode.rng import Generator, KeyedGenerator, Purpose
from mpg.decode.rows import TargetRows
from mpg.options import Options
from mpg_ext import reference

if TYPE_CHECKING:
    from mpg.models.ensemble import Ensemble, Session

MAX_ADAPTED_CHUNK = 16
# Every statistic with its denominator.
STATISTICS = {
    "accepted_per_round": "drafted tokens committed / rounds",
    "accept_rate": "drafted tokens committed / drafted tokens that could have been",
}


class Exact:
    """Exact up to the floating point of the models' own forwards. See `Sampler` for the interface.

    composed  decide step by step through `rng.bernoulli` and `rng.categorical` over the plain-torch twins, where a
              replaying generator can walk every branch; otherwise the fused ops decide, by the same rules
    """

    def __init__(self, models: Ensemble, attributes: tuple[str, ...], options: Options, *, composed: bool = False):
        self.options, self.composed = options, composed
        self.target = TargetRows(models, attributes, options, reference if composed else mpg_ext)
        self.draft = make_draft(models, self.target.roles, options, self.target.ops)
        self.roles = (*self.target.roles, *(role for role in self.draft.roles if role not in self.target.roles))

    def start(self, session: Session, batch: Batch, rng: Generator) -> None:
        self.session, self.batch, self.rng = session, batch, rng
        self.draft.start(session, batch, rng)
        self.target.start(batch)
        if self.options.adaptive:
            batch.draft_lengths = torch.full_like(batch.lengths, self.options.chunk_size)
            batch.longest_draft = self.options.chunk_size
        self.num_accepted = torch.zeros_like(batch.lengths)
        self.num_offered = torch.zeros_like(batch.lengths)

    def reset(self, rows: Tensor) -> None:
        self.target.reset(rows)
        self.num_accepted[rows] = self.num_offered[rows] = 0
        if self.batch.draft_lengths is not None:
            self.batch.draft_lengths[rows] = self.options.chunk_size

    def round(self) -> None:
        batch = self.batch

        # Draft: C ~ q, with the rows it was really drawn from
        chunk, draft_rows, num_drafted = self.draft.propose(batch.longest_draft or self.options.chunk_size)
        num_usable = torch.minimum(batch.count_usable(chunk), num_drafted)

        # Score: the rows p_1 .. p_{K+1} in one pass of every model of the target
        fed = torch.cat([batch.last_tokens()[:, None], chunk], 1)
        kv_length = batch.kv_length(fed.shape[1])
        logits = self.session.forward(self.target.roles, fed, batch.lengths - 1, kv_length=kv_length)
        rows, log_totals = self.target.of(logits, chunk, num_usable)

        # Verify: the first `accepted` tokens of the chunk stay, and the row that they leave gives one more
        accepted, carry = self._verify(rows, draft_rows, chunk, num_usable)
        batch.fail(unusable=accepted < 0)
        accepted = accepted.clamp_min(0)
        ends = batch.ends_with(chunk, accepted)
        log_total = _at(log_totals, accepted)
        batch.fail(unusable=log_total.isnan() & ~ends, empty=(log_total == -torch.inf) & ~ends)
        token = self._draw_last(rows, draft_rows, chunk, num_usable, accepted, carry, batch.active & ~ends)

        if batch.draft_lengths is not None:  # two more where all was accepted, one less where not
            longer = torch.where(accepted == num_usable, batch.draft_lengths + 2, batch.draft_lengths - 1)
            longer = longer.clamp(1, max(MAX_ADAPTED_CHUNK, self.options.chunk_size))
            batch.draft_lengths.copy_(torch.where(num_usable > 0, longer, batch.draft_lengths))

        # Commit
        self.num_accepted += accepted * batch.active
        self.num_offered += num_usable * batch.active
        self.target.commit(logits, accepted, token)
        committed = torch.cat([chunk, token[:, None]], 1).scatter(1, accepted[:, None], token[:, None])
        log_ratios = self.target.log_ratios(logits, committed) if self.options.trace else None
        batch.commit(committed, accepted + (~ends).long(), log_ratios)

    def statistics(self) -> dict[str, Tensor]:
        """The entries of `STATISTICS`, each (B,)."""
        return {
            "accepted_per_round": self.num_accepted / self.batch.rounds,
            "accept_rate": self.num_accepted / self.num_offered.clamp_min(1),
        }

    def _verify(
        self, rows: Tensor, draft_rows: Tensor | None, chunk: Tensor, num_usable: Tensor
    ) -> tuple[Tensor, Tensor]:
        """How many drafted tokens stay, (B,) int64, -1 where a row is unusable; and P at that place, (B,)."""
        num_drafted = chunk.shape[1]
        if self.options.verify == "block" and not self.composed:
            assert isinstance(self.rng, KeyedGenerator)
            uniforms = self.rng.uniforms(Purpose.ACCEPT, num_drafted, num_usable > 0)
            return mpg_ext.verify_block(rows, draft_rows, chunk, num_usable, uniforms)
        accepted = torch.zeros_like(num_usable)
        if self.options.verify == "block":  # the longest prefix that passes, as in SCR
            probs, carry = reference.block_accept_probs(rows, draft_rows, chunk, num_usable)
            for length in range(num_drafted, 0, -1):
                is_test = (accepted == 0) & (length <= num_usable)
                passed = self.rng.bernoulli(probs[:, length - 1], Purpose.ACCEPT, length - 1, is_test)
                accepted = torch.where(is_test & passed, length, accepted)
            return accepted, _at(carry, accepted)
        probs = reference.token_accept_probs(rows, draft_rows, chunk)
        for length in range(1, num_drafted + 1):  # left to right until one fails
            is_test = (accepted == length - 1) & (length <= num_usable)
            passed = self.rng.bernoulli(probs[:, length - 1], Purpose.ACCEPT, length - 1, is_test)
            accepted = torch.where(is_test & passed, length, accepted)
        return accepted, torch.ones_like(rows[:, 0, 0])

    def _draw_last(
        self,
        rows: Tensor,
        draft_rows: Tensor | None,
        chunk: Tensor,
        num_usable: Tensor,
        accepted: Tensor,
        carry: Tensor,
        active: Tensor,
    ) -> Tensor:
        """The token after the accepted ones: from the target where all were, else from the residual."""
        if self.composed:
            residual = reference.residual_rows(rows, draft_rows, chunk, num_usable, accepted, carry)
            return self.rng.categorical(residual, Purpose.LAST, 0, active)
        assert isinstance(self.rng, KeyedGenerator)
        uniforms = self.rng.uniforms(Purpose.LAST, 1, active)[:, 0]
        return mpg_ext.draw_residual(rows, draft_rows, chunk, num_usable, accepted, carry, uniforms)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """values[b, index[b]] of values (B, K), index (B,) clamped to 0 from below. out: (B,)"""
    return values.gather(1, index.clamp_min(0)[:, None])[:, 0]
