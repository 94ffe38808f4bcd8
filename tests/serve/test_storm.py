"""Many requests of every kind at once, good and bad, of clients that stay and clients that go."""

from __future__ import annotations

import gc
import random
import resource
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from longer import IS_LONG
from mpg.demo import MODELS
from mpg.demo.corpus import DEMO_QUESTIONS
from serving import serving

COUNT, AT_ONCE = (1000, 200) if IS_LONG else (60, 30)
WEIGHTS = ["E=1", "E=1,T=0.5", "J=-0.5,S=1", "ESTJ", "E=0.5,S=0.5,T=1"]
KINDS = [
    {},
    {"temperature": 0.7},
    {"sampler": "direct", "top_k": 20},
    {"draft": "lookup"},
    {"temperature": 0, "stop": "."},
]
WRONG = [{"weights": {"Q": 1}}, {"tools": [1]}, {"n": -1}, {"temperature": "x"}, {"max_tokens": 10**7}]

ALWAYS_NEW = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # threads of one client race for kept ones


@pytest.mark.parametrize("seed", [0])
def test_a_storm_leaves_every_text_as_it_is_alone_and_nothing_behind(precise_model, tmp_path, seed):
    rng = random.Random(seed)
    shutil.copytree(MODELS / "adapters" / "T", tmp_path / "mine")
    asked = []
    for index in range(COUNT):
        fate = rng.choices(["ends", "goes", "is wrong"], [0.57, 0.33, 0.1])[0]
        body = {
            "model": rng.choice(WEIGHTS), "messages": [{"role": "user", "content": rng.choice(DEMO_QUESTIONS)}],
            "seed": index % 10, "max_tokens": rng.choice([2, 8, 20]), "stream": rng.random() < 0.5, **rng.choice(KINDS),
        }  # fmt: skip
        asked.append((fate, {**body, **(rng.choice(WRONG) if fate == "is wrong" else {})}))

    limits = {
        "is_apart": True,
        "max_queue": COUNT * 2,
        "admin_key": "key",
        "attribute_folders": (tmp_path,),
        "max_rows": 16,
        "max_seconds": 900,  # on a machine that is busy
    }
    with serving(precise_model, **limits) as served, httpx.Client(timeout=900, limits=ALWAYS_NEW) as http:
        url = f"{served.url}/v1/chat/completions"

        def ask(fate, body):
            if fate != "goes":
                return http.post(url, json=body)
            try:
                http.post(url, json=body, timeout=httpx.Timeout(60, read=0.03))
            except httpx.TimeoutException:
                return None

        admin = {"authorization": "Bearer key"}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = [pool.submit(ask, *one) for one in asked]
            for _ in range(2):
                added = http.post(f"{served.url}/v1/attributes", json={"name": "mine", "source": "mine"}, headers=admin)
                assert added.status_code == 201
                assert http.delete(f"{served.url}/v1/attributes/mine", headers=admin).status_code == 200
            answers = [answer.result() for answer in answers]
        assert served.is_idle()
        statuses = Counter()
        for (fate, body), answer in zip(asked, answers, strict=True):
            if answer is None:
                continue
            statuses[answer.status_code] += 1
            if fate == "is wrong":
                assert answer.status_code == 400
            elif fate == "ends":
                assert answer.status_code == 200, answer.text
                assert text_of(answer, body["stream"]) == wanted(served.model, body)
        assert statuses[200] >= COUNT // 3 and statuses[400] >= COUNT // 20
        assert set(statuses) == {200, 400}
        if IS_LONG:  # memory is flat: the same again takes no more
            before = resident_bytes()
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(lambda one: ask(*one), asked))
            assert served.is_idle()
            assert resident_bytes() < before + 64 * 2**20


_WANTED = {}


def wanted(model, body):
    key = (
        body["model"],
        body["messages"][0]["content"],
        *(body.get(name) for name in sorted(body) if name not in ("messages", "stream")),
    )
    if key not in _WANTED:
        own = {name: body[name] for name in ("temperature", "sampler", "top_k", "draft", "seed") if name in body}
        result = model.generate(
            body["messages"], weights=body["model"], max_new_tokens=body["max_tokens"],
            stop_strings=body.get("stop"), **own,
        )  # fmt: skip
        _WANTED[key] = result.text.split(body["stop"])[0] if "stop" in body else result.text
    return _WANTED[key]


def text_of(answer, is_stream):
    if not is_stream:
        return answer.json()["choices"][0]["message"]["content"]
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    return "".join(httpx.Response(200, text=line).json()["choices"][0]["delta"].get("content", "") for line in lines)


def resident_bytes():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
