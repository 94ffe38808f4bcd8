"""Question 2: the front of trait against perplexity, per method as weights grow, and what it costs in forwards.

MPG_DATA=... MPG_STUDY=... python bench/study/front.py
"""

from __future__ import annotations

from typing import Any

import torch

from common import BATCH, NEW_TOKENS, NUM_TEXTS, PAPERS_DRAW, load, log_ratios, measure, questions, surprise, told
from judge import study_judge
from mpg.model import Model
from mpg.paper.methods import METHODS, answer
from tables import OPTIONS

NAMES = ("E", "S", "T", "P")
SCALES = (0.125, 0.25, 0.5, 1.0, 2.0)
OF_SCALE = ("soups", "geometric", "anchored")  # whose weights add up to anything
# Four weights of .25 make the geometric target MOD's and the anchored one the arithmetic one
NO_SCALE = ("arithmetic-scr", "geometric-scr", "token-rs", "seq-rs", "pp")
BEST_SCALES = (0.25, 0.5, 1.0)
BEST_OF = 4  # soups that cost about as many forwards as one text of a target of 4 attributes


def main() -> None:
    prompts, model = questions() * NUM_TEXTS, load(NAMES)
    own = {"max_new_tokens": NEW_TOKENS, "batch_size": BATCH, "seed": 2000, **PAPERS_DRAW}

    def results_of(setting: str) -> tuple[list[str], list[Any]]:
        method, _, scale = setting.partition(" ")
        weights = dict.fromkeys(NAMES, float(scale or 0.25))
        if method.endswith("soups"):
            merged = model.models.merge(NAMES, torch.tensor(list(weights.values())))
            soups = Model(merged.with_roles(base="merged"))
            many = [prompt for prompt in prompts for _ in range(BEST_OF if method == "best-soups" else 1)]
            return many, soups.generate(many, target="base", sampler="direct", **own)
        if method in METHODS:
            return prompts, answer(model, method, prompts, weights, **own, **OPTIONS.get(method, {}))[""]
        target, _, sampler = method.partition("-")
        how = {"sampler": sampler or "direct", "target": target, **({"empty": "base"} if sampler else {})}
        return prompts, model.generate(prompts, weights=weights, **how, **own)

    def rows_of(setting: str) -> list[dict[str, Any]]:
        asked, results = results_of(setting)
        if setting.startswith("best"):  # of each prompt's texts that of the largest combined log-ratio a token
            sums = [sum(ratios) for ratios in log_ratios(model, NAMES, asked, results)]
            rates = [total / len(result.tokens) for total, result in zip(sums, results, strict=True)]
            firsts = range(0, len(results), BEST_OF)
            results = [results[max(range(n, n + BEST_OF), key=rates.__getitem__)] for n in firsts]
            # a text's forwards, and those of one pass of each model over it; the others are taken to be as long
            costs = [BEST_OF * (1 + (1 + len(NAMES)) / len(result.tokens)) for result in results]
        else:
            costs = [result.stats["model_calls_per_token"] for result in results]
        nats = surprise(model, prompts, results)
        traits = study_judge().score([result.text for result in results])
        own_poles = {of: [float(p) if of[0] in NAMES else 1 - float(p) for p in ps] for of, ps in traits.items()}
        return [
            {
                "prompt": prompts.index(prompts[index]), **told(result),
                "calls": round(costs[index], 3), "nats": round(nats[index], 3),
                "traits": {of: round(of_texts[index], 4) for of, of_texts in own_poles.items()},
            }
            for index, result in enumerate(results)
        ]  # fmt: skip

    settings = ["base", *(f"{method} {scale:g}" for scale in SCALES for method in OF_SCALE)]
    settings += [*(f"best-soups {scale:g}" for scale in BEST_SCALES), *NO_SCALE]
    header = {"new_tokens": NEW_TOKENS, "texts": NUM_TEXTS, "names": list(NAMES), "judge": study_judge().accuracy}
    measure("front", NAMES, header, settings, rows_of)


if __name__ == "__main__":
    main()
