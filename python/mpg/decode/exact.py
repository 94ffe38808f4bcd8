"""Speculative sampling of the target, lossless: any draft proposes, and the text has the target's law.

Block verification: Sun et al., "Block Verification Accelerates Speculative Decoding" (2024). Token verification:
Leviathan et al. (2023). No bound and no loop; one to K + 1 tokens a round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpg.decode.batch import Batch
from mpg.decode.drafts import make_draft
from mpg.decode.rng import Decisions
from mpg.decode.rows import TargetRows
from mpg.models.ensemble import Ensemble, Pass
from mpg.models.session import Role, Session
from mpg.options import Options

MAX_ADAPTED_CHUNK = 16
# Every statistic with its denominator.
STATISTICS = {
    "accepted_per_round": "drafted tokens committed / rounds",
    "drafted_per_round": "drafted tokens that could have been committed / rounds",
    "accept_rate": "drafted tokens committed / drafted tokens that could have been",
}


class Exact:
    """Exact up to the floating point of the models' own forwards. See `Sampler` for the interface."""

    num_accepted: Tensor
    num_offered: Tensor

    def __init__(self, models: Ensemble, attributes: tuple[Role, ...], options: Options):
        self.options, self.target = options, TargetRows(models, attributes, options)
        self.draft = make_draft(models, self.target.references, options)
        self.roles = (*self.target.roles, *(role for role in self.draft.roles if role not in self.target.roles))

    def start(self, session: Session, batch: Batch, decide: Decisions) -> None:
        self.session, self.batch, self.decide = session, batch, decide
        self.draft.start(session, batch, decide)
        self.target.start(batch)
        if self.options.adaptive:
            batch.state.hold(batch, "draft_lengths", batch.state.zeros() + self.options.chunk_size)
            batch.longest_draft = self.options.chunk_size
        batch.state.hold(self, "num_accepted", batch.state.zeros())
        batch.state.hold(self, "num_offered", batch.state.zeros())

    def reset(self, rows: Tensor) -> None:
        self.target.reset(rows)
        self.num_accepted[rows] = self.num_offered[rows] = 0
        if self.batch.draft_lengths is not None:
            self.batch.draft_lengths[rows] = self.options.chunk_size
            self.batch.longest_draft = max(self.batch.longest_draft, self.options.chunk_size)

    def round(self) -> None:
        batch = self.batch

        # Draft: C ~ q, with the rows it was really drawn from
        chunk, draft_rows, num_usable = self.draft.propose(batch.longest_draft or self.options.chunk_size)

        # Score: the rows p_1 .. p_{K+1} in one pass of every model of the target
        input_tokens = torch.cat([batch.last_tokens[:, None], chunk], 1)
        kv_length = batch.kv_length(input_tokens.shape[1])
        logits = self.session.forward(self.target.roles, input_tokens, batch.lengths - 1, kv_length=kv_length)
        rows, log_totals = self.target.of(logits, chunk, num_usable)

        # Verify: the first `accepted` tokens of the chunk stay, and the row that they leave gives one more
        if self.options.verify == "block":
            accepted, carry = self.decide.verify_block(rows, draft_rows, chunk, num_usable)
        else:
            accepted = self.decide.accept_tokens(_token_accept_probs(rows, draft_rows, chunk), num_usable)
            carry = torch.ones_like(rows[:, 0, 0])

        def is_drawn() -> Tensor:
            log_total = log_totals.gather(1, accepted.clamp_min(0)[:, None])[:, 0]
            return batch.active & (accepted >= 0) & (accepted < batch.ends_at(chunk)) & log_total.isfinite()

        token = self.decide.draw_residual(rows, draft_rows, chunk, num_usable, accepted, carry, is_drawn)

        if batch.draft_lengths is not None:  # two more where all was accepted, one less where not
            longer = torch.where(accepted == num_usable, batch.draft_lengths + 2, batch.draft_lengths - 1)
            longer = longer.clamp(1, max(MAX_ADAPTED_CHUNK, self.options.chunk_size))
            batch.draft_lengths.copy_(torch.where(num_usable > 0, longer, batch.draft_lengths))

        # Commit
        self.num_accepted += accepted
        self.num_offered += num_usable
        self.target.commit(logits, accepted, token)
        committed = batch.commit(chunk, accepted, token, log_totals)
        if batch.is_traced:
            batch.trace(self.target.log_ratios(logits, committed), (accepted, num_usable))
        if batch.num_top is not None:
            batch.tell(self.target.logprobs(logits, committed, batch.num_top))

    def reach(self) -> int:
        return (self.batch.longest_draft or self.options.chunk_size) + 1

    def passes(self, num_drafts: int) -> list[Pass]:
        return [*self.draft.passes(num_drafts), (self.target.roles, num_drafts + 1)]

    def statistics(self) -> dict[str, Tensor]:
        return {
            "accepted_per_round": self.num_accepted.double() / self.batch.rounds,
            "drafted_per_round": self.num_offered.double() / self.batch.rounds,
            "accept_rate": self.num_accepted.double() / self.num_offered.clamp_min(1),
        }


def _token_accept_probs(rows: Tensor, draft_rows: Tensor | None, chunk: Tensor) -> Tensor:
    """Probability min(1, p / q) with which verification by token accepts each drafted token. out: (B, K) float64"""
    drafted = chunk[..., None]
    probs = rows[:, :-1].gather(2, drafted)[..., 0].double()
    if draft_rows is not None:
        probs = probs / draft_rows.gather(2, drafted)[..., 0]
    return probs.clamp_max(1)
