"""`mpg batch`: answers to the prompts of a file, in this process, or by workers on one machine or many."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mpg.app.cli import arguments
from mpg.extras import install

if TYPE_CHECKING:
    from mpg.batch.worker import Done

LINE_SECONDS = 10  # between two lines of progress where there is no terminal
KILLED = "mpg: the command was killed, or has lost the Ray that it ran on; the same command goes on"


@arguments.clear_errors
def batch(
    ctx: typer.Context,
    rows: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="JSON Lines (.jsonl, .ndjson) or Parquet (.parquet), a file or a folder of them, here or under a URI "
            "that pyarrow knows (s3://, ...). A row has prompt or messages; its id, seed, weights, contexts and any "
            "option, where it has some; and what else it has is kept.",
        ),
    ],
    output: Annotated[
        str, typer.Argument(help="A folder for the answers, likewise; of an unfinished job: the same command goes on.")
    ],
    models: arguments.Models = "demo",
    weights: arguments.Weights = None,
    context: arguments.Contexts = None,
    settings: arguments.Settings = None,
    max_new_tokens: Annotated[int | None, arguments.option("max_new_tokens")] = None,
    seed: Annotated[int, typer.Option(min=0, help="That the seeds of rows follow from, beside their ids.")] = 0,
    raw: arguments.Raw = False,
    form: Annotated[str, typer.Option("--format", help="Of the output: jsonl or parquet.")] = "jsonl",
    local: Annotated[bool, typer.Option("--local", help="Answer in this process, without Ray.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="How many, at most; each loads the models.")] = 1,
    min_workers: Annotated[int | None, typer.Option(min=1, help="How many, at least. Default: --workers.")] = None,
    cpus_per_worker: Annotated[float, typer.Option(min=0, help="Processors that each takes.")] = 1,
    gpus_per_worker: Annotated[float, typer.Option(min=0, help="GPUs that each takes.")] = 0,
    max_rows: Annotated[int, typer.Option(min=1, help="Rows that a worker decodes at once.")] = 32,
    max_memory: Annotated[
        float | None, typer.Option(help="GiB that their cache rows may take. Default: a quarter of the device's.")
    ] = None,
    device: arguments.Device = None,
    dtype: arguments.Dtype = None,
    quantize: arguments.Quantize = None,
    graphs: arguments.Graphs = False,
    allow_other_base: arguments.OtherBase = False,
    merge_adapters: arguments.MergeAdapters = False,
) -> None:
    """Answer every row of a file; killed at any time, the same command goes on. Needs the package's extra 'ray'."""
    if local:
        of_ray = ("workers", "min_workers", "cpus_per_worker", "gpus_per_worker")
        arguments.refuse_unused(ctx, "none beside --local", *of_ray)
    if min_workers is not None and min_workers > workers:
        raise ValueError(f"min_workers: expected at most the {workers} workers, got {min_workers}")
    if not local and find_spec("ray") is None:
        raise ValueError(f"ray: expected it installed: {install('ray')}; --local does without")
    try:
        from mpg.batch.job import begin, describe, run_local
        from mpg.batch.parts import FORMATS, Output
        from mpg.batch.rows import scan
        from mpg.batch.watch import told_if_killed
        from mpg.batch.worker import Task, check
    except ImportError as error:
        wanted = f"{install('ray')}; or for --local alone: {install('serve', 'pyarrow')}"
        raise ValueError(f"{error.name}: expected it installed: {wanted}") from None
    from mpg.frontend.hf_generate import check_options
    from mpg.options import one_of
    from mpg.recipe import parse_settings

    one_of(*FORMATS)("format", form)
    max_bytes = arguments.read_size("max_memory", max_memory)
    contexts, recipe = arguments.read_contexts(context), arguments.read_recipe(models)
    options = {"max_new_tokens": max_new_tokens}
    options |= parse_settings(settings, options)
    options = {name: value for name, value in options.items() if value is not None}
    if "seed" in options:
        raise ValueError(
            f"seed: expected --seed, which the seeds of rows follow from, got --set seed={options['seed']}"
        )
    recipe.weigh(weights)  # before an input is read
    check({**options, **vars(check_options({**options, "seed": seed}, recipe.options))})
    asked = scan(rows)
    how: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "allow_other_base": allow_other_base,
                           "merge_adapters": merge_adapters}  # fmt: skip
    load = partial(arguments.load, models, True, device=device, graphs=graphs, **how)
    task = Task(
        asked, Output.of(output, form, asked), load, weights=weights, contexts=contexts, options=options, raw=raw,
        seed=seed, max_rows=max_rows, max_memory=max_bytes,
    )  # fmt: skip
    left = begin(task, describe(task, recipe, how))
    try:
        with told_if_killed(KILLED), _Meter(asked.num_rows, sum(chunk.count for chunk in left)) as meter:
            if left and local:
                run_local(task, left, meter.take)
            elif left:
                from mpg.batch.on_ray import run_on_ray

                run_on_ray(
                    task, left, meter.take, workers=workers, min_workers=min_workers or workers, cpus=cpus_per_worker,
                    gpus=gpus_per_worker,
                )  # fmt: skip
    except ValueError:  # a command that is mended begins anew
        with suppress(ValueError):
            task.output.forget_job()
        raise
    print(f"{output}: {meter.words()}")


class _Meter:
    """How far a job has come: a bar on a terminal, else a line now and then; and where it stood when it was stopped."""

    def __init__(self, total: int, left: int) -> None:
        self.total, self.before = total, total - left
        self.rows = self.errors = self.tokens = 0
        self.begun_at = self.shown_at = time.monotonic()
        columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn()
        self.bar = Progress(
            *columns,
            console=arguments.err,
            disable=not arguments.err.is_terminal,
            transient=True,
            speed_estimate_period=600,
        )
        self.task = self.bar.add_task("rows", total=total, completed=self.before, speed="")

    def __enter__(self) -> _Meter:
        self.bar.start()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.bar.stop()
        if error is not None and (self.before or self.rows or not isinstance(error, ValueError)):
            arguments.say(f"{self.words()}; the same command goes on", "dim")

    def take(self, done: Done) -> None:
        """Count a chunk that has been written."""
        self.rows, self.errors, self.tokens = (
            self.rows + done.rows,
            self.errors + done.errors,
            self.tokens + done.tokens,
        )
        self.bar.update(self.task, completed=self.before + self.rows, speed=self._speed())
        if not arguments.err.is_terminal and time.monotonic() - self.shown_at >= LINE_SECONDS:
            self.shown_at = time.monotonic()
            seconds = (self.shown_at - self.begun_at) * (self.total - self.before - self.rows) / self.rows
            arguments.say(f"{self.words()}; {seconds:.0f} s left")

    def words(self) -> str:
        errors = f", {self.errors} with an error" if self.errors else ""
        return f"{self.before + self.rows} of {self.total} rows{errors}; {self._speed()}"

    def _speed(self) -> str:
        seconds = max(time.monotonic() - self.begun_at, 1e-9)
        return f"{self.rows / seconds:.3g} rows/s, {self.tokens / seconds:.4g} tokens/s"
