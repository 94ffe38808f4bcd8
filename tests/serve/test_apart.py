"""A service at the other end of a connection: whatever goes either way arrives, and one that fails fails alone."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from longer import IS_LONG
from mpg.serve import service
from serving import serving

TEXT = "/v1/completions"
COUNT = 800 if IS_LONG else 80


def body(**fields):
    return {"model": "E", "prompt": [5, 6, 7], "max_tokens": 4, "seed": 3, "sampler": "direct", **fields}


def test_large_messages_go_both_ways_at_once(precise_model):
    """Larger than what a connection holds, while requests come and go: neither end waits for the other to read."""
    large = body(prompt=[[5 + index, 6] for index in range(8)], n=8, logprobs=20, max_tokens=60, stream=True)
    long = body(prompt=[[5] * 200_000] * 2)
    with serving(precise_model, is_apart=True, max_queue=10_000) as served, ThreadPoolExecutor(12) as pool:
        wanted = served.post(TEXT, large).text
        assert len(wanted) > 2**18

        def leave(index):
            prompt = "word " * (1000 if index % 3 == 0 else 1)
            try:
                fields = body(prompt=prompt, max_tokens=100)
                httpx.post(f"{served.url}{TEXT}", json=fields, timeout=httpx.Timeout(30, read=0.02))
            except httpx.TimeoutException:
                pass

        left = [pool.submit(leave, index) for index in range(COUNT)]
        answers = [pool.submit(served.post, TEXT, fields) for fields in (long, large, long, large)]
        statuses = [answer.result().status_code for answer in answers]
        [one.result() for one in left]
        assert statuses == [400, 200, 400, 200]
        for answer in answers[1::2]:
            assert texts(answer.result().text) == texts(wanted)
        assert served.is_idle()
        assert served.get("/health").json()["status"] == "ready"


def texts(answer):
    """Of a streamed answer, by choice, each with the number of its tokens that have log-probabilities."""
    found = defaultdict(lambda: ["", 0])
    for line in answer.splitlines():
        for choice in json.loads(line[6:])["choices"] if line.startswith("data: {") else ():
            found[choice["index"]][0] += choice["text"]
            found[choice["index"]][1] += len((choice["logprobs"] or {"tokens": []})["tokens"])
    return found


@pytest.mark.parametrize("is_apart", [False, True])
def test_an_answer_that_cannot_be_told_fails_its_own_request_alone(precise_model, monkeypatch, is_apart):
    with serving(precise_model, is_apart=is_apart) as served:
        spell = service.spell
        monkeypatch.setattr(service, "spell", lambda *_: 1 / 0)
        answer = served.post(TEXT, body(logprobs=2))
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        monkeypatch.setattr(service, "spell", spell)
        assert served.post(TEXT, body(logprobs=2)).status_code == 200
        assert served.is_idle()


def test_what_takes_long_keeps_no_other_question_waiting(precise_model, monkeypatch):
    """Attributes that are loaded, and long requests that are read."""
    begun, go_on = threading.Semaphore(0), threading.Event()

    def wait(*_):
        begun.release()
        go_on.wait(60)

    admin = {"authorization": "Bearer key"}
    with serving(precise_model, is_apart=True, admin_key="key") as served, ThreadPoolExecutor(20) as pool:
        monkeypatch.setattr(service.Attributes, "add", wait)
        monkeypatch.setattr(service, "read_body", lambda kind, body: wait() if b"word" in body else kind(**BODY))
        adding = [pool.submit(served.post, "/v1/attributes", {"name": "a", "source": "b"}, **admin) for _ in range(8)]
        read = [pool.submit(served.post, TEXT, body(prompt="word " * 1000)) for _ in range(8)]
        for _ in range(9):
            assert begun.acquire(timeout=60)
        assert served.get("/health").status_code == served.get("/metrics").status_code == 200
        assert served.post(TEXT, BODY).status_code == 200
        go_on.set()
        assert [one.result().status_code for one in adding] == [201] * 8
        assert [one.result().status_code for one in read] == [500] * 8  # nothing was read of them


def test_what_comes_when_the_server_ends_is_told_so_and_not_read(precise_model, monkeypatch):
    with serving(precise_model, is_apart=True) as served:
        monkeypatch.setattr(service, "read_body", lambda *_: pytest.fail("it was read"))
        served.engine.drain()
        for prompt in ("word ", "word " * 1000):
            answer = served.post(TEXT, body(prompt=prompt))
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stopping")


BODY = body()
