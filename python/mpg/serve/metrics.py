"""What the two sides of a server count, as Prometheus reads it. Knows numbers and no requests."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from mpg.results import Result
    from mpg.serve.engine import Engine

SHORT = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
STATES = ("loading", "ready", "failed", "stopping")


class Metrics:
    """What handlers count."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        add: Any = {"registry": self.registry}
        self._requests = Counter("mpg_requests", "requests answered, by route and status", ("route", "status"), **add)
        self._seconds = Histogram("mpg_request_seconds", "from a request to its last byte", buckets=SHORT, **add)

    def answered(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class EngineMetrics:
    """What an engine counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        add: Any = {"registry": self.registry}
        self._first = Histogram("mpg_first_token_seconds", "from a request to its first token", buckets=SHORT, **add)
        self._waited = Histogram("mpg_queue_seconds", "from a request to its row", buckets=SHORT, **add)
        self._round = Histogram("mpg_round_seconds", "of one round of one group", buckets=SHORT, **add)
        self._prompt_tokens = Counter("mpg_prompt_tokens", "tokens of prompts that were answered", **add)
        of_prompts = "tokens of prompts, each model and adapter counted, that were"
        self._read = Counter("mpg_read_prompt_tokens", f"{of_prompts} read", **add)
        self._reused = Counter("mpg_reused_prompt_tokens", f"{of_prompts} known from another text", **add)
        self._tokens = Counter("mpg_generated_tokens", "tokens of answers", **add)
        self._rounds = Counter("mpg_rounds", "rounds of requests, each request's counted", **add)
        self._drafted = Counter("mpg_drafted_tokens", "tokens of sampler exact's drafts", **add)
        self._accepted = Counter("mpg_accepted_tokens", "of these, those that were accepted", **add)

    def watch(self, engine: Engine) -> None:
        """Read what an engine holds whenever somebody asks."""
        gauges = {
            "mpg_queue_size": ("choices that wait for a row", lambda: engine.num_waiting),
            "mpg_rows": ("choices that are decoded", lambda: engine.num_running),
            "mpg_groups": ("schedulers that take turns", lambda: len(engine.groups)),
            "mpg_cache_bytes": ("of key/value cache rows that groups hold", lambda: engine.held_bytes),
            "mpg_kept_bytes": ("of earlier texts, kept for those that begin like them", lambda: engine.kept_bytes),
        }
        for name, (meaning, read) in gauges.items():
            Gauge(name, meaning, registry=self.registry).set_function(read)
        state = Gauge("mpg_state", "1 for the state that the server is in", ("state",), registry=self.registry)
        for name in STATES:
            state.labels(name).set_function(partial(lambda name: float(engine.state == name), name))

    def waited(self, seconds: float) -> None:
        self._waited.observe(seconds)

    def round(self, seconds: float) -> None:
        self._round.observe(seconds)

    def prompts(self, num_read: int, num_reused: int) -> None:
        self._read.inc(num_read)
        self._reused.inc(num_reused)

    def finished(self, result: Result) -> None:
        self._first.observe(result.stats["time_to_first_token"])
        self._prompt_tokens.inc(result.prompt_tokens)
        self._tokens.inc(len(result.tokens))
        rounds, stats = result.stats["rounds"], result.stats
        self._rounds.inc(rounds)
        self._drafted.inc(round(stats.get("drafted_per_round", 0.0) * rounds))
        self._accepted.inc(round(stats.get("accepted_per_round", 0.0) * rounds))

    def text(self) -> bytes:
        return generate_latest(self.registry)
