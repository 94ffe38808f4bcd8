"""Table 3: what a text costs by each method, one text at a time, in processor seconds of one thread.

Methods take turns, question by question: a load beside them slows all alike. Soups are merged before they are timed.

    MPG_DATA=... MPG_STUDY=... python bench/study/speeds.py
"""

from __future__ import annotations

import time
from typing import Any

import torch

from common import NEW_TOKENS, limited, load, measure
from mpg.model import Model
from mpg.paper.methods import answer
from paper_tables import TABLE_3
from tables import OPTIONS, attributes_of, items_of

NUM_PROMPTS = limited(12)
RUNS_OF = {"roleplay": 2, "ESTP": 1}  # 2 and 4 attributes
COSTS = {"calls": "model_calls_per_token", "depth": "depth_per_token", "reject_rate": "reject_rate"}


def main() -> None:
    names = {part: attributes_of(part) for part in RUNS_OF}
    parts = {f"N={len(names[part])} run {n}": (part, n) for part, runs in RUNS_OF.items() for n in range(runs)}
    header = {"items": NUM_PROMPTS, "new_tokens": NEW_TOKENS, "clock": "processor seconds of one thread"}
    adapters = dict.fromkeys(name for own in names.values() for name in own)
    measure("speeds", adapters, header, list(parts), lambda setting: timed_texts(*parts[setting]))


def timed_texts(part: str, run: int) -> list[dict[str, Any]]:
    """A row for every text of every method."""
    names, prompts = attributes_of(part), [item.prompt for item in items_of(part)[:NUM_PROMPTS]]
    model = load(names)
    merged = model.models.merge(names, torch.full((len(names),), 1 / len(names)))
    soups = Model(merged.with_roles(base="merged"))

    def rows_of(method: str, prompt: str, seed: int) -> list[dict[str, Any]]:
        own = {"max_new_tokens": NEW_TOKENS, "seed": seed, **OPTIONS.get(method, {})}
        started_at = time.process_time()
        if method == "soups":
            results = answer(soups, "base", [prompt], **own)
        else:
            results = answer(model, method, [prompt], dict.fromkeys(names, 1.0), **own)
        seconds = (time.process_time() - started_at) / len(results)
        return [
            {
                "method": method, "tokens": len(result.tokens), "seconds": round(seconds, 4),
                **{name: round(result.stats[of], 4) for name, of in COSTS.items() if of in result.stats},
            }
            for [result] in results.values()
        ]  # fmt: skip

    for method in TABLE_3:
        rows_of(method, prompts[0], 0)  # warms up
    return [
        {"prompt": index, **row}
        for index, prompt in enumerate(prompts)
        for method in TABLE_3
        for row in rows_of(method, prompt, 5000 + 100 * run + index)
    ]


if __name__ == "__main__":
    main()
