"""The paper's two rejection baselines (section 4.5), a token or a whole text at a time: approximate, bounded in tries.

Both draw candidates from the warped base and accept one with probability min(1, S / M), M being SCR's online bound
(`mpg.decode.bound`). After `tries` rejections the last candidate is taken and counted. Neither is exact: M may be too
small.
"""

from __future__ import annotations

import torch
from torch import Tensor

import mpg_ext
from mpg.decode.batch import Batch
from mpg.decode.bound import Bound
from mpg.decode.rng import Decisions, Purpose
from mpg.decode.rows import logprobs_of
from mpg.models.ensemble import Ensemble, Pass
from mpg.models.session import Role, Session
from mpg.options import Options

# Every statistic with its denominator.
STATISTICS = {
    "reject_rate": "candidates rejected / candidates tried, both expected under token-rs",
    "capped_rate": "tokens (token-rs) or texts (seq-rs) taken after as many rejections as are allowed / all taken",
    "num_tries": "candidates tried: tokens, as expected (token-rs), or texts (seq-rs) (a count)",
    "log_bound": "log M after the last round (natural logarithm)",
}


class _Rejection:
    """What both share: the base draws; the anchor (unless it is the base) and the attributes score; M is a bound.

    Tries and rejections are counted as float64: they may be expected numbers.
    """

    num_tries: Tensor
    num_rejected: Tensor
    num_capped: Tensor

    def __init__(self, models: Ensemble, attributes: tuple[Role, ...], options: Options):
        anchor = () if models.is_same("base", "anchor") else ("anchor",)
        self.options, self.roles = options, ("base", *anchor, *attributes)

    def start(self, session: Session, batch: Batch, decide: Decisions) -> None:
        self.session, self.batch, self.decide = session, batch, decide
        self.bound = Bound(self.options, batch)
        for name in ("num_tries", "num_rejected", "num_capped"):
            batch.state.hold(self, name, batch.state.zeros(dtype=torch.float64))

    def reset(self, rows: Tensor) -> None:
        self.bound.reset(rows, self.batch.weights[rows])
        self.num_tries[rows] = self.num_rejected[rows] = self.num_capped[rows] = 0

    def reach(self) -> int:
        return 1

    def passes(self, num_drafts: int) -> list[Pass]:
        return [(self.roles, 1)]

    def statistics(self) -> dict[str, Tensor]:
        return {
            "reject_rate": self.num_rejected / self.num_tries,
            "capped_rate": self.num_capped / self.batch.num_new_tokens(),
            "num_tries": self.num_tries,
            "log_bound": self.bound.log_bound,
        }


class TokenRS(_Rejection):
    """Token-level rejection sampling. See `Sampler` for the interface.

    Every candidate of one position comes from the same row and meets the same M, so the loop is drawn in closed form:
    with a = sum_y q(y) min(1, S(y) / M), some try succeeds with probability 1 - (1 - a)^tries, and what is taken then
    has the law of an accepted candidate, else that of a rejected one.
    """

    def round(self) -> None:
        batch, bound = self.batch, self.bound

        # One pass of every model over the last token
        input_tokens = batch.last_tokens[:, None]
        kv_length = batch.kv_length(1)
        logits = self.session.forward(self.roles, input_tokens, batch.lengths - 1, kv_length=kv_length)[:, :, 0]
        scored = _scored(logits, self.bound.weights)
        draft_row = mpg_ext.warp_rows(logits[0].to(self.bound.weights.dtype), **self.options.warp())

        # Accept one of the candidates, or take the last
        scores = _token_scores(scored, bound)
        draft_row = draft_row.double()
        masses = torch.where(draft_row == 0, 0, draft_row * (scores - bound.log_bound[:, None]).clamp_max(0).exp())
        accept_prob = (masses.sum(1) / draft_row.sum(1)).clamp_max(1)  # a: of one try
        batch.fail(accept_prob.isnan())
        success_prob = -torch.expm1(self.options.tries * torch.log1p(-accept_prob))  # 1 - (1 - a)^tries
        is_accepted = self.decide.bernoulli(success_prob, Purpose.ACCEPT, 0, lambda: batch.active)
        taken = torch.where(is_accepted[:, None], masses, draft_row - masses)
        token = self.decide.categorical(taken, Purpose.DRAFT, 0, lambda: batch.active)

        # Update log M by an accepted score; the others of the loop were never seen
        pushed = torch.where(is_accepted, scores.gather(1, token[:, None])[:, 0], -torch.inf)
        bound.update(pushed[:, None], batch.active)

        # Commit
        num_tries = torch.where(accept_prob > 0, success_prob / accept_prob, self.options.tries)
        self.num_tries += num_tries.where(batch.active, 0)
        self.num_rejected += (num_tries - success_prob).where(batch.active, 0)
        self.num_capped += batch.active & ~is_accepted
        batch.commit(token[:, None][:, :0], batch.none, token)
        if batch.is_traced:
            logprobs = logprobs_of(scored[:, :, None], token[:, None])
            batch.trace(logprobs[1:] - logprobs[:1])


class SeqRS(_Rejection):
    """Sequence-level rejection sampling. See `Sampler` for the interface.

    A round draws one token of every sequence's candidate text while all attributes read along; a text that ends is
    tested, and either committed whole or begun again from the prompt. Every tested score goes into the bound: a request
    has one accepted text at most, so accepted scores alone could not estimate anything.
    """

    texts: Tensor
    sizes: Tensor
    last: Tensor
    logprobs: Tensor  # (B, 1 + N, capacity)

    def start(self, session: Session, batch: Batch, decide: Decisions) -> None:
        super().start(session, batch, decide)
        # the candidate texts: their tokens, sizes and last tokens, and log-probabilities under anchor and attributes
        state, dtype = batch.state, self.bound.weights.dtype
        state.hold(self, "texts", state.zeros(batch.capacity))
        state.hold(self, "sizes", state.zeros())
        state.hold(self, "last", state.zeros())
        self.last.copy_(batch.last_tokens)
        logprobs = state.zeros(1 + state.most_attributes, batch.capacity, dtype=dtype)
        state.hold(self, "logprobs", logprobs, by_attribute=True)

    def reach(self) -> int:
        return self.batch.num_rounds + 1  # no candidate is longer

    def reset(self, rows: Tensor) -> None:
        super().reset(rows)
        self.sizes[rows] = 0
        self.last[rows] = self.batch.last_tokens[rows]
        self.logprobs[rows] = 0

    def round(self) -> None:
        batch, bound = self.batch, self.bound

        # The candidate's next token, from the warped base
        start, kv_length = batch.lengths - 1 + self.sizes, batch.kv_length(self.reach())
        logits = self.session.forward(self.roles, self.last[:, None], start, kv_length=kv_length)[:, :, 0]
        draft_row = mpg_ext.warp_rows(logits[0].to(self.bound.weights.dtype), **self.options.warp())
        token = self.decide.categorical(draft_row, Purpose.DRAFT, 0, lambda: batch.active)
        where = self.sizes.clamp_max(batch.capacity - 1)[:, None]
        logprobs = logprobs_of(_scored(logits, bound.weights)[:, :, None], token[:, None])
        self.texts.scatter_(1, where, token[:, None])
        self.logprobs.scatter_(2, where[:, None].expand(-1, len(logprobs), -1), logprobs.transpose(0, 1))
        self.sizes += 1

        # Accept a whole text with probability min(1, S / M), or take the last one allowed
        of_text = self.logprobs.sum(2).T[..., None]
        score = mpg_ext.score_prefixes(of_text[1:], of_text[0], bound.weights, score=bound.score)[1][:, 0]
        has_token = draft_row.gather(1, token[:, None])[:, 0] > 0
        batch.fail(~has_token | score.isnan())
        is_whole = batch.active & (batch.is_eos(token) | (batch.lengths + self.sizes >= batch.limits))
        accept_prob = (score - bound.log_bound).clamp_max(0).exp()
        is_accepted = self.decide.bernoulli(accept_prob, Purpose.ACCEPT, 0, lambda: is_whole)
        self.num_tries += is_whole
        self.num_rejected += is_whole & ~is_accepted
        is_capped = is_whole & ~is_accepted & (self.num_tries >= self.options.tries)
        self.num_capped += is_capped
        bound.update(score[:, None], is_whole)

        # Commit it, or start again
        counts = torch.where(is_whole & is_accepted | is_capped, self.sizes, 0)
        self.sizes.masked_fill_(is_whole | ~batch.active, 0)
        self.last.copy_(torch.where(is_whole, batch.last_tokens.clone(), token))
        batch.commit(self.texts, counts)
        if batch.is_traced:
            batch.trace((self.logprobs[:, 1:] - self.logprobs[:, :1]).transpose(0, 1))
        self.logprobs.masked_fill_(is_whole[:, None, None], 0)

    def statistics(self) -> dict[str, Tensor]:
        return super().statistics() | {"capped_rate": self.num_capped}  # of one text


def _scored(logits: Tensor, weights: Tensor) -> Tensor:
    """The anchor's and the attributes' of all roles' logits. out: (1 + N, B, V)"""
    return logits[-1 - weights.shape[1] :]


def _token_scores(logits: Tensor, bound: Bound) -> Tensor:
    """log S of every token, by the anchor's and the attributes' logits (1 + N, B, V). out: (B, V)"""
    logprobs = logits.to(bound.weights.dtype).log_softmax(-1).flatten(1)[..., None]  # of B V prefixes of one token
    of_token = bound.weights.repeat_interleave(logits.shape[2], 0)
    _, scores = mpg_ext.score_prefixes(logprobs[1:], logprobs[0], of_token, score=bound.score)
    return scores.view(logits.shape[1:])
