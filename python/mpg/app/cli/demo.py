"""`mpg demo`: the shipped models answer."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from mpg.app.cli.arguments import Device, Dtype, Quantize, clear_errors, err, load


@clear_errors()
def demo(
    models: Annotated[
        str, typer.Option(help="'smollm2', or 'demo' for the tiny set, which needs nothing.")
    ] = "smollm2",
    questions: Annotated[int, typer.Option(min=1, help="How many questions, at most as many as there are.")] = 3,
    held_out: Annotated[
        int | None, typer.Option(min=2, help="How many more to measure the traits over. Default: 12, or 100 of 'demo'.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
) -> None:
    """Answer a few questions as the base, as one trait, as another, and as both.

    Without --dtype and --quantize a short trial decides between float32 and four bits, for smollm2 on a CPU.
    """
    from mpg.demo.precision import quicker
    from mpg.demo.show import show
    from mpg.demo.stages import stage

    how: dict[str, Any] = {"device": device, "dtype": dtype, "quantize": quantize}
    try:
        model, scene = load(models, **how), stage(models)
    except (ValueError, ImportError) as error:
        if models != "smollm2":
            raise
        err.print(f"mpg: {error}; the tiny set answers instead", style="yellow", markup=False, soft_wrap=True)
        models = "demo"
        model, scene = load(models, **how), stage(models)
    # without a terminal five columns need more than the usual 80 characters
    console = Console(width=None if sys.stdout.isatty() else 160)
    if (models, dtype, quantize) == ("smollm2", None, None):
        model, why = quicker(model, lambda: load(models, device=device, quantize="int4"), scene.questions[0])
        console.print(why, markup=False, highlight=False, soft_wrap=True)
    show(console, model, scene, questions, held_out or scene.num_held_out, seed)
