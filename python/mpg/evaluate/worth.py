"""What weights are worth for a target type: by two-way choices under the combined law itself, or by a judge of texts.

Knows models, items and judges; nothing of how weights are searched (`tune`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from mpg.decode.rows import TargetRows
from mpg.evaluate.choices import Choice
from mpg.evaluate.held_out import ItemScores
from mpg.evaluate.judges import ClassifierJudge, TraitJudge
from mpg.evaluate.tasks import Item, dimension_of
from mpg.model import Model
from mpg.options import MAX_CHUNK, Options

TIE_SHARE = 0.01  # that the mean probability of the wanted options has in a trial's value, beside their accuracy


class MissingScoresError(ValueError):
    """No reply of a judge could be read as scores of some pole: the weights are worth neither 0 nor anything else."""


@dataclass(frozen=True)
class Score:
    """What weights are worth.

    of_pole  from 0 to 1, the share of the pole's choices or its mean score
    value    what is sought: their mean, where choices are ties by the probability of those wanted
    of_item  what each item scored, of a choice 1 or 0
    """

    of_pole: dict[str, float]
    value: float
    of_item: ItemScores


# Weights and the target's poles, and what the weights are worth
Scores: TypeAlias = Callable[[Mapping[str, float], Sequence[str]], Score]


class ChoiceScores:
    """Scores of weights by two-way choices. The models' logits at the options' tokens are kept: as many numbers as
    tokens, entries of the vocabulary and models, 0.5 GB for 46 items, five models of 49,152 entries and bfloat16."""

    def __init__(
        self, model: Model, items: Sequence[Item], names: Sequence[str], target: str = "geometric", batch_size: int = 16
    ) -> None:
        """names: the attributes that weights may name"""
        self.items, self.names = items, tuple(names)
        self._rows = TargetRows(model.models, self.names, Options(sampler="direct", target=target))
        self._asked = [(item.about["stem"], text) for item in items for text in item.options.values()]
        tokenizer: Any = model.tokenizer
        self._batches = []
        for first in range(0, len(self._asked), batch_size):
            batch = self._asked[first : first + batch_size]
            texts = [tokenizer(answer, add_special_tokens=False)["input_ids"] for _, answer in batch]
            prompts = [model.encode(prompt) for prompt, _ in batch]
            self._batches.append((texts, *self._read(model, prompts, texts)))

    def __call__(self, weights: Mapping[str, float], poles: Sequence[str]) -> Score:
        """The score of weights, under the target's law."""
        logprobs = [logprob for batch in self._batches for logprob in self._combine(weights, *batch)]
        of_item, wanted = dict[str, dict[str, float | None]](), []
        for index, item in enumerate(self.items):
            of = slice(2 * index, 2 * index + 2)
            lengths = [len(answer) for _, answer in self._asked[of]]
            choice = Choice(
                item.id, item.about["dimension"],
                dict(zip(item.options, logprobs[of], strict=True)), dict(zip(item.options, lengths, strict=True)),
            )  # fmt: skip
            pole = next((pole for pole in poles if pole in choice.logprobs), None)
            if pole is not None:
                of_item[item.id] = {pole: float(choice.chosen == pole)}
                rates = {name: logprob / choice.lengths[name] for name, logprob in choice.logprobs.items()}
                total = np.logaddexp.reduce([*rates.values()])  # -inf where the law has neither of them
                wanted.append(float(np.exp(rates[pole] - total)) if total > -np.inf else 0.0)
        shares = _mean_by_pole(of_item, poles)
        return Score(shares, float(np.mean(list(shares.values())) + TIE_SHARE * np.mean(wanted)), of_item)

    @torch.no_grad()
    def _read(
        self, model: Model, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The answers' tokens (B, P), and the logits (R, B, P, V) that they came behind."""
        longest, longest_prompt = max(map(len, texts)), max(map(len, prompts))
        device = model.models.device
        rows = [[prompt[-1], *text, *[0] * (longest - len(text))] for prompt, text in zip(prompts, texts, strict=True)]
        tokens = torch.tensor(rows, device=device)
        start = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        roles = self._rows.roles
        session = model.models.open(prompts, roles, longest_prompt + longest)
        parts = []
        try:
            for first in range(0, longest, MAX_CHUNK):
                input_tokens = tokens[:, first : min(first + MAX_CHUNK, longest)]
                kv_length = longest_prompt - 1 + first + input_tokens.shape[1]
                parts.append(session.forward(roles, input_tokens, start + first, kv_length=kv_length).clone())
        finally:
            session.close()
        return tokens[:, 1:], torch.cat(parts, 2)

    @torch.no_grad()
    def _combine(
        self, weights: Mapping[str, float], texts: Sequence[Sequence[int]], tokens: torch.Tensor, logits: torch.Tensor
    ) -> list[float]:
        """The log-probability of every answer."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        alpha = torch.tensor([weights.get(name, 0.0) for name in self.names], dtype=dtype, device=logits.device)
        self._rows.chunk_weights = alpha.expand(*tokens.shape, -1)
        own = self._rows.logprobs(logits, tokens, 0).own.double()
        return [float(own[row, : len(text)].sum()) for row, text in enumerate(texts)]


class TextScores:
    """Scores of weights by a judge, on texts that are drawn for each trial with the same seeds."""

    def __init__(
        self,
        model: Model,
        items: Sequence[Item],
        judges: Mapping[str, TraitJudge],
        target: str = "geometric",
        **options: Any,
    ) -> None:
        """judges: of every pole one that looks for it alone; a classifier reads all texts, an endpoint those that
        answer a question of the pole's dimension. options: of `Model.generate`

        Raises ValueError for an endpoint's pole that no item asks about.
        """
        self.model, self.items, self.judges = model, items, judges
        self.options = {"sampler": "direct", "target": target, "seed": 0, **options}
        self._asked = {
            pole: [i for i, item in enumerate(items) if isinstance(judge, ClassifierJudge) or _is_about(item, pole)]
            for pole, judge in judges.items()
        }
        if unasked := [pole for pole, asked in self._asked.items() if not asked]:
            raise ValueError(f"data: expected questions of {dimension_of(unasked[0])} on both sides, got none on one")

    def __call__(self, weights: Mapping[str, float], poles: Sequence[str]) -> Score:
        """The mean score of each pole, of texts that have a score on every criterion.

        Raises MissingScoresError where a pole has none, and ValueError as its judge does, and where the judge gave no
        reply to a text: another call asks again.
        """
        asked = None if self.options["target"] == "base" else weights
        results = self.model.generate([item.prompt for item in self.items], weights=asked, **self.options)
        texts = [result.text for result in results]
        of_item = dict[str, dict[str, float | None]]()
        for pole in poles:
            for item, score in self._judge(pole, texts).items():
                of_item.setdefault(item, {})[pole] = score
        of_pole = _mean_by_pole(of_item, poles)
        return Score(of_pole, float(np.mean([*of_pole.values()])), of_item)

    def _judge(self, pole: str, texts: Sequence[str]) -> dict[str, float | None]:
        """The score of each item that the pole's judge is asked about; None of a text that lacks one."""
        judge, asked = self.judges[pole], [(self.items[i], texts[i]) for i in self._asked[pole]]
        scores: dict[str, float | None] = {item.id: None for item, _ in asked}
        low, high = judge.scale

        def keep(index: int, of_text: Mapping[str, float | None], more: Mapping[str, Any]) -> None:
            values = [value for value in of_text.values() if value is not None]
            if len(values) == len(judge.criteria):
                scores[asked[index][0].id] = (float(np.mean(values)) - low) / (high - low)

        if failures := judge.score(asked, keep):
            told = f"{len(failures)} texts got no reply of {judge.name}, at last: {failures[-1]}"
            raise ValueError(f"judge: {told}; the same command asks again")
        if all(score is None for score in scores.values()):
            raise MissingScoresError(f"judge: no reply of {judge.name} on {pole} has a score on every criterion")
        return scores


def _mean_by_pole(of_item: ItemScores, poles: Sequence[str]) -> dict[str, float]:
    """The mean score of every pole that has one."""
    of_pole = {pole: [score for own in of_item.values() if (score := own.get(pole)) is not None] for pole in poles}
    return {pole: float(np.mean(scores)) for pole, scores in of_pole.items() if scores}


def _is_about(item: Item, pole: str) -> bool:
    return pole in item.about["dimension"]
