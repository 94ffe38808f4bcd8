"""What a user of plain torch would write for each op, with the op's arguments: what the ops are timed against.

Knows nothing of NaN, signed weights or wrong tokens, which the twins in tests/ops/reference.py define. Never waits for
the device, so that a graph can capture it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gather_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32).gather(-1, tokens[..., None])[..., 0]


def score_prefixes(
    attribute_logprobs: Tensor, anchor_logprobs: Tensor, weights: Tensor, *, score: str
) -> tuple[Tensor, Tensor]:
    log_ratios = attribute_logprobs - anchor_logprobs  # (N, B, K)
    return log_ratios, (log_ratios.cumsum(-1) + weights.T.log()[..., None]).logsumexp(0)


def accept_prefixes(scores: Tensor, log_bound: Tensor, uniforms: Tensor, lengths: Tensor) -> Tensor:
    prefix = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    is_accepted = (prefix <= lengths[:, None]) & (uniforms.log() < scores - log_bound[:, None])
    return (prefix * is_accepted).amax(-1)


def update_bound_(
    bound: Sequence[Tensor],
    scores: Tensor,  # (B, 1)
    active: Tensor,
    *,
    constants: Sequence[float],
) -> None:
    window, num_scores, num_rounds, log_bound, frozen = bound
    log_initial_bound, log_gamma, tau = constants
    W = window.shape[1]
    column = (num_scores % W)[:, None]
    window.scatter_(1, column, scores.where(active[:, None], window.gather(1, column)))
    num_scores += active
    num_rounds += active
    is_filled = torch.arange(W, device=window.device) < num_scores[:, None]
    count = is_filled.sum(-1)
    mean = window.where(is_filled, 0).sum(-1) / count
    variance = (window - mean[:, None]).where(is_filled, 0).square().sum(-1) / count
    estimate = (window.where(is_filled, -torch.inf).amax(-1) + log_gamma).where(~frozen, log_bound)
    is_warm_up = (num_rounds <= W) | (num_scores < 2)
    log_bound.copy_(estimate.where(~is_warm_up, log_initial_bound).where(active, log_bound))
    frozen.copy_(((variance < tau) & ~is_warm_up).where(active, frozen))


def verify_chunks(
    anchor_logits: Tensor,
    attribute_logits: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    weights: Tensor,
    uniforms: Tensor,
    bound: Sequence[Tensor],
    *,
    score: str,
    constants: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    anchor_logprobs = gather_logprobs(anchor_logits, tokens)
    attribute_logprobs = gather_logprobs(attribute_logits, tokens.expand(attribute_logits.shape[0], -1, -1))
    log_ratios, scores = score_prefixes(attribute_logprobs, anchor_logprobs, weights, score=score)
    accepted = accept_prefixes(scores, bound[3], uniforms, lengths)
    accepted_scores = scores.gather(1, (accepted - 1).clamp(min=0)[:, None])
    update_bound_(bound, accepted_scores, accepted >= 1, constants=constants)
    return log_ratios, scores, accepted


def draw_fallback(
    anchor_logits: Tensor,
    attribute_logits: Tensor,
    draft_probs: Tensor,
    weights: Tensor,
    log_bound: Tensor,
    uniforms: Tensor,
    active: Tensor,
    *,
    score: str,
) -> tuple[Tensor, Tensor, Tensor]:
    anchor = torch.log_softmax(anchor_logits, dim=-1, dtype=torch.float32)  # (B, V)
    attributes = torch.log_softmax(attribute_logits, dim=-1, dtype=torch.float32)  # (N, B, V)
    scores = (attributes - anchor + weights.T.log()[..., None]).logsumexp(0)
    masses = draft_probs * (scores - log_bound[:, None]).clamp(max=0).exp()
    tokens = draw_tokens(masses, uniforms)
    return tokens.where(active, -1), scores.gather(1, tokens[:, None])[:, 0], masses.sum(-1)


def draw_uniforms(seeds: Tensor, rounds: Tensor, *, purpose: int, count: int) -> Tensor:
    return torch.rand(len(seeds), count, dtype=torch.float64, device=seeds.device)  # of one generator, without keys


def combine_rows(
    attribute_logits: Tensor, weights: Tensor, base_logits: Tensor | None, anchor_logits: Tensor | None, *, target: str
) -> tuple[Tensor, Tensor]:
    alpha = weights.permute(2, 0, 1)[..., None]  # (N, B, P, 1)
    if base_logits is None or anchor_logits is None:
        log_v = (alpha * attribute_logits.softmax(-1, dtype=torch.float32)).sum(0).log()
    else:
        attributes = torch.log_softmax(attribute_logits, dim=-1, dtype=torch.float32)
        anchor = torch.log_softmax(anchor_logits, dim=-1, dtype=torch.float32)
        # One tensor is both, as in every method but those with a base of their own.
        log_v = anchor + (alpha * (attributes - anchor)).sum(0)
    log_totals = log_v.logsumexp(-1)
    return log_v - log_totals[..., None], log_totals


def warp_rows(log_rows: Tensor, *, temperature: float, top_p: float = 1.0) -> Tensor:
    if top_p == 1:
        return (log_rows / temperature).softmax(-1)
    probs, order = _sorted_nucleus(log_rows, temperature, top_p)
    return torch.zeros_like(probs).scatter(-1, order, probs)


def draw_tokens(probs: Tensor, uniforms: Tensor) -> Tensor:
    cumulated = probs.cumsum(-1, dtype=torch.float64)
    targets = (uniforms * cumulated[:, -1])[:, None]
    return torch.searchsorted(cumulated, targets, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)


def draw_from_nucleus(log_rows: Tensor, uniforms: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Top-p and the draw in one, in the order of the sorted row."""
    probs, order = _sorted_nucleus(log_rows, temperature, top_p)
    return order.gather(-1, draw_tokens(probs, uniforms)[:, None])[:, 0]


def _sorted_nucleus(log_rows: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    sorted_rows, order = log_rows.sort(-1, descending=True)
    probs = (sorted_rows / temperature).softmax(-1)
    probs = probs.where(probs.cumsum(-1) - probs < top_p, 0)
    return probs / probs.sum(-1, keepdim=True), order


def verify_block(
    target_probs: Tensor, draft_probs: Tensor, tokens: Tensor, lengths: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    K = tokens.shape[1]
    ratio = (target_probs[:, :K].gather(-1, tokens[..., None]) / draft_probs.gather(-1, tokens[..., None]))[..., 0]
    carries = [torch.ones_like(ratio[:, 0])]
    for j in range(K):
        carries.append((carries[-1] * ratio[:, j]).clamp(max=1).where(j < lengths, 0))
    carry = torch.stack(carries, dim=1)  # (B, K + 1)
    sums = (carry[:, 1:K, None] * target_probs[:, 1:K] - draft_probs[:, 1:]).clamp(min=0).sum(-1)
    inner = (sums / (sums + (1 - carry[:, 1:K]))).nan_to_num(1)
    position = torch.arange(1, K + 1, device=tokens.device)
    accept_probs = torch.cat([inner, carry[:, K:]], dim=1).where(position < lengths[:, None], carry[:, 1:])
    accepted = (position * (uniforms < accept_probs)).amax(-1)
    return accepted, carry.gather(1, accepted[:, None])[:, 0]


def draw_residual(
    target_probs: Tensor,
    draft_probs: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    accepted: Tensor,
    carry: Tensor,
    uniforms: Tensor,
) -> Tensor:
    sequence = torch.arange(len(accepted), device=accepted.device)
    target = target_probs[sequence, accepted]
    draft = draft_probs[sequence, accepted.clamp(max=tokens.shape[1] - 1)]
    residual = (carry[:, None] * target - draft).clamp(min=0)
    return draw_tokens(residual.where((accepted < lengths)[:, None], target), uniforms)


def count_usable_(
    rows: Sequence[Tensor],
    lengths: Tensor,
    limits: Tensor,
    eos_token_ids: Tensor,
    chunk: Tensor,
    draft_probs: Tensor,
    most: Tensor,
) -> Tensor:
    active, unusable = rows
    is_end = _is_end(chunk, eos_token_ids)
    position = torch.arange(chunk.shape[1], device=chunk.device)
    is_usable = (position < (limits - lengths).minimum(most)[:, None]) & (is_end.cumsum(1) - is_end.long() == 0)
    is_drawn = draft_probs.gather(2, chunk[..., None])[..., 0] > 0
    has_failed = active & (is_usable & ~is_drawn).any(1)
    unusable |= has_failed
    active &= ~has_failed
    return is_usable.sum(1) * active


def commit_block_(
    rows: Sequence[Tensor],
    limits: Tensor,
    eos_token_ids: Tensor,
    chunk: Tensor,
    accepted: Tensor,
    token: Tensor,
    log_totals: Tensor,
) -> Tensor:
    tokens, lengths, last_tokens, rounds, active, unusable, empty = rows
    until_end = (_is_end(chunk, eos_token_ids).cumsum(1) == 0).sum(1) + 1
    kept = accepted.minimum(until_end).minimum(limits - lengths)
    goes_on = active & (kept < until_end) & (lengths + kept < limits)
    log_total = log_totals.gather(1, kept[:, None])[:, 0]
    unusable |= goes_on & log_total.isnan()
    empty |= goes_on & (log_total == -torch.inf)
    active &= ~(unusable | empty)
    counts = (kept + goes_on) * active
    shown = torch.cat([chunk, token[:, None]], 1)
    shown.scatter_(1, kept[:, None], token.where(goes_on, shown.gather(1, kept[:, None])[:, 0])[:, None])
    place = torch.arange(shown.shape[1], device=chunk.device)
    places = (lengths[:, None] + place).clamp(max=tokens.shape[1] - 1)
    tokens.scatter_(1, places, shown.where(place < counts[:, None], tokens.gather(1, places)))
    latest = shown.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
    last_tokens.copy_(latest.where(counts > 0, last_tokens))
    lengths += counts
    rounds += active
    active &= (lengths < limits) & ~_is_end(last_tokens, eos_token_ids)
    return torch.cat([torch.stack([counts, active, unusable, empty], 1), shown], 1)


def _is_end(tokens: Tensor, eos_token_ids: Tensor) -> Tensor:
    return (tokens[..., None] == eos_token_ids).any(-1)


def lora_shrink(x: Tensor, down: Tensor, groups: Tensor) -> Tensor:
    """The small products of groups of one size, in order: what a batched product can do."""
    num_groups = len(down) - 1
    return torch.bmm(x.view(num_groups, -1, x.shape[-1]), down[1:].mT).view(*x.shape[:2], -1)


def lora_expand_(out: Tensor, hidden: Tensor, up: Tensor, groups: Tensor) -> None:
    num_groups = len(up) - 1
    out.view(num_groups, -1, out.shape[-1]).baddbmm_(hidden.view(num_groups, -1, hidden.shape[-1]), up[1:])


def attend_rows(query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
    is_read = torch.arange(key.shape[2], device=key.device) <= positions[:, None, :, None]
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=is_read, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, rounds_first: bool) -> Tensor:
    whole = x.float()
    normed = whole * torch.rsqrt(whole.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * (normed.to(x.dtype) if rounds_first else normed)).to(x.dtype)
