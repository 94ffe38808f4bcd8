"""A plain-torch twin of every op, on any device and in float64 too: what the compiled ops have to equal.

Shares no code with them and checks no arguments. Shapes and promises are in `mpg_ext.ops`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpg_ext.ops import Score


def gather_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Twin of `mpg_ext.gather_logprobs`."""
    logprobs = torch.log_softmax(_accumulate(logits) / temperature, dim=-1)  # (R, K, V)
    is_token = (tokens >= 0) & (tokens < logits.shape[-1])
    gathered = logprobs.gather(-1, tokens.where(is_token, 0)[..., None])[..., 0]
    return gathered.where(is_token, -math.inf)


def score_prefixes(
    attribute_logprobs: Tensor, anchor_logprobs: Tensor, weights: Tensor, *, score: Score
) -> tuple[Tensor, Tensor]:
    """Twin of `mpg_ext.score_prefixes`."""
    log_ratios = _log_ratios(attribute_logprobs, anchor_logprobs)
    alpha = weights.T[:, :, None]  # (N, B, 1)
    return log_ratios, _scores(_terms(log_ratios, alpha, score).cumsum(-1), alpha, score)


def accept_prefixes(scores: Tensor, log_bound: Tensor, uniforms: Tensor, lengths: Tensor) -> Tensor:
    """Twin of `mpg_ext.accept_prefixes`."""
    prefix = torch.arange(1, scores.shape[1] + 1, device=scores.device)  # (K,)
    counts = prefix <= lengths[:, None]
    accepted = counts & (uniforms.log() < scores.double() - log_bound.double()[:, None])
    is_invalid = (counts & scores.isnan()).any(dim=-1)
    return (prefix * accepted).amax(dim=-1).where(~is_invalid, -1)


def update_bound_(bound: Sequence[Tensor], scores: Tensor, active: Tensor, *, constants: Sequence[float]) -> None:
    """Twin of `mpg_ext.update_bound_`."""
    window, num_scores, num_rounds, log_bound, frozen = bound
    log_initial_bound, log_gamma, tau = constants
    num_columns = window.shape[1]
    for b in active.nonzero()[:, 0].tolist():
        num_scores[b].clamp_(min=0)
        for value in scores[b]:
            if value == -math.inf or value.isnan():
                continue
            window[b, num_scores[b] % num_columns] = value
            num_scores[b] += 1
        num_rounds[b] += 1

        if num_rounds[b] <= num_columns or num_scores[b] < 2:
            log_bound[b] = log_initial_bound
            frozen[b] = False
            continue
        last = window[b, : num_scores[b]]  # all of it once the ring is full
        if not frozen[b]:
            log_bound[b] = last.max() + log_gamma
        frozen[b] = last.var(correction=0) < tau


def verify_chunks(
    anchor_logits: Tensor,
    attribute_logits: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    weights: Tensor,
    uniforms: Tensor,
    bound: Sequence[Tensor],
    *,
    score: Score,
    constants: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of `mpg_ext.verify_chunks`."""
    anchor_logprobs = gather_logprobs(anchor_logits, tokens)
    attribute_logprobs = torch.stack([gather_logprobs(logits, tokens) for logits in attribute_logits])
    log_ratios, scores = score_prefixes(attribute_logprobs, anchor_logprobs, weights, score=score)
    accepted = accept_prefixes(scores, bound[3], uniforms, lengths)
    accepted_scores = scores.gather(1, (accepted - 1).clamp(min=0)[:, None])  # (B, 1)
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
    score: Score,
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of `mpg_ext.draw_fallback`."""
    masses, scores = fallback_masses(anchor_logits, attribute_logits, draft_probs, weights, log_bound, score=score)
    tokens, totals = _invert_cdf(masses, uniforms)
    drawn_scores = scores.gather(1, tokens[:, None])[:, 0]

    is_invalid = active & totals.isnan()
    is_empty = ~active | (totals == 0)
    return (
        tokens.where(~is_invalid, -2).where(~is_empty, -1),
        drawn_scores.where(~is_invalid, math.nan).where(~is_empty, -math.inf),
        totals.where(active, 0).to(scores.dtype),
    )


def fallback_masses(
    anchor_logits: Tensor,
    attribute_logits: Tensor,
    draft_probs: Tensor,
    weights: Tensor,
    log_bound: Tensor,
    *,
    score: Score,
) -> tuple[Tensor, Tensor]:
    """What `draw_fallback` draws from: the mass of every token, and the score of every token that has one.

    Arguments as in `mpg_ext.draw_fallback`.

    out: masses (B, V) float64, draft_probs * min(1, exp(score - log M)); scores (B, V) acc
    """
    anchor_logprobs = torch.log_softmax(_accumulate(anchor_logits), dim=-1)  # (B, V)
    attribute_logprobs = torch.log_softmax(_accumulate(attribute_logits), dim=-1)  # (N, B, V)
    # Every token is a prefix of its own: B * V sequences of one token.
    scores = score_prefixes(
        attribute_logprobs.flatten(1)[..., None],
        anchor_logprobs.flatten()[:, None],
        weights.repeat_interleave(anchor_logits.shape[1], dim=0),
        score=score,
    )[1].view_as(anchor_logprobs)
    masses = draft_probs * (scores - log_bound[:, None]).clamp(max=0).exp()
    return masses.where((draft_probs > 0) & (scores != -math.inf) | draft_probs.isnan(), 0).double(), scores


def combine_rows(
    attribute_logits: Tensor,
    weights: Tensor,
    base_logits: Tensor | None,
    anchor_logits: Tensor | None,
    *,
    target: Score,
    temperature: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Twin of `mpg_ext.combine_rows`."""
    attributes = torch.log_softmax(_accumulate(attribute_logits), dim=-1)  # (N, B, P, V)
    alpha = weights.permute(2, 0, 1)[..., None]  # (N, B, P, 1)
    is_invalid = (attributes.isnan().any(-1, keepdim=True) & (alpha != 0)).any(0)  # (B, P, 1)
    if base_logits is None or anchor_logits is None:
        log_v = _scores(attributes, alpha, target)
    else:
        base = torch.log_softmax(_accumulate(base_logits), dim=-1)  # (B, P, V)
        anchor = torch.log_softmax(_accumulate(anchor_logits), dim=-1)
        is_invalid |= (base.isnan() | anchor.isnan()).any(-1, keepdim=True)
        ratios = _terms(_log_ratios(attributes, anchor), alpha, target)
        # A token that the base excludes stays excluded, whatever its ratios.
        log_v = (base + _scores(ratios, alpha, target)).where(base != -math.inf, -math.inf)
    log_v = log_v.where(~is_invalid, math.nan) / (1.0 if temperature is None else temperature)
    log_totals = log_v.logsumexp(-1)
    has_mass = log_totals != -math.inf
    log_rows = (log_v - log_totals[..., None]).where(has_mass[..., None], -math.inf)
    return log_rows if temperature is None else log_rows.exp(), log_totals


def warp_rows(
    log_rows: Tensor,
    *,
    temperature: float | Tensor,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
) -> Tensor:
    """Twin of `mpg_ext.warp_rows`."""
    temperature, top_k, top_p, min_p = (  # each (R, 1) or (1, 1)
        torch.as_tensor(option, dtype=dtype, device=log_rows.device).view(-1, 1)
        for option, dtype in (
            (temperature, torch.float64), (top_k, torch.int64), (top_p, torch.float64), (min_p, torch.float64)
        )
    )  # fmt: skip
    largest = log_rows.amax(-1, keepdim=True)  # NaN where the row has one
    is_invalid = largest.isnan() | (largest == math.inf) | ~((temperature >= 0) & temperature.isfinite())
    # Preferred first: larger, then lower token.
    order = log_rows.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(-1)
    masses = ((log_rows.double() - largest) / temperature).exp()
    masses = masses.where(temperature > 0, (rank == 0).double())
    masses = masses.where((rank < top_k) | (top_k <= 0), 0)
    cumulated = masses.gather(-1, order).cumsum(-1)
    before = torch.nn.functional.pad(cumulated, (1, -1)).gather(-1, rank)
    masses = masses.where((before < top_p * cumulated[:, -1:]) | (rank == 0) | (top_p >= 1), 0)
    masses = masses.where(masses >= min_p.clamp(max=1), 0)  # the largest mass is 1
    probs = (masses / masses.sum(-1, keepdim=True)).to(log_rows.dtype)
    return probs.where(largest != -math.inf, 0).where(~is_invalid, math.nan)


def draw_tokens(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Twin of `mpg_ext.draw_tokens`."""
    tokens, _ = _invert_cdf(probs.double(), uniforms)
    return tokens


def block_accept_probs(
    target_probs: Tensor, draft_probs: Tensor | None, tokens: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """What `verify_block` decides by: the probabilities of its tests and the running clip of the likelihood ratio.

    Arguments and symbols as in `mpg_ext.verify_block`.

    out: accept_probs (B, K) float64, h_1 to h_K, and carry (B, K + 1) float64, P_0 to P_K; both are 0 beyond lengths
    and NaN from where a row is
    """
    K = tokens.shape[1]
    p, q = _drafted_probs(target_probs, draft_probs, tokens)
    position = torch.arange(1, K + 1, device=tokens.device)  # (K,)
    running = torch.ones_like(p[:, 0])
    carries = [running]
    for j in range(K):
        is_open = (j < lengths) & (running != 0)
        running = _clipped_ratio(running * p[:, j], q[:, j]).where(is_open, 0)
        carries.append(running)
    carry = torch.stack(carries, dim=1)  # (B, K + 1)

    clip = carry[:, 1:K, None]  # P_1 to P_K-1 scale the rows after theirs
    residuals = clip * target_probs[:, 1:K].double() - _draft_rows(draft_probs, tokens, target_probs)[:, 1:]
    sums = residuals.clamp(min=0).cumsum(-1)[..., -1]  # cumsum: added in token order, as the op does
    inner = (sums / (sums + (1 - carry[:, 1:K]))).where((sums != 0) | (carry[:, 1:K] != 1), 1)
    inner = inner.where(carry[:, 1:K] != 0, 0)
    accept_probs = torch.cat([inner, carry[:, K:]], dim=1).where(position < lengths[:, None], carry[:, 1:])
    return accept_probs, carry


def residual_rows(
    target_probs: Tensor,
    draft_probs: Tensor | None,
    tokens: Tensor,
    lengths: Tensor,
    accepted: Tensor,
    carry: Tensor,
) -> Tensor:
    """What `draw_residual` draws from, not normalised. Arguments as in `mpg_ext.draw_residual`.

    out: (B, V) float64
    """
    K = tokens.shape[1]
    sequence = torch.arange(tokens.shape[0], device=tokens.device)
    position = accepted.clamp(0, K)
    target = target_probs[sequence, position].double()
    draft = _draft_rows(draft_probs, tokens, target_probs)[sequence, position.clamp(max=K - 1)]
    residual = (carry.double()[:, None] * target - draft).clamp(min=0)
    has_residual = (position < lengths.clamp(max=K)) & (residual.sum(-1) != 0)
    return residual.where(has_residual[:, None], target).where(accepted[:, None] >= 0, 0)


def token_accept_probs(target_probs: Tensor, draft_probs: Tensor | None, tokens: Tensor) -> Tensor:
    """Probability min(1, p / q) with which verification token by token accepts each drafted token.

    Arguments as in `mpg_ext.verify_block`.

    out: (B, K) float64
    """
    return _clipped_ratio(*_drafted_probs(target_probs, draft_probs, tokens))


def verify_block(
    target_probs: Tensor, draft_probs: Tensor | None, tokens: Tensor, lengths: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Twin of `mpg_ext.verify_block`."""
    accept_probs, carry = block_accept_probs(target_probs, draft_probs, tokens, lengths)
    position = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    accepted = (position * (uniforms < accept_probs)).amax(-1)
    accepted_carry = carry.gather(1, accepted[:, None])[:, 0]
    is_valid = ~accept_probs.isnan().any(-1)
    return accepted.where(is_valid, -1), accepted_carry.where(is_valid, math.nan).to(target_probs.dtype)


def draw_residual(
    target_probs: Tensor,
    draft_probs: Tensor | None,
    tokens: Tensor,
    lengths: Tensor,
    accepted: Tensor,
    carry: Tensor,
    uniforms: Tensor,
) -> Tensor:
    """Twin of `mpg_ext.draw_residual`."""
    return draw_tokens(residual_rows(target_probs, draft_probs, tokens, lengths, accepted, carry), uniforms)


def draw_uniforms(seeds: Tensor, rounds: Tensor, *, purpose: int, count: int, first: int = 0) -> Tensor:
    """Twin of `mpg_ext.draw_uniforms`."""
    shape = (seeds.shape[0], count)
    index = torch.arange(first, first + count, device=seeds.device)
    counter = [word.expand(shape) for word in (index, torch.full_like(index, purpose), *_words(rounds))]
    word0, word1, _, _ = _philox4x32_10(counter, _words(seeds))
    return ((word0 >> 5) * 2**26 + (word1 >> 6)).double() * 2.0**-53


def count_usable_(
    rows: Sequence[Tensor],
    lengths: Tensor,
    limits: Tensor,
    eos_token_ids: Tensor,
    chunk: Tensor,
    draft_probs: Tensor | None = None,
    most: Tensor | None = None,
) -> Tensor:
    """Twin of `mpg_ext.count_usable_`."""
    active, unusable = rows
    ending, counts = set(eos_token_ids.tolist()), torch.zeros_like(lengths)
    for b in active.nonzero()[:, 0].tolist():
        usable = chunk[b, : max(0, int(limits[b] - lengths[b]))].tolist()
        usable = usable[: None if most is None else max(0, int(most[b]))]
        usable = usable[: next((k + 1 for k, token in enumerate(usable) if token in ending), None)]
        for k, token in enumerate(usable):
            if draft_probs is not None and not (0 <= token < draft_probs.shape[2] and draft_probs[b, k, token] > 0):
                active[b], unusable[b] = False, True
                break
        else:
            counts[b] = len(usable)
    return counts


def commit_block_(
    rows: Sequence[Tensor],
    limits: Tensor,
    eos_token_ids: Tensor,
    chunk: Tensor,
    accepted: Tensor,
    token: Tensor | None = None,
    log_totals: Tensor | None = None,
) -> Tensor:
    """Twin of `mpg_ext.commit_block_`."""
    tokens, lengths, last_tokens, rounds, active, unusable, empty = rows
    ending, num_drafted = set(eos_token_ids.tolist()), chunk.shape[1]
    done = []
    for b, drafted in enumerate(chunk.tolist()):
        length, next_token = int(lengths[b]), None if token is None else int(token[b])
        end = min(int(limits[b]), tokens.shape[1])
        kept = drafted[: max(0, min(int(accepted[b]), end - length))]
        stop = next((k + 1 for k, drafted_token in enumerate(kept) if drafted_token in ending), None)
        kept = kept[:stop]
        goes_on = next_token is not None and stop is None and length + len(kept) < end
        total = 0.0 if log_totals is None else float(log_totals[b, len(kept)])
        shown = [*drafted, max(next_token or 0, 0)]
        new: list[int] = []
        if active[b]:
            unusable_now = int(accepted[b]) < 0 or (goes_on and (next_token == -2 or math.isnan(total)))
            nothing = goes_on and (total == -math.inf or (next_token == -1 and not kept))
            if unusable_now or nothing:
                (unusable if unusable_now else empty)[b] = True
                active[b] = False
            else:
                follows = [next_token] if goes_on and next_token is not None and next_token >= 0 else []
                new = kept + follows
                shown[: len(new)] = new
                tokens[b, length : length + len(new)] = torch.tensor(new, dtype=torch.int64)
                lengths[b] += len(new)
                rounds[b] += 1
                if new:
                    last_tokens[b] = new[-1]
                if int(lengths[b]) >= int(limits[b]) or (new and new[-1] in ending):
                    active[b] = False
        done.append([len(new), int(active[b]), int(unusable[b]), int(empty[b]), *shown])
    return torch.tensor(done, dtype=torch.int64, device=chunk.device).view(len(chunk), 4 + num_drafted + 1)


def lora_shrink(x: Tensor, down: Tensor, groups: Tensor) -> Tensor:
    """Twin of `mpg_ext.lora_shrink`."""
    return (_accumulate(x) @ _factors_of_rows(down, groups).mT).to(x.dtype)


def lora_expand_(out: Tensor, hidden: Tensor, up: Tensor, groups: Tensor, *, blocks: Sequence[int] = ()) -> None:
    """Twin of `mpg_ext.lora_expand_`, which reads the zeros between the blocks too."""
    if hidden.shape[2] == len(up) * up.shape[1]:
        index = groups.where((groups >= 0) & (groups < len(up)), 0)[:, None, None, None]
        of_groups = hidden.unflatten(2, up.shape[:2])  # (R, q, G, r)
        hidden = of_groups.take_along_dim(index, 2)[:, :, 0]
    out.copy_(_accumulate(out) + _accumulate(hidden) @ _factors_of_rows(up, groups))


def attend_rows(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, *, scale: float | None = None) -> Tensor:
    """Twin of `mpg_ext.attend_rows`."""
    (num_rows, num_heads, num_queries, size), groups = query.shape, query.shape[1] // key.shape[1]
    out = query.new_empty(num_rows, num_queries, num_heads, value.shape[3])
    last = positions.clamp(0, key.shape[2] - 1).tolist()
    for row in range(num_rows):
        for head in range(num_heads):
            for t in range(num_queries):
                held = slice(last[row][t] + 1)
                keys, values = (_accumulate(x[row, head // groups, held]) for x in (key, value))
                scores = keys @ _accumulate(query[row, head, t]) * (size**-0.5 if scale is None else scale)
                out[row, t, head] = (scores.softmax(0) @ values).to(query.dtype)
    return out


def linear_panels(
    x: Tensor,
    panels: Tensor,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    groups: Tensor | None = None,
    *,
    out_features: int | None = None,
    blocks: Sequence[int] = (),
) -> Tensor:
    """Twin of `mpg_ext.linear_panels`."""
    weight = panels.mT.flatten(0, 1)[:out_features]
    out = x @ weight.T + (0 if bias is None else bias)
    if down is not None and up is not None and groups is not None:
        rows = out.view(len(groups), -1, out.shape[-1])
        lora_expand_(rows, lora_shrink(x.reshape(*rows.shape[:2], -1), down, groups), up, groups)
    return out


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0, rounds_first: bool = False) -> Tensor:
    """Twin of `mpg_ext.rms_norm`."""
    whole = _accumulate(x)
    normed = whole / (whole.square().mean(-1, keepdim=True) + eps).sqrt()
    normed = normed.to(x.dtype) if rounds_first else normed
    return (_accumulate(normed) * (offset + _accumulate(weight))).to(x.dtype)


def _factors_of_rows(factors: Tensor, groups: Tensor) -> Tensor:
    """One factor a row, of zeros where the row runs no adapter."""
    has_adapter = (groups >= 1) & (groups < len(factors))
    return _accumulate(factors)[groups.where(has_adapter, 0)].where(has_adapter[:, None, None], 0)


def _accumulate(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _log_ratios(attribute_logprobs: Tensor, anchor_logprobs: Tensor) -> Tensor:
    """log pi_i - log anchor, with 0 for (-inf) - (-inf) and NaN for whatever is not a pair of log-probabilities."""
    anchor = anchor_logprobs.expand_as(attribute_logprobs)
    ratios = attribute_logprobs - anchor
    ratios = ratios.where((attribute_logprobs != -math.inf) | (anchor != -math.inf), 0)
    # +inf left over: the anchor excludes a token that the attribute model allows.
    is_invalid = (ratios == math.inf) | (attribute_logprobs == math.inf) | (anchor == math.inf)
    return ratios.where(~is_invalid, math.nan)


def _terms(log_ratios: Tensor, alpha: Tensor, score: Score) -> Tensor:
    """Log-ratios as the score takes them: an impossible token under a negative geometric weight counts as -80."""
    is_capped = (log_ratios == -math.inf) & (alpha < 0)
    return log_ratios.where(~is_capped, -80.0) if score == "geometric" else log_ratios


def _scores(prefix_log_ratios: Tensor, alpha: Tensor, score: Score) -> Tensor:
    """Scores (B, ...) of prefixes from their log-ratios (N, B, ...) and weights (N, B, ..., 1)."""
    is_used = alpha != 0
    if score == "geometric":
        return (alpha * prefix_log_ratios).where(is_used, 0).sum(0)
    terms = (prefix_log_ratios + alpha.abs().log()).where(is_used, -math.inf)
    shift = terms.amax(0)
    shift = shift.where(shift != -math.inf, 0)
    magnitudes = (terms - shift).exp()
    positive = magnitudes.where(alpha > 0, 0).sum(0)
    negative = magnitudes.where(~(alpha > 0), 0).sum(0)
    difference, total = positive - negative, positive + negative
    is_zero = difference <= 8 * torch.finfo(terms.dtype).eps * total
    return (difference.log() + shift).where(~is_zero, -math.inf)


def _invert_cdf(masses: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B,) drawn in the order of their ids from masses (B, V) float64, 0 where none can be; the totals (B,)."""
    cumulated = masses.cumsum(-1)
    totals = cumulated[:, -1]
    # The last token with mass takes what rounding leaves above the cumulated total.
    token_ids = torch.arange(masses.shape[1], device=masses.device)
    last = (token_ids * (masses > 0)).amax(dim=-1, keepdim=True)
    is_drawn = (masses > 0) & ((cumulated > uniforms[:, None] * totals[:, None]) | (token_ids == last))
    return is_drawn.int().argmax(dim=-1).where(~totals.isnan(), 0), totals


def _draft_rows(draft_probs: Tensor | None, tokens: Tensor, target_probs: Tensor) -> Tensor:
    """Rows (B, K, V) float64 that the tokens were drawn from; one-hot where each was the only choice."""
    if draft_probs is not None:
        return draft_probs.double()
    return (tokens[..., None] == torch.arange(target_probs.shape[-1], device=tokens.device)).double()


def _drafted_probs(target_probs: Tensor, draft_probs: Tensor | None, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What target and draft give to the drafted tokens, both (B, K) float64; 0 to a token outside the vocabulary."""
    rows = target_probs[:, : tokens.shape[1]].double(), _draft_rows(draft_probs, tokens, target_probs)
    is_token = (tokens >= 0) & (tokens < target_probs.shape[-1])
    p, q = (row.gather(-1, tokens.where(is_token, 0)[..., None])[..., 0].where(is_token, 0) for row in rows)
    return p, q


def _clipped_ratio(p: Tensor, q: Tensor) -> Tensor:
    """min(1, p / q), where p = 0 gives 0 and otherwise q = 0 gives 1."""
    return (p / q).clamp(max=1).where(p != 0, 0)


def _words(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high 32-bit word of int64 numbers (B,), as int64 columns (B, 1)."""
    return (numbers & 0xFFFFFFFF)[:, None], ((numbers >> 32) & 0xFFFFFFFF)[:, None]


def _philox4x32_10(counter: list[Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Ten rounds of Philox4x32 on 32-bit words held in int64 (Salmon et al., SC 2011)."""
    key0, key1 = key
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, counter[0])
        high1, low1 = _multiply(0xCD9E8D57, counter[2])
        counter = [high1 ^ counter[1] ^ key0, low1, high0 ^ counter[3] ^ key1, low0]
        key0 = (key0 + 0x9E3779B9) & 0xFFFFFFFF
        key1 = (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return counter


def _multiply(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32-bit word of a 64-bit product, which int64 arithmetic wraps but does not lose."""
    product = multiplier * word
    return (product >> 32) & 0xFFFFFFFF, product & 0xFFFFFFFF
