"""`mpg evaluate mbti` and `mpg evaluate roleplay`: the paper's tables on your models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress, TaskID

from mpg.app.cli import arguments
from mpg.files import parse_json, refuse_unreadable_text
from mpg.options import OPTIONS, check_weights, has_option, hint, one_of, parse_pair

if TYPE_CHECKING:
    from mpg.evaluate.run import Target
    from mpg.evaluate.tasks import Item

app = typer.Typer(
    help="The paper's tables on your models: answers by every method, judged, as a table.", no_args_is_help=True
)

Data = Annotated[Path, typer.Option(help="The folder of the paper's data release: mbti/questions, roleplay.")]
Out = Annotated[Path, typer.Option(help="A folder for answers, scores and tables; the same command goes on in it.")]
Weights = Annotated[
    str | None,
    typer.Option(
        help="NAME=NUMBER,... such as E=1,T=-0.5, or a preset of the recipe. Default: 1 for each that is judged."
    ),
]
Methods = Annotated[str | None, typer.Option(help="NAME,...: of mpg info --methods. Default: all.")]
Seeds = Annotated[int, typer.Option(min=1, help="Texts per prompt and method.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Items of each task at most.")]
Reference = Annotated[
    str | None,
    typer.Option(help="The method that differences are from, of those that run. Default: base, else the first."),
]
Anchor = Annotated[
    str | None, typer.Option(help="What the attributes were trained on where the base is a specialised one: a folder.")
]
Scoring = Annotated[
    str | None, typer.Option(help="The model under which perplexity is measured: a folder. Default: the base.")
]
BertScore = Annotated[str | None, typer.Option(help="BERTScore's model: a folder. Default: it is not run.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts that are written at once.")]
Picture = Annotated[
    Path | None, typer.Option("--plot", help="Draw trait against naturalness, as judged, into this image file.")
]


@app.command()
@arguments.clear_errors
def mbti(
    ctx: typer.Context,
    data: Data,
    out: Out,
    type: Annotated[
        list[str] | None,
        typer.Option(help="ESTP, ...: whose questions are asked and whose poles are judged; repeat it for the mean."),
    ] = None,
    weights: Weights = None,
    models: arguments.Models = "demo",
    methods: Methods = None,
    tasks: Annotated[str | None, typer.Option(help="Some of qa,mcqa,16p. Default: all.")] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="classifier (the demo's), classifier:FOLDER (a saved one), or an endpoint's URL#MODEL; repeat it."
        ),
    ] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Only the questions that tuned weights were not found on.")
    ] = False,
    choices: Annotated[
        str, typer.Option(help="What is scored of a multiple choice: the options' texts, or their letters.")
    ] = "texts",
    seeds: Seeds = 1,
    limit: Limit = None,
    reference: Reference = None,
    max_new_tokens: MaxNewTokens = 128,
    batch_size: BatchSize = 16,
    settings: arguments.Settings = None,
    key_env: arguments.KeyEnv = "OPENAI_API_KEY",
    concurrency: arguments.Concurrency = 4,
    timeout: arguments.Timeout = 120.0,
    scoring_model: Scoring = None,
    bertscore: BertScore = None,
    picture: Picture = None,
    anchor: Anchor = None,
    device: arguments.Device = None,
    dtype: arguments.Dtype = None,
    quantize: arguments.Quantize = None,
) -> None:
    """MBTI (Table 1): open questions, multiple choice and 16Personalities, judged for a type."""
    from mpg.evaluate.choices import WAYS
    from mpg.evaluate.tasks import DIMENSIONS, MBTI_TASKS, OPPOSITE

    if choices not in WAYS:
        raise ValueError(f"choices: expected one of {', '.join(WAYS)}, got {choices!r}")
    asked = [*MBTI_TASKS[not type :]] if tasks is None else _names("tasks", tasks, MBTI_TASKS)
    if "mcqa" not in asked:
        arguments.refuse_unused(ctx, "none without mcqa among the tasks", "choices")
    if weights is not None and len(type or ()) > 1:
        raise ValueError(f"weights: expected none beside several types, whose poles are weighed 1, got {weights!r}")
    if type and len(set(type)) < len(type):
        raise ValueError(f"type: expected each once, got {', '.join(type)}")

    def targets(names: list[str], given: dict[str, float]) -> list[Target]:
        from mpg.evaluate.run import Target

        found = []
        for name in type or [""]:
            if name and not (len(name) == 4 and all(pole in pair for pole, pair in zip(name, DIMENSIONS, strict=True))):
                raise ValueError(f"type: expected four poles such as ESTP, got {name!r}")
            alpha = given or dict.fromkeys(name, 1.0)
            if missing := [pole for pole in alpha if pole not in names]:
                wanted = f"an attribute for each pole of {name}; --weights names another combination"
                raise ValueError(f"type: expected {wanted}; got {', '.join(names)}, and no {missing[0]}")
            poles = tuple(name) or tuple(
                pole if alpha[pole] > 0 else OPPOSITE[pole] for pole in alpha if pole in OPPOSITE and alpha[pole]
            )
            if not poles:
                raise ValueError("type: expected --type, or --weights of poles, to know what is judged")
            items = _read_items(data, asked, name or None, limit, held_out)
            chosen_by = {"tasks": asked, "limit": limit, "held_out": held_out}
            found.append(Target(name or "weights", items, alpha, poles, chosen_by))
        return found

    _evaluate(
        "mbti", f"MBTI: {', '.join(type or ['weights'])}", targets, ctx=ctx, way=choices, weights=weights,
        models=models, methods=methods, judges=judge, out=out, seeds=seeds, reference=reference, settings=settings,
        scoring_model=scoring_model, bertscore=bertscore, picture=picture, max_new_tokens=max_new_tokens,
        batch_size=batch_size, key_env=key_env, concurrency=concurrency, timeout=timeout,
        load=dict(anchor=anchor, device=device, dtype=dtype, quantize=quantize),
    )  # fmt: skip


@app.command()
@arguments.clear_errors
def roleplay(
    ctx: typer.Context,
    data: Data,
    out: Out,
    weights: Weights = None,
    models: arguments.Models = "demo",
    methods: Methods = None,
    judge: Annotated[list[str] | None, typer.Option(help="An endpoint's URL#MODEL; repeat it.")] = None,
    seeds: Seeds = 1,
    limit: Limit = None,
    reference: Reference = None,
    max_new_tokens: MaxNewTokens = 128,
    batch_size: BatchSize = 16,
    settings: arguments.Settings = None,
    key_env: arguments.KeyEnv = "OPENAI_API_KEY",
    concurrency: arguments.Concurrency = 4,
    timeout: arguments.Timeout = 120.0,
    scoring_model: Scoring = None,
    bertscore: BertScore = None,
    picture: Picture = None,
    anchor: Anchor = None,
    device: arguments.Device = None,
    dtype: arguments.Dtype = None,
    quantize: arguments.Quantize = None,
) -> None:
    """Role-play (Table 2): messages of persons who have a profile and a personality, judged and compared."""
    if any(text.partition(":")[0] == "classifier" for text in judge or ()):
        raise ValueError(f"judge: expected an endpoint's URL#MODEL, as classifiers tell traits of MBTI; got {judge!r}")

    def targets(names: list[str], given: dict[str, float]) -> list[Target]:
        from mpg.evaluate.run import Target

        alpha = given or dict.fromkeys(("profile", "personality"), 1.0)
        if missing := [name for name in alpha if name not in names]:
            wanted = "attributes profile and personality; --weights names another combination"
            raise ValueError(f"models: expected {wanted}; got {', '.join(names)}, and no {missing[0]}")
        items = _read_items(data, ["roleplay"], None, limit)
        return [Target("roleplay", items, alpha, chosen_by={"limit": limit})]

    _evaluate(
        "roleplay", "Role-Play", targets, ctx=ctx, way="texts", weights=weights,
        models=models, methods=methods, judges=judge, out=out, seeds=seeds, reference=reference, settings=settings,
        scoring_model=scoring_model, bertscore=bertscore, picture=picture, max_new_tokens=max_new_tokens,
        batch_size=batch_size, key_env=key_env, concurrency=concurrency, timeout=timeout,
        load=dict(anchor=anchor, device=device, dtype=dtype, quantize=quantize),
    )  # fmt: skip


@app.command()
@arguments.clear_errors
def overall(
    tables: Annotated[list[str], typer.Argument(help="NAME=FOLDER of what the other commands wrote; several.")],
    methods: Annotated[str | None, typer.Option(help="NAME,...: rows to show. Default: all that are there.")] = None,
    picture: Picture = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON array on stdout, an object a method.")
    ] = False,
) -> None:
    """What every judge said over all, of tables that were made (Table 4). Loads no model and asks nobody."""
    from mpg.evaluate import tables as layouts
    from mpg.evaluate import tradeoff
    from mpg.paper.methods import METHODS
    from mpg.paper.report import check_plot

    shown = None if methods is None else _names("methods", methods, [*METHODS])
    found = {}
    for name, folder in (parse_pair("tables", "NAME=FOLDER", text) for text in tables):
        if name in found:
            raise ValueError(f"tables: {name!r} is given twice, expected once")
        found[name] = _read_table(Path(folder) / "table.json")
    try:
        rows = layouts.overall(found, shown)
        text = json.dumps(rows, indent=1) + "\n" if as_json else layouts.render_overall(rows)
        if picture is not None:
            check_plot(picture)
            tradeoff.plot(found, picture)
    except (KeyError, TypeError, AttributeError) as error:
        wanted = "tables as this version of mpg evaluate writes them"
        raise ValueError(f"tables: expected {wanted}, got {type(error).__name__}: {error}") from None
    print(text, end="")


def _read_table(file: Path) -> dict[str, Any]:
    """What `mpg evaluate` wrote. Raises ValueError for what it did not."""
    with refuse_unreadable_text("tables", file):
        text = file.read_text(encoding="utf-8")
    try:
        table = parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"tables: {file}, line {error.lineno}: expected JSON; {error.msg}") from None
    if not isinstance(table, dict) or not table.get("sections"):
        raise ValueError(f"tables: expected a table with a section, got {text:.60} in {file}")
    return table


def _names(argument: str, text: str, known: Sequence[str]) -> list[str]:
    """Names with commas between them, each once."""
    names = text.split(",")
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"{argument}: expected some of {', '.join(known)}, got {wrong[0]!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"{argument}: expected each once, got {text!r}")
    return names


def _evaluate(
    rubric: str,
    title: str,
    targets: Callable[[list[str], dict[str, float]], list[Target]],
    *,
    ctx: typer.Context,
    way: str,
    weights: str | None,
    models: str,
    methods: str | None,
    judges: list[str] | None,
    out: Path,
    seeds: int,
    reference: str | None,
    settings: list[str] | None,
    scoring_model: str | None,
    bertscore: str | None,
    picture: Path | None,
    max_new_tokens: int,
    batch_size: int,
    key_env: str,
    concurrency: int,
    timeout: float,
    load: dict[str, Any],
) -> None:
    """What both commands do. Refuses what can be refused before minutes of loading.

    targets: of the names of the attributes there are, and of the weights that were given, if any
    """
    from mpg.paper.methods import METHODS, sampler_of
    from mpg.paper.report import check_plot
    from mpg.recipe import parse_settings

    chosen = _names("methods", methods, [*METHODS]) if methods else list(METHODS)
    if reference is None:
        reference = "base" if "base" in chosen else chosen[0]
    one_of(*chosen)("reference", reference)
    options = parse_settings(settings)
    samplers = {sampler_of(method, {}) for method in chosen}
    own = ("max_new_tokens", "batch_size")
    left_open = [name for name in OPTIONS if name not in ("sampler", "target", "seed", "trace", *own)]
    for name in options:
        if name in own:
            raise ValueError(f"{name}: expected --{name.replace('_', '-')}, got --set {name}={options[name]}")
        if name not in left_open:
            raise ValueError(f"{name}: expected an option that methods leave open; {hint(name, left_open)}")
        OPTIONS[name].metadata["check"](name, options[name])
        if not any(has_option(sampler, name) for sampler in samplers):
            raise ValueError(f"{name}: expected an option of one of {', '.join(chosen)}, got {options[name]!r}")
    if scoring_model is not None and not Path(scoring_model).is_dir():
        raise ValueError(f"scoring_model: expected the folder of a model, got {scoring_model!r}")
    recipe = arguments.read_recipe(models)
    given = dict(recipe.weigh(weights) or {}) if weights is not None else {}
    if given:
        check_weights(given, list(recipe.attributes or ()), "geometric")
    planned = targets(list(recipe.attributes or ()), given)
    if picture is not None:
        if not judges:
            raise ValueError("plot: expected a --judge, whose scores are drawn, got none")
        check_plot(picture)

    from mpg.evaluate import tradeoff
    from mpg.evaluate.judges import EndpointJudge, judge_of
    from mpg.evaluate.metrics import Metrics
    from mpg.evaluate.run import Evaluation

    def panel(target: Target) -> list[Any]:
        how = {"key_env": key_env, "concurrency": concurrency, "timeout": timeout, "replies": out / "replies"}
        asked = [judge_of(text, rubric, target.poles, **how) for text in judges or ()]
        names = [judge.name for judge in asked]
        if len(set(names)) < len(names):
            raise ValueError(f"judge: expected judges of different names, got {', '.join(names)}")
        return sorted(asked, key=lambda judge: isinstance(judge, EndpointJudge))  # local ones first: these cannot fail

    panels = [panel(target) for target in planned]
    if not any(isinstance(judge, EndpointJudge) for judges in panels for judge in judges):
        arguments.refuse_unused(ctx, "none without an endpoint's --judge", "key_env", "concurrency", "timeout")
    model = arguments.load(models, **load)
    scoring = (models, model)
    if scoring_model is not None:
        from mpg.model import load as load_model

        scoring = (Path(scoring_model).name, load_model(scoring_model, {}, device=load["device"]))
    metrics = Metrics(scoring, bertscore)
    with Progress(console=arguments.err, disable=not arguments.err.is_terminal, transient=True) as progress:
        bars: dict[str, TaskID] = {}

        def on_row(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done, visible=done < total)

        evaluation = Evaluation(
            model, planned, chosen, out, rubric, panels, metrics, range(seeds), way,
            batch_size, {"max_new_tokens": max_new_tokens, **options}, on_row, _note,
        )  # fmt: skip
        failures = evaluation.run(title, reference)
    print((out / "table.md").read_text(encoding="utf-8"), end="")
    if failures:
        raise ValueError("; ".join(map(str, failures)))
    if picture is not None:
        tradeoff.plot({title: _read_table(out / "table.json")}, picture)


def _note(text: str) -> None:
    arguments.say(text, "yellow")


def _read_items(
    data: Path, tasks: list[str], type: str | None, limit: int | None, held_out: bool = False
) -> list[Item]:
    from mpg.evaluate.tasks import read_items, split

    items = read_items(data, tasks, type, on_problem=lambda problem: _note(f"left out: {problem}"))
    if held_out:
        items = split(items)[1]
        if missing := [task for task in tasks if task not in {item.task for item in items}]:
            raise ValueError(f"held_out: expected questions of {missing[0]} on the side that is held out, got none")
    return [item for task in tasks for item in [item for item in items if item.task == task][:limit]]
