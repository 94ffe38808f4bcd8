"""`mpg chat`: a conversation on the terminal."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from mpg.app.cli.arguments import (
    Device,
    Dtype,
    Graphs,
    MergeAdapters,
    Models,
    OtherBase,
    Settings,
    Weights,
    clear_errors,
    load,
    read_recipe,
)  # fmt: skip


@clear_errors()
def chat(
    weights: Weights = None,
    models: Models = "demo",
    system: Annotated[str, typer.Option(help="A system prompt, where the chat template takes one.")] = "",
    settings: Settings = None,
    device: Device = None,
    dtype: Dtype = None,
    graphs: Graphs = False,
    allow_other_base: OtherBase = False,
    merge_adapters: MergeAdapters = False,
) -> None:
    """Talk with a weighted combination; weights, sampler and options change on the way. /help lists the commands."""
    from mpg.app.chat import Chat, run
    from mpg.app.settings import check_settings, parse_setting

    options = dict(map(parse_setting, settings or ()))
    recipe = read_recipe(models)
    recipe.weigh(weights)  # before minutes of loading, as the options
    check_settings(options, recipe.options)
    model = load(
        models, device=device, dtype=dtype, graphs=graphs,
        allow_other_base=allow_other_base, merge_adapters=merge_adapters,
    )  # fmt: skip
    run(Chat(model, weights, options, system), Console())
