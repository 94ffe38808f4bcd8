"""Weights for a target type, found by trying: by the paper's iterative adjustment (section 4.4) or by optuna.

A trial scores weights on items to tune on (`worth`). Trials are written as they end, and what is in the file is not
tried again: ways to search are told of them as if they had just been made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mpg.evaluate.answers import describe_models
from mpg.evaluate.held_out import ItemScores, estimate_gain, estimate_value
from mpg.evaluate.records import open_records
from mpg.evaluate.tasks import OPPOSITE, Item, dimension_of, items_hash
from mpg.evaluate.worth import MissingScoresError, Scores
from mpg.extras import install
from mpg.model import Model
from mpg.options import a_number, an_integer, check_weights, one_of
from mpg.paper.report import save_plot
from mpg.paper.statistics import Estimate

SEARCHES = ("iterative", "optuna")
FIRST_STEP, LAST_STEP = 1.0, 0.125  # of the iterative adjustment

Weights = dict[str, float]


@dataclass(frozen=True)
class Tuning:
    """What a search found.

    weights   the best, as every command takes them: "E=1,S=2,T=1,P=-0.5"
    trials    rows of the file: trial, weights, scores, value, is_best (so far); None where scores are missing
    tuned     the scores of the best on the items that were tuned on
    held_out  by "base", "start" and "tuned", scores on the items that were not
    values    what these are worth, the mean over poles; and "tuned less start", "tuned less base". With intervals, by a
              paired bootstrap over the held-out items; None where a judge's scores are missing
    """

    weights: str
    trials: list[dict[str, Any]]
    tuned: dict[str, float | None]
    held_out: dict[str, dict[str, float | None]]
    values: dict[str, Estimate | None]


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
    scores_of  makes what scores weights on items under a target: `ChoiceScores` or `TextScores`
    about      what else the header of the file is to say
    low, high  of every weight
    start      the weight of every pole in the first trial
    seed       of optuna
    on_trial   is called with the row of every new trial

    Raises ValueError, naming the argument: for what is out of range, for poles of one dimension, for items on both
    sides or none on one, for a pole without an attribute, as `open_records` and the scores do, and where no trial has
    any scores.
    """
    one_of(*SEARCHES)("search", search)
    one_of("geometric", "anchored", "arithmetic")("target", target)
    check_type(poles)
    if not (tuned_on and held_out):
        sides = f"{len(tuned_on)} to tune on, {len(held_out)} held out"
        raise ValueError(f"data: expected items of {''.join(poles)} on both sides, got {sides}")
    an_integer(1)("trials", trials)
    for name, value in (("low", low), ("start", start)):
        a_number(-1e6)(name, value)
    a_number(low)("high", high)
    if not low <= start <= high:
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
                tried, _ = _try(score, weights, poles, model, target)
                rows.append({"trial": trial, "weights": weights, **tried})
                rows[-1]["is_best"] = _value(rows[-1]) > best
                records.append(rows[-1])
                on_trial(rows[-1])
            best = max(best, _value(rows[trial]))
            searching.tell(rows[trial]["scores"], _value(rows[trial]))
        if best == -np.inf:
            raise ValueError(rows[0]["missing"])
        chosen = max(rows[:trials], key=_value)
        # what earlier versions reported has no scores of items, and is scored again
        reported = {row["held_out"]: row for row in records.rows if "held_out" in row and "items" in row}
        base, score = scores_of(held_out, "base"), scores_of(held_out, target)
        for name, weights, own in (
            ("base", {}, base),
            (spell(rows[0]["weights"]), rows[0]["weights"], score),
            (spell(chosen["weights"]), chosen["weights"], score),
        ):
            if name not in reported:
                tried, items = _try(own, weights, poles, model, "base" if own is base else target)
                if "refused" in tried:
                    items = {item: dict.fromkeys(of, 0.0) for item, of in reported["base"]["items"].items()}
                reported[name] = {"held_out": name, **tried, "items": items}
                records.append(reported[name])
    found = spell(chosen["weights"])
    names = {"base": "base", "start": spell(rows[0]["weights"]), "tuned": found}
    held = {which: reported[name]["scores"] for which, name in names.items()}
    of_items = {which: reported[name]["items"] for which, name in names.items()}
    values = {which: estimate_value(own) for which, own in of_items.items()}
    for which in ("start", "base"):
        values[f"tuned less {which}"] = estimate_gain(of_items["tuned"], of_items[which])
    return Tuning(found, rows[:trials], chosen["scores"], held, values)


def check_type(poles: Sequence[str]) -> None:
    """Raise ValueError for what are no poles, and for two of one dimension."""
    dimensions = {dimension_of(pole) for pole in poles if pole in OPPOSITE}
    if not poles or len(dimensions) < len(poles):
        raise ValueError(f"type: expected poles of different dimensions such as ESTP, got {''.join(poles)!r}")


def spell(weights: Mapping[str, float]) -> str:
    """Weights as every command takes them; those of 0 are left out."""
    return ",".join(f"{name}={alpha:g}" for name, alpha in weights.items() if alpha)


def _try(
    score: Scores, weights: Mapping[str, float], poles: Sequence[str], model: Model, target: str
) -> tuple[dict[str, Any], ItemScores]:
    """Scores and value of weights, for a row, and what items scored. Zeros, and no items, where the target refuses the
    weights or a row of it is empty; None, and no items, where a judge's scores are missing."""
    try:
        check_weights(weights, model.models.attribute_names, target)
        found = score(weights, poles)
    except MissingScoresError as error:
        return {"scores": dict.fromkeys(poles), "value": None, "missing": str(error)}, {}
    except ValueError as error:
        if not str(error).startswith("weights:"):
            raise
        return {"scores": dict.fromkeys(poles, 0.0), "value": 0.0, "refused": str(error)}, {}
    items = {item: _rounded(scores) for item, scores in found.of_item.items()}
    return {"scores": _rounded(found.of_pole), "value": round(found.value, 6)}, items


def _rounded(scores: Mapping[str, float | None]) -> dict[str, float | None]:
    return {pole: None if score is None else round(score, 6) for pole, score in scores.items()}


def _value(row: Mapping[str, Any]) -> float:
    """What a trial is worth to a search: -inf where its scores are missing."""
    return -np.inf if row["value"] is None else float(row["value"])


class _Search:
    """Ways to search: each proposes weights, and goes on once `tell` has said what they are worth: -inf, nothing."""

    def __init__(self, start: Weights, low: float, high: float, seed: int) -> None:
        self.start, self.low, self.high, self.seed = start, low, high, seed
        self.scores: Mapping[str, float | None] = {}
        self.value = -np.inf

    def tell(self, scores: Mapping[str, float | None], value: float) -> None:
        self.scores, self.value = scores, value

    def iterate(self) -> Iterator[Weights]:
        """The paper's adjustment, which it describes and does not spell out: the pole that does worst is weighed more;
        where that does not help, less, below zero too; where neither helps, the next worst; where none does, by half
        the step."""
        best, step, tried = dict(self.start), FIRST_STEP, [self.start]
        yield best
        scores, value = self.scores, self.value

        def place(pole: str) -> float:
            score = scores.get(pole)
            return 1.0 if score is None else score

        while step >= LAST_STEP:
            is_better = False
            for pole in sorted(best, key=place):
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
            raise ImportError(f"search 'optuna' needs optuna: {install('tune')}") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=self.seed))
        study.enqueue_trial(self.start)
        while True:
            trial = study.ask()
            yield {pole: round(trial.suggest_float(pole, self.low, self.high), 3) for pole in self.start}
            if self.value == -np.inf:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, self.value)


def plot(trials: Sequence[Mapping[str, Any]], path: str | Path, title: str = "", *, with_values: bool = False) -> None:
    """Draw a history as the paper's Figure 3 has it, only kept trials: bars of scores, lines of weights.

    with_values  whether Figure 4 stands beside it: the value of every trial, and the best so far
    """
    from matplotlib.figure import Figure

    kept = [row for row in trials if row["is_best"]]
    poles = list(kept[0]["weights"])
    widths = [2.2 + 1.0 * len(kept), *[4.2] * with_values]
    figure = Figure(figsize=(sum(widths), 3.4), layout="constrained")
    axes, *beside = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
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
    for of_values in beside:
        scored = [row for row in trials if row["value"] is not None]
        places, values = [row["trial"] for row in scored], [row["value"] for row in scored]
        of_values.step(places, np.maximum.accumulate(values), where="post", color="0.4", label="best so far")
        of_values.plot(places, values, ".", color="0.4", label="trial")
        of_values.set(xlabel="adjustments", ylabel="value: mean score")
        of_values.legend(fontsize="small")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    save_plot(figure, path, dpi=110)
