"""What proposes tokens to the exact sampler. A draft changes the speed and never the law.

Knows how to draft and from which rows; nothing of targets or of what is accepted. A new draft is one more class.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

import mpg_ext
from mpg.decode.batch import Batch
from mpg.decode.rng import Decisions, Purpose
from mpg.decode.rows import process_rows
from mpg.decode.targets import is_one_model
from mpg.models.ensemble import Ensemble, Pass
from mpg.models.session import Role, Session
from mpg.options import Options

ROLES = {"reference": "base", "model": "draft", "merged": "merged"}  # the model behind each draft that has one


class Proposal(NamedTuple):
    """A drafted chunk of every sequence.

    chunk       (B, K) int64
    rows        (B, K, V), which its tokens were drawn from; None where each was the only choice
    num_usable  (B,) int64 in 0..K, its first tokens that were drafted and could be committed
    """

    chunk: Tensor
    rows: Tensor | None
    num_usable: Tensor


class Draft(Protocol):
    """Proposes a chunk for every active sequence.

    roles  the models that it feeds; none where it needs none
    """

    roles: tuple[Role, ...]

    def start(self, session: Session, batch: Batch, decide: Decisions) -> None: ...

    def propose(self, chunk_size: int) -> Proposal: ...

    def passes(self, num_drafts: int) -> list[Pass]:
        """Passes of the drafting alone, as in `Sampler`."""


class ModelDraft:
    """Drafts with a model of the same vocabulary, one pass a token; its rows are processed and warped as the target's
    are. That costs a call of the processors for every drafted token, and buys acceptance: what they exclude or push
    down in the target is then not drafted. A sequence fails where the model leaves no token to draw.

    is_verified  whether verification feeds this model too; if not, it has not read the chunk's last token when the next
                 round begins, and the first pass reads two tokens
    logits       what the tokens of the last chunk came from, each (B, V), as the model gave them
    """

    def __init__(self, role: str, options: Options, *, is_verified: bool):
        self.roles: tuple[Role, ...] = (role,)
        self.options, self.is_verified = options, is_verified

    def start(self, session: Session, batch: Batch, decide: Decisions) -> None:
        self.session, self.batch, self.decide = session, batch, decide

    def propose(self, chunk_size: int) -> Proposal:
        batch = self.batch
        tokens: list[Tensor] = []
        rows: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.decide.draw_ahead(Purpose.DRAFT, chunk_size)
        for index in range(chunk_size):
            self.logits.append(self._read_last() if index == 0 else self._read(tokens[-1], index))
            rows.append(self._probs(self.logits[-1], tokens, rows))
            active = partial(batch.is_open, tokens)
            tokens.append(self.decide.categorical(rows[-1], Purpose.DRAFT, index, active))
        chunk, draft_rows = torch.stack(tokens, 1), torch.stack(rows, 1)
        return Proposal(chunk, draft_rows, batch.count_usable(chunk, draft_rows))

    def passes(self, num_drafts: int) -> list[Pass]:
        return [(self.roles, 2 if index == 0 and not self.is_verified else 1) for index in range(num_drafts)]

    def _probs(self, logits: Tensor, tokens: list[Tensor], rows: list[Tensor]) -> Tensor:
        """What the next token is drawn from, (B, V), by the logits (B, V) behind the tokens drafted so far."""
        batch, dtype, warps = self.batch, self.batch.weights.dtype, self.batch.warps
        common = self.options if warps is None else warps.common
        plain = logits.softmax(-1, dtype) if common is None or common.is_plain else None
        if common is not None and plain is not None and batch.processors is None:
            return plain
        log_row = logits.to(dtype)
        if batch.processors is not None:
            log_row = self._process(log_row, tokens, rows)
        probs = mpg_ext.warp_rows(log_row, **(self.options.warp() if warps is None else warps.keywords(1)))
        if plain is None:
            return probs
        # to the last bit what a request without a processor has alone
        if batch.has_processor is not None:
            plain = probs.where(batch.has_processor[:, None], plain)
        return plain if warps is None or common is not None else plain.where(warps.is_plain[:, None], probs)

    def _process(self, log_row: Tensor, tokens: list[Tensor], rows: list[Tensor]) -> Tensor:
        """The row (B, V) behind the tokens drafted so far, processed; as it was without a processor, and where nothing
        would be left."""
        drafted, is_wanted = self.batch.tokens[:, :0], self.batch.is_open(tokens)
        if tokens:
            drafted = torch.stack(tokens, 1)
            is_wanted &= _count_drawn(torch.stack(rows, 1), drafted) == len(tokens)
        # the target's rows are logits too where they are one model's
        assert self.batch.has_processor is not None
        is_combined = self.batch.has_processor & ~is_one_model(self.batch.weights, self.options.target)
        log_row = torch.where(is_combined[:, None], log_row.log_softmax(-1), log_row)
        processed = process_rows(self.batch, log_row[:, None], drafted, is_wanted.long())[:, 0]
        return torch.where(processed.amax(-1, keepdim=True) == -torch.inf, log_row, processed)

    def _read_last(self) -> Tensor:
        """Logits after the last committed token. out: (B, V)"""
        batch = self.batch
        if self.is_verified:
            return self._read(batch.last_tokens, 0)
        has_new = batch.num_new_tokens() > 0  # of the prompt all but the last is read: that is fed twice, once in vain
        start = batch.lengths - 1 - has_new.long()
        input_tokens = torch.stack([batch.tokens.gather(1, start[:, None])[:, 0], batch.last_tokens], 1)
        logits = self.session.forward(self.roles, input_tokens, start, kv_length=batch.kv_length(2))[0]
        return torch.where(has_new[:, None], logits[:, 1], logits[:, 0])

    def _read(self, token: Tensor, index: int) -> Tensor:
        start, kv_length = self.batch.lengths + (index - 1), self.batch.kv_length(index + 1)
        return self.session.forward(self.roles, token[:, None], start, kv_length=kv_length)[0, :, 0]


def _count_drawn(rows: Tensor, chunk: Tensor) -> Tensor:
    """Tokens of a chunk (B, K) before the first that its row (B, K, V), unusable or empty, did not give. out: (B,)"""
    return (rows.gather(2, chunk[..., None])[..., 0] > 0).cumprod(1).sum(1)


class LookupDraft:
    """Prompt lookup: what followed the latest earlier occurrence of the last n tokens, the largest n <= 3 that has one.

    (Saxena, "Prompt lookup decoding", 2023.) Needs no model; where nothing matches it drafts nothing.
    """

    roles: tuple[Role, ...] = ()

    def start(self, session: Session, batch: Batch, decide: Decisions) -> None:
        self.batch = batch

    def propose(self, chunk_size: int) -> Proposal:
        batch = self.batch
        positions = torch.arange(batch.capacity, device=batch.tokens.device)
        is_earlier = positions < batch.lengths[:, None] - 1  # (B, L): ends of earlier occurrences
        match = torch.full_like(batch.lengths, -1)
        agrees = is_earlier
        for n in range(1, 4):  # does the n-gram that ends here agree with the last n tokens?
            last = batch.tokens.gather(1, (batch.lengths - n).clamp_min(0)[:, None])
            shifted = batch.tokens.roll(n - 1, 1)
            agrees = agrees & (shifted == last) & (positions >= n - 1)
            latest = torch.where(agrees, positions, -1).amax(1)
            match = torch.where(latest >= 0, latest, match)
        following = match[:, None] + 1 + torch.arange(chunk_size, device=match.device)
        chunk = batch.tokens.gather(1, following.clamp_max(batch.capacity - 1))
        num_drafted = torch.where(match >= 0, (batch.lengths - 1 - match).clamp_max(chunk_size), 0)
        return Proposal(chunk, None, batch.count_usable(chunk, most=num_drafted))

    def passes(self, num_drafts: int) -> list[Pass]:
        return []


def merged_shares(weights: Tensor, target: str) -> Tensor:
    """The adapters' weights in the role "merged" that lie nearest to a target: alpha, or its share in a mixture.

    weights: (B, N), alpha
    out: (B, N)
    """
    if target != "arithmetic":
        return weights
    total = weights.sum(1, keepdim=True)
    return torch.where(total == 0, 0, weights / total)  # of contexts alone none is left to merge


def needs_base(models: Ensemble, options: Options) -> bool:
    """Whether a sampler runs the base whatever the target makes of it: to draft, or to judge as those of SCR's kind."""
    if options.sampler != "exact":
        return options.sampler != "direct"
    role = ROLES.get(options.draft)
    return role in ("base", "draft") and models.is_same(role, "base")


def make_draft(models: Ensemble, verified: tuple[str, ...], options: Options) -> Draft:
    """The draft that the options name. `verified`: the roles that every verification feeds."""
    if options.draft == "lookup":
        return LookupDraft()
    role = ROLES[options.draft]
    return ModelDraft(role, options, is_verified=any(models.is_same(role, other) for other in verified))
