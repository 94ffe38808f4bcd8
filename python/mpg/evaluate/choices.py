"""Two-way choices by log-probability under the combined law, exactly: nothing is drawn.

Of every option the log-probability of its tokens behind the question, in the rows of the target. Two ways to ask:

texts    the question alone, and the option's text as the answer; what is chosen is the larger log-probability per
         character, as lm-evaluation-harness' acc_norm has it, so that a longer option is at no loss. No order, no seed.
letters  the question with its options as A and B, in the order of `deal_options`, and the letter as the answer. Small
         models choose a letter by its place: average over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mpg.decode.scoring import score_texts
from mpg.evaluate.answers import describe_models
from mpg.evaluate.records import open_records
from mpg.evaluate.tasks import OPTION_ORDER, Item, deal_options, items_hash
from mpg.model import Model, Weights

WAYS = ("texts", "letters")


@dataclass(frozen=True)
class Choice:
    """What the options of an item got, by pole.

    logprobs  natural log, of all the tokens of the answer
    lengths   characters of the answer
    """

    item: str
    dimension: str
    logprobs: dict[str, float]
    lengths: dict[str, int]

    @property
    def chosen(self) -> str:
        """The pole of the larger log-probability per character; of two equal ones the first."""
        return max(self.logprobs, key=lambda pole: self.logprobs[pole] / self.lengths[pole])


def choose(
    model: Model,
    items: Sequence[Item],
    weights: Weights | None = None,
    *,
    target: str = "geometric",
    way: str = "texts",
    seed: int = 0,
    batch_size: int = 16,
) -> list[Choice]:
    """Score the options of every item under the law of a target.

    items    of mcqa
    weights  as `Model.generate` has them; None under target "base"
    target   geometric, anchored, arithmetic (of one token) or base
    way      of `WAYS`

    Raises ValueError for an unknown way, for items without options, where a model's row is unusable, and as
    `Model.generate` does.
    """
    if way not in WAYS:
        raise ValueError(f"way: expected one of {', '.join(WAYS)}, got {way!r}")
    asked: list[tuple[str, str]] = []  # two of every item, in the order of its options
    for item in items:
        if len(item.options) != 2:
            raise ValueError(f"items: expected two options of every item, got {len(item.options)} of {item.id}")
        asked += _ask(item, way, seed)
    tokenizer: Any = model.tokenizer
    logprobs: list[float] = []
    for first in range(0, len(asked), batch_size):
        batch = asked[first : first + batch_size]
        call = model.read([prompt for prompt, _ in batch], weights=weights, sampler="direct", target=target)
        texts = [tokenizer(answer, add_special_tokens=False)["input_ids"] for _, answer in batch]
        parts = score_texts(call.models, call.requests, texts, call.options)
        whole = torch.cat([part.own for part in parts], 1).double()
        logprobs += [float(whole[row, : len(text)].sum()) for row, text in enumerate(texts)]
    if any(logprob != logprob for logprob in logprobs):
        raise ValueError("models: a model returned NaN for a question, expected finite logits or -inf")
    return [
        Choice(
            item.id,
            item.about["dimension"],
            dict(zip(item.options, logprobs[2 * index : 2 * index + 2], strict=True)),
            dict(zip(item.options, (len(answer) for _, answer in asked[2 * index : 2 * index + 2]), strict=True)),
        )
        for index, item in enumerate(items)
    ]


def write_choices(
    path: str | Path,
    model: Model,
    items: Sequence[Item],
    weights: Weights | None = None,
    *,
    target: str = "geometric",
    way: str = "texts",
    seeds: Sequence[int] = (0,),
    batch_size: int = 16,
    chosen_by: Mapping[str, Any] | None = None,
    on_row: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """`choose` for every seed, into a file of JSON Lines (`records`) that goes on where it ended.

    chosen_by  as `write_answers` has it

    out: rows of item, seed, what a `Choice` has, -inf as None, and of letters "option_order", the poles of A and B; in
    the order of items and seeds (`choice_of`)

    Raises ValueError as `choose` and `open_records` do.
    """
    alpha = {} if target == "base" else dict(model.recipe.weigh(weights) or {})
    header = {
        "what": "choices",
        **describe_models(model, alpha),
        "precision": model.precision,
        "target": target,
        "weights": alpha,
        "way": way,
        "items": items_hash(items),
        "chosen_by": dict(chosen_by or {}),
        **({"option_order": OPTION_ORDER} if way == "letters" else {}),
    }
    wanted = [(item, seed) for item in items for seed in (seeds if way == "letters" else seeds[:1])]
    with open_records(path, header) as records:
        there = {(row["item"], row["seed"]): row for row in records.rows}
        on_row(sum((item.id, seed) in there for item, seed in wanted), len(wanted))
        for seed in seeds:
            todo = [item for item, of in wanted if of == seed and (item.id, seed) not in there]
            for first in range(0, len(todo), max(1, batch_size // 2)):
                batch = todo[first : first + max(1, batch_size // 2)]
                chosen = choose(model, batch, alpha or None, target=target, way=way, seed=seed, batch_size=batch_size)
                for item, choice in zip(batch, chosen, strict=True):
                    logprobs = {pole: None if of == -math.inf else of for pole, of in choice.logprobs.items()}
                    order = {"option_order": [*deal_options(item, seed).options]} if way == "letters" else {}
                    there[choice.item, seed] = {"seed": seed, **asdict(choice), "logprobs": logprobs, **order}
                    records.append(there[choice.item, seed])
                on_row(sum((item.id, seed) in there for item, seed in wanted), len(wanted))
    return [there[item.id, seed] for item, seed in wanted]


def choice_of(row: Mapping[str, Any]) -> Choice:
    """The choice that `write_choices` wrote."""
    logprobs = {pole: -math.inf if logprob is None else logprob for pole, logprob in row["logprobs"].items()}
    return Choice(row["item"], row["dimension"], logprobs, row["lengths"])


def accuracy(choices: Sequence[Choice], poles: Sequence[str]) -> dict[str, float | None]:
    """The share of choices that fell on each pole of a target, of those of its dimension; None where there are none."""
    shares: dict[str, float | None] = {}
    for pole in poles:
        own = [choice.chosen == pole for choice in choices if pole in choice.dimension]
        shares[pole] = sum(own) / len(own) if own else None
    return shares


def _ask(item: Item, way: str, seed: int) -> list[tuple[str, str]]:
    """The prompt and the answer of each option."""
    if way == "texts":
        return [(item.about["stem"], text) for text in item.options.values()]
    dealt = deal_options(item, seed)
    letters = dict(zip(dealt.options, "AB", strict=True))
    return [(f"{dealt.prompt}\nAnswer with A or B alone.", letters[pole]) for pole in item.options]
