"""`mpg chat`: a conversation on the terminal."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from mpg.app.cli import arguments


@arguments.clear_errors
def chat(
    weights: arguments.Weights = None,
    context: arguments.Contexts = None,
    models: arguments.Models = "demo",
    system: Annotated[str, typer.Option(help="A system prompt, where the chat template takes one.")] = "",
    settings: arguments.Settings = None,
    device: arguments.Device = None,
    dtype: arguments.Dtype = None,
    quantize: arguments.Quantize = None,
    graphs: arguments.Graphs = False,
    allow_other_base: arguments.OtherBase = False,
    merge_adapters: arguments.MergeAdapters = False,
    allow_pickle: arguments.AllowPickle = False,
) -> None:
    """Talk with a weighted combination of attributes; weights and options change on the way, /help says how."""
    from mpg.app.chat import Chat, run
    from mpg.frontend.hf_generate import check_options
    from mpg.recipe import parse_settings

    options, contexts = parse_settings(settings), arguments.read_contexts(context)
    recipe = arguments.read_recipe(models)
    recipe.weigh(weights)  # before minutes of loading, as the options
    check_options(options, recipe.options)
    model = arguments.load(
        models, bool(contexts), device=device, dtype=dtype, quantize=quantize, graphs=graphs,
        allow_other_base=allow_other_base, merge_adapters=merge_adapters, allow_pickle=allow_pickle,
    )  # fmt: skip
    run(Chat(model, weights, options, system, contexts), Console())
