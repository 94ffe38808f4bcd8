"""`mpg demo`: the shipped models answer."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from mpg.app.cli import arguments


@arguments.clear_errors()
def demo(
    questions: Annotated[int, typer.Option(min=1, help="How many questions, at most as many as there are.")] = 3,
    held_out: Annotated[int, typer.Option(min=2, max=100, help="How many more to measure the traits over.")] = 100,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: arguments.Device = None,
) -> None:
    """Answer a few questions as the base, as E, as T, and as both: the shipped demo models, offline."""
    from mpg.demo.corpus import DEMO_QUESTIONS
    from mpg.demo.show import show

    # without a terminal five columns need more than the usual 80 characters
    console = Console(width=None if sys.stdout.isatty() else 160)
    show(console, arguments.load("demo", device=device), DEMO_QUESTIONS[:questions], held_out, seed)
