"""`mpg train`: an adapter of one attribute from preference pairs."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.progress import Progress

from mpg.app.cli.arguments import clear_errors, err, say
from mpg.extras import install
from mpg.train.settings import PRESETS, SETTINGS, Settings, default_of, describe


def _with_settings(command: Any) -> Any:
    """The command with an argument for every setting, as typer reads it."""
    signature = inspect.signature(command)
    types = get_type_hints(Settings)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    more = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[types[name] | None, typer.Option(help=describe(name)[0].upper() + describe(name)[1:])],
        )
        for name in SETTINGS
    ]
    hints = get_type_hints(command, include_extras=True)
    own = [parameter.replace(annotation=hints[parameter.name]) for parameter in own]
    command.__signature__ = signature.replace(parameters=[*own, *more])
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *more]}
    return command


@_with_settings
@clear_errors
def train(
    base: Annotated[
        str, typer.Option(help="A model's folder or its name on the hub, a GGUF file, 'smollm2' or 'demo'.")
    ],
    data: Annotated[
        str,
        typer.Option(
            help="A file of JSON, an object a line or a list of them, each with prompt, chosen and rejected, or with "
            "question and an answer per pole; a folder of such files; 'traits', which ships with mpg; the paper's data "
            "release; or a dataset, saved or on the hub."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="The adapter's folder, to be made. Checkpoints are in OUT.partial until then.")
    ],
    pole: Annotated[
        list[str] | None, typer.Option(help="Whose answers are to be preferred, where the data has poles: E, for one.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help=" | ".join(PRESETS) + " (small models, few pairs): the defaults below.")
    ] = "paper",
    keep_preamble: Annotated[
        bool, typer.Option("--keep-preamble", help="Of the paper's release: leave the persona before each question.")
    ] = False,
    drop_identical: Annotated[
        bool, typer.Option("--drop-identical", help="Leave out pairs of equal answers, which else are refused.")
    ] = False,
    base_name: Annotated[
        str | None, typer.Option(help="The name of its base that the adapter records. Default: the base as given.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the base: float32, bfloat16 or float16. Default: float32 on cpu, else its own."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="How many torch takes. Default: its own choice.")] = None,
    **settings: Any,
) -> None:
    """Train an adapter of one attribute by direct preference optimisation; after a kill the same command goes on."""
    chosen = Settings.of(preset, settings)
    if pole is not None and len(pole) > 1:
        raise ValueError(f"pole: expected one, got {', '.join(map(repr, pole))}")
    own_pole = pole[0] if pole else None
    if preset != "paper":
        changes = ", ".join(f"{name} {value} for {default_of(name)}" for name, value in PRESETS[preset].items())
        say(f"preset {preset}: {changes}", "dim")
    from mpg.demo import MODELS, TRAITS
    from mpg.train.pairs import read_pairs

    pairs = read_pairs(
        TRAITS if data == "traits" else data, own_pole, keep_preamble=keep_preamble, drop_identical=drop_identical
    )
    try:
        from mpg.train.run import train
    except ModuleNotFoundError as error:
        raise ImportError(f"expected mpg[train], got no {error.name}: {install('train')}") from None
    from transformers.utils import logging

    logging.set_verbosity_error()
    with Progress(console=err, disable=not err.is_terminal, transient=True) as progress:
        task = progress.add_task("steps", total=None)

        def on_epoch(epoch: int, scores: dict[str, float]) -> None:
            say(f"epoch {epoch}: held out, {_words(scores)}")

        card = train(
            MODELS if base == "demo" else base, pairs, out, chosen, base_name=base_name, device=device, dtype=dtype,
            threads=threads, about={"source": data, "pole": own_pole, "preamble": keep_preamble},
            on_note=partial(say, style="yellow"),
            on_epoch=on_epoch, on_step=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    print(f"{out}: {card['pairs']} pairs, {card['held_out']} held out: {_words(card['scores'])}")


def _words(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
