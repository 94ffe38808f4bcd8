"""`mpg serve`: OpenAI's API in front of the models."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpg.app.cli import arguments

if TYPE_CHECKING:
    from mpg.model import Model
    from mpg.models.ensemble import Ensemble
    from mpg.recipe import Recipe


@arguments.clear_errors()
def serve(
    models: arguments.Models = "demo",
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(help="A key that requests must bring; repeat it. Default: MPG_API_KEY.")
    ] = None,
    admin_key: Annotated[
        str | None, typer.Option(help="The key that adding and removing attributes takes. Default: MPG_ADMIN_KEY.")
    ] = None,
    allow_open: Annotated[bool, typer.Option("--allow-open", help="Serve beyond loopback without a key.")] = False,
    attribute_folder: Annotated[
        list[Path] | None, typer.Option(help="A folder below which attributes may be added; repeat it.")
    ] = None,
    max_rows: Annotated[int, typer.Option(help="Texts that are decoded at once.")] = 32,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a prompt and its answer. Default: the model's positions, 2048 at most."),
    ] = None,
    max_memory: Annotated[
        float | None,
        typer.Option(
            help="GiB that cache rows of running requests may take, also while they grow. Default: a quarter of all."
        ),
    ] = None,
    prefill_tokens: Annotated[
        int, typer.Option(help="Of prompts, that each model reads between two rounds of running requests.")
    ] = 256,
    max_kept: Annotated[
        float | None,
        typer.Option(help="GiB of earlier texts kept for prompts that begin like them. Default: a sixteenth; 0: none."),
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Texts that may wait; more are refused.")] = 256,
    max_seconds: Annotated[float, typer.Option(help="That a request may take.")] = 600.0,
    grace: Annotated[float, typer.Option(help="Seconds that running requests have when the server ends.")] = 30.0,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log what requests say, too.")] = False,
    settings: arguments.Settings = None,
    device: arguments.Device = None,
    dtype: arguments.Dtype = None,
    quantize: arguments.Quantize = None,
    graphs: arguments.Graphs = False,
    allow_other_base: arguments.OtherBase = False,
    merge_adapters: arguments.MergeAdapters = False,
    allow_pickle: arguments.AllowPickle = False,
) -> None:
    """Serve the models under OpenAI's API; needs the package's extra 'serve'."""
    try:
        from mpg.serve.logs import log_to
        from mpg.serve.server import check_host, make_app
        from mpg.serve.server import serve as run
        from mpg.serve.settings import Settings
    except ImportError as error:
        raise ValueError(f"{error.name}: expected it installed: pip install 'mpg[serve]'") from None
    from dataclasses import replace

    from mpg.frontend.hf_generate import check_options
    from mpg.model import Model
    from mpg.models import loading
    from mpg.recipe import parse_setting

    keys = api_key or [key for key in [os.environ.get("MPG_API_KEY")] if key]
    hosts = check_host(host, bool(keys), allow_open)
    recipe, options = arguments.read_recipe(models), dict(map(parse_setting, settings or ()))
    check_options(options, recipe.options)
    limits = Settings(
        name=_name(models), hosts=hosts, api_keys=tuple(keys), admin_key=admin_key or os.environ.get("MPG_ADMIN_KEY"),
        attribute_folders=tuple(attribute_folder or ()), max_rows=max_rows, max_length=max_length,
        max_memory=None if max_memory is None else int(max_memory * 2**30), max_queue=max_queue,
        prefill_tokens=prefill_tokens, max_kept=None if max_kept is None else int(max_kept * 2**30),
        max_seconds=max_seconds, grace=grace, log_prompts=log_prompts,
    )  # fmt: skip

    def reload(other: Recipe, beside: Ensemble) -> Model:
        return Model(loading.load(other, dtype=dtype, device=device, graphs=graphs, beside=beside), other)

    def load() -> Model:
        model = arguments.load(
            models, device=device, dtype=dtype, quantize=quantize, graphs=graphs, allow_other_base=allow_other_base,
            merge_adapters=merge_adapters, allow_pickle=allow_pickle,
        )  # fmt: skip
        if model.models.device.type == "cpu":
            arguments.leave_a_core()
        return Model(model.models, replace(model.recipe, options={**model.recipe.options, **options}))

    stderr = sys.stderr  # another while the engine's thread loads a set that ships
    log_to(stderr)
    run(
        make_app(limits, load, reload),
        limits,
        host,
        port,
        lambda at: print(f"mpg: serving at {at}/v1", file=stderr, flush=True),
    )


def _name(models: str) -> str:
    """What requests call the combination: a set's name, or the folder's or recipe's."""
    return re.sub(r"\.ya?ml$", "", Path(models).absolute().name) or "mpg"
