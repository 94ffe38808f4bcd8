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
from pairs import ROLEPLAY
from paper_tables import TABLE_3
from tables import OPTIONS, items_of

NUM_PROMPTS = limited(12)
NUM_RUNS = limited(2)
COSTS = {"calls": "model_calls_per_token", "depth": "depth_per_token", "reject_rate": "reject_rate"}


def main() -> None:
    items, model = items_of("roleplay")[:NUM_PROMPTS], load(ROLEPLAY)
    merged = model.models.merge(ROLEPLAY, torch.full((len(ROLEPLAY),), 1 / len(ROLEPLAY)))
    soups = Model(merged.with_roles(base="merged"))

    def rows_of(method: str, prompt: str, seed: int) -> list[dict[str, Any]]:
        own = {"max_new_tokens": NEW_TOKENS, "seed": seed, **OPTIONS.get(method, {})}
        started_at = time.process_time()
        if method == "soups":
            results = answer(soups, "base", [prompt], **own)
        else:
            results = answer(model, method, [prompt], dict.fromkeys(ROLEPLAY, 1.0), **own)
        seconds = (time.process_time() - started_at) / len(results)
        return [
            {
                "method": method, "tokens": len(result.tokens), "seconds": round(seconds, 4),
                **{name: round(result.stats[of], 4) for name, of in COSTS.items() if of in result.stats},
            }
            for [result] in results.values()
        ]  # fmt: skip

    def run(setting: str) -> list[dict[str, Any]]:
        seed = 5000 + 100 * int(setting.removeprefix("run "))
        return [
            {"prompt": index, **row}
            for index, item in enumerate(items)
            for method in TABLE_3
            for row in rows_of(method, item.prompt, seed + index)
        ]

    for method in TABLE_3:
        rows_of(method, items[0].prompt, 0)  # warms up
    header = {"items": len(items), "new_tokens": NEW_TOKENS, "clock": "processor seconds of one thread"}
    measure("speeds", header, [f"run {n}" for n in range(NUM_RUNS)], run)


if __name__ == "__main__":
    main()
