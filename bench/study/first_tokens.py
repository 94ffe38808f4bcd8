"""Question 1, distances: SCR's exact law of the next token, from every chunk that its draft can make.

SCR keeps a drafted token if its chunk, or any prefix of the chunk that holds it, passes. What follows the token in the
chunk is enumerated over the draft's nuclei. So nothing is drawn, and neither the law nor its distance from the target's
has any noise. A tree of chunks that outgrows MOST_PATHS is left at the length before.

    MPG_DATA=... MPG_STUDY=... python bench/study/first_tokens.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common import contexts, load, measure, questions
from mpg.model import Model
from next_token import BOUNDS, log_ratios_at, warped

NAMES = "ESTP"
LONGEST = 4  # tokens of a chunk
PREFIXES = (0, 1)  # tokens of a text of the base that a context has beside its prompt
MOST_PATHS = 256  # that are read for one more token
ROWS = 32


@dataclass(frozen=True)
class Level:
    """All chunks of one length d that the draft can make, n of them.

    paths       (n, d), their tokens
    parent      (n,), each one's place among those of d - 1
    probs       (n,), of its last token, given its parent
    log_ratios  (names, n), of the whole chunk
    has_ended   (n,), by its last token
    """

    paths: Tensor
    parent: Tensor
    probs: Tensor
    log_ratios: Tensor
    has_ended: Tensor


def main() -> None:
    model = load(NAMES)

    def laws(_: str) -> list[dict[str, Any]]:
        return [{**place, **laws_of(model, NAMES, ids)} for place, ids in contexts(model, questions(), PREFIXES)]

    header = {"bounds": list(BOUNDS), "prefixes": list(PREFIXES), "longest": LONGEST, "most_paths": MOST_PATHS}
    measure("first-tokens", NAMES, header, ["laws"], laws)


def laws_of(model: Model, names: str, context: list[int]) -> dict[str, Any]:
    """What one context tells: by "k M", SCR's shift of the next token's mean log-ratio and its total variation from the
    target, whose own and whose distance from the base are there as well; and how many chunks there are of each length.
    """
    levels = chunks(model, names, context)
    first = levels[0]
    p, shift = first.probs, first.log_ratios.mean(0)
    own = first.log_ratios.exp().mean(0)
    wanted = p * own / (p * own).sum()
    told: dict[str, Any] = {"chunks": [len(level.probs) for level in levels]}
    told |= {"base": _pair(p, wanted, shift), "target": _pair(wanted, wanted, shift)}
    for bound in BOUNDS:
        fallback = p * (own / bound).clamp_max(1)
        for k in range(1, len(levels) + 1):
            kept = p * (1 - _failures(levels[:k], bound))
            law = kept + (1 - kept.sum()) * fallback / fallback.sum()
            told[f"k={k} M={bound:g}"] = _pair(law, wanted, shift)
    return told


@torch.inference_mode()
def chunks(model: Model, names: str, context: list[int]) -> list[Level]:
    """All chunks of 1 to LONGEST tokens that the draft can make behind a context, unless there are too many."""
    paths, log_ratios = torch.empty(1, 0, dtype=torch.long), torch.zeros(len(names), 1, dtype=torch.float64)
    has_ended, levels = torch.zeros(1, dtype=torch.bool), list[Level]()
    for _ in range(LONGEST):
        going = (~has_ended).nonzero()[:, 0]
        if len(going) > MOST_PATHS:
            break
        parts = []
        for rows in going.split(ROWS):
            logits = _read(model, names, context, paths[rows])
            draft = warped(logits[0])
            row, token = draft.nonzero().T
            of_token = log_ratios_at(logits[:, row], token) + log_ratios[:, rows[row]]
            parts.append((torch.cat([paths[rows[row]], token[:, None]], 1), rows[row], draft[row, token], of_token))
        of_paths, parents, probs, of_ratios = zip(*parts, strict=True)
        paths, log_ratios = torch.cat(of_paths), torch.cat(of_ratios, 1)
        has_ended = torch.isin(paths[:, -1], torch.tensor(model.models.eos_token_ids))
        levels.append(Level(paths, torch.cat(parents), torch.cat(probs), log_ratios, has_ended))
    return levels


def _failures(levels: list[Level], bound: float) -> Tensor:
    """The probability that no prefix of a chunk passes, for each first token."""
    fails, behind = torch.empty(0), torch.ones_like(levels[-1].probs)
    for index in range(len(levels) - 1, -1, -1):
        level = levels[index]
        fails = (1 - (level.log_ratios.exp().mean(0) / bound).clamp_max(1)) * behind
        if index:  # a chunk that has ended has no prefix that is longer
            ended = levels[index - 1].has_ended.double()
            behind = ended.index_add(0, level.parent, level.probs * fails)
    return fails


def _read(model: Model, names: str, context: list[int], paths: Tensor) -> Tensor:
    """The logits (1 + names, n, V) behind paths (n, d) of tokens after a context."""
    roles = ("base", *names)
    count, depth = paths.shape
    session = model.models.open([context] * count, roles, len(context) + depth)
    fed = torch.cat([torch.full((count, 1), context[-1]), paths], 1)
    start = torch.full((count,), len(context) - 1)
    logits = session.forward(roles, fed, start, kv_length=len(context) + depth)[:, :, -1].float()
    session.close()
    return logits


def _pair(law: Tensor, wanted: Tensor, shift: Tensor) -> list[float]:
    """The mean log-ratio under a law of the next token, in nats, and its distance from the wanted one."""
    return [round(float(law @ shift), 6), round(float((law - wanted).abs().sum() / 2), 6)]


if __name__ == "__main__":
    main()
