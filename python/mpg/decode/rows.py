"""The target's rows along a text: the models they come from, the weights as they stand, the processors, the warp.

Shared by the samplers that draw from the target itself. Knows no draft and no acceptance.
"""

from __future__ import annotations

import torch
from torch import Tensor

import mpg_ext
from mpg.decode.batch import Batch, Logprobs
from mpg.decode.targets import TARGETS, is_one_model, references
from mpg.models.ensemble import Ensemble
from mpg.models.session import Role
from mpg.options import Options


class TargetRows:
    """Rows of the target of one batch.

    roles    whose logits `of` takes, in this order
    """

    _carried: Tensor

    def __init__(self, models: Ensemble, attributes: tuple[Role, ...], options: Options):
        self.options, self.combine = options, TARGETS[options.target]
        self.anchor_is_base = models.is_same("base", "anchor")
        if options.span != 1 and not self.anchor_is_base:
            raise ValueError(
                "mixture_span: expected 'token' where the anchor is not the base, the mixture being of ratios; "
                f"got {options.mixture_span!r}"
            )
        self.references = references(options.target, self.anchor_is_base)
        self.roles = (*self.references, *attributes)

    def start(self, batch: Batch) -> None:
        self.batch, state = batch, batch.state
        if self.options.span != 1:
            state.hold(
                self, "_carried", state.zeros(state.most_attributes, dtype=batch.weights.dtype), by_attribute=True
            )
            self._carried.copy_(batch.weights)

    def reset(self, rows: Tensor) -> None:
        if self.options.span != 1:
            self._carried[rows] = self.batch.weights[rows]

    @property
    def weights(self) -> Tensor:
        """The weights (B, N) at the next token: alpha, unless the mixture spans more than a token. Then w_i *= pi_i(y)
        after every committed y, rescaled, and alpha again at each multiple of the span."""
        return self.batch.weights if self.options.span == 1 else self._carried

    def of(self, logits: Tensor, chunk: Tensor, num_usable: Tensor) -> tuple[Tensor, Tensor]:
        """The target's rows after the last committed token and after each drafted one.

        logits:     (len(roles), B, K + 1, V), after the last committed token, C_1, ..., C_K
        chunk:      (B, K) int64
        num_usable: (B,) int64 in 0..K, drafted tokens that could be committed; rows behind them are meaningless

        out: probabilities (B, K + 1, V): combined, normalised, processed, warped; zeros where nothing is left. And the
        logarithm (B, K + 1) of what each row was divided by: -inf where it is empty, NaN where a model's logits are
        unusable
        """
        base, anchor, attributes = self._split(logits)
        self.chunk_weights = self._weights_along(attributes, chunk)
        warps, processors = self.batch.warps, self.batch.processors
        common = self.options if warps is None else warps.common
        is_fused = common is not None and common.is_uncut
        if common is not None and is_fused:
            own_probs, own_totals = self.combine(base, anchor, attributes, self.chunk_weights, common.temperature)
            if processors is None:
                return own_probs, own_totals
        log_rows, log_totals = self.combine(base, anchor, attributes, self.chunk_weights, None)
        if processors is not None:
            num_rows = num_usable + (num_usable < self.batch.ends_at(chunk))
            scores = self._scores(base, attributes, log_rows)
            log_rows = process_rows(self.batch, scores, chunk, num_rows * self.batch.active)
            log_totals = log_totals.where(log_rows.amax(-1) != -torch.inf, -torch.inf)
        warp = self.options.warp() if warps is None else warps.keywords(log_rows.shape[1])
        probs = mpg_ext.warp_rows(log_rows.flatten(0, 1), **warp).view_as(log_rows)
        if warps is not None and common is None:
            self._warp_as_alone(probs, base, anchor, attributes)
        if is_fused:  # to the last bit what a request without a processor has alone
            assert self.batch.has_processor is not None
            probs = probs.where(self.batch.has_processor[:, None, None], own_probs)
        return probs, log_totals

    def _warp_as_alone(self, probs: Tensor, base: Tensor | None, anchor: Tensor | None, attributes: Tensor) -> None:
        """Let the probabilities of requests without cuts and processors be to the last bit what each has alone."""
        assert self.batch.warps is not None
        for temperature, rows in self.batch.warps.fused.items():
            own_base = None if base is None else base.index_select(0, rows)
            own_anchor = own_base if anchor is base or anchor is None else anchor.index_select(0, rows)
            weights = self.chunk_weights.index_select(0, rows)
            own, _ = self.combine(own_base, own_anchor, attributes.index_select(1, rows), weights, temperature)
            if self.batch.has_processor is not None:
                is_processed = self.batch.has_processor.index_select(0, rows)[:, None, None]
                own = torch.where(is_processed, probs.index_select(0, rows), own)
            probs.index_copy_(0, rows, own)

    def commit(self, logits: Tensor, accepted: Tensor, token: Tensor) -> None:
        """Move the weights behind `accepted` (B,) drafted tokens and the one `token` (B,) that follows them."""
        if self.options.span == 1:
            return
        accepted = accepted.clamp_min(0)  # of a row that has failed
        _, _, attributes = self._split(logits)
        row = accepted.view(1, -1, 1, 1).expand(len(attributes), -1, 1, attributes.shape[3])
        logprobs = logprobs_of(attributes.gather(2, row), token[:, None])[:, :, 0]
        index = accepted.view(-1, 1, 1).expand(-1, 1, self.chunk_weights.shape[2])
        weights = self.chunk_weights.gather(1, index)[:, 0]
        self._carried.copy_(self._advance(weights, logprobs, self.batch.num_new_tokens() + accepted + 1))

    def log_ratios(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """log pi_i - log anchor of the tokens (B, K + 1) that `logits` came before; against the target's row as it
        was combined where the target runs no anchor. out: (N, B, K + 1)"""
        base, anchor, attributes = self._split(logits)
        ratios = logprobs_of(attributes, tokens)
        if anchor is not None:
            return ratios - logprobs_of(anchor[None], tokens)
        log_rows, _ = self.combine(base, anchor, attributes, self.chunk_weights, None)
        return ratios - log_rows.gather(2, tokens[..., None])[..., 0]

    def logprobs(self, logits: Tensor, tokens: Tensor, num_top: int) -> Logprobs:
        """The combined rows' log-probabilities of the tokens (B, K + 1) that `logits` came before, and the largest."""
        log_rows, _ = self.combine(*self._split(logits), self.chunk_weights, None)
        top, ids = log_rows.topk(min(num_top, log_rows.shape[-1]), -1)
        return Logprobs(log_rows.gather(2, tokens[..., None])[..., 0], top, ids)

    def _scores(self, base: Tensor | None, attributes: Tensor, log_rows: Tensor) -> Tensor:
        """What processors get: log-probabilities (B, K + 1, V), or the logits of the model whose row alone it is, as
        transformers has it."""
        if not self.anchor_is_base and self.options.target != "base":
            return log_rows
        weights = self.batch.weights
        assert self.batch.has_processor is not None
        is_own = self.batch.has_processor & is_one_model(weights, self.options.target)
        rows = torch.arange(len(weights), device=log_rows.device)
        own = base if self.options.target == "base" else attributes[weights.argmax(1), rows]
        assert own is not None
        return torch.where(is_own[:, None, None] & ~log_rows.isnan(), own.to(log_rows.dtype), log_rows)

    def _split(self, logits: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        if not self.references:
            return None, None, logits
        base, anchor = logits[0], logits[len(self.references) - 1]
        return base, (base if len(self.references) == 1 else anchor), logits[len(self.references) :]

    def _weights_along(self, attributes: Tensor, chunk: Tensor) -> Tensor:
        """The weights (B, K + 1, N) at the next token and after each drafted one."""
        if self.options.span == 1:
            return self.weights[:, None].expand(-1, chunk.shape[1] + 1, -1)
        logprobs = logprobs_of(attributes, torch.nn.functional.pad(chunk, (0, 1)))  # of no token after the last row
        along = [self.weights]
        for index in range(chunk.shape[1]):
            num_tokens = self.batch.num_new_tokens() + index + 1
            along.append(self._advance(along[-1], logprobs[:, :, index], num_tokens))
        return torch.stack(along, 1)

    def _advance(self, weights: Tensor, logprobs: Tensor, num_tokens: Tensor) -> Tensor:
        """The weights after a token of log-probability (N, B), the `num_tokens`-th new one."""
        log_sizes = torch.where(weights == 0, -torch.inf, weights.abs().log() + logprobs.T)
        largest = log_sizes.amax(1, keepdim=True)
        carried = weights.sign() * (log_sizes - torch.where(largest == -torch.inf, 0, largest)).exp()
        if self.options.span is None:
            return carried
        return torch.where((num_tokens % self.options.span == 0)[:, None], self.batch.weights, carried)


def logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Unwarped log-probabilities (N, B, P) of tokens (B, P), each after its row of logits (N, B, P, V)."""
    every = tokens.flatten().repeat(len(logits))
    return mpg_ext.gather_logprobs(logits.flatten(0, 2)[:, None], every[:, None]).view(logits.shape[:3])


def process_rows(batch: Batch, log_rows: Tensor, drafted: Tensor, num_wanted: Tensor) -> Tensor:
    """What the logits processors of each sequence make of its rows: one call a row, with every token before it and
    nothing else. A processor has transformers' protocol, processor(input_ids (1, L), scores (1, V)) -> scores (1, V).

    log_rows:   (B, P, V) log-probabilities up to a constant, the rows behind the last P prefixes of `drafted`
    drafted:    (B, D) int64, tokens after the committed ones, D >= P - 1
    num_wanted: (B,) int64 in 0..P, rows of each sequence that a token may still be drawn from

    out: (B, P, V), not normalised; -inf throughout where nothing is left

    A history holds the sequence's own tokens alone: no padding, nothing of its neighbours, and no drafted token that
    the row before it excludes. Behind such a token, beyond `num_wanted`, and where a row is empty or unusable already,
    rows stay as they are: no text leads there. Waits for the device.

    What a processor raises, or a ValueError where it returns NaN, +inf or another shape, ends its sequence's request as
    `batch.errors` says.
    """
    assert batch.processors is not None
    largest = log_rows.amax(-1)  # (B, P)
    lengths, counts = torch.stack([batch.lengths, num_wanted]).tolist()
    is_usable = largest.isfinite().tolist()
    processed = log_rows.clone()
    num_before = drafted.shape[1] - log_rows.shape[1] + 1  # drafted tokens before the first row
    for b, processor in enumerate(batch.processors):
        if processor is None:
            continue
        history = torch.cat([batch.tokens[b, : lengths[b]], drafted[b]])[None]
        for p in range(counts[b]):
            if not is_usable[b][p]:
                break
            try:
                row = processed[b, p]
                row.copy_(_checked(processor(history[:, : lengths[b] + num_before + p], row[None]), len(row)))
            except Exception as error:  # whatever a caller's processor raises
                batch.errors[b] = error
                break
            if p + 1 < counts[b] and processed[b, p, drafted[b, num_before + p]] == -torch.inf:
                break
    if batch.errors:
        batch.stop(list(batch.errors))
    return processed


def _checked(scores: Tensor, vocab_size: int) -> Tensor:
    """The row (V,) of scores that a processor returned."""
    if not isinstance(scores, Tensor) or scores.shape != (1, vocab_size):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"logits_processor: expected scores (1, {vocab_size}) from every processor, got {got}")
    if not scores.is_floating_point():
        raise ValueError(f"logits_processor: expected floating-point scores from every processor, got {scores.dtype}")
    if not scores.amax() < torch.inf:
        raise ValueError("logits_processor: expected finite scores or -inf from every processor, got NaN or +inf")
    return scores[0]
