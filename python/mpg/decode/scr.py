"""Speculative chunk-level rejection sampling (SCR, Algorithm 1), as published: fast, and approximate by design.

It samples neither Eq. 5 nor the token target: it keeps part of the distance between the reference and the target, the
more of it the more it accepts. What its bound M is estimated from is in `mpg.decode.bound`.
"""

from __future__ import annotations

import torch
from torch import Tensor

import mpg_ext
from mpg.decode.batch import Batch
from mpg.decode.bound import Bound
from mpg.decode.drafts import ModelDraft
from mpg.decode.rng import Decisions, Purpose
from mpg.models.ensemble import Ensemble, Pass
from mpg.models.session import Role, Session
from mpg.options import Options

# Every statistic with its denominator.
STATISTICS = {
    "reject_rate": "rounds whose full chunk was rejected / rounds",
    "salvage_rate": "rounds that committed a proper prefix of their chunk / rounds",
    "fallback_rate": "rounds that fell back to a single token / rounds",
    "clip_rate": "tested prefixes whose score exceeds M, so that Eq. 14 clips / tested prefixes",
    "warmup_share": "tokens committed while M was still M_0 / tokens",
    "frozen_exceeded_rounds": "rounds in which a tested score exceeded a frozen M (a count)",
    "expected_rs1_tries": "tries that the RS-1 loop would have taken / fallbacks with a token to draw, 0 without one",
    "log_bound": "log M after the last round (natural logarithm)",
}


class SCR:
    """Algorithm 1, with what it leaves open decided so: base and draft are one model; a chunk ends at an
    end-of-sequence token or with the tokens left; the RS-1 loop is drawn in closed form; the warm-up counts rounds.
    See `Sampler` for the interface.
    """

    sums: Tensor  # (B, 9)
    prefixes: Tensor  # 1, ..., K

    def __init__(self, models: Ensemble, attributes: tuple[Role, ...], options: Options):
        self.options = options
        # where anchor and base are one model, the anchor's rows are those that the chunk was drafted from
        self.anchor_is_base = models.is_same("base", "anchor")
        self.scored = attributes if self.anchor_is_base else ("anchor", *attributes)
        self.roles = ("base", *self.scored)
        self.draft = ModelDraft("base", options, is_verified=True)

    def start(self, session: Session, batch: Batch, decide: Decisions) -> None:
        self.session, self.batch, self.decide = session, batch, decide
        self.draft.start(session, batch, decide)
        self.bound = Bound(self.options, batch)
        batch.state.hold(self, "sums", batch.state.zeros(9, dtype=torch.float64))
        self.prefixes = torch.arange(1, self.options.chunk_size + 1, device=batch.lengths.device)

    def reset(self, rows: Tensor) -> None:
        self.bound.reset(rows, self.batch.weights[rows])
        self.sums[rows] = 0

    def round(self) -> None:
        batch, bound = self.batch, self.bound
        log_bound, is_warm, is_frozen = bound.log_bound.clone(), bound.is_warming_up(), bound.frozen.clone()

        # (Propose) a chunk from the base (Eq. 12)
        chunk, draft_rows, num_usable = self.draft.propose(self.options.chunk_size)
        assert draft_rows is not None
        base_logits, first_row = torch.stack(self.draft.logits, 1), draft_rows[:, 0]

        # Score it under every attribute in one pass and accept the longest prefix that passes (Eq. 13-17, 18-20)
        input_tokens = torch.cat([batch.last_tokens[:, None], chunk[:, :-1]], 1)
        kv_length = batch.kv_length(input_tokens.shape[1])
        logits = self.session.forward(self.scored, input_tokens, batch.lengths - 1, kv_length=kv_length)
        anchor_logits, attribute_logits = (base_logits, logits) if self.anchor_is_base else (logits[0], logits[1:])
        log_ratios, scores, accepted = self._verify(anchor_logits, attribute_logits, chunk, num_usable)

        # (RS-1 fallback) one token where no prefix passed
        is_fallback = batch.active & (accepted == 0)
        token, score, accept_prob = self.decide.draw_fallback(
            anchor_logits[:, 0], attribute_logits[:, :, 0], first_row, bound, is_fallback
        )
        if self.options.empty == "base":
            is_empty = is_fallback & (accept_prob == 0)
            token = torch.where(is_empty, self.decide.categorical(first_row, Purpose.EMPTY, 0, lambda: is_empty), token)

        # (Update log M) by the fallback's score; `verify` has pushed the accepted ones
        is_tested = self._is_tested(accepted, num_usable)
        pushed = score[:, None]
        if self.options.observed:
            pushed = torch.cat([_observed(scores, is_tested), pushed], 1)
        bound.update(pushed, is_fallback)

        # Commit
        is_rejected, is_drawn = accepted < num_usable, accept_prob > 0
        num_clipped = (is_tested & (scores > log_bound[:, None])).sum(1)
        self.sums += torch.stack([
            is_rejected,
            is_rejected & (accepted > 0),
            is_fallback,
            is_drawn,
            accept_prob.double().reciprocal().nan_to_num(0, 0),  # 0 where nothing is drawn
            is_tested.sum(1),
            num_clipped,
            (accepted + is_fallback) * is_warm,
            is_frozen & (num_clipped > 0),
        ], 1)  # fmt: skip
        committed = batch.commit(chunk, accepted, token)
        if batch.is_traced:
            # the first token may be the fallback's now
            first = anchor_logits[:, :1], attribute_logits[:, :, :1], committed[:, :1]
            log_ratios = torch.cat([self._score(*first)[0], log_ratios[:, :, 1:]], 2)
            batch.trace(log_ratios, (accepted, num_usable))

    def reach(self) -> int:
        return self.options.chunk_size

    def passes(self, num_drafts: int) -> list[Pass]:
        return [*self.draft.passes(num_drafts), (self.scored, num_drafts)]

    def statistics(self) -> dict[str, Tensor]:
        rounds = self.batch.rounds
        # over the rounds of a request, in the order in which `round` adds them
        rejected, salvaged, fallbacks, drawn, rs1_tries, tested, clipped, warmup_tokens, frozen_exceeded = (
            self.sums.unbind(1)
        )
        return {
            "reject_rate": rejected / rounds,
            "salvage_rate": salvaged / rounds,
            "fallback_rate": fallbacks / rounds,
            "clip_rate": clipped / tested,
            "warmup_share": warmup_tokens / self.batch.num_new_tokens(),
            "frozen_exceeded_rounds": frozen_exceeded,
            "expected_rs1_tries": rs1_tries / drawn.clamp_min(1),
            "log_bound": self.bound.log_bound,
        }

    def _verify(
        self, anchor_logits: Tensor, attribute_logits: Tensor, chunk: Tensor, num_usable: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-ratios (N, B, K), prefix scores (B, K) and accepted tokens (B,) of a chunk, -1 where a score is NaN.

        Updates the bound where a prefix was accepted, by its score, or by the scores of all tests if observed."""
        if not self.options.observed:
            return self.decide.verify_chunks(anchor_logits, attribute_logits, chunk, num_usable, self.bound)
        log_ratios, scores = self._score(anchor_logits, attribute_logits, chunk)
        accepted = self.decide.accept_prefixes(scores, self.bound.log_bound, num_usable)
        self.bound.update(_observed(scores, self._is_tested(accepted, num_usable)), accepted > 0)
        return log_ratios, scores, accepted

    def _is_tested(self, accepted: Tensor, num_usable: Tensor) -> Tensor:
        """Which prefixes a round tested: from the longest usable one down to the accepted one. out: (B, K) bool"""
        return (self.prefixes >= accepted[:, None]) & (self.prefixes <= num_usable[:, None])

    def _score(self, anchor_logits: Tensor, attribute_logits: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor]:
        """Log-ratios (N, B, K) and prefix scores (B, K) of a chunk, from logits."""
        anchor = mpg_ext.gather_logprobs(anchor_logits, chunk)
        attributes = torch.stack([mpg_ext.gather_logprobs(logits, chunk) for logits in attribute_logits])
        return mpg_ext.score_prefixes(attributes, anchor, self.bound.weights, score=self.bound.score)


def _observed(scores: Tensor, is_tested: Tensor) -> Tensor:
    """The tested scores in the order of their tests, the longest prefix first; -inf elsewhere. out: (B, K)"""
    return torch.where(is_tested, scores, -torch.inf).flip(1)
