"""Many requests of every kind at once, good and bad, of clients that stay and clients that go."""

from __future__ import annotations

import asyncio
import json
import random
import re
import shutil
from collections import Counter

import httpx
import openai
import psutil

from longer import IS_LONG
from mpg.demo import MODELS
from mpg.demo.corpus import DEMO_QUESTIONS
from serving import started, wait_for

COUNT, AT_ONCE, LOADS = (1000, 200, 2) if IS_LONG else (60, 30, 1)
CHAT = "/v1/chat/completions"
ADMIN = {"authorization": "Bearer key"}
FATES = {"ends": 0.57, "is cancelled": 0.17, "hangs up": 0.16, "is wrong": 0.07, "is no JSON": 0.03}
MODEL_NAMES = ["E=1", "E=1,T=0.5", "J=-0.5,S=1", "ESTJ", "E=0.5,S=0.5,T=1", "mine"]  # the last comes and goes
KINDS = [
    {},
    {"temperature": 0.7},
    {"sampler": "direct", "top_k": 20},
    {"draft": "lookup"},
    {"temperature": 0, "stop": "."},
]
WRONG = [{"weights": {"Q": 1}}, {"tools": [1]}, {"n": -1}, {"temperature": "x"}, {"max_tokens": 10**7}]
NOT_OPENAIS = ("sampler", "top_k", "draft", "weights")
MAY_GROW = 64 * 2**20  # bytes, from one load to the next like it


def test_a_storm_leaves_every_text_as_it_is_alone_and_nothing_behind(precise_model, tmp_path):
    shutil.copytree(MODELS / "adapters" / "T", tmp_path / "mine")
    requests = make_requests(random.Random(0))
    options = {
        "dtype": "float64", "admin-key": "key", "attribute-folder": tmp_path, "max-rows": 16,
        "max-queue": 2 * COUNT, "max-seconds": 900,  # on a machine that is busy
    }  # fmt: skip
    with started("--allow-other-base", *(f"--{name}={value}" for name, value in options.items())) as (process, url):
        memory = []
        for _ in range(LOADS):  # the first warms up
            answers = asyncio.run(storm(url, requests))
            wait_for(lambda: held(url) == {"queue_size": 0, "rows": 0, "groups": 0, "cache_bytes": 0})
            memory.append(resident_bytes(process.pid))
            check(precise_model, requests, answers)
    assert memory[-1] < memory[0] + MAY_GROW


def make_requests(rng):
    """(what becomes of it, its body, when its client goes as a number from 0 to 1) of each."""
    requests = []
    for index in range(COUNT):
        [fate] = rng.choices(list(FATES), list(FATES.values()))
        body = {
            "model": rng.choice(MODEL_NAMES), "messages": [{"role": "user", "content": rng.choice(DEMO_QUESTIONS)}],
            "seed": index % 10, "max_tokens": rng.choice([2, 8, 20]), "stream": rng.random() < 0.5, **rng.choice(KINDS),
        }  # fmt: skip
        requests.append((fate, {**body, **(rng.choice(WRONG) if fate == "is wrong" else {})}, rng.random()))
    return requests


async def storm(url, requests):
    """(status, text) of every request's answer, None where its client had gone before it; meanwhile an attribute comes
    and goes."""
    free, limits = asyncio.Semaphore(AT_ONCE), httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=url, timeout=900, limits=limits) as http,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http) as client,
    ):

        async def answer(fate, body, patience):
            async with free:
                if fate == "hangs up":
                    return await hang_up(url, body, patience)
                if fate == "is no JSON":
                    return await ask_raw(http, body, patience)
                if fate != "is cancelled":
                    return await ask(client, body)
                try:
                    return await asyncio.wait_for(ask(client, body), patience / 2)
                except TimeoutError:
                    return None

        await change(http, is_there=True)
        answers, is_there = asyncio.gather(*(answer(*request) for request in requests)), True
        while is_there or not answers.done():
            await asyncio.sleep(0.05)
            is_there = not is_there
            await change(http, is_there=is_there)
        return await answers


async def change(http, *, is_there):
    """Let the attribute come or go."""
    if is_there:
        done = await http.post("/v1/attributes", json={"name": "mine", "source": "mine"}, headers=ADMIN)
    else:
        done = await http.delete("/v1/attributes/mine", headers=ADMIN)
    assert done.status_code == (201 if is_there else 200)


async def ask(client, body):
    """What OpenAI's client makes of an answer."""
    own = {name: body[name] for name in NOT_OPENAIS if name in body}
    theirs = {name: value for name, value in body.items() if name not in own}
    try:
        answer = await client.chat.completions.create(**theirs, extra_body=own)
        if not body["stream"]:
            return 200, answer.choices[0].message.content
        return 200, "".join([chunk.choices[0].delta.content or "" async for chunk in answer])
    except openai.APIStatusError as error:
        return error.status_code, error.message


async def ask_raw(http, body, share):
    """The answer to a part of a body."""
    text = json.dumps(body)
    answer = await http.post(CHAT, content=text[: int(share * len(text))], headers={"content-type": "application/json"})
    return answer.status_code, answer.text


async def hang_up(url, body, share):
    """Go without a word: every second in the midst of the body, the others while they are answered."""
    host, port = url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    text = json.dumps(body)
    head = f"POST {CHAT} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(text)}\r\n\r\n"
    writer.write((head + text[: int(2 * share * len(text))]).encode())
    await writer.drain()
    await asyncio.sleep(share / 4)
    writer.transport.abort()


def check(model, requests, answers):
    """What is answered is what the model by itself would say, and what stays is answered."""
    statuses = Counter()
    for (fate, body, _), answer in zip(requests, answers, strict=True):
        if answer is None:
            assert fate in ("is cancelled", "hangs up")
            continue
        status, text = answer
        statuses[status] += 1
        if status == 200:
            assert fate in ("ends", "is cancelled") and text == wanted(model, body)
        elif status == 404:
            assert body["model"] == "mine" and "'mine'" in text
        else:
            assert status == 400 and fate in ("is wrong", "is no JSON")
    assert set(statuses) <= {200, 400, 404}
    assert statuses[200] >= COUNT // 3 and statuses[400] >= COUNT // 20


_WANTED = {}


def wanted(model, body):
    key = json.dumps({name: value for name, value in body.items() if name != "stream"}, sort_keys=True)
    if key not in _WANTED:
        own = {name: body[name] for name in ("temperature", "sampler", "top_k", "draft", "seed") if name in body}
        result = model.generate(
            body["messages"], weights={"mine": "T=1"}.get(body["model"], body["model"]),
            max_new_tokens=body["max_tokens"], stop_strings=body.get("stop"), **own,
        )  # fmt: skip
        _WANTED[key] = result.text.split(body["stop"])[0] if "stop" in body else result.text
    return _WANTED[key]


def held(url):
    """What the server says that it holds for requests."""
    text = httpx.get(f"{url}/metrics").text
    found = re.findall(r"^mpg_(queue_size|rows|groups|cache_bytes) (\S+)", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def resident_bytes(pid):
    """Of a process and those that it has started."""
    process = psutil.Process(pid)
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))
