"""Question 2: the front of trait against perplexity, per method as weights grow, and what it costs in forwards.

MPG_DATA=... MPG_STUDY=... python bench/study/front.py
"""

from __future__ import annotations

from typing import Any

import torch

from common import BATCH, PAPERS_DRAW, load, log_ratios, measure, questions, surprise, told
from judge import study_judge
from mpg.model import Model
from mpg.paper.methods import answer

NAMES = ("E", "S", "T", "P")
NEW_TOKENS = 32
SCALES = (0.25, 0.5, 1.0)
BEST_OF = 4  # soups that cost as many forwards as one text of a target of 4 attributes


def main() -> None:
    prompts, model = questions(), load(NAMES)
    own = {"max_new_tokens": NEW_TOKENS, "batch_size": BATCH, "seed": 2000, **PAPERS_DRAW}

    def results_of(setting: str) -> tuple[list[str], list[Any]]:
        method, _, scale = setting.partition(" ")
        weights = dict.fromkeys(NAMES, float(scale or 0.25))
        if method == "soups":  # each prompt BEST_OF times
            merged = model.models.merge(NAMES, torch.tensor(list(weights.values())))
            many = [prompt for prompt in prompts for _ in range(BEST_OF)]
            return many, Model(merged.with_roles(base="merged")).generate(many, target="base", sampler="direct", **own)
        if method in ("base", "pp"):
            return prompts, answer(model, method, prompts, weights, **own)[""]
        target, _, sampler = method.partition("-")
        how = {"sampler": sampler or "direct", "target": target, **({"empty": "base"} if sampler else {})}
        return prompts, model.generate(prompts, weights=weights, **how, **own)

    def rows_of(setting: str) -> list[dict[str, Any]]:
        asked, results = results_of(setting)
        ratios = [sum(own) for own in log_ratios(model, NAMES, asked, results)]
        nats = surprise(model, asked, results)
        traits = study_judge().score([result.text for result in results])
        first_poles = {of: [float(p) if of[0] in NAMES else 1 - float(p) for p in ps] for of, ps in traits.items()}
        each = len(results) // len(prompts)
        return [
            {
                "prompt": index // each, "draw": index % each, **told(result), "nats": round(nats[index], 3),
                "log_ratio": round(ratios[index], 3),
                "traits": {of: round(of_texts[index], 4) for of, of_texts in first_poles.items()},
            }
            for index, result in enumerate(results)
        ]  # fmt: skip

    settings = ["base", "pp", "arithmetic", "arithmetic-scr", "geometric-scr"]
    settings += [f"{method} {scale:g}" for scale in SCALES for method in ("soups", "geometric", "anchored")]
    header = {"new_tokens": NEW_TOKENS, "names": list(NAMES), "judge": study_judge().accuracy}
    measure("front", header, settings, rows_of)


if __name__ == "__main__":
    main()
