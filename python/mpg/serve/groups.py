"""Jobs that share rounds: those of one sampler, target and draft in one scheduler, and prompts scored in one pass.

Knows one group; which of them runs, and who may join, is the engine's business.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Protocol

import torch

from mpg.decode.batch import Logprobs
from mpg.decode.drafts import needs_base
from mpg.decode.run import ROUNDS_AHEAD, Scheduler
from mpg.decode.scoring import NOTHING, score_texts
from mpg.model import Model
from mpg.models.pool import View
from mpg.options import ROW_SAMPLERS, Options
from mpg.serve.jobs import Event, Job, Need
from mpg.serve.settings import MOST_ATTRIBUTES

OWN_OPTIONS = ("temperature", "top_k", "top_p", "min_p")  # of every request, under samplers that take them per row
SCORED_AT_ONCE = 8


class Group(Protocol):
    """Jobs that run together.

    waiting   jobs that have not begun
    running   those that have
    spent     seconds of rounds, by which turns are taken
    decodes   whether it has rounds, which streams wait for
    """

    waiting: deque[Job]
    running: list[Job]
    spent: float
    decodes: bool

    def num_bytes(self, *jobs: Job, is_fitted: bool = False) -> int:
        """What caches take, at most, once these jobs run beside those that do; with `is_fitted` after `fit`."""

    def alone(self, job: Job) -> int:
        """What they take where a job runs alone."""

    def fit(self) -> None:
        """Give back what caches have more than running jobs need."""

    def begin(self, job: Job) -> None:
        """Let a job run from the next round on. Raises ValueError where it cannot be run."""

    def step(self, may_read: bool = True, is_alone: bool = True) -> list[tuple[Job, Event]]:
        """One round, and what it brought. Jobs whose last event it is are no longer running.

        may_read: whether a part of prompts may be read, too; always where a group does nothing else
        is_alone: no other group waits for its turn meanwhile
        """

    def take_counts(self) -> tuple[int, int]:
        """Tokens of prompts that models have read since it was asked before, and those that they need not, as `Ahead`
        has them. Prompts that are scored are not counted."""

    def cancel(self, job: Job) -> None:
        """Give up a running job."""

    def close(self) -> None:
        """Give up all memory."""


def group_key(job: Job) -> Hashable:
    """What jobs must agree in to share rounds."""
    options, models = job.call.options, job.model.models
    if job.scores_prompt:
        return id(models), "score", options.target, options.mixture_span
    # the sum that a merged draft is has the rank of its members: of these alone, as in a call of its own
    names = job.request.weighed(job.call.models.attribute_names) if options.draft == "merged" else ()
    return id(models), shared_options(options), tuple(name for name in names if name not in job.call.models.contexts)


def shared_options(options: Options) -> Options:
    """Options without those that each request may have for itself."""
    fields = {**vars(options), "seed": None, "max_new_tokens": None, "trace": False, "batch_size": None}
    if options.sampler in ROW_SAMPLERS:
        fields |= dict.fromkeys(OWN_OPTIONS)
    return Options(**fields)


class DecodeGroup:
    """Jobs in one scheduler. See `Group` for the interface."""

    decodes = True

    def __init__(self, first: Job, num_rows: int, capacity: int, part: int, gather: float):
        models, names = first.model.models, first.model.models.attribute_names
        if first.call.options.draft == "merged":
            weighed = first.request.weighed(first.call.models.attribute_names)
            names = tuple(name for name in names if name in weighed)
        self.part = part
        self.waiting, self.running = deque[Job](), list[Job]()
        self.spent = 0.0
        self._open = partial(
            Scheduler, models, shared_options(first.call.options), first.call.eos_token_ids, num_rows=num_rows,
            capacity=capacity, attributes=names, most=MOST_ATTRIBUTES, part=part,
            rounds_ahead=ROUNDS_AHEAD[models.device.type], gather=gather,
        )  # fmt: skip
        self.scheduler = self._open()

    def num_bytes(self, *jobs: Job, is_fitted: bool = False) -> int:
        return self._bytes_of([*self.running, *jobs], is_fitted)

    def alone(self, job: Job) -> int:
        return self._bytes_of([job], is_fitted=True)

    def fit(self) -> None:
        self.scheduler.session.fit()

    def begin(self, job: Job) -> None:
        if (argument := self.scheduler.session.stale()) is not None:
            if self.running:
                wanted = "the weights that requests began with which still run"
                raise ValueError(f"{argument}: expected {wanted}, got others; ask again once they have ended")
            self.scheduler.close()
            self.scheduler = self._open()
        request = replace(job.request, options=job.call.options)
        job.num_seen = 0
        job.entry = self.scheduler.add(request, job.added_at, job.call.contexts[0])
        self.running.append(job)

    def step(self, may_read: bool = True, is_alone: bool = True) -> list[tuple[Job, Event]]:
        by_entry = {id(job.entry): job for job in self.running}
        events: list[tuple[Job, Event]] = []
        news, now = self.scheduler.step(admits=may_read), monotonic()
        for entry, tokens in news:
            if (job := by_entry.get(id(entry))) is None:  # given up
                continue
            is_over = entry.is_over
            if new := job.unsent(tokens, now, is_last=is_over):
                events.append((job, new))
            if is_over:
                self.running.remove(job)
                last = entry.error or entry.result
                assert last is not None
                events.append((job, last))
        return events

    def take_counts(self) -> tuple[int, int]:
        ahead = self.scheduler.session.ahead
        counts, ahead.num_read, ahead.num_reused = (ahead.num_read, ahead.num_reused), 0, 0
        return counts

    def cancel(self, job: Job) -> None:
        self.running.remove(job)
        assert job.entry is not None
        self.scheduler.cancel(job.entry)

    def close(self) -> None:
        self.scheduler.close()

    def _bytes_of(self, jobs: Sequence[Job], is_fitted: bool) -> int:
        needs = [job.need or self._need_of(job) for job in jobs]
        rows, kinds = Counter[View](), Counter(need.rows for need in needs)
        for of_job, count in kinds.items():  # few, however many jobs there are
            rows.update({view: count * own for view, own in of_job})
        if spare := self.scheduler.models.rows_to_run(len(jobs), self.scheduler.num_rows) - len(jobs):
            rows.update({view: spare * max(dict(of_job).get(view, 0) for of_job in kinds) for view in rows})
        longest = max((need.positions for need in needs), default=0)
        ahead = max((need.ahead for need in needs), default=0)
        return self.scheduler.session.room.num_bytes(rows, longest, is_fitted) + ahead

    def _need_of(self, job: Job) -> Need:
        models = self.scheduler.models.with_contexts([job.call.contexts[0]])
        request, options = job.request, job.call.options  # its own: a trace runs the base
        attributes = request.attributes(models, options, needs_base=needs_base(models, options))
        rows = tuple(self.scheduler.session.count_rows(attributes, models).items())
        positions, num_rows = request.num_positions, sum(count for _, count in rows)
        is_long = request.longest_prompt * num_rows > self.part  # and is read ahead, in rows of its own
        ahead = sum(view[0].cache_bytes(count, positions) for view, count in rows) if is_long else 0
        job.need = Need(rows, positions, ahead)
        return job.need


class ScoreGroup:
    """Prompts whose tokens are scored, some at a time. See `Group` for the interface.

    part  tokens that are read in a turn, over all prompts and models, where another group waits for its own
    """

    decodes = False

    def __init__(self, first: Job, part: int):
        self.model: Model = first.model
        self.part = part
        self._limit: int | None = None
        self.waiting, self.running = deque[Job](), list[Job]()
        self.spent = 0.0
        self._scored: list[Job] = []  # by the pass that is under way
        self._pass: Iterator[Logprobs] | None = None
        self._parts: list[Logprobs] = []

    def num_bytes(self, *jobs: Job, is_fitted: bool = False) -> int:
        every = [*self.running, *jobs]
        longest = max((job.request.num_positions for job in every), default=0)
        return sum(sorted(self._bytes_of(job, longest) for job in every)[-SCORED_AT_ONCE:])

    def alone(self, job: Job) -> int:
        return self._bytes_of(job, job.request.num_positions)

    def fit(self) -> None:
        pass

    def begin(self, job: Job) -> None:
        self.running.append(job)

    def step(self, may_read: bool = True, is_alone: bool = True) -> list[tuple[Job, Event]]:
        self._limit = None if is_alone else self.part
        if self._pass is None:
            self._scored = self.running[:SCORED_AT_ONCE]
            self._parts = []
            self._pass = self._start(self._scored)
        part = next(self._pass, None)
        if part is not None:
            self._parts += [] if part is NOTHING else [part]
            return []
        self._pass = None
        whole = Logprobs(*(torch.cat(parts, 1) for parts in zip(*self._parts, strict=True)))
        events: list[tuple[Job, Event]] = []
        for row, job in enumerate(self._scored):
            if job in self.running:
                self.running.remove(job)
                events.append((job, _of_row(whole, row, job)))
        return events

    def take_counts(self) -> tuple[int, int]:
        return 0, 0

    def cancel(self, job: Job) -> None:
        self.running.remove(job)  # what is under way goes on to its end

    def close(self) -> None:
        self._pass = None

    def _bytes_of(self, job: Job, num_positions: int) -> int:
        models = job.call.models
        names = {"base", "anchor", *job.request.weighed(models.attribute_names)}
        own = models.cache_bytes(sorted(names), 1, num_positions)
        return 2 * own if job.request.contexts else own  # contexts may be read ahead, in rows of their own

    def _start(self, jobs: Sequence[Job]) -> Iterator[Logprobs]:
        """The pass over some prompts from their second token on."""
        prompts = [job.request.token_ids for job in jobs]
        cut = [
            replace(
                job.request,
                token_ids=prompt[:1],
                contexts={name: ids[: len(ids) - len(prompt) + 1] for name, ids in job.request.contexts.items()},
            )
            for job, prompt in zip(jobs, prompts, strict=True)
        ]
        num_top = max(job.request.num_top or 0 for job in jobs)
        texts, ensembles = [prompt[1:] for prompt in prompts], [job.call.models for job in jobs]
        options = jobs[0].call.options
        return score_texts(self.model.models, cut, texts, options, num_top, ensembles, lambda: self._limit)


def _of_row(whole: Logprobs, row: int, job: Job) -> Event:
    """(log-probability, the largest by token id) of every token of a prompt but the first."""
    count, num_top = len(job.request.token_ids) - 1, job.request.num_top or 0
    own, top, ids = (part[row, :count].tolist() for part in whole)
    if any(value != value for value in own):
        return ArithmeticError("a model returned NaN for the prompt, expected finite logits or -inf")
    return [(lp, tuple(zip(i[:num_top], t[:num_top], strict=True))) for lp, t, i in zip(own, top, ids, strict=True)]
