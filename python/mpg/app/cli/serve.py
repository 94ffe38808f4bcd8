"""`mpg serve`: OpenAI's API in front of the models."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpg.app.cli import arguments
from mpg.extras import install

if TYPE_CHECKING:
    from mpg.model import Model
    from mpg.models.ensemble import Ensemble
    from mpg.recipe import Recipe


KILLED = "mpg: the command was killed, or has lost the Ray that it ran on"


@arguments.clear_errors
def serve(
    ctx: typer.Context,
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
        int, typer.Option(help="Of prompts, over all models, that are read between two rounds of running requests.")
    ] = 256,
    max_kept: Annotated[
        float | None,
        typer.Option(help="GiB of earlier texts kept for prompts that begin like them. Default: a sixteenth; 0: none."),
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Texts that may wait; more are refused.")] = 256,
    max_seconds: Annotated[float, typer.Option(help="That a request may take.")] = 600.0,
    stream_interval: Annotated[
        float, typer.Option(help="Seconds between two events of a stream; 0: one a round.")
    ] = 0.05,
    grace: Annotated[float, typer.Option(help="Seconds that running requests have when the server ends.")] = 30.0,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log what requests say, too.")] = False,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Servers of Ray that each load the models, behind one address.")
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="That there may be while requests queue up. Default: --replicas.")
    ] = None,
    cpus_per_replica: Annotated[float, typer.Option(min=0, help="Processors that each takes.")] = 1,
    gpus_per_replica: Annotated[float, typer.Option(min=0, help="GPUs that each takes.")] = 0,
    print_config: Annotated[
        str | None,
        typer.Option(help="serve: print a file for 'serve deploy'; kuberay: one for 'kubectl apply'. Serve nothing."),
    ] = None,
    image: Annotated[
        str, typer.Option(help="A container image that has mpg with the extra ray, for kuberay's file.")
    ] = "IMAGE",
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
        from mpg.serve import process
        from mpg.serve.logs import log_to
        from mpg.serve.server import address, check_address, check_host
        from mpg.serve.settings import Settings
    except ImportError as error:
        raise ValueError(f"{error.name}: expected it installed: {install('serve')}") from None
    keys = api_key or [key for key in [os.environ.get("MPG_API_KEY")] if key]
    # of a cluster, its own environment's key counts
    hosts = check_host(host, bool(keys or print_config), allow_open)
    if not print_config:
        check_address(host, port)
    # seconds of imports: what can be said before them is said
    from dataclasses import replace

    from mpg.frontend.hf_generate import check_options
    from mpg.model import Model
    from mpg.models import loading
    from mpg.options import one_of
    from mpg.recipe import parse_settings

    if not (replicas or max_replicas or print_config):
        arguments.refuse_unused(ctx, "none without --replicas", "cpus_per_replica", "gpus_per_replica")
    if print_config != "kuberay":
        arguments.refuse_unused(ctx, "none without --print-config kuberay", "image")
    how: dict[str, Any] = {
        "device": device, "dtype": dtype, "quantize": quantize, "graphs": graphs,
        "allow_other_base": allow_other_base, "merge_adapters": merge_adapters, "allow_pickle": allow_pickle,
    }  # fmt: skip
    options = parse_settings(settings)
    if print_config is None or Path(models).exists():  # else the cluster has them
        check_options(options, arguments.read_recipe(models).options)
    limits = Settings(
        name=_name(models), hosts=hosts, api_keys=tuple(keys), admin_key=admin_key or os.environ.get("MPG_ADMIN_KEY"),
        attribute_folders=tuple(attribute_folder or ()), max_rows=max_rows, max_length=max_length,
        max_memory=arguments.read_size("max_memory", max_memory), max_queue=max_queue, prefill_tokens=prefill_tokens,
        max_kept=arguments.read_size("max_kept", max_kept, can_be_0=True),
        max_seconds=max_seconds, stream_interval=stream_interval, grace=grace, log_prompts=log_prompts,
    )  # fmt: skip
    if replicas or max_replicas or print_config:
        from mpg.batch.watch import told_if_killed
        from mpg.serve import deploy

        scale = deploy.Scale(
            replicas=replicas or 1, max_replicas=max_replicas, cpus=cpus_per_replica, gpus=gpus_per_replica
        )
        load_how = {name: value for name, value in how.items() if value not in (None, False)}
        given = {"load": load_how, "options": options, "allow_open": allow_open, **deploy.told(limits)}
        given = {name: value for name, value in given.items() if value not in ({}, False)}
        if print_config:
            one_of(*deploy.FILES)("print_config", print_config)
            config = deploy.Config(models, scale, given, host, port, image)
            print(config.text(print_config), end="")
        else:
            port = port or deploy.free_port(host)  # Ray's own choice is not told
            application = deploy.deployment(deploy.place(models), scale=scale, **given, api_keys=keys)
            with told_if_killed(KILLED):
                deploy.run(application, scale, host, port, lambda: process.say(address(host, port)))
        return

    def reload(other: Recipe, beside: Ensemble) -> Model:
        return Model(loading.load(other, dtype=dtype, device=device, graphs=graphs, beside=beside), other)

    def load() -> Model:
        arguments.leave_a_core()  # before layers are timed, which then are as they will run
        model = arguments.load(models, **how)
        return Model(model.models, replace(model.recipe, options={**model.recipe.options, **options}))

    log_to(sys.stderr)
    process.serve(limits, host, port, load, reload)


def _name(models: str) -> str:
    """What requests call the combination: a set's name, or the folder's or recipe's where no other model has it."""
    name, taken = re.sub(r"\.ya?ml$", "", Path(models).absolute().name), {"", "base"}
    if Path(models).exists():
        recipe = arguments.read_recipe(models)
        taken |= {*(recipe.attributes or ()), *recipe.presets}
    return "mpg" if name in taken else name
