"""The thread that owns the models: it lets jobs in, gives every group its turn, and tells what rounds bring.

Knows jobs and groups of them; nothing of HTTP.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from threading import Condition, Thread
from time import monotonic, perf_counter

import torch

from mpg.model import Model
from mpg.models.ensemble import available_bytes
from mpg.serve.groups import DecodeGroup, Group, ScoreGroup, group_key
from mpg.serve.jobs import Event, Job, Refused, Tell, TooLarge
from mpg.serve.metrics import EngineMetrics
from mpg.serve.settings import Settings

DEFAULT_LENGTH = 2048
DEFAULT_SHARE = 0.25  # of a device's memory for caches: models, forwards and what is kept of texts take some too
MOST_GATHERED = 0.05  # seconds that a request may wait for others to begin with, see `Scheduler`
LOOK = 0.1  # seconds from one look for jobs that have run out of time, and at what caches hold, to the next

logger = logging.getLogger("mpg.serve")


class Engine:
    """Runs jobs on one model, which may be replaced while it runs.

    state  "loading", "ready", "failed" or "stopping"
    """

    def __init__(self, settings: Settings, metrics: EngineMetrics):
        self.settings, self.metrics = settings, metrics
        self.state, self.failure = "loading", ""
        self.groups: list[Group] = []
        self._owed: list[Group] = []  # a round, since prompts were read
        self._keys: dict[int, Hashable] = {}  # of groups that jobs may join, by id
        self._inbox: deque[Job] = deque()
        self._given_up: deque[Job] = deque()
        self._changed = Condition()
        self._num_waiting, self._looked_at = 0, 0.0
        self.held_bytes = 0  # of the groups' caches, when it was last looked
        self._is_draining = self._is_stopped = False
        self._thread = Thread(target=self._run, name="mpg-engine", daemon=True)
        metrics.watch(self)

    def start(self, load: Callable[[], Model]) -> None:
        """Load a model in the engine's thread, and run jobs from then on."""
        self._load = load
        self._thread.start()

    def replace(self, model: Model) -> None:
        """Let new requests be read by another model; those that run go on with theirs."""
        if self.settings.max_kept is not None:
            model.models.kept.max_bytes = self.settings.max_kept
        self.model = model

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all or none. Raises Refused."""
        with self._changed:
            if self._is_draining or self.state != "ready":
                raise Refused(self.state if not self._is_draining else "stopping")
            if self._num_waiting + len(jobs) > self.settings.max_queue:
                raise Refused("full")
            self._num_waiting += len(jobs)
            self._inbox.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Give up jobs; nobody listens any more."""
        with self._changed:
            self._given_up.extend(job for job in jobs if not job.is_over)
            self._changed.notify()

    def drain(self) -> None:
        """Take no new jobs."""
        self._is_draining = True
        if self.state == "ready":
            self.state = "stopping"

    def stop(self) -> None:
        """Give up what runs, and end the thread."""
        self.drain()
        with self._changed:
            self._is_stopped = True
            self._changed.notify()
        self._thread.join()

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def num_running(self) -> int:
        return sum(len(group.running) for group in self.groups)

    @property
    def kept_bytes(self) -> int:
        return self.model.models.kept.num_bytes if self.state == "ready" else 0

    @torch.no_grad()
    def _run(self) -> None:
        try:
            self.replace(self._load())
            models = self.model.models
            limits = [self.settings.max_length or DEFAULT_LENGTH, models.max_positions or DEFAULT_LENGTH]
            self.max_length = min(limits)
            self.max_memory = self.settings.max_memory or int(available_bytes(models.device) * DEFAULT_SHARE)
        except Exception as error:
            logger.exception("the models could not be loaded")
            self.failure, self.state = str(error), "failed"
            return
        with self._changed:
            if not self._is_draining:
                self.state = "ready"
        try:
            while self._turn():
                pass
            reason: Exception = Refused("stopping")
        except Exception as error:  # a mistake of this file's: nobody is to wait for ever
            logger.exception("the engine has failed")
            self.failure, self.state = str(error), "failed"
            reason = RuntimeError("the engine has failed")
        with self._changed:
            left = [*self._inbox, *(job for group in self.groups for job in (*group.running, *group.waiting))]
            self._inbox.clear()
        for group in list(self.groups):
            self._close(group)
        self._deliver([(job, reason) for job in left])

    def _turn(self) -> bool:
        """Wait for something to do, and do some of it. out: False when the engine is to end"""
        with self._changed:
            while not (self._inbox or self._given_up or self.groups or self._is_stopped):
                self._changed.wait()
            if self._is_stopped:
                return False
            new, self._inbox = self._inbox, deque()
            given_up, self._given_up = self._given_up, deque()
        self._drop(given_up, new)
        for job in new:
            self._sort(job)
        self._look_around()
        self._admit()
        self._take_turn()
        for group in [group for group in self.groups if not group.running and not group.waiting]:
            self._close(group)
        if not self.groups:
            self.held_bytes = 0
        return True

    def _sort(self, job: Job) -> None:
        """Let a job wait in the group that it belongs to."""
        key = group_key(job)
        group = next((group for group in self.groups if self._keys.get(id(group)) == key), None)
        try:
            group = group or self._open([job], key)
            needed = group.alone(job)
            if needed > self.max_memory:
                sizes = f"{needed / 2**30:.4g} GiB, expected at most {self.max_memory / 2**30:.4g} GiB (--max-memory)"
                raise TooLarge(f"max_tokens: the key/value cache rows of this request alone take {sizes}")
        except Exception as error:
            self._end_waiting(job)
            self._deliver([(job, error)])
        else:
            group.waiting.append(job)

    def _open(self, jobs: Sequence[Job], key: Hashable | None) -> Group:
        """A new group. key: what jobs have that may join it, None where none may"""
        first, limits = jobs[0], self.settings
        gather = min(limits.stream_interval, MOST_GATHERED)
        how = limits.max_rows, self.max_length, limits.prefill_tokens, gather
        group: Group = ScoreGroup(first, limits.prefill_tokens) if first.scores_prompt else DecodeGroup(first, *how)
        # no turn before those that have waited for theirs
        group.spent = min((other.spent for other in self.groups), default=0.0)
        self.groups.append(group)
        if key is not None:
            self._keys[id(group)] = key
        return group

    def _close(self, group: Group) -> None:
        self.groups.remove(group)
        self._keys.pop(id(group), None)
        group.close()

    def _admit(self) -> None:
        """Let jobs begin while there are rows and memory: of the group first that has the fewest rows. One that does
        not fit yet keeps all others waiting, so that its turn comes."""
        while self.num_running < self.settings.max_rows:
            waiting = [group for group in self.groups if group.waiting]
            if not waiting:
                return
            group = min(waiting, key=lambda group: len(group.running))
            job = group.waiting[0]
            left = self.max_memory - sum(other.num_bytes() for other in self.groups if other is not group)
            if group.num_bytes(job) > left:
                # the memory of a group that has nothing to run is given back before anybody waits for it
                if idle := next((other for other in self.groups if other.num_bytes() and not other.running), None):
                    idle.close()
                    self._reopen(idle)
                    continue
                if group.num_bytes(job, is_fitted=True) <= left:
                    group.fit()
                if group.num_bytes(job) > left:
                    return
            group.waiting.popleft()
            self._end_waiting(job)
            try:
                group.begin(job)
                self.metrics.waited(perf_counter() - job.added_at)
            except ValueError as error:
                self._deliver([(job, error)])

    def _reopen(self, group: Group) -> None:
        """Let what waits in a group that was closed wait in a new one."""
        key = self._keys.pop(id(group), None)
        self.groups.remove(group)
        self._queue(list(group.waiting), key)

    def _queue(self, jobs: Sequence[Job], key: Hashable | None) -> None:
        """Let jobs that are counted as waiting wait in a new group, or fail where there cannot be one."""
        try:
            if jobs:
                self._open(jobs, key).waiting.extend(jobs)
        except Exception as error:  # of a model that the caller has changed meanwhile
            for job in jobs:
                self._end_waiting(job)
            self._deliver([(job, error) for job in jobs])

    def _take_turn(self) -> None:
        """A round of the group that has had the least time. Once it has read a part of prompts, all others have a round
        before any reads again: a stream waits for one part."""
        running = [group for group in self.groups if group.running]
        if not running:
            return
        owed = [group for group in running if group in self._owed]
        group = min(owed or running, key=lambda group: group.spent)
        begun_at = perf_counter()
        try:
            events = group.step(may_read=not owed, is_alone=len(running) == 1)
        except Exception as error:  # whatever a forward raises
            logger.warning("a round of %d requests failed: %s", len(group.running), error)
            reason = f"{type(error).__name__}: {error}"
            is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
            failure = MemoryError(reason) if is_memory else RuntimeError(reason)
        else:
            group.spent += perf_counter() - begun_at
            self.metrics.round(perf_counter() - begun_at)
            num_read, num_reused = group.take_counts()
            if num_read or num_reused:
                self.metrics.prompts(num_read, num_reused)
            has_read = num_read > 0 or not group.decodes
            others = [other for other in running if other.decodes] if has_read else owed
            self._owed = [other for other in others if other is not group]
            self._deliver(events)
            return
        self._split(group, failure)  # here, where nothing holds the caches any more: the error's traceback did

    def _split(self, group: Group, failure: Exception) -> None:
        """Find out whose fault a failed round was: each half of its requests begins again by itself, and one that fails
        alone has failed. The others' texts are those that they would have been."""
        jobs, key = list(group.running), self._keys.pop(id(group), None)
        self.groups.remove(group)
        group.close()
        while self.model.models.drop_idle():
            pass
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(jobs) == 1:
            self._deliver([(jobs[0], failure)])
            jobs = []
        for half in (jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]):
            with self._changed:
                self._num_waiting += len(half)
            self._queue(half, None)
        self._queue(list(group.waiting), key)

    def _drop(self, given_up: Sequence[Job] | deque[Job], new: deque[Job]) -> None:
        for job in given_up:
            if job.is_over:
                continue
            job.is_over = True
            if job in new:
                new.remove(job)
                self._end_waiting(job)
            for group in self.groups:
                if job in group.running:
                    group.cancel(job)
                elif job in group.waiting:
                    group.waiting.remove(job)
                    self._end_waiting(job)

    def _look_around(self) -> None:
        """Now and then, end the jobs that have run out of time, and count what caches hold."""
        now = monotonic()
        if now - self._looked_at < LOOK:
            return
        self._looked_at = now
        self.held_bytes = sum(group.num_bytes() for group in self.groups)
        late = [job for group in self.groups for job in (*group.running, *group.waiting) if job.deadline < now]
        self._drop(late, deque())
        for job in late:
            job.is_over = False
        self._deliver([(job, TimeoutError(f"it took longer than {self.settings.max_seconds:g} s")) for job in late])

    def _end_waiting(self, job: Job) -> None:
        with self._changed:
            self._num_waiting -= 1

    def _deliver(self, events: Sequence[tuple[Job, Event]]) -> None:
        """Tell events to who asked, of one round all at once."""
        by_teller: dict[Tell, list[tuple[Job, Event]]] = {}
        for job, event in events:
            if job.is_over:
                continue
            job.is_over = job.is_last(event)
            by_teller.setdefault(job.tell, []).append((job, event))
        for tell, told in by_teller.items():
            tell(told)
