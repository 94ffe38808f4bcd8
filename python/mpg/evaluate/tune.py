"""Weights for a target type, found by trying: by the paper's iterative adjustment (section 4.4) or by optuna.

A trial scores weights on items to tune on. Multiple choice is scored under the combined law itself (`choices`), and as
the models do not change from trial to trial, what they make of the options is read once and only combined anew. A judge
of traits scores texts instead, which every trial draws with the same seeds. Trials are written as they end, and what is
in the file is not tried again: ways to search are told of them as if they had just been made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpg.decode.rows import TargetRows
from mpg.evaluate.answers import describe_models
from mpg.evaluate.choices import Choice, accuracy
from mpg.evaluate.judges.classifier import Scorer
from mpg.evaluate.records import open_records
from mpg.evaluate.tasks import OPPOSITE, Item, dimension_of, items_hash
from mpg.model import Model
from mpg.options import MAX_CHUNK, Options, a_number, an_integer, check_weights, one_of
from mpg.paper.report import save_plot

SEARCHES = ("iterative", "optuna")
FIRST_STEP, LAST_STEP = 1.0, 0.125  # of the iterative adjustment
TIE_SHARE = 0.01  # that the mean probability of the wanted options has in a trial's value, beside their accuracy

Weights = dict[str, float]


@dataclass(frozen=True)
class Score:
    """What weights are worth: by pole, the share of its choices or its mean probability; and the value that is sought,
    their mean, where choices are ties by the probability of those wanted."""

    of_pole: dict[str, float]
    value: float


@dataclass(frozen=True)
class Tuning:
    """What a search found.

    weights   the best, as every command takes them: "E=1,S=2,T=1,P=-0.5"
    trials    rows of the file: trial, weights, scores, value, is_best (so far)
    tuned     the scores of the best on the items that were tuned on
    held_out  by "base", "start" and "tuned", scores on the items that were not
    """

    weights: str
    trials: list[dict[str, Any]]
    tuned: dict[str, float]
    held_out: dict[str, dict[str, float]]


# Weights and the target's poles, and what the weights are worth
Scores = Callable[[Mapping[str, float], Sequence[str]], Score]


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
        choices, wanted = [], []
        for index, item in enumerate(self.items):
            of = slice(2 * index, 2 * index + 2)
            lengths = [len(answer) for _, answer in self._asked[of]]
            choice = Choice(
                item.id, item.about["dimension"],
                dict(zip(item.options, logprobs[of], strict=True)), dict(zip(item.options, lengths, strict=True)),
            )  # fmt: skip
            choices.append(choice)
            pole = next((pole for pole in poles if pole in choice.logprobs), None)
            if pole is not None:
                rates = {name: logprob / choice.lengths[name] for name, logprob in choice.logprobs.items()}
                total = np.logaddexp.reduce([*rates.values()])  # -inf where the law has neither of them
                wanted.append(float(np.exp(rates[pole] - total)) if total > -np.inf else 0.0)
        shares = {pole: share for pole, share in accuracy(choices, poles).items() if share is not None}
        return Score(shares, float(np.mean(list(shares.values())) + TIE_SHARE * np.mean(wanted)))

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
                fed = tokens[:, first : min(first + MAX_CHUNK, longest)]
                kv_length = longest_prompt - 1 + first + fed.shape[1]
                parts.append(session.forward(roles, fed, start + first, kv_length=kv_length).clone())
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


class TraitScores:
    """Scores of weights by a judge of traits, on texts that are drawn for each trial with the same seeds."""

    def __init__(
        self, model: Model, items: Sequence[Item], scorer: Scorer, target: str = "geometric", **options: Any
    ) -> None:
        """options: of `Model.generate`"""
        self.model, self.items, self.scorer = model, items, scorer
        self.options = {"sampler": "direct", "target": target, "seed": 0, **options}

    def __call__(self, weights: Mapping[str, float], poles: Sequence[str]) -> Score:
        """The mean probability of each pole."""
        prompts = [item.prompt for item in self.items]
        asked = None if self.options["target"] == "base" else weights
        results = self.model.generate(prompts, weights=asked, **self.options)
        told = self.scorer.score([result.text for result in results])
        first = {pole: float(told[dimension_of(pole)].mean()) for pole in poles}
        of_pole = {pole: p if dimension_of(pole)[0] == pole else 1 - p for pole, p in first.items()}
        return Score(of_pole, float(np.mean(list(of_pole.values()))))


def tune(
    path: str | Path,
    model: Model,
    poles: Sequence[str],
    tuned_on: Sequence[Item],
    held_out: Sequence[Item],
    scores_of: Callable[[Sequence[Item], str], Scores],
    *,
    about: Mapping[str, Any],
    target: str = "geometric",
    search: str = "iterative",
    trials: int = 20,
    low: float = -2.0,
    high: float = 4.0,
    start: float = 1.0,
    seed: int = 0,
    on_trial: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Tuning:
    """Search weights for a target type, and say what the best are worth on items that the search did not see.

    path       the history, JSON Lines: of this search alone; more trials may be asked for later
    poles      the target's, each the name of an attribute
    scores_of  makes what scores weights on items under a target: `ChoiceScores` or `TraitScores`
    about      what else the header of the file is to say
    low, high  of every weight
    start      the weight of every pole in the first trial
    seed       of optuna
    on_trial   is called with the row of every new trial

    Raises ValueError, naming the argument: for what is out of range, for poles of one dimension, for items on both
    sides or none on one, for a pole without an attribute, and as `open_records` does.
    """
    one_of(*SEARCHES)("search", search)
    one_of("geometric", "anchored", "arithmetic")("target", target)
    dimensions = [dimension_of(pole) for pole in poles if pole in OPPOSITE]
    if not poles or len(set(dimensions)) < len(dimensions):
        raise ValueError(f"type: expected poles of different dimensions such as ESTP, got {''.join(poles)!r}")
    if not (tuned_on and held_out):
        sides = f"{len(tuned_on)} to tune on, {len(held_out)} held out"
        raise ValueError(f"data: expected items of {''.join(poles)} on both sides, got {sides}")
    an_integer(1)("trials", trials)
    for name, value in (("low", low), ("start", start)):
        a_number(-1e6)(name, value)
    a_number(max(low, start))("high", high)
    if low > start:
        raise ValueError(f"start: expected a number in [{low:g}, {high:g}], got {start:g}")
    if both := {item.id for item in tuned_on} & {item.id for item in held_out}:
        raise ValueError(f"held_out: expected items that are not tuned on, got {min(both)} on both sides")
    if missing := [pole for pole in poles if pole not in model.models.attribute_names]:
        raise ValueError(
            f"type: expected an attribute for each of {', '.join(poles)}, got none for {missing[0]!r}; "
            f"these models have {', '.join(model.models.attribute_names)}"
        )
    header = {
        "what": "tuning", **describe_models(model, poles), "precision": model.precision, "poles": list(poles),
        "target": target, "search": search, "bounds": [low, high], "start": start, "seed": seed,
        "tuned_on": items_hash(tuned_on), "held_out": items_hash(held_out), **about,
    }  # fmt: skip
    with open_records(path, header) as records:
        rows = [row for row in records.rows if "trial" in row]
        searching = _Search(dict.fromkeys(poles, start), low, high, seed)
        proposals = searching.iterate() if search == "iterative" else searching.by_optuna()
        score, best = scores_of(tuned_on, target), -np.inf
        for trial, weights in enumerate(islice(proposals, trials)):
            if trial == len(rows):
                rows.append({"trial": trial, "weights": weights, **_try(score, weights, poles, model, target)})
                rows[-1]["is_best"] = rows[-1]["value"] > best
                records.append(rows[-1])
                on_trial(rows[-1])
            best = max(best, rows[trial]["value"])
            searching.tell(rows[trial]["scores"], rows[trial]["value"])
        chosen = max(rows[:trials], key=lambda row: row["value"])
        reported = {row["held_out"]: row for row in records.rows if "held_out" in row}
        base, score = scores_of(held_out, "base"), scores_of(held_out, target)
        for name, weights, own in (
            ("base", {}, base),
            (spell(rows[0]["weights"]), rows[0]["weights"], score),
            (spell(chosen["weights"]), chosen["weights"], score),
        ):
            if name not in reported:
                of_weights = _try(own, weights, poles, model, "base" if own is base else target)
                reported[name] = {"held_out": name, **of_weights}
                records.append(reported[name])
    found = spell(chosen["weights"])
    names = {"base": "base", "start": spell(rows[0]["weights"]), "tuned": found}
    held = {which: reported[name]["scores"] for which, name in names.items()}
    return Tuning(found, rows[:trials], chosen["scores"], held)


def spell(weights: Mapping[str, float]) -> str:
    """Weights as every command takes them; those of 0 are left out."""
    return ",".join(f"{name}={alpha:g}" for name, alpha in weights.items() if alpha)


def _try(
    score: Scores, weights: Mapping[str, float], poles: Sequence[str], model: Model, target: str
) -> dict[str, Any]:
    """Scores and value of weights, for a row; zeros where the target refuses them or a row of it is empty."""
    try:
        check_weights(weights, model.models.attribute_names, target)
        found = score(weights, poles)
    except ValueError as error:
        if not str(error).startswith("weights:"):
            raise
        return {"scores": dict.fromkeys(poles, 0.0), "value": 0.0, "refused": str(error)}
    of_pole = {pole: round(value, 6) for pole, value in found.of_pole.items()}
    return {"scores": of_pole, "value": round(found.value, 6)}


class _Search:
    """Ways to search: each proposes weights, and goes on once `tell` has said what they are worth."""

    def __init__(self, start: Weights, low: float, high: float, seed: int) -> None:
        self.start, self.low, self.high, self.seed = start, low, high, seed
        self.scores: Mapping[str, float] = {}
        self.value = -np.inf

    def tell(self, scores: Mapping[str, float], value: float) -> None:
        self.scores, self.value = scores, value

    def iterate(self) -> Iterator[Weights]:
        """The paper's adjustment, which it describes and does not spell out: the pole that does worst is weighed more;
        where that does not help, less, below zero too; where neither helps, the next worst; where none does, by half
        the step."""
        best, step, tried = dict(self.start), FIRST_STEP, [self.start]
        yield best
        scores, value = self.scores, self.value
        while step >= LAST_STEP:
            is_better = False
            for pole in sorted(best, key=lambda name: scores.get(name, 1.0)):
                for change in (step, -step):
                    weights = {**best, pole: min(max(best[pole] + change, self.low), self.high)}
                    if weights in tried:
                        continue
                    tried.append(weights)
                    yield weights
                    if is_better := self.value > value:
                        best, scores, value = weights, self.scores, self.value
                        break
                if is_better:
                    break
            if not is_better:
                step /= 2

    def by_optuna(self) -> Iterator[Weights]:
        """optuna's tree-structured Parzen estimator, which begins with the start."""
        try:
            import optuna
        except ImportError as error:
            raise ImportError("search 'optuna' needs optuna: pip install 'mpg[tune]'") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=self.seed))
        study.enqueue_trial(self.start)
        while True:
            trial = study.ask()
            yield {pole: round(trial.suggest_float(pole, self.low, self.high), 3) for pole in self.start}
            study.tell(trial, self.value)


def plot(trials: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Draw a history as the paper's Figure 3 has it, only kept trials: bars of scores, lines of weights."""
    from matplotlib.figure import Figure

    kept = [row for row in trials if row["is_best"]]
    poles = list(kept[0]["weights"])
    figure = Figure(figsize=(2.2 + 1.0 * len(kept), 3.4), layout="constrained")
    axes = figure.subplots()
    lines = axes.twinx()
    width = 0.8 / len(poles)
    for index, pole in enumerate(poles):
        places = [place + (index - (len(poles) - 1) / 2) * width for place in range(len(kept))]
        axes.bar(
            places, [row["scores"].get(pole, 0.0) for row in kept], width, color=f"C{index}", alpha=0.6, label=pole
        )
        lines.plot(range(len(kept)), [row["weights"][pole] for row in kept], "--o", color=f"C{index}", ms=3)
    axes.set(title=title, xlabel="trial", ylabel="score", ylim=(0, 1), xticks=range(len(kept)))
    axes.set_xticklabels([str(row["trial"]) for row in kept])
    lines.set_ylabel("weight (dashed)")
    figure.legend(loc="outside right upper", fontsize="small")
    save_plot(figure, path, dpi=110)
