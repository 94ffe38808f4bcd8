"""What the commands share: arguments that several of them have, the models these mean, and what is said on stderr."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Container
from contextlib import nullcontext, redirect_stderr
from dataclasses import replace
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from rich.console import Console

import mpg
from mpg.demo import SETS
from mpg.options import OPTIONS, a_number, describe, parse_pair, suggest

if TYPE_CHECKING:
    from mpg.recipe import Recipe

P = ParamSpec("P")

FEW_PARAMETERS = 10**7  # models with fewer lose more to threads that wait for one another than the threads compute

err = Console(stderr=True)


def say(text: str, style: str = "") -> None:
    """Print text on stderr as it is, its lines not folded: no name is parted from its value."""
    err.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def option(name: str, more: str = "") -> Any:
    """The argument for a field of `Options`, with its help."""
    text = describe(name)
    return typer.Option(help=f"{text[0].upper()}{text[1:]}{more}")


Models = Annotated[
    str,
    typer.Option(
        "--models",
        help="'demo' (a tiny set) or 'smollm2' (a real model); a recipe (.yaml) or a folder that holds mpg.yaml; or a "
        "base model's folder with adapters/NAME inside it.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="NAME=NUMBER,... such as E=1,T=-0.5, where attributes not named weigh 0; or a preset of the recipe. "
        "Default: the recipe's own weights."
    ),
]
Contexts = Annotated[
    list[str] | None,
    typer.Option(
        "--context",
        help="NAME=TEXT: an attribute that is the base with this text for a system message, weighed like any; repeat "
        "it. In a recipe it may also be a prefix, and be read by an adapter.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="NAME=VALUE: any option (mpg info --options), or a field of transformers' GenerationConfig such as "
        "repetition_penalty=1.1; repeat it.",
    ),
]
Raw = Annotated[bool, typer.Option("--raw", help="Take prompts verbatim, without the chat template.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: cuda where there is one.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, ... Default: the checkpoint's on cuda, else float32.")
]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="int4: linear layers in four bits, on the CPU, in bfloat16; int4-draft: those of exact's drafts "
        "'model' and 'merged' alone; or none. Default: the recipe's."
    ),
]
Graphs = Annotated[bool, typer.Option("--graphs", help="Capture decoding as CUDA graphs; not yet run on a GPU.")]
OtherBase = Annotated[bool, typer.Option("--allow-other-base", help="Take adapters that were trained on another base.")]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Read weights that are pickles (.bin), not safetensors: they may run code."),
]
MergeAdapters = Annotated[
    bool,
    typer.Option(
        "--merge-adapters", help="Merge adapters that cannot be stacked (DoRA, ...), each into one more model."
    ),
]

KeyEnv = Annotated[str, typer.Option(help="The environment's variable that holds the endpoints' key.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests to an endpoint at once.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds for one reply of an endpoint.")]


def read_recipe(models: str) -> Recipe:
    """What --models means: the recipe that it names, or one of a folder's own attributes."""
    from mpg.recipe import Recipe

    recipe = Recipe.of(_place(models))
    if recipe.attributes is not None:
        return recipe
    from mpg.models.sources import default_attributes

    return replace(recipe, attributes=default_attributes(models))


def load(models: str, with_contexts: bool = False, **how: Any) -> mpg.Model:
    """The models, `how` as `mpg.load` takes it; what is None or False is left to it.

    with_contexts: whether calls bring attributes, without which a base needs some of its own
    """
    if with_contexts and not read_recipe(models).attributes:
        how["attributes"] = {}
    for name in ("draft", "anchor"):
        if how.get(name) is not None and not Path(how[name]).is_dir():
            raise ValueError(f"{name}: expected a model's folder, got {how[name]!r}")
    # transformers' bar over the shipped models is gone before it can be read
    with redirect_stderr(io.StringIO()) if models in SETS else nullcontext():
        model = mpg.load(_place(models), **{name: value for name, value in how.items() if value not in (None, False)})
    if all(role["parameters"] < FEW_PARAMETERS for role in model.models.describe().values()):
        import torch

        torch.set_num_threads(1)
    return model


def leave_a_core() -> None:
    """Keep torch off one core in the thread that calls, for those that answer; fewer threads stay fewer."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - 1)))


def refuse_unused(ctx: typer.Context, wanted: str, *names: str) -> None:
    """Raises ValueError for an argument of the command that was given, where nothing would use it.

    wanted: what was expected of it, in words
    """
    for name in names:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"{name}: expected {wanted}, got {ctx.params[name]!r}")


def read_contexts(given: list[str] | None) -> dict[str, str]:
    """Texts by name, of --context."""
    contexts: dict[str, str] = {}
    for name, text in (parse_pair("context", "NAME=TEXT", text) for text in given or ()):
        if name in contexts:
            raise ValueError(f"context: {name!r} is given twice, expected once")
        contexts[name] = text
    return contexts


def read_size(name: str, size: float | None, *, can_be_0: bool = False) -> int | None:
    """Bytes, of an option in GiB. Raises ValueError for a number that is no size."""
    if size is None:
        return None
    a_number(0, open_low=not can_be_0)(name, size)
    return math.ceil(size * 2**30)


def _place(models: str) -> str:
    if not models or (models not in SETS and not Path(models).exists()):
        wanted = f"{', '.join(map(repr, SETS))}, a folder or a recipe"
        raise ValueError(f"models: expected {wanted}, got {models!r}{suggest(models, SETS)}")
    return models


def clear_errors(command: Callable[P, None]) -> Callable[P, None]:
    """A command that turns the library's errors about its input into one line on stderr and exit status 2, Ctrl-C into
    130."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, OSError, MemoryError, ImportError) as error:
            say(f"mpg: {_as_arguments(str(error), signature(command).parameters)}", "red")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    return run


def _as_arguments(message: str, own: Container[str]) -> str:
    """A message of the library, whose advice is for Python, as a command with these parameters has it: `--target base`
    or `--set target=base` for `target='base'`, `--allow-other-base` for `allow_other_base=True`."""

    def spell(found: re.Match[str]) -> str:
        name, value = found[1], found[2]
        if name in own:
            return f"--{name.replace('_', '-')}" + (f" {value}" if value else "")
        return f"--set {name}={value or 'true'}" if "settings" in own and name in OPTIONS else found[0]

    return re.sub(r"(?<= )([a-z_]+)=(?:'([^' ]*)'|True(?: \(--[a-z-]+\))?)(?=[ ,;)]|$)", spell, message)
