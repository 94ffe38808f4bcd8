"""Answers of one of the paper's methods to items, written as they are made. Knows models, methods and a file; no judge.

The file is JSON Lines (`records`). Its header says what was asked: task, models (with what their adapters were trained
with), method, weights, options and the items' hash. A row is one text:

    item       the item's id
    seed       which of the seeds
    attribute  whose model wrote it, under the methods of single attributes; else ""
    text       without special tokens
    option_order (of multiple choice alone), the poles of A and B
    tokens, finish_reason, drawn_with (the seed of `generate`), stats
    ran        on what, and in batches of how many
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import mpg
from mpg.evaluate.records import open_records
from mpg.evaluate.tasks import OPTION_ORDER, Item, deal_options, items_hash
from mpg.files import hash_files
from mpg.model import Model, Weights
from mpg.paper.methods import SINGLE_METHODS, answer
from mpg.results import Result

WEIGHTS = ("safetensors", "bin", "gguf")  # how their files end
# What preference prompting says of the attributes of role-play; the item's own words are in the prompt
DESCRIPTIONS = {
    "profile": "what you speak of comes from your profile: your work, your home, your interests",
    "personality": "how you speak shows the personality that you are given",
}


def write_answers(
    path: str | Path,
    model: Model,
    items: Sequence[Item],
    method: str,
    weights: Weights | None = None,
    *,
    seeds: Sequence[int] = (0,),
    batch_size: int = 16,
    chosen_by: Mapping[str, Any] | None = None,
    on_row: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Answer every item with every seed, and write each text as soon as it has ended. What is there is not made again.

    path       the file: of this method, these items, weights and options alone; seeds may be added later
    method     in `mpg.paper.methods.METHODS`
    weights    as `Model.generate` has them
    seeds      numbers of the repetitions; an item's text depends upon its id and the number, not upon the other items
    chosen_by  the caller's arguments that chose the items, to be told where the file is of others
    on_row     is called after every text, with how many there are
    options    of `mpg.paper.methods.answer`, but for those that are named here: max_new_tokens, temperature, ...

    out: all rows of these seeds, in the order of items, seeds and attributes

    Raises ValueError where the method lacks what it needs, and as `open_records` does.
    """
    is_weighed = method not in ("base", "base-specialized")
    weighed = model.recipe.weigh(weights) if is_weighed else {}
    alpha = {name: value for name, value in (weighed or {}).items() if value}
    header = {
        "what": "answers",
        **describe_models(model, alpha),
        "precision": model.precision,
        "method": method,
        "weights": alpha,
        "options": {name: value for name, value in sorted(options.items()) if value is not None},
        "items": items_hash(items),
        "chosen_by": dict(chosen_by or {}),
        **({"option_order": OPTION_ORDER} if any(item.options for item in items) else {}),
        "versions": {"mpg": mpg.__version__, **{name: version(name) for name in ("torch", "transformers")}},
    }
    attributes = list(alpha) if alpha and method in SINGLE_METHODS else [""]
    wanted = [(item.id, seed, attribute) for item in items for seed in seeds for attribute in attributes]
    machine = _describe_device(model.models.device)
    with open_records(path, header) as records:
        there = {key_of(row) for row in records.rows}
        todo = [
            (deal_options(item, seed), seed)
            for item in items
            for seed in seeds
            if any((item.id, seed, attribute) not in there for attribute in attributes)
        ]
        drawn_with = [_draw_seed(item.id, seed) for item, seed in todo]

        def write(attribute: str, index: int, result: Result) -> None:
            item, seed = todo[index]
            if (item.id, seed, attribute) in there:
                return
            order = {"option_order": [*item.options]} if item.options else {}
            row = {"item": item.id, "seed": seed, **order, "attribute": attribute, "text": result.text}
            row |= {"tokens": len(result.tokens), "finish_reason": result.finish_reason, "drawn_with": result.seed}
            row |= {"ran": f"{machine}, batches of {batch_size}"}
            records.append(row | {"stats": {name: round(value, 4) for name, value in result.stats.items()}})
            there.add((item.id, seed, attribute))
            on_row(sum(key in there for key in wanted), len(wanted))

        on_row(sum(key in there for key in wanted), len(wanted))
        if todo:
            how = {"descriptions": DESCRIPTIONS, "batch_size": batch_size, **options}
            answer(model, method, [item.prompt for item, _ in todo], weights, seed=drawn_with, on_result=write, **how)
        rows = {key_of(row): row for row in records.rows}
    return [rows[key] for key in wanted]


def key_of(row: Mapping[str, Any]) -> tuple[str, int, str]:
    """Item, seed and attribute: which text a row is of."""
    return row["item"], row["seed"], row["attribute"]


def describe_models(model: Model, attributes: Collection[str]) -> dict[str, Any]:
    """What base, anchor and some attributes are, wherever they lie.

    out: "models", by role the name of its folder, a hash of the sizes and ends of its weights, and of an adapter rank,
    alpha and the dropout that it was trained with; and "contexts", the texts of attributes that are contexts
    """
    roles, sources = model.models.describe(), model.recipe.attributes or {}
    named = [name for name in ("base", "anchor", *attributes) if name in roles]
    contexts = {name: source for name in attributes if isinstance(source := sources.get(name), Mapping)}
    return {
        "models": {name: _describe(Path(roles[name]["adapter"] or roles[name]["source"])) for name in named},
        "contexts": {name: {**context, "source": None} for name, context in contexts.items()},
    }


def _describe(source: Path) -> dict[str, Any]:
    described: dict[str, Any] = {"name": source.name}
    weights = [source] if source.is_file() else [file for kind in WEIGHTS for file in source.glob(f"*.{kind}")]
    if weights:
        described["sha256"] = hash_files(sorted(weights))
    if (config := source / "adapter_config.json").is_file():
        adapter = json.loads(config.read_text())
        described |= {name: adapter.get(name) for name in ("r", "lora_alpha", "lora_dropout")}
    return described


def _describe_device(device: torch.device) -> str:
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s'[: threads > 1]}" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _draw_seed(item_id: str, seed: int) -> int:
    """The seed of a text: the same under every method, so that they are compared on equal draws."""
    return int(hashlib.sha256(f"{seed} {item_id}".encode()).hexdigest()[:15], 16)
