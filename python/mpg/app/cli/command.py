"""The command and its subcommands as typer has them, and standard output that may be full or closed."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Annotated

import typer

import mpg
from mpg.app.cli.batch import batch
from mpg.app.cli.chat import chat
from mpg.app.cli.check import check
from mpg.app.cli.demo import demo
from mpg.app.cli.evaluate import app as evaluate
from mpg.app.cli.generate import generate
from mpg.app.cli.info import info
from mpg.app.cli.serve import serve
from mpg.app.cli.train import train
from mpg.app.cli.tune import tune

app = typer.Typer(
    help="Text from several aligned language models at once, combined while decoding.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (demo, generate, batch, chat, serve, check, train, tune, info):
    app.command()(command)
app.add_typer(evaluate, name="evaluate")


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"mpg {mpg.__version__}")
        raise typer.Exit


@app.callback()
def _version(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


class OutputError(Exception):
    """Standard output is full or closed. No OSError, upon which typer and rich would leave without a word."""


class _Output(io.TextIOWrapper):
    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise OutputError(error.strerror) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise OutputError(error.strerror) from error


def run() -> int:
    """The command line of this process. out: 1 where its output could not be written; else the command exits itself"""
    try:
        if sys.stdout is None:
            raise OutputError("it is closed")
        sys.stdout = _Output(sys.stdout.buffer, sys.stdout.encoding, sys.stdout.errors, None, sys.stdout.isatty())
        try:
            app()
        finally:
            sys.stdout.flush()
    except OutputError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where the rest goes when Python exits
        with suppress(OSError):
            print(f"mpg: standard output: {error}", file=sys.stderr)
    return 1
