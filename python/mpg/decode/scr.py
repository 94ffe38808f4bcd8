"""Speculative chunk-level rejection sampling (SCR, Algorithm 1), as published: fast, and approximate by design.

It samples neither Eq. 5 nor the token target: it keeps part of the distance between the reference and the target, the
more of it the more it accepts. What its bound M is estimated from is in `mpg.decode.bound`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

import mpg_ext
from mpg.decode.batch import Batch
from mpg.decode.bound import Bound, normalise_weights
from mpg.decode.rng import Generator, KeyedGenerator, Purpose
from mpg.options import Options
from mpg_ext import reference
from mpg_ext.ops import Score

if TYPE_CHECKING:
    from mpg.models.ensemble import Ensemble, Session

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

    composed  decide step by step through `rng.bernoulli` and `rng.categorical` over the plain-torch twins, where a
              replaying generator can walk every branch; otherwise the fused ops decide, by the same rules
    """

    def __init__(self, models: Ensemble, attributes: tuple[str, ...], options: Options, *, composed: bool = False):
        self.options, self.composed, self.ops = options, composed, reference if composed else mpg_ext
        # where anchor and base are one model, the anchor's rows are those that the chunk was drafted from
        self.anchor_is_base = models.is_same("base", "anchor")
        self.scored = attributes if self.anchor_is_base else ("anchor", *attributes)
        self.roles = ("base", *self.scored)

    def start(self, session: Session, batch: Batch, rng: Generator) -> None:
        self.session, self.batch, self.rng = session, batch, rng
        self.weights = normalise_weights(batch.weights)
        self.bound = Bound.initial(self.options, len(batch), self.weights.dtype, self.weights.device)
        self.decide: _Composed | _Fused
        if self.composed:
            self.decide = _Composed(self.weights, self.bound, self.options, rng)
        else:
            assert isinstance(rng, KeyedGenerator)
            self.decide = _Fused(self.weights, self.bound, self.options, rng)
        self.sums = {name: torch.zeros(len(batch), dtype=torch.float64, device=self.weights.device) for name in _SUMS}

    def reset(self, rows: Tensor) -> None:
        self.weights[rows] = normalise_weights(self.batch.weights[rows])
        self.bound.reset(rows)
        for values in self.sums.values():
            values[rows] = 0

    def round(self) -> None:
        batch, bound = self.batch, self.bound
        log_bound, is_warm, is_frozen = bound.log_bound.clone(), bound.is_warming_up(), bound.frozen.clone()

        # (Propose) a chunk from the base (Eq. 12)
        chunk, base_logits, first_row = self._propose()
        num_usable = batch.count_usable(chunk)

        # Score it under every attribute in one pass and accept the longest prefix that passes (Eq. 13-17, 18-20)
        fed = torch.cat([batch.last_tokens()[:, None], chunk[:, :-1]], 1)
        logits = self.session.forward(self.scored, fed, batch.lengths - 1, kv_length=batch.kv_length(fed.shape[1]))
        anchor_logits, attribute_logits = (base_logits, logits) if self.anchor_is_base else (logits[0], logits[1:])
        log_ratios, scores, accepted = self.decide.verify(anchor_logits, attribute_logits, chunk, num_usable)
        batch.fail(unusable=accepted < 0)

        # (RS-1 fallback) one token where no prefix passed
        is_fallback = batch.active & (accepted == 0)
        token, score, accept_prob = self.decide.fall_back(
            anchor_logits[:, 0], attribute_logits[:, :, 0], first_row, is_fallback
        )
        is_empty = is_fallback & (accept_prob == 0)
        batch.fail(unusable=is_fallback & accept_prob.isnan())
        if self.options.empty == "base":
            token = torch.where(is_empty, self.rng.categorical(first_row, Purpose.EMPTY, 0, is_empty), token)
        else:
            batch.fail(empty=is_empty)
        is_fallback = is_fallback & batch.active

        # (Update log M) by the fallback's score; `verify` has pushed the accepted ones
        is_tested = _is_tested(accepted, num_usable, chunk.shape[1]) & batch.active[:, None]
        pushed = (
            torch.cat([_observed(scores, is_tested), score[:, None]], 1) if self.options.observed else score[:, None]
        )
        mpg_ext.update_bound_(bound.tensors(), pushed, is_fallback, constants=bound.constants())

        # Commit
        chunk[:, 0] = torch.where(is_fallback, token, chunk[:, 0])
        counts = torch.where(is_fallback, 1, accepted) * batch.active
        is_above = scores > log_bound[:, None]
        self.sums["rejected"] += batch.active & (accepted < num_usable)
        self.sums["salvaged"] += batch.active & (accepted < num_usable) & (accepted > 0)
        self.sums["fallbacks"] += is_fallback
        self.sums["drawn"] += is_fallback & ~is_empty
        self.sums["rs1_tries"] += torch.where(is_fallback & ~is_empty, 1 / accept_prob.double(), 0)
        self.sums["tested"] += is_tested.sum(1)
        self.sums["clipped"] += (is_tested & is_above).sum(1)
        self.sums["warmup_tokens"] += counts * is_warm
        self.sums["frozen_exceeded"] += is_frozen & (is_tested & is_above).any(1)
        if self.options.trace:
            first = (
                anchor_logits[:, :1],
                attribute_logits[:, :, :1],
                chunk[:, :1],
            )  # the token may be the fallback's now
            log_ratios = torch.cat([self.decide.score(*first)[0], log_ratios[:, :, 1:]], 2)
        batch.commit(chunk, counts, log_ratios)

    def statistics(self) -> dict[str, Tensor]:
        """The entries of `STATISTICS`, each (B,)."""
        sums, rounds = self.sums, self.batch.rounds
        return {
            "reject_rate": sums["rejected"] / rounds,
            "salvage_rate": sums["salvaged"] / rounds,
            "fallback_rate": sums["fallbacks"] / rounds,
            "clip_rate": sums["clipped"] / sums["tested"],
            "warmup_share": sums["warmup_tokens"] / self.batch.num_new_tokens(),
            "frozen_exceeded_rounds": sums["frozen_exceeded"],
            "expected_rs1_tries": sums["rs1_tries"] / sums["drawn"].clamp_min(1),
            "log_bound": self.bound.log_bound,
        }

    def _propose(self) -> tuple[Tensor, Tensor, Tensor]:
        """Draft K tokens from the warped base, one pass each.

        out: the chunk (B, K) int64, the base's own logits (B, K, V), and the row (B, V) its first token came from
        """
        batch, options = self.batch, self.options
        tokens, logits, rows = [batch.last_tokens()], [], []
        is_drafting = batch.active
        for index in range(options.chunk_size):
            is_drafting = is_drafting & batch.has_room(index)
            start = batch.lengths - 1 + index
            step = self.session.forward(("base",), tokens[-1][:, None], start, kv_length=batch.kv_length(index + 1))
            logits.append(step[0, :, 0])
            rows.append(self.ops.warp_rows(logits[-1].to(batch.weights.dtype), **options.warp()))
            batch.fail(unusable=is_drafting & rows[-1][:, 0].isnan())
            is_drafting = is_drafting & batch.active
            tokens.append(self.rng.categorical(rows[-1], Purpose.DRAFT, index, is_drafting))
            is_drafting = is_drafting & ~batch.is_eos(tokens[-1])
        return torch.stack(tokens[1:], 1), torch.stack(logits, 1), rows[0]


_SUMS = (
    "rejected",
    "salvaged",
    "fallbacks",
    "drawn",
    "rs1_tries",
    "tested",
    "clipped",
    "warmup_tokens",
    "frozen_exceeded",
)


def _is_tested(accepted: Tensor, num_usable: Tensor, chunk_size: int) -> Tensor:
    """Which prefixes a round tested: from the longest usable one down to the accepted one. out: (B, K) bool"""
    lengths = torch.arange(1, chunk_size + 1, device=accepted.device)
    return (lengths >= accepted[:, None]) & (lengths <= num_usable[:, None])


def _observed(scores: Tensor, is_tested: Tensor) -> Tensor:
    """The tested scores in the order of their tests, the longest prefix first; -inf elsewhere. out: (B, K)"""
    return torch.where(is_tested, scores, -torch.inf).flip(1)


class _Decisions:
    """What both ways of deciding share."""

    ops: Any

    def __init__(self, weights: Tensor, bound: Bound, options: Options):
        self.weights, self.bound, self.options = weights, bound, options

    def score(self, anchor_logits: Tensor, attribute_logits: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor]:
        """Log-ratios (N, B, K) and prefix scores (B, K) of a chunk, from logits."""
        anchor = self.ops.gather_logprobs(anchor_logits, chunk)
        attributes = torch.stack([self.ops.gather_logprobs(logits, chunk) for logits in attribute_logits])
        return self.ops.score_prefixes(attributes, anchor, self.weights, score=self.options.target)

    def push(self, scores: Tensor, accepted: Tensor, num_usable: Tensor) -> None:
        """Update the bound where a prefix was accepted, by its score, or by the scores of all tests if observed."""
        if self.options.observed:
            pushed = _observed(scores, _is_tested(accepted, num_usable, scores.shape[1]))
        else:
            pushed = scores.gather(1, (accepted - 1).clamp_min(0)[:, None])
        self.ops.update_bound_(self.bound.tensors(), pushed, accepted > 0, constants=self.bound.constants())


class _Fused(_Decisions):
    """By the compiled ops: results as `verify_chunks` and `draw_fallback` have them."""

    ops = mpg_ext

    def __init__(self, weights: Tensor, bound: Bound, options: Options, rng: KeyedGenerator):
        super().__init__(weights, bound, options)
        self.rng = rng

    def verify(
        self, anchor_logits: Tensor, attribute_logits: Tensor, chunk: Tensor, num_usable: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        uniforms = self.rng.uniforms(Purpose.ACCEPT, chunk.shape[1], num_usable > 0)
        if not self.options.observed:
            return mpg_ext.verify_chunks(
                anchor_logits, attribute_logits, chunk, num_usable, self.weights, uniforms, self.bound.tensors(),
                score=cast(Score, self.options.target), constants=self.bound.constants(),
            )  # fmt: skip
        log_ratios, scores = self.score(anchor_logits, attribute_logits, chunk)
        accepted = mpg_ext.accept_prefixes(scores, self.bound.log_bound, uniforms, num_usable)
        self.push(scores, accepted, num_usable)
        return log_ratios, scores, accepted

    def fall_back(
        self, anchor_logits: Tensor, attribute_logits: Tensor, draft_row: Tensor, is_fallback: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        uniforms = self.rng.uniforms(Purpose.FALLBACK, 1, is_fallback)[:, 0]
        return mpg_ext.draw_fallback(
            anchor_logits, attribute_logits, draft_row, self.weights, self.bound.log_bound, uniforms, is_fallback,
            score=cast(Score, self.options.target),
        )  # fmt: skip


class _Composed(_Decisions):
    """One by one, in plain torch: the path that the proofs enumerate."""

    ops = reference

    def __init__(self, weights: Tensor, bound: Bound, options: Options, rng: Generator):
        super().__init__(weights, bound, options)
        self.rng = rng

    def verify(
        self, anchor_logits: Tensor, attribute_logits: Tensor, chunk: Tensor, num_usable: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_ratios, scores = self.score(anchor_logits, attribute_logits, chunk)
        accept_probs = (scores - self.bound.log_bound[:, None]).clamp_max(0).exp()  # (B, K)
        is_usable = torch.arange(chunk.shape[1], device=chunk.device) < num_usable[:, None]
        accepted = -(scores.isnan() & is_usable).any(1).long()
        for length in range(chunk.shape[1], 0, -1):
            is_test = (accepted == 0) & (length <= num_usable)
            passed = self.rng.bernoulli(accept_probs[:, length - 1], Purpose.ACCEPT, length - 1, is_test)
            accepted = torch.where(is_test & passed, length, accepted)
        self.push(scores, accepted, num_usable)
        return log_ratios, scores, accepted

    def fall_back(
        self, anchor_logits: Tensor, attribute_logits: Tensor, draft_row: Tensor, is_fallback: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        masses, scores = reference.fallback_masses(
            anchor_logits, attribute_logits, draft_row, self.weights, self.bound.log_bound,
            score=cast(Score, self.options.target),
        )  # fmt: skip
        accept_prob = torch.where(is_fallback, masses.sum(1), 0)
        token = self.rng.categorical(masses, Purpose.FALLBACK, 0, accept_prob > 0)
        score = scores.gather(1, token[:, None])[:, 0]
        return token, score.where(accept_prob != 0, -torch.inf), accept_prob  # nothing drawn, no score to push
