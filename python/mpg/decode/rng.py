"""Where every random decision comes from: the fused ops, each on uniforms that have keys.

A key is (request seed, the request's own round, purpose, index) and no key is used twice. Keys by position would be
wrong: a position is drafted again after a rejection, and given the rejection its old uniform is no longer uniform.
So a request's uniforms depend on neither its batch nor its place there. Knows nothing of models or of what is drawn.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from torch import Tensor

import mpg_ext
from mpg.decode.bound import Bound


class Purpose(enum.IntEnum):
    """What a uniform decides; part of its key."""

    DRAFT = 0  # a drafted token, by its index in the chunk
    ACCEPT = 1  # one prefix of the chunk, by its length - 1
    FALLBACK = 2  # the single token after a rejected chunk
    EMPTY = 3  # the base's token where the fallback has none
    LAST = 4  # the token drawn from the target's row, or from what verification left of it


class Decisions:
    """What a sampler accepts and draws by, one op a decision, on Philox uniforms whose keys live on the device.

    seeds   (B,) int64, one per request
    rounds  (B,) int64, each request's round; the batch advances it

    A method that is named as an op of `mpg_ext` takes what that takes but for uniforms, and a bound for what it holds.
    `active`, where it is a callable, says whose decision counts, (B,) bool: the others' is garbage. Only what
    proves something of a sampler (tests/proof) calls it; here it costs nothing.
    """

    def __init__(self, seeds: Tensor, rounds: Tensor):
        self.seeds, self.rounds = seeds, rounds
        self._ahead: dict[Purpose, Tensor] = {}

    def draw_ahead(self, purpose: Purpose, count: int) -> None:
        """Draw at once what this round will ask for of a purpose: the uniforms of index 0, ..., count - 1."""
        drawn = mpg_ext.draw_uniforms(self.seeds, self.rounds, purpose=int(purpose), count=count)
        self._ahead[purpose] = drawn.T.contiguous()  # (count, B): one index at a time is asked for

    def uniforms(self, purpose: Purpose, count: int, active: Callable[[], Tensor], first: int = 0) -> Tensor:
        """Uniforms of index first, ..., first + count - 1. out: (B, count) float64 in [0, 1)"""
        if (ahead := self._ahead.get(purpose)) is not None:
            return ahead[first : first + count].T
        return mpg_ext.draw_uniforms(self.seeds, self.rounds, purpose=int(purpose), count=count, first=first)

    def bernoulli(self, probs: Tensor, purpose: Purpose, index: int, active: Callable[[], Tensor]) -> Tensor:
        """True with probability `probs` (B,) in [0, 1]. out: (B,) bool"""
        return self.uniforms(purpose, 1, active, index)[:, 0] < probs

    def categorical(self, rows: Tensor, purpose: Purpose, index: int, active: Callable[[], Tensor]) -> Tensor:
        """A token from each unnormalised row (B, V) >= 0. out: (B,) int64, in [0, V) even where a row is empty"""
        return mpg_ext.draw_tokens(rows, self.uniforms(purpose, 1, active, index)[:, 0])

    def accept_tokens(self, probs: Tensor, lengths: Tensor) -> Tensor:
        """The number of tokens before the first that fails, each passing with probability `probs` (B, K).

        lengths: (B,) int64, tokens that count
        out:     (B,) int64
        """
        uniforms = self.uniforms(Purpose.ACCEPT, probs.shape[1], lambda: lengths > 0)
        return (uniforms < probs).long().cumprod(1).sum(1).minimum(lengths)

    def accept_prefixes(self, scores: Tensor, log_bound: Tensor, lengths: Tensor) -> Tensor:
        uniforms = self.uniforms(Purpose.ACCEPT, scores.shape[1], lambda: lengths > 0)
        return mpg_ext.accept_prefixes(scores, log_bound, uniforms, lengths)

    def verify_chunks(
        self, anchor_logits: Tensor, attribute_logits: Tensor, tokens: Tensor, lengths: Tensor, bound: Bound
    ) -> tuple[Tensor, Tensor, Tensor]:
        uniforms = self.uniforms(Purpose.ACCEPT, tokens.shape[1], lambda: lengths > 0)
        return mpg_ext.verify_chunks(
            anchor_logits, attribute_logits, tokens, lengths, bound.weights, uniforms, bound.tensors(),
            score=bound.score, constants=bound.constants,
        )  # fmt: skip

    def draw_fallback(
        self, anchor_logits: Tensor, attribute_logits: Tensor, draft_probs: Tensor, bound: Bound, active: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        uniforms = self.uniforms(Purpose.FALLBACK, 1, lambda: active)[:, 0]
        return mpg_ext.draw_fallback(
            anchor_logits, attribute_logits, draft_probs, bound.weights, bound.log_bound, uniforms, active,
            score=bound.score,
        )  # fmt: skip

    def verify_block(
        self, target_probs: Tensor, draft_probs: Tensor | None, tokens: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        uniforms = self.uniforms(Purpose.ACCEPT, tokens.shape[1], lambda: lengths > 0)
        return mpg_ext.verify_block(target_probs, draft_probs, tokens, lengths, uniforms)

    def draw_residual(
        self,
        target_probs: Tensor,
        draft_probs: Tensor | None,
        tokens: Tensor,
        lengths: Tensor,
        accepted: Tensor,
        carry: Tensor,
        active: Callable[[], Tensor],
    ) -> Tensor:
        uniforms = self.uniforms(Purpose.LAST, 1, active)[:, 0]
        return mpg_ext.draw_residual(target_probs, draft_probs, tokens, lengths, accepted, carry, uniforms)
