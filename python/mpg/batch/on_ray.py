"""A job on Ray: a pool of actors of Ray Data, each a worker that is kept full, on one machine or a cluster.

Only places of rows go through Ray, and how many have been written: workers read and write the files themselves. What a
worker has begun when it dies is begun again by another one, without end: `Worker.run_again` finds the rows of which
workers die.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from mpg.batch.cluster import check_room, connect
from mpg.batch.rows import Chunk
from mpg.batch.worker import AT_ONCE, Done, Task, Worker

LOADS = 2  # of the models that a worker may die of, beside which Ray has no limit
THREAD_SECONDS = 60  # that the threads of Ray Data have to end


class RayWorker:
    """A worker as `map_batches` takes it: several calls run at once, so that its scheduler is full across them."""

    def __init__(self, task: Task) -> None:
        import ray

        own = str(ray.get_runtime_context().get_actor_id())  # the same where Ray starts it again after its death
        begun = task.output.read_begun(own) or {"times": 0}
        if begun["times"] == LOADS:
            raise MemoryError(f"the worker died {LOADS} times while it loaded the models, expected memory for them")
        task.output.write_begun(own, {"times": begun["times"] + 1})
        self.task, self.worker = task, Worker(task)
        task.output.remove_begun(own)

    async def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from ray.util import get_node_ip_address

        try:
            done, failure = await self.worker.run_again(self.task.rows.chunks[int(batch["chunk"][0])]), ""
        except Exception as error:  # the job's, not the chunk's: the disk is full, or the input has changed
            done, failure = Done(0), f"{str(error) or repr(error)} (on the node {get_node_ip_address()})"
        return {"rows": [done.rows], "errors": [done.errors], "tokens": [done.tokens], "failure": [failure]}


def run_on_ray(
    task: Task,
    chunks: Sequence[Chunk],
    on_done: Callable[[Done], None],
    *,
    workers: int,
    min_workers: int,
    cpus: float,
    gpus: float,
) -> None:
    """Run chunks by `min_workers` to `workers` workers of so many processors and GPUs each.

    Raises ValueError where workers cannot start, and where rows cannot be written.
    """
    is_alone = connect()
    before = threading.enumerate()
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    try:
        check_room("workers", min_workers, cpus, gpus, is_alone)
        least, most = (min(number, len(chunks)) for number in (min_workers, workers))  # others would have nothing to do
        pool = ActorPoolStrategy(
            min_size=least, max_size=most, max_tasks_in_flight_per_actor=2 * AT_ONCE,
            max_concurrent_calls_per_actor=AT_ONCE,
        )  # fmt: skip
        places = ray.data.from_items([{"chunk": chunk.number} for chunk in chunks], override_num_blocks=len(chunks))
        answered = places.map_batches(
            RayWorker, fn_constructor_args=(task,), batch_size=1, compute=pool, num_cpus=cpus, num_gpus=gpus
        )
        for told in answered.iter_rows():
            if told["failure"]:
                raise ValueError(told["failure"])
            on_done(Done(told["rows"], told["errors"], told["tokens"]))
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        raise ValueError(f"workers: they cannot start: {str(cause).strip().splitlines()[-1]}") from error
    finally:
        _wait_for_threads(before)
        ray.shutdown()
        with suppress(ValueError):
            task.output.clear()  # of workers that were still loading


def _wait_for_threads(before: Sequence[threading.Thread]) -> None:
    """Wait for the threads that there are beside those before. Ray Data waits for its own for two seconds alone, and
    Ray ends a process at once, without a word, in which one asks it for anything behind its shutdown."""
    ends_at = time.monotonic() + THREAD_SECONDS
    for thread in set(threading.enumerate()) - set(before):
        if thread.name != "Prefetcher":  # which sleeps for ever, and asks for nothing
            thread.join(max(ends_at - time.monotonic(), 0))
