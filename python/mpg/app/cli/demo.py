"""`mpg demo`: the shipped models answer."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import mpg
from mpg.app.cli.arguments import Device, Dtype, Quantize, clear_errors, load, say
from mpg.demo import SETS
from mpg.files import check_writable, whole_file
from mpg.options import one_of


@clear_errors
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
    save: Annotated[
        Path | None, typer.Option(help="Write answers, scores, intervals and speeds to this file of JSON, too.")
    ] = None,
) -> None:
    """Answer a few questions as the base, as one trait, as another, and as both.

    Without --dtype and --quantize a short trial decides between float32 and four bits, for smollm2 on a CPU.
    """
    from mpg.demo.precision import quicker
    from mpg.demo.show import show
    from mpg.demo.stages import stage

    one_of(*SETS)("models", models)
    if save is not None:
        check_writable("save", save)
    how: dict[str, Any] = {"device": device, "dtype": dtype, "quantize": quantize}
    say(f"loading {models}" + "; the first time its weights are converted, too" * (models == "smollm2"), "dim")
    try:
        model, scene = load(models, **how), stage(models)
    except (ValueError, ImportError) as error:
        if models != "smollm2":
            raise
        say(f"mpg: {error}; the tiny set answers instead", "yellow")
        models = "demo"
        model, scene = load(models, **how), stage(models)
    # without a terminal five columns need more than the usual 80 characters
    console = Console(width=None if sys.stdout.isatty() else 160)
    if (models, dtype, quantize) == ("smollm2", None, None):
        model, why = quicker(
            model, lambda: load(models, device=device, quantize="int4"), scene.questions[0], partial(say, style="dim")
        )
        console.print(why, markup=False, highlight=False, soft_wrap=True)
    num_held_out = held_out or scene.num_held_out
    shown = show(console, model, scene, questions, num_held_out, seed)
    if save is not None:
        import torch

        from mpg.models.timings import processor

        asked = {"models": models, "questions": questions, "held_out": num_held_out, "seed": seed}
        machine = {"processor": processor(), "threads": torch.get_num_threads(), "load_average": os.getloadavg()[0]}
        versions = {"mpg": mpg.__version__, "torch": torch.__version__}
        with whole_file("save", save) as beside:
            beside.write_text(json.dumps({**asked, **shown, "machine": machine, "versions": versions}, indent=1) + "\n")
