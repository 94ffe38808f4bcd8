"""A sampler's decisions step by step, by the rules of the fused ops: what a proof can follow, branch by branch.

Every probability is the plain-torch twins', every choice one call of `bernoulli` or `categorical`.
"""

from __future__ import annotations

import torch
from torch import Tensor

import reference
from mpg.decode.bound import Bound
from mpg.decode.rng import Decisions, Purpose


class Composed(Decisions):
    def accept_tokens(self, probs: Tensor, lengths: Tensor) -> Tensor:
        accepted = torch.zeros_like(lengths)
        for length in range(1, probs.shape[1] + 1):  # left to right until one fails
            is_test = (accepted == length - 1) & (length <= lengths)
            accepted = self._test(probs, accepted, length, is_test)
        return accepted

    def accept_prefixes(self, scores: Tensor, log_bound: Tensor, lengths: Tensor) -> Tensor:
        is_usable = torch.arange(scores.shape[1]) < lengths[:, None]
        is_bad = (scores.isnan() & is_usable).any(1)
        accepted = self._accept_longest((scores - log_bound[:, None]).clamp_max(0).exp(), lengths * ~is_bad)
        return accepted.where(~is_bad, -1)

    def verify_chunks(
        self, anchor_logits: Tensor, attribute_logits: Tensor, tokens: Tensor, lengths: Tensor, bound: Bound
    ) -> tuple[Tensor, Tensor, Tensor]:
        anchor = reference.gather_logprobs(anchor_logits, tokens)
        attributes = torch.stack([reference.gather_logprobs(logits, tokens) for logits in attribute_logits])
        log_ratios, scores = reference.score_prefixes(attributes, anchor, bound.weights, score=bound.score)
        accepted = self.accept_prefixes(scores, bound.log_bound, lengths)
        bound.update(scores.gather(1, (accepted - 1).clamp_min(0)[:, None]), accepted > 0)
        return log_ratios, scores, accepted

    def draw_fallback(
        self, anchor_logits: Tensor, attribute_logits: Tensor, draft_probs: Tensor, bound: Bound, active: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        masses, scores = reference.fallback_masses(
            anchor_logits, attribute_logits, draft_probs, bound.weights, bound.log_bound, score=bound.score
        )
        accept_prob = masses.sum(1).where(active, 0)
        token = self.categorical(masses, Purpose.FALLBACK, 0, lambda: accept_prob > 0)
        drawn = scores.gather(1, token[:, None])[:, 0]
        token = token.where(~accept_prob.isnan(), -2).where(accept_prob != 0, -1)
        return token, drawn.where(accept_prob != 0, -torch.inf), accept_prob  # nothing drawn, no score to push

    def verify_block(
        self, target_probs: Tensor, draft_probs: Tensor | None, tokens: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        probs, carry = reference.block_accept_probs(target_probs, draft_probs, tokens, lengths)
        is_bad = probs.isnan().any(1)
        accepted = self._accept_longest(probs, lengths * ~is_bad)
        return accepted.where(~is_bad, -1), carry.gather(1, accepted[:, None])[:, 0]

    def draw_residual(
        self,
        target_probs: Tensor,
        draft_probs: Tensor | None,
        tokens: Tensor,
        lengths: Tensor,
        accepted: Tensor,
        carry: Tensor,
        active: Tensor,
    ) -> Tensor:
        residual = reference.residual_rows(target_probs, draft_probs, tokens, lengths, accepted, carry)
        return self.categorical(residual, Purpose.LAST, 0, active)

    def _accept_longest(self, probs: Tensor, lengths: Tensor) -> Tensor:
        """The longest prefix that passes, each with its probability (B, K). out: (B,) int64"""
        accepted = torch.zeros_like(lengths)
        for length in range(probs.shape[1], 0, -1):
            accepted = self._test(probs, accepted, length, (accepted == 0) & (length <= lengths))
        return accepted

    def _test(self, probs: Tensor, accepted: Tensor, length: int, is_test: Tensor) -> Tensor:
        passed = self.bernoulli(probs[:, length - 1], Purpose.ACCEPT, length - 1, lambda: is_test)
        return torch.where(is_test & passed, length, accepted)
