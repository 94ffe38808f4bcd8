"""Question 3: a trait suppressed by a negative weight of its own adapter, against the opposite pole's adapter.

MPG_DATA=... MPG_STUDY=... python bench/study/negative.py [negative | rows]
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from common import BATCH, NEW_TOKENS, NUM_TEXTS, PAPERS_DRAW, POLES, RUNS, load, measure, questions
from judge import judged, study_judge
from next_token import warped

KEPT = "T"  # is asked for, and E is to go
SIZES = (0.9, 0.5)
TARGETS = ("geometric", "anchored", "arithmetic")
# Weights as the paper gives them for INFJ, [1, 0, -9, -3], which it calls those of E, S, T and J; the same with P in
# the place of J, and of INFJ's own poles; and milder ones
ROWS: dict[str, dict[str, float]] = {
    "E=1,T=-9,P=-3": {"E": 1, "T": -9, "P": -3},
    "E=-1,S=-1,T=-1,P=1": {"E": -1, "S": -1, "T": -1, "P": 1},
    "T=1,E=-0.9": {"T": 1, "E": -0.9},
    "I=1,S=1,T=1,E=-1,P=-1": {"I": 1, "S": 1, "T": 1, "E": -1, "P": -1},
    "E=1,T=-9,J=-3": {"E": 1, "T": -9, "J": -3},
    "I=1,F=-9,J=-3": {"I": 1, "F": -9, "J": -3},
}


def main(part: str) -> None:
    names = [name for name in POLES if (RUNS / "adapters" / name / "training.json").is_file()]
    prompts, model = questions() * NUM_TEXTS, load("EIT" if part == "negative" else names)
    own = {"max_new_tokens": NEW_TOKENS, "batch_size": BATCH, "seed": 3000, "sampler": "direct", **PAPERS_DRAW}
    base: list[Any] = []

    def texts_of(setting: str) -> list[Any]:
        if setting == "base":
            return model.generate(prompts, target="base", **own)
        target, _, text = setting.partition(" ")
        return model.generate(prompts, target=target, weights=text, **own)

    def rows_of(setting: str) -> list[dict[str, Any]]:
        if setting.startswith("rows "):
            base[:] = base or texts_of("base")
            return empty_rows(model, prompts, [result.tokens for result in base], ROWS[setting.removeprefix("rows ")])
        return judged(model, prompts, texts_of(setting))

    settings = ["base", f"geometric {KEPT}=1"]
    if part == "rows":  # of the adapters that are there
        settings = [f"rows {name}" for name, weights in ROWS.items() if weights.keys() <= set(names)]
    for size in SIZES if part == "negative" else ():
        settings += [f"{target} {KEPT}=1,{way}" for target in TARGETS for way in (f"E=-{size:g}", f"I={size:g}")]
    header = {"new_tokens": NEW_TOKENS, "texts": NUM_TEXTS, "judge": study_judge().accuracy}
    measure(part, model.models.attribute_names, header, settings, rows_of)


def empty_rows(model: Any, prompts: list[str], texts: list[Any], weights: dict[str, float]) -> list[dict[str, Any]]:
    """Along texts of the base: positions where no token of the vocabulary, and where none of the draft's nucleus, has a
    positive arithmetic score, and the base's probability of those that have one."""
    roles, alpha = ("base", *weights), torch.tensor(list(weights.values()), dtype=torch.float64)
    rows = []
    for prompt, text in zip(prompts, texts, strict=True):
        ids = model.encode(prompt)
        session = model.models.open([ids], roles, len(ids) + len(text))
        fed = torch.tensor([[ids[-1], *text[:-1]]])
        logits = session.forward(roles, fed, torch.tensor([len(ids) - 1]), kv_length=len(ids) + len(text) - 1)[:, 0]
        session.close()
        logprobs = logits.double().log_softmax(-1)
        is_left = torch.einsum("i,ipv->pv", alpha, (logprobs[1:] - logprobs[0]).exp()) > 0
        left_mass = (logprobs[0].exp() * is_left).sum()
        row = {"prompt": prompts.index(prompt), "tokens": len(text), "empty": int((~is_left.any(-1)).sum())}
        row["empty_nucleus"] = int((~(is_left & (warped(logits[0]) > 0)).any(-1)).sum())
        rows.append({**row, "left_mass": round(float(left_mass), 5)})
    return rows


if __name__ == "__main__":
    for part in sys.argv[1:] or ("negative", "rows"):
        main(part)
