"""The sequences being decoded: their tokens, limits and state, all on the device. Knows no model and no sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class HostState(NamedTuple):
    """A batch as the host sees it after a round, one entry a sequence; see `Batch`."""

    lengths: list[int]
    active: list[int]
    unusable: list[int]
    empty: list[int]
    draft_lengths: list[int]


class Batch:
    """B sequences that advance together, each by its own number of tokens a round.

    tokens      (B, capacity) int64, prompt and committed tokens; nothing meaningful from `lengths` on
    lengths     (B,) int64, committed tokens, the prompt among them
    limits      (B,) int64, what `lengths` may grow to
    weights     (B, N), alpha
    seeds       (B,) int64
    rounds      (B,) int64, rounds each request has seen: part of its uniforms' keys
    active      (B,) bool, neither ended by an end-of-sequence token nor full
    unusable    (B,) bool, a model returned NaN or +inf for it
    empty       (B,) bool, no token was left to draw
    draft_lengths  (B,) int64, tokens that each request drafts next, where its sampler adapts them, else None
    log_ratios  (B, capacity, N) of each committed token under each attribute, or None when not traced

    A sequence that became unusable or empty is no longer active and committed nothing in that round.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        weights: Tensor,
        seeds: Tensor,
        eos_token_ids: Sequence[int],
        *,
        trace: bool = False,
    ):
        device, num_rows = weights.device, len(prompts)
        prompt_lengths = [len(prompt) for prompt in prompts]
        limits = [length + new for length, new in zip(prompt_lengths, max_new_tokens, strict=True)]
        self.capacity = max(limits)
        padded = [[*prompt, *[0] * (self.capacity - len(prompt))] for prompt in prompts]
        self.tokens = torch.tensor(padded, device=device)
        self.prompt_lengths = torch.tensor(prompt_lengths, device=device)
        self.lengths = self.prompt_lengths.clone()
        self.limits = torch.tensor(limits, device=device)
        self.eos_token_ids = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=device)
        self.weights, self.seeds = weights, seeds
        self.rounds = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.active = self.lengths < self.limits
        self.unusable = torch.zeros_like(self.active)
        self.empty = torch.zeros_like(self.active)
        self.log_ratios = weights.new_zeros(num_rows, self.capacity, weights.shape[1]) if trace else None
        self.draft_lengths: Tensor | None = None
        self.longest, self.longest_draft = max(prompt_lengths), 0  # what the host steers by: see `read`

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def read(self) -> HostState:
        """Bring the state to the host, in one transfer, and steer the next round by it."""
        drafts = torch.zeros_like(self.lengths) if self.draft_lengths is None else self.draft_lengths * self.active
        state = HostState(
            *torch.stack([self.lengths, self.active.long(), self.unusable.long(), self.empty.long(), drafts]).tolist()
        )
        self.longest, self.longest_draft = max(state.lengths), max(state.draft_lengths)
        return state

    def num_new_tokens(self) -> Tensor:
        """Tokens committed since the prompt. out: (B,) int64"""
        return self.lengths - self.prompt_lengths

    def kv_length(self, width: int) -> int:
        """Cache positions in use once `width` tokens are fed from the last committed one on."""
        return min(self.longest - 1 + width, self.capacity)

    def last_tokens(self) -> Tensor:
        """The last committed token of every sequence. out: (B,) int64"""
        return self.tokens.gather(1, self.lengths[:, None] - 1)[:, 0]

    def is_eos(self, tokens: Tensor) -> Tensor:
        """Whether tokens end their sequence. out: bool, of the shape of `tokens`"""
        return (tokens[..., None] == self.eos_token_ids).any(-1)

    def has_room(self, index: int) -> Tensor:
        """Whether a chunk's token number `index` (from 0) could be committed. out: (B,) bool"""
        has_room = self.lengths + index < self.limits
        return has_room if self.draft_lengths is None else has_room & (index < self.draft_lengths)

    def count_usable(self, chunk: Tensor) -> Tensor:
        """min(K, tokens left, position of the first end-of-sequence token, draft length), 0 where inactive.

        chunk: (B, K) int64, drafted tokens
        out: (B,) int64
        """
        before_or_at_eos = self.is_eos(chunk).cumsum(1) - self.is_eos(chunk).long() == 0
        num_usable = torch.minimum(before_or_at_eos.sum(1), self.limits - self.lengths)
        if self.draft_lengths is not None:
            num_usable = torch.minimum(num_usable, self.draft_lengths)
        return num_usable * self.active

    def fail(self, *, unusable: Tensor | None = None, empty: Tensor | None = None) -> None:
        """Stop the active sequences where a mask (B,) bool says so, and note why."""
        for flag, mask in ((self.unusable, unusable), (self.empty, empty)):
            if mask is not None:
                flag |= mask & self.active
        self.active = self.active & ~self.unusable & ~self.empty

    def commit(self, chunk: Tensor, counts: Tensor, log_ratios: Tensor | None = None) -> None:
        """Append the first counts[b] tokens of chunk[b] to every active sequence, and end its round.

        chunk       (B, K) int64
        counts      (B,) int64 in 0..K, at most what `count_usable` says; ignored where inactive
        log_ratios  (N, B, K) of the chunk, where the batch traces them
        """
        counts = counts * self.active
        index = torch.arange(chunk.shape[1], device=chunk.device)
        positions = (self.lengths[:, None] + index).clamp_max(self.capacity - 1)
        is_new = index < counts[:, None]
        # positions past the end collapse onto the last one, so add differences: those of discarded tokens are 0
        self.tokens.scatter_add_(1, positions, (chunk - self.tokens.gather(1, positions)) * is_new)
        if self.log_ratios is not None:
            assert log_ratios is not None
            where = positions[..., None].expand(-1, -1, self.log_ratios.shape[2])
            new = torch.where(is_new[..., None], log_ratios.movedim(0, 2), 0)
            self.log_ratios.scatter_add_(1, where, new)
        self.lengths = self.lengths + counts
        self.rounds += self.active
        ended = self.is_eos(self.last_tokens()) & (counts > 0)
        self.active = self.active & ~ended & (self.lengths < self.limits)
