"""Question 1: how much of the shift that is asked for SCR delivers, from its own law of the next token.

Behind a context every token of the nucleus that SCR drafts from is walked, and chunks are drafted on from each. SCR
keeps the token if the chunk or any prefix of it passes, with probability 1 - prod_j (1 - A_j), and else falls back to
one token: so its law of the next token is a mean over chunks of probabilities, in which no accepted token is drawn. The
same chunks serve every chunk size, bound M, score and number of attributes; k = 1 is exact.

The first token of a chunk is kept if any of k prefixes passes, the last one only if the whole chunk does: tokens behind
the first are shifted more. So the same is asked of all tokens that a round keeps.

Then what M becomes: texts are drawn with a bound that begins anew with each, that has a short window, and that a row
keeps from text to text. Chunks of one token under a bound above every score have the law that all of them aim at.

    MPG_DATA=... MPG_STUDY=... python bench/study/next_token.py ESTP          the same with ESTPINFJ goes on to N = 8
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common import BATCH, NEW_TOKENS, PAPERS_DRAW, contexts, limited, load, log_ratios, measure, questions, told
from mpg.decode import scr
from mpg.decode.bound import Bound, _normalise
from mpg.model import Model

MOST = 8  # tokens of a chunk
BOUNDS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
PREFIXES = (0, 12)  # tokens of a text of the base that a context has beside its prompt
# Chunks drafted from a token of probability 1, beside the one of every token: what is said of all tokens has more noise
CHUNKS_OF_LAW, CHUNKS_OF_ROUND = limited(6), limited(24)
TEXTS_OF_BOUND = limited(4)  # to every prompt
BOUND_RUNS: dict[str, dict[str, Any]] = {
    "base": {"sampler": "direct", "target": "base"},
    "exact": {"sampler": "direct", "target": "arithmetic"},
    "scr k=1 M=10": {"sampler": "scr", "chunk_size": 1, "initial_bound": 10.0, "window": 2 * NEW_TOKENS},
    "scr": {"sampler": "scr"},
    "scr W=5": {"sampler": "scr", "window": 5},
    "scr carried": {"sampler": "scr"},
}


def main(names: str) -> None:
    prompts, model = questions(), load(names)

    def of_contexts(tell: Callable[[Model, str, list[int]], dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**place, **tell(model, names, ids)} for place, ids in contexts(model, prompts, PREFIXES)]

    def texts_of(name: str) -> list[dict[str, Any]]:
        options = {**BOUND_RUNS[name], **PAPERS_DRAW}
        weights = None if name == "base" else dict.fromkeys(names, 1 / len(names))
        options |= {"empty": "base"} if options["sampler"] == "scr" else {}
        is_carried = name.endswith("carried")
        how = {"max_new_tokens": NEW_TOKENS, "seed": 1000, "batch_size": 4 if is_carried else BATCH}
        with carried() if is_carried else nullcontext():
            results = model.generate(prompts * TEXTS_OF_BOUND, weights=weights, **how, **options)
        ratios = log_ratios(model, names, prompts * TEXTS_OF_BOUND, results)
        return [
            {
                "prompt": index % len(prompts), **told(result), "log_ratio": round(sum(own) / len(own), 4),
                **({"log_bound": round(result.stats["log_bound"], 4)} if options["sampler"] == "scr" else {}),
            }
            for index, (result, own) in enumerate(zip(results, ratios, strict=True))
        ]  # fmt: skip

    header = {"bounds": list(BOUNDS), "prefixes": list(PREFIXES), "new_tokens": NEW_TOKENS}
    of_tokens = {"laws": law_of, "rounds": round_of}
    settings = ["laws", "rounds", *(BOUND_RUNS if len(names) == 4 else ())]
    measure(
        f"laws-{names}", names, header, settings,
        lambda name: of_contexts(of_tokens[name]) if name in of_tokens else texts_of(name),
    )  # fmt: skip


def law_of(model: Model, names: str, context: list[int]) -> dict[str, Any]:
    """What one context tells: the mean combined log-ratio of the next token, in nats, under base, target and SCR. By
    "score N k M"; "target score N" is what scr aims at."""
    chunks = _draft_chunks(model, names, context, CHUNKS_OF_LAW)
    log_ratios_of, is_text, p, place = chunks.log_ratios, chunks.is_text, chunks.probs, chunks.place
    told: dict[str, Any] = {"nucleus": len(p)}
    for score in ("arithmetic", "geometric"):
        for n in range(1, len(names) + 1) if score == "arithmetic" else (4,):
            along = log_ratios_of[:n].cumsum(2)  # (n, tokens, MOST)
            scores = (along.exp() if score == "arithmetic" else along.mean(0, keepdim=True).exp()).mean(0)
            own = torch.zeros_like(p).scatter(0, place, scores[:, 0])  # of the token alone, the same in all its chunks
            shift = torch.zeros_like(p).scatter(0, place, log_ratios_of[:n, :, 0].mean(0))
            wanted = p * own / (p * own).sum()
            told[f"base {score} N={n}"] = _mean(p, shift)
            told[f"target {score} N={n}"] = _mean(wanted, shift)
            for bound in BOUNDS if n == 4 else (2.0,):
                passes = (scores / bound).clamp_max(1) * is_text
                fallback = p * (own / bound).clamp_max(1)
                for k in range(1, MOST + 1) if n == 4 else (1, 4):
                    keeps = 1 - (1 - passes[:, :k]).prod(1)
                    kept = p * torch.zeros_like(p).scatter_reduce(0, place, keeps, "mean", include_self=False)
                    law = kept + (1 - kept.sum()) * fallback / fallback.sum()
                    told[f"{score} N={n} k={k} M={bound:g}"] = _mean(law, shift)
    return told


def round_of(model: Model, names: str, context: list[int]) -> dict[str, Any]:
    """What one round of SCR does from a context, by "N k M": over the tokens that it keeps, the shift of the mean
    log-ratio from the draft's, and that which the target asks for at each of them; both in nats a round."""
    chunks = _draft_chunks(model, names, context, CHUNKS_OF_ROUND)
    if len(names) == 4:
        return _rounds(chunks, 4, BOUNDS, range(1, MOST + 1))
    sizes = range(1, len(names) + 1)
    return {key: pair for n in sizes for key, pair in _rounds(chunks, n, (2.0,), (1, 4)).items()}


def _rounds(chunks: Chunks, n: int, bounds: Sequence[float], lengths: Sequence[int]) -> dict[str, list[float]]:
    """`round_of` for the first n attributes."""
    log_ratios_of, means_of, wanted_of = chunks.log_ratios[:n], chunks.means[n - 1], chunks.wanted[n - 1]
    scores, shift = log_ratios_of.cumsum(2).exp().mean(0), log_ratios_of.mean(0)  # (T, MOST)
    of_token = chunks.probs / chunks.place.bincount()  # of each of a token's chunks
    weight, own = of_token[chunks.place], scores[:, 0]
    mean, wanted = weight @ shift[:, 0], weight * own @ shift[:, 0] / (weight @ own)  # of the first token
    means = torch.cat([mean.expand(len(own), 1), means_of], 1)
    asks = torch.cat([(wanted - mean).expand(len(own), 1), wanted_of - means_of], 1)
    told: dict[str, list[float]] = {}
    for bound in bounds:
        passes = (scores / bound).clamp_max(1) * chunks.is_text
        before = torch.cat([torch.ones_like(scores[:, :1]), scores[:, :-1]], 1)  # of what stands before each token
        fallback = weight * (own / bound).clamp_max(1)
        fallback_shift = fallback @ shift[:, 0] / fallback.sum() - mean
        for k in lengths:
            fails = (1 - passes[:, :k]).flip(1).cumprod(1).flip(1)  # all prefixes from the token's on
            chances = torch.arange(k, 0, -1)
            # the probability of keeping a token that changes no score is known before it is drawn: times the shift of
            # what the draft draws it has mean 0, and is taken off as noise
            guess = (1 - (1 - (before[:, :k] / bound).clamp_max(1)) ** chances) * chunks.is_text[:, :k]
            gain = ((1 - fails - guess) * (shift - means)[:, :k]).sum(1)
            due = ((1 - fails) * asks[:, :k]).sum(1)
            nothing = weight @ fails[:, 0]
            shifted = weight @ gain + nothing * fallback_shift
            asked = weight @ due + nothing * (wanted - mean)
            told[f"N={n} k={k} M={bound:g}"] = [round(float(shifted), 6), round(float(asked), 6)]
    return told


def _mean(law: Tensor, shift: Tensor) -> float:
    return round(float(law @ shift), 6)


@dataclass(frozen=True)
class Chunks:
    """Chunks that the draft goes on with from a context, T of them, MOST tokens each.

    probs       (P,), the draft's of every token of its nucleus
    place       (T,), which of them a chunk begins with
    log_ratios  (names, T, MOST), token by token
    is_text     (T, MOST), False behind an end
    means       (names, T, MOST - 1), of every token but the first: the mean combined log-ratio of the first name, the
                first two, ... under the draft there
    wanted      (names, T, MOST - 1), the same under each one's target
    """

    probs: Tensor
    place: Tensor
    log_ratios: Tensor
    is_text: Tensor
    means: Tensor
    wanted: Tensor


@torch.inference_mode()
def _draft_chunks(model: Model, names: str, context: list[int], chunks_per_mass: int) -> Chunks:
    """Chunks behind a context; each token of the draft's nucleus begins one or more."""
    roles = ("base", *names)
    start = torch.tensor([len(context) - 1])
    session = model.models.open([context], roles, len(context))
    draft = warped(session.forward(roles, torch.tensor([[context[-1]]]), start, kv_length=len(context))[0, 0, -1])
    session.close()
    nucleus = draft.nonzero()[:, 0]
    first = nucleus.repeat_interleave((1 + chunks_per_mass * draft[nucleus]).round().long())
    generator = torch.Generator().manual_seed(len(context))
    parts, texts, means = [], [], []
    for tokens in first.split(BATCH):
        session = model.models.open([context] * len(tokens), roles, len(context) + MOST)
        position = torch.full_like(tokens, len(context) - 1)
        fed = torch.stack([torch.full_like(tokens, context[-1]), tokens], 1)
        logits = session.forward(roles, fed, position, kv_length=len(context) + 1).float()
        is_text, ratios = [torch.ones(len(tokens), dtype=torch.bool)], [log_ratios_at(logits[:, :, 0], tokens)]
        expected = []
        for step in range(1, MOST):
            is_text.append(is_text[-1] & ~torch.isin(tokens, torch.tensor(model.models.eos_token_ids)))
            rows = logits[:, :, -1]
            tokens = torch.multinomial(warped(rows[0]), 1, generator=generator)[:, 0]
            ratios.append(log_ratios_at(rows, tokens))
            expected.append(_expected(rows))
            if step + 1 < MOST:
                kv_length = len(context) + step + 1
                logits = session.forward(roles, tokens[:, None], position + step + 1, kv_length=kv_length).float()
        session.close()
        parts.append(torch.stack(ratios, 2))
        texts.append(torch.stack(is_text, 1))
        means.append(torch.stack(expected, 3))
    place = torch.searchsorted(nucleus, first)
    return Chunks(draft[nucleus], place, torch.cat(parts, 1).double(), torch.cat(texts), *torch.cat(means, 2))


def log_ratios_at(logits: Tensor, tokens: Tensor) -> Tensor:
    """log pi_i - log base of tokens (T,) behind logits (1 + names, T, V). out: (names, T)"""
    own = logits.gather(2, tokens.expand(len(logits), -1)[..., None])[..., 0] - logits.logsumexp(-1)
    return own[1:] - own[0]


def _expected(logits: Tensor) -> Tensor:
    """The next token's mean combined log-ratio of the first name, the first two, ... under draft and target, behind
    logits (1 + names, T, V). out: (2, names, T)"""
    draft, logprobs = warped(logits[0]), logits.double().log_softmax(-1)
    ratios, sizes = logprobs[1:] - logprobs[0], torch.arange(1, len(logits))[:, None, None]
    wanted = draft * ratios.exp().cumsum(0)
    mean = ratios.cumsum(0) / sizes
    return torch.stack([(draft * mean).sum(-1), (wanted * mean).sum(-1) / wanted.sum(-1)])


def warped(logits: Tensor) -> Tensor:
    """The draft's probabilities, (..., V)."""
    probs = (logits.double() / PAPERS_DRAW["temperature"]).softmax(-1)
    ordered, order = probs.sort(-1, descending=True)
    ordered = torch.where(ordered.cumsum(-1) - ordered < PAPERS_DRAW["top_p"], ordered, 0)
    probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    return probs / probs.sum(-1, keepdim=True)


@contextmanager
def carried() -> Iterator[None]:
    """SCR with a bound that a row keeps from one text to the next, where Algorithm 1 leaves open what begins anew."""

    class Carried(Bound):
        has_begun = False

        def reset(self, rows: Tensor, alpha: Tensor) -> None:
            if self.has_begun:
                self.weights[rows] = _normalise(alpha)
            else:
                super().reset(rows, alpha)
                self.has_begun = True

    scr.Bound = Carried  # type: ignore[misc]
    try:
        yield
    finally:
        scr.Bound = Bound  # type: ignore[misc]


if __name__ == "__main__":
    main(sys.argv[1])
