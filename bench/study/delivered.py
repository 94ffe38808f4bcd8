"""Question 1: how much of the shift that is asked for each sampler delivers, on the study's adapters.

Every setting continues the same questions; a row keeps the log-ratio of a text under each attribute, so that shares
and their intervals are made from the rows alone. Also the exact law of SCR's first token, in its draft's nucleus.

    MPG_DATA=... MPG_STUDY=... python bench/study/delivered.py [delivered | attributes]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from common import BATCH, PAPERS_DRAW, UNWARPED, load, log_ratios, measure, questions, told
from mpg.decode import scr
from mpg.decode.bound import Bound, _normalise

# By the part of the question, the attributes: the first N of them are asked for. Eight that pull together: three seeds
# of two poles beside the other two
PARTS = {
    "delivered": ("E", "S", "T", "P"),
    "attributes": ("E", "S", "T", "P", "E-seed1", "T-seed1", "E-seed2", "T-seed2"),
}
NEW_TOKENS = 32
CHUNKS = (1, 2, 3, 4, 6, 8)
BOUNDS = (1.0, 1.5, 4.0, 10.0)
LAW_BOUNDS = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)


def settings(part: str) -> dict[str, tuple[int, dict[str, Any]]]:
    """By name, the number of attributes and the options."""
    own = {"sampler": "scr", "empty": "base"}
    arithmetic = {"sampler": "direct", "target": "arithmetic"}
    of: dict[str, tuple[int, dict[str, Any]]] = {"base": (len(PARTS[part]), {"sampler": "direct", "target": "base"})}
    if part == "attributes":
        for n in (1, 2, 8):
            of |= {f"exact N={n}": (n, arithmetic), f"scr N={n}": (n, own)}
        return of
    of["arithmetic exact"] = (4, arithmetic)
    of |= {f"arithmetic scr k={k}": (4, {**own, "chunk_size": k}) for k in CHUNKS}
    of |= {f"arithmetic scr k=4 M0={bound:g}": (4, {**own, "initial_bound": bound}) for bound in BOUNDS}
    of["arithmetic scr k=4 W=5"] = (4, {**own, "window": 5})
    of["arithmetic scr k=4 carried"] = (4, {**own, "carried": True})
    of["geometric exact"] = (4, {"sampler": "direct", "target": "geometric"})
    of |= {f"geometric scr k={k}": (4, {**own, "target": "geometric", "chunk_size": k}) for k in (1, 4, 8)}
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


def first_laws(model: Any, names: tuple[str, ...], prompts: list[str]) -> list[dict[str, Any]]:
    """Total variation between SCR's law of the first token and the one it aims at, by bound and k = 1 and 2, under the
    paper's draft. Exact: every token of the nucleus, and every token that may follow it, is walked."""
    rows = []
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


def main(part: str) -> None:
    prompts, wanted, names = questions(), settings(part), PARTS[part]
    model = load(names)

    def rows_of(setting: str) -> list[dict[str, Any]]:
        if setting == "first token":
            return first_laws(model, names, prompts)
        n, options = wanted[setting]
        own = {**UNWARPED, **options}
        weights = None if own.get("target") == "base" else dict.fromkeys(names[:n], 1 / n)
        is_carried = own.pop("carried", False)
        how = {"max_new_tokens": NEW_TOKENS, "seed": 1000, "batch_size": 6 if is_carried else BATCH, **own}
        with carried() if is_carried else nullcontext():
            results = model.generate(prompts, weights=weights, **how)
        ratios = log_ratios(model, names[:n], prompts, results)
        return [
            {"prompt": index, **told(result), "log_ratios": [round(ratio, 3) for ratio in own]}
            for index, (result, own) in enumerate(zip(results, ratios, strict=True))
        ]

    first = ["first token"] if part == "delivered" else []
    measure(part, {"new_tokens": NEW_TOKENS, "names": list(names)}, [*first, *wanted], rows_of)


if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        main(part)
