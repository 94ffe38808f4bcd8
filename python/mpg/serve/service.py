"""The models' side of a server: it reads what handlers ask, lets the engine run it, and tells them what comes of it.

Knows no HTTP and no handler. Handlers are in this process or in another one: whatever goes either way can be pickled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock, Thread
from typing import Any, cast

from mpg.model import Model
from mpg.models.ensemble import Ensemble
from mpg.recipe import Recipe
from mpg.results import Result
from mpg.serve.asks import describe_model, describe_models, read_request, spell
from mpg.serve.attributes import Attributes
from mpg.serve.engine import Engine
from mpg.serve.errors import ApiError, of_job
from mpg.serve.jobs import Event, Job, Refused
from mpg.serve.messages import Begun, End, New, Scored
from mpg.serve.metrics import EngineMetrics
from mpg.serve.protocol import ChatRequest, CompletionRequest, read_body
from mpg.serve.settings import Settings

SHORT = 2048  # bytes of a request: a prompt is read in .7 ms, and a thread is another .4 of everybody's
QUICK = ("health", "measure", "models", "model")  # which wait for nothing

logger = logging.getLogger("mpg.serve")


class Service:
    """What handlers may have done, by the names of methods.

    load    the models to begin with
    reload  the models of a recipe with other attributes, beside those that are loaded
    tell    called in any thread with (what handlers know a question by, what they are told of it); waits for nobody
    """

    def __init__(
        self,
        settings: Settings,
        load: Callable[[], Model],
        reload: Callable[[Recipe, Ensemble], Model],
        tell: Callable[[list[tuple[int, Any]]], None],
    ):
        self.metrics = EngineMetrics()
        self.engine = Engine(settings, self.metrics)
        self.attributes = Attributes(self.engine, reload)
        self._load, self._tell = load, tell
        self._jobs: dict[int, set[Job]] = {}  # that have not ended, by question
        self._begun: dict[int, Begun] = {}  # what is yet to be told, with the first event
        self._lock = Lock()  # of these
        self._readers = ThreadPoolExecutor(thread_name_prefix="mpg-reader")
        self._unread: set[int] = set()  # questions that readers have, or will have

    def start(self) -> None:
        """Load the models, and serve from then on."""
        self.engine.start(self._load)

    def ask(self, key: int, kind: type[ChatRequest | CompletionRequest], body: bytes) -> None:
        """Answer a request: with `Begun`, and then (number of the choice, event) until all have ended; or an ApiError.
        It is read in a thread where that may take so long that others would wait; as many may wait for that as then
        wait for a row."""
        if is_long := len(body) > SHORT:
            if len(self._unread) >= self.engine.settings.max_queue:
                self._tell([(key, of_job(Refused("full")))])
                return
            self._unread.add(key)
        self._jobs[key] = set()
        if is_long:
            self._readers.submit(self._begin, key, kind, body)
        else:
            self._begin(key, kind, body)

    def cancel(self, key: int) -> None:
        """Give up a request; nobody listens any more."""
        with self._lock:
            self._begun.pop(key, None)
            self.engine.cancel(list(self._jobs.pop(key, ())))

    def drain(self) -> None:
        """Take no new requests."""
        self.engine.drain()

    def call(self, key: int, name: str, args: Sequence[Any]) -> None:
        """Answer with what another method returns or raises, as soon as it has."""

        def answer() -> None:
            self._tell([(key, _outcome(getattr(self, name), *args))])

        if name in QUICK:
            answer()
        else:
            Thread(target=answer, daemon=True).start()

    def health(self) -> tuple[str, str]:
        """The engine's state, and why it has failed."""
        return self.engine.state, self.engine.failure

    def measure(self) -> bytes:
        return self.metrics.text()

    def models(self) -> dict[str, dict[str, Any]]:
        return describe_models(self._ready().model, self.engine.settings.name)

    def model(self, name: str) -> dict[str, Any]:
        return describe_model(self._ready().model, self.engine.settings.name, name)

    def add(self, name: str, source: str) -> None:
        self._ready()
        self.attributes.add(name, source)

    def remove(self, name: str) -> None:
        self._ready()
        self.attributes.remove(name)

    def stop(self) -> None:
        """Give up what runs."""
        self.engine.stop()

    def _ready(self) -> Engine:
        if self.engine.state != "ready":
            raise of_job(Refused(self.engine.state))
        return self.engine

    def _begin(self, key: int, kind: type[ChatRequest | CompletionRequest], body: bytes) -> None:
        found = _outcome(self._read, key, kind, body)
        self._unread.discard(key)
        if isinstance(found, ApiError):
            self._jobs.pop(key, None)
            self._tell([(key, found)])
            return
        begun, jobs = found
        with self._lock:
            if key not in self._jobs:  # given up meanwhile
                return
            if not jobs:
                del self._jobs[key]
                self._tell([(key, begun)])
                return
            self._jobs[key].update(jobs)
            self._begun[key] = begun
            try:
                self.engine.submit(jobs)
            except Refused as error:
                del self._jobs[key], self._begun[key]
                self._tell([(key, of_job(error))])

    def _read(self, key: int, kind: type[ChatRequest | CompletionRequest], body: bytes) -> tuple[Begun, list[Job]]:
        engine = self._ready()  # before what may take long
        return read_request(read_body(kind, body), engine, key, self._hand_out)

    def _hand_out(self, events: Sequence[tuple[Job, Event]]) -> None:
        told: list[tuple[int, Any]] = []
        for job, event in events:
            with self._lock:
                if (left := self._jobs.get(job.id)) is None:  # given up
                    continue
                if begun := self._begun.pop(job.id, None):
                    told.append((job.id, begun))
                if job.is_last(event):
                    left.discard(job)
                    if not left:
                        del self._jobs[job.id]
            found = _outcome(self._message, job, event)
            told.append((job.id, found if isinstance(found, ApiError) else (job.number, found)))
        self._tell(told)

    def _message(self, job: Job, event: Event) -> Any:
        if isinstance(event, Exception):
            return of_job(event)
        if isinstance(event, Result):
            self.metrics.finished(event)
            return End(event.finish_reason, event.seed, event.weights, event.stats)
        tokenizer, of_prompt = job.model.tokenizer, cast(list[Any], event)
        if job.scores_prompt:
            return Scored(event, spell(tokenizer, (top for _, tops in of_prompt for top, _ in tops)))
        text, has_logprobs = "".join(token.text for token in event), job.request.num_top is not None
        if not has_logprobs and not job.call.options.trace:
            return New(text, len(event))
        ids = (id for token in event for id in (token.id, *(top for top, _ in token.top_logprobs)))
        return New(text, len(event), event, spell(tokenizer, ids) if has_logprobs else {})


def _outcome(do: Callable[..., Any], *args: Any) -> Any:
    """What a function returns, or what an answer says of what it raises."""
    try:
        return do(*args)
    except ApiError as error:
        return error
    except Exception:
        logger.exception("the service has failed at a question")
        return ApiError(500, "internal error")
