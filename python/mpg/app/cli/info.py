"""`mpg info`: the build, the devices, the models, the options, the methods."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import mpg
from mpg.app.cli import arguments
from mpg.options import OPTIONS, SAMPLERS, TARGETS, describe


@arguments.clear_errors
def info(
    models: Annotated[str | None, typer.Option("--models", help="Describe these models too.")] = None,
    methods: Annotated[bool, typer.Option("--methods", help="List the methods of the paper's tables instead.")] = False,
    options: Annotated[bool, typer.Option("--options", help="List the options of generation instead.")] = False,
    device: arguments.Device = None,
    allow_other_base: arguments.OtherBase = False,
    merge_adapters: arguments.MergeAdapters = False,
    allow_pickle: arguments.AllowPickle = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False,
) -> None:
    """Show the build, the devices and, if asked, the models; or the methods, or the options."""
    if methods or options:
        table = Table("method", "what it is", "what it needs") if methods else Table("option", "what it is")
        listed = mpg.METHODS if methods else OPTIONS
        facts: dict[str, Any] = {}
        for name in listed:
            facts[name] = dataclasses.asdict(mpg.METHODS[name]) if methods else {"meaning": describe(name)}
            table.add_row(name, *facts[name].values())
        shown: Any = table
        facts = {"methods" if methods else "options": facts}
    else:
        import torch

        import mpg_ext

        facts = shown = {
            "mpg": mpg.__version__,
            "torch": torch.__version__,
            "build": mpg_ext.build_info(),
            "devices": ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))],
            "samplers": list(SAMPLERS),
            "targets": list(TARGETS),
            "statistics": mpg.STATISTICS,
        }
        if models is not None:
            model = arguments.load(
                models, device=device, allow_other_base=allow_other_base, merge_adapters=merge_adapters,
                allow_pickle=allow_pickle,
            )  # fmt: skip
            facts["models"] = model.models.describe()
            facts["recipe"] = {
                name: getattr(model.recipe, name) for name in ("quantize", "weights", "presets", "options")
            }
    if as_json:
        print(json.dumps(facts))
    else:
        Console().print(shown)
