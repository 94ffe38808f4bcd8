"""The compiled ops as typed functions, with what they promise.

Arguments are checked in csrc/bindings.cpp; the mathematics is in csrc/numerics.h and csrc/block.h. Ops of the CPU alone
are in cpu_ops.py.

Throughout: B sequences, K draft tokens (1 to 32), N attribute models (at least 1), V vocabulary, W window. Logits are
float32, float16 or bfloat16, on the CPU also float64, and may have any strides but unit stride in V. `acc` is the
dtype of everything computed from them: float64 for float64 logits, else float32. Every op raises ValueError where a
shape, dtype, device or stride is not as written. B may be 0. No op can be differentiated. Equations are those of
arXiv 2511.01891.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Score = Literal["arithmetic", "geometric"]


def gather_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of given tokens, log softmax(logits / temperature)[token], without a probability tensor.

    logits: (R, K, V), any number of rows R
    tokens: (R, K) int64; a token outside [0, V) has log-probability -inf and is never read
    temperature: in [2**-126, 2**126]

    out: (R, K) acc; NaN where a row has NaN or +inf or is -inf throughout
    """
    return torch.ops.mpg.gather_logprobs(logits, tokens, temperature=temperature)


def score_prefixes(
    attribute_logprobs: Tensor, anchor_logprobs: Tensor, weights: Tensor, *, score: Score
) -> tuple[Tensor, Tensor]:
    """Log-ratios of drafted tokens and the score of every prefix of the draft.

    With r_i the sum of log pi_i - log anchor over the prefix (Eq. 15) and alpha the weights:
    "arithmetic" is log sum_i alpha_i exp(r_i), a signed log-sum-exp (Eq. 13-16, 18-19), -inf where the sum is not
    positive or within 8 roundings of 0; "geometric" is sum_i alpha_i r_i (Eq. 7 for the reverse KL).
    A weight of exactly 0 removes its model before any arithmetic. A token that both models exclude has log-ratio 0;
    under a negative geometric weight a log-ratio of -inf counts as -80.

    attribute_logprobs: (N, B, K) acc
    anchor_logprobs: (B, K) acc
    weights: (B, N) acc

    out: log_ratios (N, B, K) acc, per token; scores (B, K) acc of the prefixes of 1 to K tokens.
    NaN or +inf in, or a token that only the attribute model allows, gives NaN: the models do not belong together.
    """
    return torch.ops.mpg.score_prefixes(attribute_logprobs, anchor_logprobs, weights, score=score)


def accept_prefixes(scores: Tensor, log_bound: Tensor, uniforms: Tensor, lengths: Tensor) -> Tensor:
    """Length of the longest prefix j <= lengths with log u_j < score_j - log M (Eq. 14, 17, 20).

    scores: (B, K) acc
    log_bound: (B,) acc, log M
    uniforms: (B, K) float64 in [0, 1), one for each prefix
    lengths: (B,) int64, tokens of the draft that count; read as if clipped to [0, K]

    out: (B,) int64; 0 where no prefix is accepted, -1 where one of these scores is NaN
    """
    return torch.ops.mpg.accept_prefixes(scores, log_bound, uniforms, lengths)


def update_bound_(bound: Sequence[Tensor], scores: Tensor, active: Tensor, *, constants: Sequence[float]) -> None:
    """Count one round of every active sequence and set its bound, in place (section 3.3).

    The scores of the row are pushed in order. Warm-up, the first W rounds and until two scores were pushed:
    the initial bound. Estimation: log M = max of the window + log_gamma. Stabilisation: a population variance of the
    window below tau freezes the bound until the variance rises again. Rows that are not active keep every byte.

    bound: five contiguous tensors, written in place: window (B, W) acc, a ring, score number n in column n % W;
        num_scores and num_rounds, (B,) int64, scores pushed (negative numbers are read as 0) and rounds counted so far;
        log_bound (B,) acc, log M; frozen (B,) bool
    scores: (B, P) acc, 1 <= P <= 33; -inf and NaN are not pushed
    active: (B,) bool
    constants: log_initial_bound, log_gamma, tau
    """
    torch.ops.mpg.update_bound_(bound, scores, active, constants=constants)


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
    """Score drafted chunks, accept a prefix of each and update the bound: the four ops above in one call.

    Acceptance uses the bound as it stands. Then, where a prefix was accepted, its score is pushed and the bound
    updated; elsewhere the bound is left alone, for the caller to update after the fallback.

    anchor_logits: (B, K, V)
    attribute_logits: (N, B, K, V), dtype of anchor_logits
    tokens: (B, K) int64
    lengths: (B,) int64, as in accept_prefixes; 0 for a finished sequence
    weights: (B, N) acc
    uniforms: (B, K) float64 in [0, 1)
    bound, constants: as in update_bound_

    out: log_ratios (N, B, K) acc, scores (B, K) acc, both for all K tokens; accepted (B,) int64 as in accept_prefixes
    """
    return torch.ops.mpg.verify_chunks(
        anchor_logits, attribute_logits, tokens, lengths, weights, uniforms, bound, score=score, constants=constants
    )


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
    """Draw one token from the law of the single-token loop (lines 17-23 of Algorithm 1), without the loop.

    Token y has mass draft_probs[y] * min(1, exp(score_1(y) - log M)), score_1 the score of y as a prefix of one token.
    The draw inverts the cumulated mass in the order of token ids. A token that the draft excludes needs no score.

    anchor_logits: (B, V)
    attribute_logits: (N, B, V), dtype of anchor_logits
    draft_probs: (B, V) acc
    weights: (B, N) acc
    log_bound: (B,) acc, log M
    uniforms: (B,) float64 in [0, 1)
    active: (B,) bool, the sequences that draw

    out: tokens (B,) int64, the score of each (B,) acc, and accept_probs (B,) acc: the total mass, the probability that
    one try of the loop accepts. No mass, or not active: token -1, score -inf, accept_prob 0. NaN among the masses:
    token -2, NaN, NaN.
    """
    return torch.ops.mpg.draw_fallback(
        anchor_logits, attribute_logits, draft_probs, weights, log_bound, uniforms, active, score=score
    )


def draw_uniforms(seeds: Tensor, rounds: Tensor, *, purpose: int, count: int, first: int = 0) -> Tensor:
    """Uniforms in [0, 1) keyed by (seed, round, purpose, index): Philox4x32-10, the same bits on every device.

    The key is the seed's low and high word, the counter (index, purpose, round's low and high word); the uniform takes
    53 bits from the first two words out. (Salmon et al., SC 2011)

    seeds, rounds: (B,) int64
    purpose: in [0, 2**32)
    count, first: the indices are first to first + count - 1

    out: (B, count) float64
    """
    return torch.ops.mpg.draw_uniforms(seeds, rounds, purpose=purpose, count=count, first=first)


def combine_rows(
    attribute_logits: Tensor,
    weights: Tensor,
    base_logits: Tensor | None,
    anchor_logits: Tensor | None,
    *,
    target: Score,
    temperature: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Combined next-token rows v / sum v, in logs, with alpha the weights, pi_i the softmax rows.

    With a temperature T in [2**-126, 2**126] what comes out are the probabilities v^(1/T) / sum v^(1/T) themselves: as
    from warp_rows where nothing is cut, without another pass over the rows.

    "arithmetic" is v = sum_i alpha_i pi_i, with a base and an anchor v = base * sum_i alpha_i pi_i / anchor
    (Eq. 10-11, 13), where the sum is clipped at 0 and is 0 within 8 roundings of it. "geometric" is
    log v = log base + sum_i alpha_i (log pi_i - log anchor) (Eq. 7 for the reverse KL, token by token).
    Zero weights and log-ratios are treated as in score_prefixes. A token that the base excludes stays excluded.

    attribute_logits: (N, B, P, V), 1 <= P <= 33: the positions of K draft tokens and the one after them
    weights: (B, P, N) acc
    base_logits, anchor_logits: (B, P, V), dtype of attribute_logits; both or, for "arithmetic" only, neither. They
    may be one tensor.

    out: log_rows (B, P, V) acc and log_totals (B, P) acc, log sum v; with a temperature probabilities, and
    log sum v^(1/T). A row without mass is -inf, or of probabilities 0, with total -inf.
    A row is NaN with total NaN where a model of nonzero weight, the base or the anchor has NaN, +inf or nothing but
    -inf in it, or where a model allows a token that the anchor excludes and the base allows.
    """
    return torch.ops.mpg.combine_rows(
        attribute_logits, weights, base_logits, anchor_logits, target=target, temperature=temperature
    )


def warp_rows(
    log_rows: Tensor,
    *,
    temperature: float | Tensor,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
) -> Tensor:
    """Probabilities after temperature, top-k, top-p on the renormalised rest, and min-p, in this order.

    Tokens are preferred by value and, among equals, by lower id. top-k keeps the k preferred tokens; top-p keeps a
    token if those preferred to it hold less than top_p; min-p keeps a token of at least min_p times the largest
    probability.

    log_rows: (R, V) acc, not necessarily normalised
    temperature: finite, not negative; 0 keeps the preferred token alone
    top_k: 0 for all tokens
    top_p: in (0, 1]
    min_p: in [0, 1]
    Each may be a tensor (R,), a number a row, float64 or for top_k int64. Its values lie on the device and are not
    refused: a temperature outside gives a row of NaN, others count as the nearest number inside.

    out: (R, V) acc, every row sums to 1; 0 where a row is -inf throughout, NaN where it has NaN or +inf
    """
    # Not by a loop over all of them, which would take longer than the call
    has_tensor = isinstance(temperature, Tensor) or isinstance(top_k, Tensor)
    if not (has_tensor or isinstance(top_p, Tensor) or isinstance(min_p, Tensor)):
        return torch.ops.mpg.warp_rows(log_rows, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    return torch.ops.mpg.warp_rows(
        log_rows, **{f"{name}s" if isinstance(value, Tensor) else name: value for name, value in options.items()}
    )


def draw_tokens(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token from every row by inverting its cumulated mass in the order of token ids.

    The token is the smallest y with cdf(y) > u * total, never one without mass; the cdf is cumulated in float64, and
    the last token with mass takes what rounding leaves.

    probs: (B, V) acc, not negative, not necessarily normalised
    uniforms: (B,) float64 in [0, 1)

    out: (B,) int64; 0 where a row has no mass or NaN
    """
    return torch.ops.mpg.draw_tokens(probs, uniforms)


def verify_block(
    target_probs: Tensor, draft_probs: Tensor | None, tokens: Tensor, lengths: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Block verification: how many drafted tokens to keep so that the text follows the target (Sun et al., 2024).

    With p and q the rows of target and draft, k = lengths and C the tokens:
    P_0 = 1, P_j = min(1, P_j-1 p_j(C_j) / q_j(C_j)); S_i = sum_v (P_i p_i+1(v) - q_i+1(v))_+;
    h_k = P_k, and h_i = S_i / (S_i + 1 - P_i) for i < k, 1 where that is 0/0, 0 where P_i = 0.
    Kept is the longest prefix i with u_i < h_i. Followed by draw_residual. Sums and comparisons are in float64.

    target_probs: (B, K + 1, V) acc, the row before each drafted token and the one after all of them
    draft_probs: (B, K, V) acc, the rows that the tokens were drawn from; None where each was the only choice
    tokens: (B, K) int64; one outside the vocabulary has probability 0
    lengths: (B,) int64, tokens of the draft that count; read as if clipped to [0, K]
    uniforms: (B, K) float64 in [0, 1)

    out: accepted (B,) int64 and carry (B,) acc, the clipped likelihood ratio P of the accepted prefix (1 for none).
    Rows after lengths, or after a drafted token that the target excludes, do not matter. NaN among the others:
    accepted -1, carry NaN.
    """
    return torch.ops.mpg.verify_block(target_probs, draft_probs, tokens, lengths, uniforms)


def draw_residual(
    target_probs: Tensor,
    draft_probs: Tensor | None,
    tokens: Tensor,
    lengths: Tensor,
    accepted: Tensor,
    carry: Tensor,
    uniforms: Tensor,
) -> Tensor:
    """Draw the token that follows the accepted prefix of a block.

    From p, the target's row after the prefix, where all of lengths was accepted; else from (carry * p - q)_+ with q
    the draft's row there; from p where that has no mass. Draws as draw_tokens does.

    target_probs, draft_probs, tokens, lengths: as in verify_block
    accepted, carry: what verify_block gave
    uniforms: (B,) float64 in [0, 1)

    out: (B,) int64; 0 where accepted is negative or the row has no mass or NaN
    """
    return torch.ops.mpg.draw_residual(target_probs, draft_probs, tokens, lengths, accepted, carry, uniforms)


def count_usable_(
    rows: Sequence[Tensor],
    lengths: Tensor,
    limits: Tensor,
    eos_token_ids: Tensor,
    chunk: Tensor,
    draft_probs: Tensor | None = None,
    most: Tensor | None = None,
) -> Tensor:
    """How many of a chunk's first tokens could be committed: up to the first that ends the text, the limit, and `most`.

    A row of which one of these was not drawn, since its draft had nothing to draw it from or was NaN there, fails: it
    is unusable and no longer active, in place.

    rows: active and unusable, (B,) bool, contiguous, written in place
    lengths, limits: (B,) int64, committed tokens and what they may grow to
    eos_token_ids: (E,) int64
    chunk: (B, K) int64
    draft_probs: (B, K, V) acc, what the tokens were drawn from; None where they were not drawn
    most: (B,) int64, or None

    out: (B,) int64 in 0..K; 0 where a row is not active
    """
    return torch.ops.mpg.count_usable_(rows, lengths, limits, eos_token_ids, chunk, draft_probs, most)


def commit_block_(
    rows: Sequence[Tensor],
    limits: Tensor,
    eos_token_ids: Tensor,
    chunk: Tensor,
    accepted: Tensor,
    token: Tensor | None = None,
    log_totals: Tensor | None = None,
) -> Tensor:
    """End a round of every active row, in place: commit the accepted tokens of its chunk and one that follows them.

    Of the chunk no more is kept than there is room for, nor anything behind a token that ends the text. `token` follows
    where the text may go on behind what is kept. A row fails as unusable where accepted is negative, or where a token
    would follow that is -2, or that is from a row of log-total NaN; as empty where one would follow from a row of
    log-total -inf, or where neither is there anything kept nor a token, which is then -1. What fails commits nothing
    and is no longer active, nor is what ended. Rows that are not active keep every byte.

    rows: seven contiguous tensors, written in place: tokens (B, C) int64, of which the first lengths[b] are committed;
        lengths, last_tokens and rounds, (B,) int64; active, unusable and empty, (B,) bool
    limits: (B,) int64, what lengths may grow to
    eos_token_ids: (E,) int64
    chunk: (B, L) int64
    accepted: (B,) int64; read as if clipped to at most L
    token: (B,) int64, or None where none follows
    log_totals: (B, L + 1) acc, of the row that the token is from where so many tokens are kept; None where all are
        neither NaN nor -inf

    out: (B, 4 + L + 1) int64: how many tokens were committed, active, unusable and empty as they are now, and these
    tokens, with others behind them that do not count
    """
    return torch.ops.mpg.commit_block_(rows, limits, eos_token_ids, chunk, accepted, token, log_totals)


def lora_shrink(x: Tensor, down: Tensor, groups: Tensor) -> Tensor:
    """Features of rows times the down factor of the adapter that each row runs: hidden[i] = x[i] down[groups[i]]^T.

    The first half of y + x A B for rows that each have an A and B of their own. Neighbouring rows of one group are
    computed together, so rows sorted by group are fastest. Sums are in acc, and do not depend on the other rows.

    x: (R, q, in), float32, float16 or bfloat16, on the CPU also float64; R rows of q tokens with `in` at least 1. Any
        strides; where the last is not 1, x is copied
    down: (G, r, in), dtype of x; smaller ranks padded with zeros
    groups: (R,) int64; a row of group 0, or of another outside [1, G), runs no adapter

    out: (R, q, r), dtype of x; 0 for rows without an adapter
    """
    return torch.ops.mpg.lora_shrink(x, down, groups)


def lora_expand_(out: Tensor, hidden: Tensor, up: Tensor, groups: Tensor, *, blocks: Sequence[int] = ()) -> None:
    """Add hidden[i] up[groups[i]] to out[i], in place: the second half of y + x A B, see lora_shrink.

    Sums are in acc, and rounded once with what lies in `out`. Rows without an adapter keep every byte.

    out: (R, q, out), float32, float16 or bfloat16, on the CPU also float64; written in place. It may be a part of the
        columns of another tensor: any strides without overlap, but 1 in the last dimension
    hidden: (R, q, r), dtype of out; may be part of another, too. Or (R, q, G * r), what every group's down factor makes
        of x one after another, of which each row uses its own group's
    up: (G, r, out), dtype of out
    groups: (R,) int64, as in lora_shrink
    blocks: where up is block diagonal, as of layers that are joined: of each block how many of the r ranks it has,
        which follow those of the one before, and its first output and the one behind its last. Elsewhere up must be
        zero, and may not be read
    """
    torch.ops.mpg.lora_expand_(out, hidden, up, groups, blocks=blocks)
