"""The requests of one call, from the first to the last. Knows schedulers; nothing of what a round does."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch

from mpg.decode.request import Request
from mpg.decode.run import Scheduler
from mpg.models.ensemble import Ensemble
from mpg.options import Options
from mpg.results import Result, Token


@torch.no_grad()
def decode(
    models: Ensemble,
    requests: Sequence[Request],
    options: Options,
    eos_token_ids: tuple[int, ...],
    *,
    on_token: Callable[[Token], None] | None = None,
    on_result: Callable[[int, Result], None] | None = None,
    started_at: float | None = None,
    plan: str | None = None,
) -> list[Result]:
    """The results of requests, in order.

    on_result   called with the index of every result and the result as soon as it is there
    started_at  when the call began, default now
    plan        as in `Result`

    Raises what `Model.generate` says that decoding may raise.
    """
    scheduler: Scheduler | None = None
    try:
        scheduler, key = _open(models, requests, options, eos_token_ids, plan)
        results = finish(scheduler, requests, on_token=on_token, on_result=on_result, started_at=started_at)
        if key is not None and scheduler.rounds.graphs is not None:
            models.idle.leave(key, scheduler)
        return results
    except torch.OutOfMemoryError as error:
        reason = ". ".join(str(error).split(". ")[:2])
    scheduler = None  # nothing holds the caches and the graphs any more: the error's traceback did too
    while models.drop_idle():
        pass
    if models.device.type == "cuda":
        torch.cuda.empty_cache()
    rows = min(options.batch_size, len(requests))
    raise MemoryError(
        f"batch_size, max_new_tokens: {rows} rows at once are too many ({reason}); lower either, or load with "
        "dtype='bfloat16'"
    )


def finish(
    scheduler: Scheduler,
    requests: Sequence[Request],
    *,
    on_token: Callable[[Token], None] | None = None,
    on_result: Callable[[int, Result], None] | None = None,
    started_at: float | None = None,
) -> list[Result]:
    """The results of requests, in order; raises the first error among them. Closes the scheduler."""
    try:
        entries = [scheduler.add(request, started_at) for request in requests]
        while scheduler.has_work:
            for entry, tokens in scheduler.step():
                for token in tokens:
                    if on_token is not None:
                        on_token(token)
                if entry.error is not None:
                    raise entry.error
                if entry.result is not None and on_result is not None:
                    on_result(entry.transcript.request, entry.result)
    finally:
        scheduler.close()
    return [entry.result for entry in entries if entry.result is not None]


def _open(
    models: Ensemble, requests: Sequence[Request], options: Options, eos_token_ids: tuple[int, ...], plan: str | None
) -> tuple[Scheduler, Hashable | None]:
    """A scheduler for these requests, and where rounds are captured what a later call must agree in to take it, once it
    has been left: an idle one, whose rounds are captured already, if there is one."""
    sizes = Scheduler.sizes(models, requests, options)
    if (of_models := models.call_key(sizes["capacity"])) is None:
        return Scheduler(models, options, eos_token_ids, plan=plan, **sizes), None
    models_key, sizes["capacity"] = of_models
    num_rows, expected = sizes["num_rows"], sizes["expected"]
    of_sizes = models.rows_to_run(num_rows, num_rows), sizes["attributes"], sizes["most"]
    shared = replace(options, seed=None, max_new_tokens=None, batch_size=None)
    key = models_key, shared, eos_token_ids, sizes["capacity"], *of_sizes
    if (idle := models.idle.take(key)) is None:
        return Scheduler(models, options, eos_token_ids, plan=plan, **sizes), key
    idle.begin_call(num_rows, expected, plan)
    return idle, key
