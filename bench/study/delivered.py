"""Question 1: how much of the shift that is asked for each sampler delivers, on the study's adapters.

Every setting continues the same questions; a row keeps the log-ratio of a text under each attribute, so that shares
and their intervals are made from the rows alone. Also the exact law of SCR's first token, in the nucleus it drafts from.

    MPG_DATA=... MPG_STUDY=... python bench/study/delivered.py
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from common import BATCH, PAPERS_DRAW, UNWARPED, load, log_ratios, measure, questions, told
from mpg.decode import scr
from mpg.decode.bound import Bound, _normalise

NAMES = ("E", "S", "T", "P", "E-seed1", "T-seed1", "E-seed2", "T-seed2")  # the first N of which one asks for
NEW_TOKENS = 32
CHUNKS = (1, 2, 3, 4, 6, 8)
BOUNDS = (1.0, 1.25, 1.5, 4.0, 10.0)
LAW_BOUNDS = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)


def settings() -> dict[str, tuple[int, dict[str, Any]]]:
    """By name, the number of attributes and the options."""
    own = {"sampler": "scr", "empty": "base"}
    of: dict[str, tuple[int, dict[str, Any]]] = {"base": (8, {"sampler": "direct", "target": "base"})}
    of["arithmetic exact N=4"] = (4, {"sampler": "direct", "target": "arithmetic"})
    of |= {f"arithmetic scr N=4 k={k}": (4, {**own, "chunk_size": k}) for k in CHUNKS}
    of |= {f"arithmetic scr N=4 k=4 M0={m:g}": (4, {**own, "initial_bound": m}) for m in BOUNDS}
    of["arithmetic scr N=4 k=4 W=5"] = (4, {**own, "window": 5})
    of["arithmetic scr N=4 k=4 W=20 carried"] = (4, {**own, "carried": True})
    of["geometric exact N=4"] = (4, {"sampler": "direct", "target": "geometric"})
    of |= {f"geometric scr N=4 k={k}": (4, {**own, "target": "geometric", "chunk_size": k}) for k in (1, 4, 8)}
    for n in (1, 2, 8):
        of[f"arithmetic exact N={n}"] = (n, {"sampler": "direct", "target": "arithmetic"})
        of[f"arithmetic scr N={n} k=4"] = (n, own)
    return of


@contextmanager
def carried() -> Iterator[None]:
    """SCR with a bound that a row keeps from one text to the next, where Algorithm 1 leaves open what begins anew."""

    class Carried(Bound):
        def __init__(self, *args: Any) -> None:
            self.began = False
            super().__init__(*args)

        def reset(self, rows: Tensor, alpha: Tensor) -> None:
            if self.began:
                self.weights[rows] = _normalise(alpha)
            else:
                super().reset(rows, alpha)
                self.began = True

    scr.Bound = Carried
    try:
        yield
    finally:
        scr.Bound = Bound


def first_laws(model: Any, prompts: list[str]) -> list[dict[str, Any]]:
    """Total variation between SCR's law of the first token and the one it aims at, by bound and k = 1 and 2, under the
    paper's draft. Exact: every token of the nucleus, and every token that may follow it, is walked."""
    names, rows = NAMES[:4], []
    for index, prompt in enumerate(prompts):
        ids = model.encode(prompt)
        draft, scores = _draft_and_scores(model, names, [ids])
        tokens = draft[0].nonzero()[:, 0]
        p, score = draft[0, tokens], scores[0, tokens]
        wanted = p * score / (p * score).sum()
        after, after_scores = _draft_and_scores(model, names, [[*ids, int(token)] for token in tokens])
        row: dict[str, Any] = {"prompt": index, "nucleus": len(tokens), "base": _tv(p / p.sum(), wanted)}
        for bound in LAW_BOUNDS:
            one = (score / bound).clamp_max(1)
            two = (score[:, None] * after_scores / bound).clamp_max(1)
            both = (after * (two + (1 - two) * one[:, None])).sum(1)  # the whole chunk passes, or else its first token
            for k, kept in ((1, p * one), (2, p * both)):
                fallback = p * one / (p * one).sum() * (1 - kept.sum())
                row[f"k={k} M0={bound:g}"] = _tv(kept + fallback, wanted)
        rows.append({name: round(value, 5) for name, value in row.items()})
    return rows


def _draft_and_scores(model: Any, names: tuple[str, ...], texts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The draft's row behind each text, and the score sum_i alpha_i pi_i / base of every token there, (texts, V)."""
    drafts, scores = [], []
    for first in range(0, len(texts), BATCH):
        part = texts[first : first + BATCH]
        roles = ("base", *names)
        session = model.models.open(part, roles, max(map(len, part)))
        start = torch.tensor([len(text) - 1 for text in part])
        last = torch.tensor([[text[-1]] for text in part])
        logits = session.forward(roles, last, start, kv_length=max(map(len, part)))[:, :, 0].double()
        session.close()
        logprobs = logits.log_softmax(-1)
        scores.append((logprobs[1:] - logprobs[0]).exp().mean(0))
        warped = (logits[0] / PAPERS_DRAW["temperature"]).softmax(-1)
        ordered, order = warped.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= PAPERS_DRAW["top_p"]] = 0
        warped = torch.zeros_like(warped).scatter(-1, order, ordered)
        drafts.append(warped / warped.sum(-1, keepdim=True))
    return torch.cat(drafts), torch.cat(scores)


def _tv(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().sum() / 2)


def main() -> None:
    prompts, wanted = questions(), settings()
    model = load(NAMES)

    def rows_of(setting: str) -> list[dict[str, Any]]:
        if setting == "first token":
            return first_laws(model, prompts)
        n, options = wanted[setting]
        names, own = NAMES[:n], {**UNWARPED, **options}
        weights = None if own.get("target") == "base" else dict.fromkeys(names, 1 / n)
        is_carried = own.pop("carried", False)
        how = {"max_new_tokens": NEW_TOKENS, "seed": 1000, "batch_size": 6 if is_carried else BATCH, **own}
        if is_carried:
            with carried():
                results = model.generate(prompts, weights=weights, **how)
        else:
            results = model.generate(prompts, weights=weights, **how)
        ratios = log_ratios(model, names, prompts, results)
        return [
            {"prompt": index, **told(result), "log_ratios": dict(zip(names, (round(r, 3) for r in own), strict=True))}
            for index, (result, own) in enumerate(zip(results, ratios, strict=True))
        ]

    measure("delivered", {"new_tokens": NEW_TOKENS, "names": list(NAMES)}, ["first token", *wanted], rows_of)


if __name__ == "__main__":
    main()
