"""`mpg check`: how much of the intended shift each sampler delivers."""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TaskID

from mpg.app.cli import arguments
from mpg.app.cli.prompts import read_prompts
from mpg.options import TARGETS

# For models that come with no questions of their own: everyday, and leaning to no trait.
PROMPTS = str(files("mpg.app") / "prompts.txt")


@arguments.clear_errors
def check(
    weights: arguments.Weights = None,
    context: arguments.Contexts = None,
    models: arguments.Models = "demo",
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A file, or - for standard input: a prompt a line; or JSON, an object a line or a list of them, each "
            "with prompt or messages. Default: the demo's held-out questions, else neutral ones."
        ),
    ] = None,
    target: Annotated[str, typer.Option(help=" | ".join(TARGETS[:-1]))] = "geometric",
    max_new_tokens: Annotated[int | None, arguments.option("max_new_tokens")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Texts per prompt and sampler.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of the first text; all others count up.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that are written at once.")] = 32,
    plot: Annotated[Path | None, typer.Option(help="Draw delivered share against depth into this image file.")] = None,
    raw: arguments.Raw = False,
    draft: Annotated[str | None, typer.Option(help="A model's folder: exact drafts with it too.")] = None,
    device: arguments.Device = None,
    dtype: arguments.Dtype = None,
    quantize: arguments.Quantize = None,
    allow_other_base: arguments.OtherBase = False,
    merge_adapters: arguments.MergeAdapters = False,
    allow_pickle: arguments.AllowPickle = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False,
) -> None:
    """Measure how much of the intended shift each sampler delivers on these models, and at what cost."""
    lines = None if prompts is None else read_prompts(prompts)
    if lines is not None and len(lines) < 2:
        raise ValueError(f"prompts: expected at least 2, to tell a shift from chance, got {len(lines)} in {prompts}")
    for line in lines or ():
        with line.locate_errors():
            own = {"weights": line.weights is not None, "contexts": line.contexts}
            if more := [*line.options, *(name for name, given in own.items() if given)]:
                raise ValueError(f"{more[0]}: expected none of a single prompt under mpg check")
    arguments.read_recipe(models).weigh(weights)  # before minutes of loading
    contexts = arguments.read_contexts(context)
    from mpg.paper import report as reports

    if plot is not None:
        reports.check_plot(plot)
    from mpg.demo.corpus import HELD_OUT_QUESTIONS
    from mpg.paper.check import check as measure

    if lines is None and models == "demo":
        chosen = [question.text for question in HELD_OUT_QUESTIONS]
    else:
        chosen = [line.prompt for line in lines or read_prompts(PROMPTS)]
    if lines is None:
        arguments.say(f"prompts: {len(chosen)} that come with mpg; --prompts FILE measures on yours", "dim")
    model = arguments.load(
        models, bool(contexts), device=device, dtype=dtype, quantize=quantize, draft=draft,
        allow_other_base=allow_other_base, merge_adapters=merge_adapters, allow_pickle=allow_pickle,
    )  # fmt: skip
    with Progress(console=arguments.err, disable=not arguments.err.is_terminal, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def on_progress(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=total)
            progress.update(tasks[label], completed=done)

        report = measure(
            model, weights, chosen, contexts=contexts, target=target, max_new_tokens=max_new_tokens, num_seeds=seeds,
            seed=seed, batch_size=batch_size, raw=raw, on_progress=on_progress,
        )  # fmt: skip
    if as_json:
        print(json.dumps(dataclasses.asdict(report), allow_nan=False))
    else:
        # without a terminal the tables need more than the usual 80 characters
        Console(width=None if sys.stdout.isatty() else 120).print(reports.render(report))
    if plot is not None:
        reports.plot(report, plot)
