"""`mpg tune`: weights for a target type, by multiple choice or a judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpg.app.cli import arguments

if TYPE_CHECKING:
    from mpg.evaluate.tasks import Item
    from mpg.evaluate.worth import Scores

# of `mpg.evaluate.tune.SEARCHES`, which imports torch
SEARCH_HELP = "iterative (the paper's adjustment) or optuna (its tree-structured Parzen estimator; the extra tune)."


@arguments.clear_errors
def tune(
    ctx: typer.Context,
    type: Annotated[str, typer.Option(help="The target's poles, such as ESTP: each the name of an attribute.")],
    data: Annotated[str, typer.Option(help="The folder of the paper's data release.")],
    out: Annotated[Path, typer.Option(help="The history, JSON Lines: one line a trial, which goes on where it ends.")],
    models: arguments.Models = "smollm2",
    search: Annotated[str, typer.Option(help=SEARCH_HELP)] = "iterative",
    trials: Annotated[int, typer.Option(min=1, help="Weights to try.")] = 20,
    target: Annotated[str, typer.Option(help="geometric | anchored | arithmetic")] = "geometric",
    low: Annotated[float, typer.Option(help="The least that a weight may be.")] = -2.0,
    high: Annotated[float, typer.Option(help="The most.")] = 4.0,
    start: Annotated[float, typer.Option(help="The weight of every pole in the first trial.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of optuna and of texts for a judge.")] = 0,
    judge: Annotated[
        str | None,
        typer.Option(
            help="classifier (the demo's), classifier:FOLDER (a saved one), or an endpoint's URL#MODEL: tune by texts "
            "that it scores, instead of by multiple choice."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of texts for a judge.")] = 40,
    key_env: arguments.KeyEnv = "OPENAI_API_KEY",
    concurrency: arguments.Concurrency = 4,
    timeout: arguments.Timeout = 120.0,
    limit: Annotated[int | None, typer.Option(min=2, help="Items on each side at most.")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="Draw the history into this image file.")] = None,
    device: arguments.Device = None,
    dtype: arguments.Dtype = None,
    quantize: arguments.Quantize = None,
) -> None:
    """Find weights for a target type on one half of the questions, and report them on the other."""
    from mpg.paper.report import check_plot

    if picture is not None:
        check_plot(picture)
    from mpg.evaluate import tune as tuning
    from mpg.evaluate.judges import EndpointJudge, judge_of
    from mpg.evaluate.tasks import read_items, split
    from mpg.evaluate.worth import ChoiceScores, TextScores
    from mpg.paper.statistics import FEW_PROMPTS

    tuning.check_type(type)

    def on_problem(problem: str) -> None:
        arguments.say(problem, "yellow")

    items = read_items(data, ["16p" if judge else "mcqa"], on_problem=on_problem)
    sides = [side[:limit] for side in split([item for item in items if set(type) & set(item.about["dimension"])])]
    about: dict[str, Any] = {"by": "multiple choice"}
    judges: dict[str, Any] = {}
    if judge is not None:
        how = {"key_env": key_env, "concurrency": concurrency, "timeout": timeout}
        replies = out.with_suffix(".replies")
        judges = {pole: judge_of(judge, "mbti", (pole,), replies=replies, **how) for pole in type}
        about = {"by": [own.identity for own in judges.values()], "max_new_tokens": max_new_tokens}
    if judge is None:
        arguments.refuse_unused(ctx, "none without a --judge", "max_new_tokens")
        if search != "optuna":
            arguments.refuse_unused(ctx, "none without --search optuna or a --judge", "seed")
    if not any(isinstance(own, EndpointJudge) for own in judges.values()):
        arguments.refuse_unused(ctx, "none without an endpoint's --judge", "key_env", "concurrency", "timeout")
    about["chosen_by"] = {"limit": limit}
    model = arguments.load(models, device=device, dtype=dtype, quantize=quantize)

    def scores_of(side: Sequence[Item], target: str) -> Scores:
        if judges:
            return TextScores(model, side, judges, target, max_new_tokens=max_new_tokens, seed=seed)
        return ChoiceScores(model, side, type, target)

    def on_trial(row: dict[str, Any]) -> None:
        best = "  best so far" if row["is_best"] else ""
        line = f"{row['trial']}: {tuning.spell(row['weights']) or 'none'}: {_words(row['scores'])}{best}"
        arguments.say(line)

    found = tuning.tune(
        out, model, type, sides[0], sides[1], scores_of, about=about, target=target, search=search, trials=trials,
        low=low, high=high, start=start, seed=seed, on_trial=on_trial,
    )  # fmt: skip
    if (done := len(found.trials)) < trials:
        why = f"no step of {tuning.FIRST_STEP:g} to {tuning.LAST_STEP:g} in one weight is better than the best"
        arguments.say(f"search: ended after {done} of {trials} trials: {why}")
    if picture is not None:
        tuning.plot(found.trials, picture, f"{type}, {target}", with_values=True)
    for side, name in zip(sides, ("to tune on", "held out"), strict=True):
        if missing := [pole for pole in type if not any(pole in item.about["dimension"] for item in side)]:
            on_problem(f"data: no question about {', '.join(missing)} {name}; a larger --limit may have some")
    for name, scores in {
        "tuned on": found.tuned,
        **{f"held out, {name}": s for name, s in found.held_out.items()},
    }.items():
        arguments.say(f"{name}: {_words(scores)}")
    for name, value in found.values.items():
        told = "missing" if value is None else f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"
        arguments.say(f"held out, mean over poles, {name}: {told}")
    few = f": few, fewer than {FEW_PROMPTS} give intervals too narrow" if len(sides[1]) < FEW_PROMPTS else ""
    bootstrap = f"intervals: 95 %, by a paired bootstrap over {len(sides[1])} questions{few}"
    arguments.say(bootstrap)
    print(found.weights)


def _words(scores: dict[str, float | None]) -> str:
    return " ".join(f"{pole} {'missing' if score is None else f'{score:.3f}'}" for pole, score in scores.items())
