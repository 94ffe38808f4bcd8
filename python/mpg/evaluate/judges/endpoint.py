"""A judge behind an OpenAI-compatible endpoint: a rubric, a question for every answer, and what its replies say.

Every reply is kept on disk by its request, so that nothing is asked twice. What a reply does not say, or says out of
range, is missing: never 0.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from queue import Empty, SimpleQueue
from string import Template
from threading import Event, Thread
from typing import Any

from mpg.evaluate.judging import OnScore
from mpg.evaluate.records import open_records
from mpg.evaluate.tasks import Item
from mpg.extras import install
from mpg.paper.methods import DESCRIPTIONS

# By rubric, a file beside this one
CRITERIA = {
    "mbti": ("style", "thought", "behaviour", "naturalness"),
    "roleplay": ("profile_relevance", "persona_match", "humanlikeness"),
}
SCALE = (1.0, 5.0)
MAX_FAILURES = 5  # requests in a row that got no reply, however often they were tried: there is no use in going on


class EndpointJudge:
    """A model that scores answers by a rubric, from 1 to 5 on every criterion.

    name      the model's
    scale     the least and the most of a score
    identity  what a file of its scores says of it
    """

    scale = SCALE

    def __init__(
        self,
        url: str,
        model: str,
        rubric: str,
        poles: Sequence[str] = (),
        *,
        key_env: str = "OPENAI_API_KEY",
        concurrency: int = 4,
        timeout: float = 120.0,
        tries: int = 5,
        replies: str | Path,
    ) -> None:
        """url: of the API, up to /v1. rubric: of `CRITERIA`. poles: of the target, where the rubric is that of MBTI.

        key_env  the environment's variable that holds the key; endpoints that need none take any
        timeout  seconds for one reply
        tries    of one request, each some time after the last: on 429, 5xx, a timeout or a connection that breaks
        replies  a folder for a file of raw replies by request
        """
        try:
            import openai
        except ImportError as error:
            raise ImportError(f"judges behind endpoints need openai: {install('evaluate')}") from error
        self.name, self.criteria = model, CRITERIA[rubric]
        self.url, self.key_env, self.concurrency = url, key_env, concurrency
        text = files("mpg.evaluate.judges").joinpath(f"{rubric}.txt").read_text(encoding="utf-8")
        self.rubric, self.target = Template(text), "\n".join(f"- {DESCRIPTIONS[pole]}" for pole in poles)
        self.identity: dict[str, Any] = {
            "judge": model, "url": url, "rubric": hashlib.sha256(text.encode()).hexdigest(), "poles": list(poles)
        }  # fmt: skip
        key = os.environ.get(key_env) or "none"
        self._client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=tries - 1)
        digest = hashlib.sha256(url.encode()).hexdigest()[:8]
        self._failures_in_a_row = 0  # over all calls: methods have few texts each
        self._replies = Path(replies) / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', model)}-{digest}.jsonl"

    def score(self, asked: Sequence[tuple[Item, str]], on_score: OnScore) -> list[str]:
        """Score answers to items as `mpg.evaluate.judging.Judge` has it; what is told beside the scores is the request
        by which the raw reply is kept.

        Raises ValueError, naming the endpoint and what it said, where no reply can be expected: it is down, the key is
        wrong, there is no such model, or several requests in a row failed.
        """
        requests: dict[str, tuple[dict[str, Any], list[int]]] = {}
        for index, (item, text) in enumerate(asked):
            request = self._request(item, text)
            key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
            requests.setdefault(key, (request, []))[1].append(index)
        header = {"what": "replies", "judge": self.name, "url": self.url}
        failures: list[str] = []
        with open_records(self._replies, header) as records:
            kept = {row["request"]: row["reply"] for row in records.rows}

            def tell(key: str, reply: str) -> None:
                for index in requests[key][1]:
                    on_score(index, read_scores(reply, self.criteria), {"request": key})

            for key in requests.keys() & kept:
                tell(key, kept[key])
            todo = {key: request for key, (request, _) in requests.items() if key not in kept}
            for key, reply in self._ask(todo):
                if isinstance(reply, str):
                    self._failures_in_a_row = 0
                    records.append({"request": key, "reply": reply})
                    tell(key, reply)
                    continue
                failures += [f"{self.url}: {_say(reply)}"] * len(requests[key][1])
                self._failures_in_a_row += 1
                if self._failures_in_a_row >= MAX_FAILURES:
                    times = f"{self._failures_in_a_row} times in a row"
                    raise ValueError(f"judge: {self.name} at {self.url} failed {times}, at last: {_say(reply)}")
        return failures

    def _request(self, item: Item, text: str) -> dict[str, Any]:
        about = {name: item.about.get(name, "") for name in ("profile", "personality")}
        prompt = self.rubric.substitute(about, question=item.prompt, answer=text, target=self.target)
        return {"model": self.name, "messages": [{"role": "user", "content": prompt}], "temperature": 0}

    def _ask(self, requests: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str | Exception]]:
        """Replies by the keys of their requests, as they come, `concurrency` at a time; or what went wrong with one."""
        todo: SimpleQueue[tuple[str, dict[str, Any]]] = SimpleQueue()
        done: SimpleQueue[tuple[str, str | Exception]] = SimpleQueue()
        for key, request in requests.items():
            todo.put((key, request))

        def work() -> None:
            while not todo.empty() and not is_over.is_set():
                with suppress(Empty):
                    key, request = todo.get_nowait()
                    try:
                        done.put((key, self._reply(request)))
                    except Exception as error:  # told where the reply is waited for
                        done.put((key, error))

        is_over = Event()
        try:
            for _ in range(min(self.concurrency, len(requests))):
                Thread(target=work, daemon=True).start()  # a daemon: whoever interrupts does not wait for replies
            for _ in requests:
                key, reply = done.get()
                self._check_hope(reply)
                yield key, reply
        finally:
            is_over.set()

    def _check_hope(self, reply: str | Exception) -> None:
        """Refuse to go on after an error that other requests would meet too, or that is ours."""
        import openai

        if isinstance(reply, (openai.AuthenticationError, openai.PermissionDeniedError)):
            told = f"refused the key in {self.key_env}: {_say(reply)}"
            raise ValueError(f"judge: {self.name} at {self.url} {told}") from reply
        if isinstance(reply, openai.NotFoundError):
            raise ValueError(f"judge: {self.name} at {self.url} is not there: {_say(reply)}") from reply
        if isinstance(reply, Exception) and not isinstance(reply, (openai.OpenAIError, _NoReply)):
            raise reply

    def _reply(self, request: dict[str, Any]) -> str:
        try:
            return self._client.chat.completions.create(**request).choices[0].message.content or ""
        except (AttributeError, IndexError, TypeError, json.JSONDecodeError) as error:  # as the client leaves it
            raise _NoReply(f"expected a chat completion, got {type(error).__name__}: {error}") from error


class _NoReply(Exception):
    """An answer of the endpoint's that holds none of the model."""


def read_scores(reply: str, criteria: Sequence[str]) -> dict[str, float | None]:
    """The scores in the last JSON object of a reply that gives one, whatever stands around it; None for what it does
    not give, is no number, or is beyond `SCALE`."""
    told: dict[str, Any] = {}
    end = 0
    for match in re.finditer(r"\{", reply):
        if match.start() < end:
            continue
        try:
            found, behind = json.JSONDecoder().raw_decode(reply, match.start())
        except (json.JSONDecodeError, RecursionError):
            continue
        if found.keys() & set(criteria):
            told, end = found, behind
    return {name: _number(told.get(name)) for name in criteria}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if SCALE[0] <= number <= SCALE[1] else None


def _say(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
