"""How much a training seed matters: three adapters of each of two poles, the same pairs, each alone.

MPG_DATA=... MPG_STUDY=... python bench/study/seeds.py
"""

from __future__ import annotations

from typing import Any

from common import BATCH, NEW_TOKENS, NUM_TEXTS, PAPERS_DRAW, load, measure, questions
from judge import judged, study_judge
from mpg.model import Model

NAMES = ("E", "E-seed1", "E-seed2", "T", "T-seed1", "T-seed2")


def main() -> None:
    prompts, model = questions() * NUM_TEXTS, load(NAMES)
    how = {"target": "base", "sampler": "direct", "batch_size": BATCH, "max_new_tokens": NEW_TOKENS, "seed": 4000}

    def rows_of(name: str) -> list[dict[str, Any]]:
        own = model if name == "base" else Model(model.models.with_roles(base=name))
        return judged(model, prompts, own.generate(prompts, **how, **PAPERS_DRAW))

    header = {"new_tokens": NEW_TOKENS, "texts": NUM_TEXTS, "judge": study_judge().accuracy}
    measure("seeds", NAMES, header, ["base", *NAMES], rows_of)


if __name__ == "__main__":
    main()
