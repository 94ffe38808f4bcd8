"""Question 1: how much of the shift that is asked for SCR delivers, from its own law of the next token.

Behind a context every token of the nucleus that SCR drafts from is walked, and chunks are drafted on from each. SCR
keeps the token if the chunk or any prefix of it passes, with probability 1 - prod_j (1 - A_j), and else falls back to
one token: so its law of the next token is a mean over chunks of probabilities, in which no accepted token is drawn. The
same chunks serve every chunk size, bound M, score and number of attributes; k = 1 is exact.

Then what M becomes: texts are drawn with a bound that begins anew with each, that has a short window, and that a row
keeps from text to text.

    MPG_DATA=... MPG_STUDY=... python bench/study/next_token.py ESTP          the same with ESTPINFJ goes on to N = 8
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from common import BATCH, PAPERS_DRAW, load, log_ratios, measure, questions, told
from mpg.decode import scr
from mpg.decode.bound import Bound, _normalise
from mpg.model import Model

MOST = 8  # tokens of a chunk
BOUNDS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
PREFIXES = (0, 12)  # tokens of a text of the base that a context has beside its prompt
CHUNKS_PER_MASS = 6  # drafted from a token of probability 1, beside the one of every token
NEW_TOKENS = 32
BOUND_RUNS: dict[str, dict[str, Any]] = {
    "base": {"sampler": "direct", "target": "base"},
    "exact": {"sampler": "direct", "target": "arithmetic"},
    "scr": {"sampler": "scr"},
    "scr W=5": {"sampler": "scr", "window": 5},
    "scr carried": {"sampler": "scr"},
}


def main(names: str) -> None:
    prompts, model = questions(), load(names)
    contexts: list[tuple[int, int, list[int]]] = []

    def laws() -> list[dict[str, Any]]:
        texts = model.generate(prompts, target="base", sampler="direct", seed=900, max_new_tokens=max(PREFIXES))
        for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            contexts.extend((index, n, [*model.encode(prompt), *text.tokens[:n]]) for n in PREFIXES)
        return [{"prompt": index, "prefix": n, **law_of(model, names, context)} for index, n, context in contexts]

    def texts_of(name: str) -> list[dict[str, Any]]:
        options = {**BOUND_RUNS[name], **PAPERS_DRAW}
        weights = None if name == "base" else dict.fromkeys(names, 1 / len(names))
        options |= {"empty": "base"} if options["sampler"] == "scr" else {}
        is_carried = name.endswith("carried")
        how = {"max_new_tokens": NEW_TOKENS, "seed": 1000, "batch_size": 4 if is_carried else BATCH}
        with carried() if is_carried else nullcontext():
            results = model.generate(prompts, weights=weights, **how, **options)
        ratios = log_ratios(model, names, prompts, results)
        return [
            {
                "prompt": index, **told(result), "log_ratio": round(sum(own) / len(own), 4),
                **({"log_bound": round(result.stats["log_bound"], 4)} if options["sampler"] == "scr" else {}),
            }
            for index, (result, own) in enumerate(zip(results, ratios, strict=True))
        ]  # fmt: skip

    header = {"bounds": list(BOUNDS), "prefixes": list(PREFIXES), "new_tokens": NEW_TOKENS}
    settings = ["laws", *(BOUND_RUNS if len(names) == 4 else ())]
    measure(f"laws-{names}", header, settings, lambda name: laws() if name == "laws" else texts_of(name))


def law_of(model: Model, names: str, context: list[int]) -> dict[str, Any]:
    """What one context tells: of base, target and SCR the mean combined log-ratio of the next token, and of base and
    SCR the total variation from the target. By "score N k M"; "target score N" is what scr aims at."""
    draft, tokens, log_ratios_of, is_text = _draft_chunks(model, names, context)
    nucleus = draft.nonzero()[:, 0]
    p, place = draft[nucleus], torch.searchsorted(nucleus, tokens)
    told: dict[str, Any] = {"nucleus": len(nucleus)}
    for score in ("arithmetic", "geometric"):
        for n in range(1, len(names) + 1) if score == "arithmetic" else (4,):
            along = log_ratios_of[:n].cumsum(2)  # (n, tokens, MOST)
            scores = (along.exp() if score == "arithmetic" else along.mean(0, keepdim=True).exp()).mean(0)
            own = torch.zeros_like(p).scatter(0, place, scores[:, 0])  # of the token alone, the same in all its chunks
            shift = torch.zeros_like(p).scatter(0, place, log_ratios_of[:n, :, 0].mean(0))
            wanted = p * own / (p * own).sum()
            told[f"base {score} N={n}"] = _pair(p, wanted, shift)
            told[f"target {score} N={n}"] = _pair(wanted, wanted, shift)
            for bound in BOUNDS if n == 4 else (2.0,):
                passes = (scores / bound).clamp_max(1) * is_text
                fallback = p * (own / bound).clamp_max(1)
                for k in range(1, MOST + 1) if n == 4 else (1, 4):
                    keeps = 1 - (1 - passes[:, :k]).prod(1)
                    kept = p * torch.zeros_like(p).scatter_reduce(0, place, keeps, "mean", include_self=False)
                    law = kept + (1 - kept.sum()) * fallback / fallback.sum()
                    told[f"{score} N={n} k={k} M={bound:g}"] = _pair(law, wanted, shift)
    return told


def _pair(law: Tensor, wanted: Tensor, shift: Tensor) -> list[float]:
    """The mean log-ratio under a law of the next token, in nats, and its distance from the wanted one."""
    return [round(float(law @ shift), 6), round(float((law - wanted).abs().sum() / 2), 6)]


@torch.inference_mode()
def _draft_chunks(model: Model, names: str, context: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The draft's row (V,); the first tokens (T,) of chunks, each token of its nucleus once or more; their log-ratios
    (names, T, MOST), token by token; and which of their tokens are text, none behind an end (T, MOST)."""
    roles = ("base", *names)
    start = torch.tensor([len(context) - 1])
    session = model.models.open([context], roles, len(context))
    draft = _warped(session.forward(roles, torch.tensor([[context[-1]]]), start, kv_length=len(context))[0, 0, -1])
    session.close()
    nucleus = draft.nonzero()[:, 0]
    first = nucleus.repeat_interleave((1 + CHUNKS_PER_MASS * draft[nucleus]).round().long())
    generator = torch.Generator().manual_seed(len(context))
    parts, texts = [], []
    for tokens in first.split(BATCH):
        session = model.models.open([context] * len(tokens), roles, len(context) + MOST)
        position = torch.full_like(tokens, len(context) - 1)
        fed = torch.stack([torch.full_like(tokens, context[-1]), tokens], 1)
        logits = session.forward(roles, fed, position, kv_length=len(context) + 1).float()
        is_text, ratios = [torch.ones(len(tokens), dtype=torch.bool)], [_log_ratios(logits[:, :, 0], tokens)]
        for step in range(1, MOST):
            is_text.append(is_text[-1] & ~torch.isin(tokens, torch.tensor(model.models.eos_token_ids)))
            rows = logits[:, :, -1]
            tokens = torch.multinomial(_warped(rows[0]), 1, generator=generator)[:, 0]
            ratios.append(_log_ratios(rows, tokens))
            if step + 1 < MOST:
                kv_length = len(context) + step + 1
                logits = session.forward(roles, tokens[:, None], position + step + 1, kv_length=kv_length).float()
        session.close()
        parts.append(torch.stack(ratios, 2))
        texts.append(torch.stack(is_text, 1))
    return draft, first, torch.cat(parts, 1).double(), torch.cat(texts)


def _log_ratios(logits: Tensor, tokens: Tensor) -> Tensor:
    """log pi_i - log base of tokens (T,) behind logits (1 + names, T, V). out: (names, T)"""
    own = logits.gather(2, tokens.expand(len(logits), -1)[..., None])[..., 0] - logits.logsumexp(-1)
    return own[1:] - own[0]


def _warped(logits: Tensor) -> Tensor:
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
