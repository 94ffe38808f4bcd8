"""Tables 1 to 4: the paper's methods on items that nothing was tuned on, judged by the study's classifier and measured.

Texts are written to MPG_STUDY/answers, which is not committed; their scores to bench/results/study.

    MPG_DATA=... MPG_STUDY=... python bench/study/tables.py [ESTP | INFJ | ENTJ | roleplay] ...
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from common import BASE, DATA, NEW_TOKENS, NUM_TEXTS, RUNS, limited, load, measure
from judge import FOLDER, study_judge
from mpg.evaluate.answers import write_answers
from mpg.evaluate.judges.classifier import ClassifierJudge
from mpg.evaluate.metrics import Metrics
from mpg.evaluate.tasks import MBTI_TASKS, OPTION_ORDER, TYPES, Item, deal_options, read_items, split
from mpg.model import Model
from mpg.models import gguf, sources
from mpg.paper.methods import METHODS
from pairs import ROLEPLAY

EACH = limited(12)  # items of every task and type
NUM_PLAYS = limited(24)
OPTIONS: dict[str, dict[str, Any]] = {
    "seq-rs": {"tries": 8},  # of whole texts, where 64 would take an hour
    **{method: {"empty": "base"} for method in METHODS if method.startswith("scr")},
}


def attributes_of(part: str) -> tuple[str, ...]:
    """The attributes of a type, or of role-play."""
    return ROLEPLAY if part == "roleplay" else tuple(part)


def items_of(part: str) -> list[Item]:
    """Items of the side that is only reported on, the same number of each task."""
    if part == "roleplay":
        return read_items(DATA, ["roleplay"], on_problem=_ignore)[:NUM_PLAYS]
    items = []
    for task in MBTI_TASKS:
        reported = split(read_items(DATA, [task], part, on_problem=_ignore))[1]
        items += sorted(reported, key=lambda item: item.id)[:EACH]
    return items


def specialised() -> Path:
    """The further-trained reference: the base with the adapter of role-play in general merged into it."""
    folder = RUNS / "reference"
    if not (folder / "config.json").is_file():
        base = gguf.resolve("base", BASE)
        model = sources.read_model("base", base, torch.bfloat16, torch.device("cpu"))
        PeftModel.from_pretrained(model, str(RUNS / "adapters" / "reference")).merge_and_unload().save_pretrained(
            folder
        )
        sources.read_tokenizer("base", base).save_pretrained(folder)
    return folder


def main(part: str) -> None:
    items, poles = items_of(part), attributes_of(part)
    original = load(poles)
    metrics = Metrics((Path(gguf.SMOLLM2_ON_HUB if BASE == gguf.SMOLLM2 else BASE).name, original))
    judge = None if part == "roleplay" else ClassifierJudge(FOLDER, poles)
    loaded: dict[bool, Model] = {False: original}

    def rows_of(method: str) -> list[dict[str, Any]]:
        needs = method.endswith("-specialized")
        if needs not in loaded:
            loaded[needs] = load(poles, base=str(specialised()), anchor=BASE)
        place = RUNS / "answers" / part / f"{method}.jsonl"
        own = {"seeds": range(NUM_TEXTS), "max_new_tokens": NEW_TOKENS, **OPTIONS.get(method, {})}
        answers = write_answers(place, loaded[needs], items, method, dict.fromkeys(poles, 1.0), **own)
        of_items = {item.id: item for item in items}
        asked = [(deal_options(of_items[answer["item"]], answer["seed"]), answer["text"]) for answer in answers]
        rows = [
            {**{name: answer[name] for name in ("item", "seed", "attribute", "tokens")}, **_costs(answer)}
            for answer in answers
        ]
        for scorer in filter(None, (metrics, judge)):
            scorer.score(asked, lambda index, scores, _: rows[index].update(scores))
        return rows

    header = {"items": len(items), "texts": NUM_TEXTS, "new_tokens": NEW_TOKENS, "signatures": metrics.signatures}
    header |= {} if part == "roleplay" else {"option_order": OPTION_ORDER}
    header["judge"] = None if judge is None else judge.accuracy
    has_reference = (RUNS / "adapters" / "reference" / "training.json").is_file()
    methods = [method for method in METHODS if has_reference or not method.endswith("-specialized")]
    measure(f"table-{part}", poles, header, methods, rows_of)


def _costs(answer: dict[str, Any]) -> dict[str, float]:
    names = ("model_calls_per_token", "depth_per_token", "tokens_per_second", "reject_rate")
    return {name: answer["stats"][name] for name in names if name in answer["stats"]}


def _ignore(problem: str) -> None:
    """Entries of the release that are no items: `mpg evaluate` names them."""


if __name__ == "__main__":
    study_judge()
    for part in sys.argv[1:] or (*TYPES, "roleplay"):
        main(part)
