"""The engine under load and under faults: each request has its own, and nobody else's."""

from __future__ import annotations

import json
import random
import re
import shutil
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import pairwise

import httpx
import pytest
import torch

from longer import thinned
from mpg.demo import MODELS
from mpg.models import sources
from mpg.models.runner import ModelRunner
from mpg.serve.groups import DecodeGroup, ScoreGroup
from mpg.serve.service import SHORT, Service
from serving import serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
POISON = 77
CALM = [5, 6, 7]


def completion(prompt, **fields):
    return {"model": "E", "prompt": prompt, "max_tokens": 8, "seed": 3, **fields}


def counted(served, name):
    """A number of /metrics."""
    lines = served.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@contextmanager
def hooked(model, hook):
    """Let a function see, and spoil, the output of every forward of the base."""
    handle = model.models._models[0].model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def raise_for_poison(module, args, kwargs, output):
    if (kwargs["input_ids"] == POISON).any():
        raise RuntimeError("a broken kernel")


def spoil_for_poison(module, args, kwargs, output):
    is_poisoned = (kwargs["input_ids"] == POISON).any(1)
    output.logits[is_poisoned] = torch.nan
    return output


@pytest.mark.parametrize(
    ("hook", "message", "stream"),
    thinned(
        [
            (raise_for_poison, "a broken kernel", False),
            (raise_for_poison, "a broken kernel", True),
            (spoil_for_poison, "returned NaN", True),
            (spoil_for_poison, "returned NaN", False),
        ]
    ),
)
def test_a_forward_that_fails_fails_its_own_request_alone(served, hook, message, stream):
    prompts = [CALM, [5, 6, POISON], [8, 9], [POISON, POISON], [11]]
    wanted = [served.model.generate(ids, weights={"E": 1}, seed=3, max_new_tokens=8).text for ids in prompts]
    with hooked(served.model, hook), ThreadPoolExecutor(5) as pool:
        post = lambda ids: served.post(TEXT, completion(ids, stream=stream))  # noqa: E731
        answers = list(pool.map(post, prompts))
    for ids, answer, text in zip(prompts, answers, wanted, strict=True):
        if POISON in ids:
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (500, "engine_error")
            assert message in error["message"] and answer.headers["x-request-id"] in error["message"]
        elif not stream:
            assert answer.json()["choices"][0]["text"] == text
        else:
            assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
    assert served.is_idle()
    assert served.post(TEXT, completion(CALM)).json()["choices"][0]["text"] == wanted[0]


def test_too_little_memory_for_many_at_once_is_enough_for_fewer(served):
    prompts = [[5 + index, 6] for index in range(8)]
    wanted = [served.model.generate(ids, weights={"E": 1}, seed=3, max_new_tokens=8).text for ids in prompts]

    def refuse_many(module, args, kwargs, output):
        if len(kwargs["input_ids"]) > 4:
            raise torch.OutOfMemoryError("tried to allocate too much")

    with hooked(served.model, refuse_many), ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda ids: served.post(TEXT, completion(ids)), prompts))
    assert [answer.json()["choices"][0]["text"] for answer in answers] == wanted
    with hooked(served.model, lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none at all"))):
        answer = served.post(TEXT, completion(CALM))
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "out_of_memory")
    assert served.is_idle()


def test_a_request_that_makes_its_own_row_empty_is_its_own_fault(served):
    body = {"model": "demo", "weights": {"E": -1e4, "T": 1e-6}, "sampler": "scr", "target": "geometric"}
    answer = served.post(TEXT, {**completion(CALM), **body})
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        assert answer.json()["error"]["param"] == "weights"


@contextmanager
def slowed(model, seconds):
    with hooked(model, lambda *_: time.sleep(seconds)):
        yield


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_leaves_its_rows_to_others(served, stream):
    tokens = counted(served, "mpg_generated_tokens_total")
    host, port = served.url.removeprefix("http://").split(":")
    body = f'{{"model": "E", "prompt": [5, 6], "max_tokens": 200, "n": 8, "stream": {str(stream).lower()}}}'
    head = f"POST {TEXT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with slowed(served.model, 0.02):
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall((head + body).encode())
            served.wait_until(lambda engine: engine.num_running == 8)
        served.wait_until(lambda engine: engine.num_running == 0)
    assert served.is_idle()
    assert counted(served, "mpg_generated_tokens_total") == tokens  # none of them came to its end


@pytest.mark.parametrize("interval", [0.0, 1e9])
def test_a_stream_has_an_event_a_round_or_one_an_interval(precise_model, interval):
    """The first at once, what an interval has held back with the end; an answer in one piece is handed on in one."""
    handed = []
    with serving(precise_model, stream_interval=interval) as served, pytest.MonkeyPatch.context() as patched:
        deliver = served.engine._deliver
        patched.setattr(served.engine, "_deliver", lambda events: (handed.extend(events), deliver(events)))
        fields = completion(CALM, max_tokens=11, sampler="direct", trace=True)
        [whole] = served.post(TEXT, fields).json()["choices"]
        of_whole, handed = handed, []
        lines = served.post(TEXT, {**fields, "stream": True}).text.splitlines()
    chunks = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    tokens = [chunk["mpg"].get("tokens", []) for chunk in chunks]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert [token for of_chunk in tokens for token in of_chunk] == whole["mpg"]["tokens"] and len(
        whole["mpg"]["tokens"]
    ) == 11
    assert list(map(len, tokens)) == ([1] * 11 + [0] if interval == 0 else [1, 10, 0])
    assert [len(event) for _, event in of_whole if isinstance(event, list)] == [11]


def test_a_slow_reader_does_not_slow_others(served):
    """Its answer, of some megabytes, is generated while it reads nothing."""
    host, port = served.url.removeprefix("http://").split(":")
    body = '{"model": "E", "prompt": [5, 6], "max_tokens": 100, "n": 16, "stream": true, "logprobs": 20, "trace": true}'
    head = f"POST {TEXT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect((host, int(port)))
        raw.sendall((head + body).encode())
        served.wait_until(lambda engine: engine.num_running == 8)
        assert served.post(TEXT, completion(CALM)).status_code == 200
        assert served.is_idle()
        raw.settimeout(20)
        text = b""
        while b"data: [DONE]" not in text:
            text += raw.recv(65536)
        assert text.count(b'finish_reason": "') == 16


def test_a_full_queue_and_a_late_answer_are_told(precise_model):
    with serving(precise_model, max_rows=1, max_queue=2, max_seconds=0.5) as served, slowed(precise_model, 0.1):
        body = completion(CALM, max_tokens=200, sampler="direct")
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: served.post(TEXT, body), range(8)))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) <= {429, 504} and statuses.count(504) in (2, 3)
        refused = answers[statuses.index(429)]
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert served.is_idle()


def test_what_no_queue_could_hold_is_refused_at_once(precise_model):
    with serving(precise_model, max_queue=3) as served:
        assert served.post(TEXT, {**completion(CALM), "n": 3}).status_code == 200
        scored = {**completion(CALM, max_tokens=1), "prompt": [CALM, CALM], "echo": True, "logprobs": 0}
        for body in ({**completion(CALM), "n": 4}, scored):
            answer = served.post(TEXT, body)
            assert answer.status_code == 400 and "retry-after" not in answer.headers
            error = answer.json()["error"]
            assert error["param"] == "n" and "at most 3" in error["message"] and "got 4" in error["message"]


def test_as_many_long_requests_wait_to_be_read_as_may_wait_for_rows(precise_model, monkeypatch):
    may_read, read = threading.Event(), Service._read

    def wait_and_read(service, *args):
        assert may_read.wait(20)
        return read(service, *args)

    monkeypatch.setattr(Service, "_read", wait_and_read)
    body = {**completion(CALM, max_tokens=2), "user": "x" * SHORT}
    with serving(precise_model, max_queue=2) as served, ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(served.post, TEXT, body) for _ in range(5)]
        statuses = []
        for answer in as_completed(answers):
            statuses.append(answer.result().status_code)
            if len(statuses) == 3:
                may_read.set()
        assert statuses == [429] * 3 + [200] * 2


def test_memory_lets_in_what_fits_and_refuses_what_never_will(precise_model):
    models = precise_model.models
    row = models.cache_bytes(["base", "E"], 1, 64)  # as many positions as a short request is given
    limits = {
        "max_rows": 8,
        "max_length": 100,
        "max_memory": int(2.5 * row),
    }  # a quarter is copied: of two layers one half
    with serving(precise_model, **limits) as served:
        most = 0

        def look(*_):
            nonlocal most
            most = max(most, served.engine.num_running)

        with hooked(precise_model, look), ThreadPoolExecutor(6) as pool:
            bodies = [completion(CALM, sampler=("exact", "direct")[index % 2]) for index in range(6)]
            answers = list(pool.map(lambda body: served.post(TEXT, {**body, "model": "E=0.5"}), bodies))
        assert [answer.status_code for answer in answers] == [200] * 6
        assert most == 2  # each has two rows
        wide = {**completion(CALM), "model": "demo", "weights": {"E": 1, "S": 1, "T": 1, "J": 1}}
        error = served.post(TEXT, wide).json()["error"]
        told = re.search(r"take (\S+) GiB, expected at most (\S+) GiB \(--max-memory\)$", error["message"])
        taken, most = (float(size) * 2**30 for size in told.groups())
        assert error["code"] == "request_too_large" and taken > most == pytest.approx(2.5 * row, rel=1e-3)
        long = served.post(TEXT, completion(CALM, max_tokens=98)).json()["error"]
        assert (long["param"], long["code"]) == ("max_tokens", "context_length_exceeded")
        assert served.is_idle()


@pytest.fixture
def buffers(monkeypatch):
    """The bytes of all buffers of caches that there were at once, whenever one was made."""
    live, sums, new_zeros = weakref.WeakSet(), [], torch.Tensor.new_zeros

    def record(self, *sizes, **options):
        made = new_zeros(self, *sizes, **options)
        if made.ndim == 4:
            live.add(made)
            sums.append(sum(buffer.nbytes for buffer in live))
        return made

    monkeypatch.setattr(torch.Tensor, "new_zeros", record)
    return sums


def test_caches_never_take_more_than_max_memory_whatever_comes(precise_model, buffers, monkeypatch):
    """Growing in rows and positions, read ahead, and given back for others, in two groups."""
    rng = random.Random(0)
    bodies = [
        {
            "model": "demo", "weights": dict.fromkeys(rng.sample("ESTJ", rng.randint(1, 3)), 0.5), "seed": index,
            "prompt": [rng.randrange(5, 300) for _ in range(rng.choice([3, 3, 20, 100]))],
            "max_tokens": rng.choice([4, 20, 60]), "sampler": rng.choice(["direct", "direct", "exact"]),
        }
        for index in range(24)
    ]  # fmt: skip
    wanted = [
        precise_model.generate(
            body["prompt"], weights=body["weights"], seed=body["seed"], max_new_tokens=body["max_tokens"],
            sampler=body["sampler"],
        ).text
        for body in bodies
    ]  # fmt: skip
    precise_model.models.kept.clear()
    monkeypatch.setattr(precise_model.models.kept, "max_bytes", 0)  # which counts for itself
    most = precise_model.models.cache_bytes(["base"], 1, 160) * 16
    buffers.clear()
    with (
        serving(precise_model, max_memory=most, prefill_tokens=32) as served,
        ThreadPoolExecutor(len(bodies)) as pool,
    ):
        answers = list(pool.map(lambda body: served.post(TEXT, body), bodies))
    assert [answer.json()["choices"][0]["text"] for answer in answers] == wanted
    assert most / 2 < max(buffers) <= most


def test_groups_take_turns_and_each_gets_its_rows(precise_model):
    """A flood of one kind does not keep another kind from its first token."""
    with serving(precise_model, max_rows=2) as served, slowed(precise_model, 0.002):
        ended = []

        def ask(kind):
            answer = served.post(TEXT, completion(CALM, max_tokens=30, sampler=kind))
            ended.append(kind)
            assert answer.status_code == 200

        flood = [threading.Thread(target=ask, args=("direct",)) for _ in range(12)]
        for thread in flood:
            thread.start()
        served.wait_until(lambda engine: engine.num_waiting >= 8)
        late = threading.Thread(target=ask, args=("exact",))
        late.start()
        for thread in (*flood, late):
            thread.join()
        assert ended.index("exact") < 6


def test_attributes_come_and_go_while_others_run(precise_model, tmp_path, monkeypatch):
    shutil.copytree(MODELS / "adapters" / "T", tmp_path / "mine")
    cached = tmp_path / "models--ours--kind"  # as the hub's package keeps a repository
    shutil.copytree(MODELS / "adapters" / "T", cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr(sources, "read_model", lambda *_: pytest.fail("a base was read that is there"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    limits = {"admin_key": "key", "attribute_folders": (tmp_path,)}
    admin = {"authorization": "Bearer key"}
    with serving(precise_model, **limits) as served:
        before = served.post(TEXT, completion(CALM, model="T")).json()["choices"][0]["text"]
        with slowed(precise_model, 0.01), ThreadPoolExecutor(1) as pool:
            running = pool.submit(lambda: served.post(TEXT, completion(CALM, model="T", max_tokens=40)))
            served.wait_until(lambda engine: engine.num_running == 1)
            added = served.post("/v1/attributes", {"name": "mine", "source": "mine"}, **admin)
            assert added.status_code == 201, added.text
        text = served.model.generate(CALM, weights={"T": 1}, seed=3, max_new_tokens=40).text
        assert running.result().json()["choices"][0]["text"] == text
        assert "mine" in [model["id"] for model in served.get("/v1/models").json()["data"]]
        assert served.post(TEXT, completion(CALM, model="mine")).json()["choices"][0]["text"] == before
        [old], [new] = served.model.models._models, served.engine.model.models._models
        places = {parameter.untyped_storage().data_ptr() for parameter in old.model.parameters()}
        assert places == {parameter.untyped_storage().data_ptr() for parameter in new.model.parameters()}
        added = served.post("/v1/attributes", {"name": "kind", "source": "ours/kind"}, **admin)
        assert added.status_code == 201, added.text
        assert served.post(TEXT, completion(CALM, model="kind")).json()["choices"][0]["text"] == before
        for name, source, status in [
            ("mine", "mine", 409), ("base", "mine", 409), ("other", str(MODELS / "adapters" / "T"), 400),
            ("other", "../..", 400), ("other", "empty", 400), ("other", "a/b", 400), ("../x", "mine", 400),
            ("..", "mine", 400), ("merged", "mine", 409), ("other", "a" * 1000, 400), ("other", "loop", 400),
            ("other", "ours/other", 400), ("other", "ours/kind/..", 400),
        ]:  # fmt: skip
            answer = served.post("/v1/attributes", {"name": name, "source": source}, **admin)
            assert answer.status_code == status, answer.text
        deleted = [
            httpx.delete(f"{served.url}/v1/attributes/{name}", headers=admin) for name in ("mine", "mine", "E", "kind")
        ]
        assert [answer.status_code for answer in deleted] == [200, 404, 409, 200]
        assert served.post(TEXT, completion(CALM, model="mine")).status_code == 404
        assert served.post(TEXT, completion(CALM, model="T")).json()["choices"][0]["text"] == before


def test_metrics_count_what_was_done(served):
    before = {name: counted(served, name) for name in ("mpg_generated_tokens_total", "mpg_prompt_tokens_total")}
    answer = served.post(TEXT, completion(CALM)).json()
    assert (
        counted(served, "mpg_generated_tokens_total") - before["mpg_generated_tokens_total"]
        == (answer["usage"]["completion_tokens"])
    )
    assert counted(served, "mpg_prompt_tokens_total") - before["mpg_prompt_tokens_total"] == len(CALM)
    assert counted(served, 'mpg_state{state="ready"}') == 1
    assert (
        counted(served, "mpg_rows ") == counted(served, "mpg_queue_size ") == counted(served, "mpg_cache_bytes ") == 0
    )


def test_nobody_waits_for_an_engine_that_has_failed(precise_model, monkeypatch):
    with serving(precise_model) as served:
        monkeypatch.setattr(served.engine, "_admit", lambda: 1 / 0)
        answer = served.post(TEXT, completion(CALM))
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_error")
        assert (served.get("/health").status_code, served.get("/health").json()["status"]) == (503, "failed")
        assert served.post(TEXT, completion(CALM)).status_code == 503


def test_long_prompts_are_read_in_parts_and_what_they_begin_with_once(precise_model):
    """By each model; and not again when they are asked once more."""
    system, kept = list(range(10, 150)), precise_model.models.kept
    prompts = [system + [200 + index] * (1 + 9 * index) for index in range(6)]
    wanted = [precise_model.generate(ids, weights={"E": 1}, seed=3, max_new_tokens=8).text for ids in prompts]
    kept.clear()
    fed = []
    with (
        serving(precise_model, prefill_tokens=32, max_rows=4) as served,
        hooked(precise_model, lambda module, args, kwargs, output: fed.append(kwargs["input_ids"].shape)),
        ThreadPoolExecutor(len(prompts)) as pool,
    ):
        for most in (2 * (len(system) + 32 + 64 * len(prompts)), 2 * 64 * len(prompts)):
            fed.clear()
            answers = list(pool.map(lambda ids: served.post(TEXT, completion(ids)), prompts))
            assert [answer.json()["choices"][0]["text"] for answer in answers] == wanted
            assert max(width for _, width in fed) <= 32
            assert sum(rows * width for rows, width in fed if width > 9) <= most  # what no round of eight tokens fed
        assert counted(served, "mpg_kept_bytes") == kept.num_bytes > 0


def test_a_turn_reads_no_more_than_a_part_of_prompts_and_of_what_is_scored(precise_model, monkeypatch):
    """Over all rows and models, beside the one position of a row that a round feeds, while a text is streamed."""
    fed, turns, forward, part = [], [], ModelRunner.forward, 32

    def watched(self, rows, layout, tokens, *args, **kwargs):
        fed.append(sum(count for _, count in layout.runs) * tokens.shape[1])
        return forward(self, rows, layout, tokens, *args, **kwargs)

    monkeypatch.setattr(ModelRunner, "forward", watched)
    monkeypatch.setattr(precise_model.models, "eos_token_ids", ())  # the stream goes on meanwhile
    precise_model.models.kept.clear()
    both = {"model": "demo", "weights": {"E": 1, "T": 1}, "sampler": "direct", "seed": 0}
    with serving(precise_model, prefill_tokens=part, max_rows=8) as served:
        take_turn = served.engine._take_turn

        def watch_turn():
            fed.clear()
            take_turn()
            turns.append(sum(fed))

        with monkeypatch.context() as patched, slowed(precise_model, 0.002), ThreadPoolExecutor(6) as pool:
            streamed = pool.submit(served.post, TEXT, {**both, "prompt": CALM, "max_tokens": 200, "stream": True})
            served.wait_until(lambda engine: engine.num_running == 1)
            patched.setattr(served.engine, "_take_turn", watch_turn)
            prompt = lambda index: [20 + index] * 30  # noqa: E731
            bodies = [{**both, "prompt": prompt(index), "max_tokens": 1} for index in range(2)]
            bodies += [
                {**both, "prompt": prompt(index), "max_tokens": 0, "echo": True, "logprobs": 1} for index in range(3)
            ]
            answers = list(pool.map(lambda body: served.post(TEXT, body), bodies))
            assert not streamed.done()
        assert [answer.status_code for answer in answers] == [200] * 5 and streamed.result().status_code == 200
        assert served.is_idle()
    assert max(turns) <= part + 3 * 3
    assert sum(of_turn >= part - 5 for of_turn in turns) >= 5 * 30 * 3 // part - 3


def test_a_stream_waits_for_one_part_of_prompts_between_its_rounds_however_many_batches_take_turns(
    precise_model, monkeypatch
):
    turns, part = [], 32  # of each the group, and what it read
    for kind in (DecodeGroup, ScoreGroup):

        def watched(self, *, step=kind.step, **how):
            turns.append((self, []))
            return step(self, **how)

        monkeypatch.setattr(kind, "step", watched)
    monkeypatch.setattr(precise_model.models, "eos_token_ids", ())  # the streams go on meanwhile
    precise_model.models.kept.clear()
    targets = ("geometric", "arithmetic", "anchored")
    both = {"model": "demo", "weights": {"E": 1, "T": 1}, "sampler": "direct", "seed": 0}
    bodies = [
        {**both, "target": target, "prompt": [20 + 9 * place + index] * 40, "max_tokens": 1}
        for place, target in enumerate(targets)
        for index in range(2)
    ]
    bodies.append({**both, "prompt": [90] * 20, "max_tokens": 0, "echo": True, "logprobs": 1})
    with (
        serving(precise_model, prefill_tokens=part, max_rows=16) as served,
        slowed(precise_model, 0.001),
        ThreadPoolExecutor(len(targets) + len(bodies)) as pool,
    ):
        count = served.engine.metrics.prompts
        monkeypatch.setattr(
            served.engine.metrics, "prompts", lambda read, reused: (turns[-1][1].append(read), count(read, reused))
        )
        streams = [
            pool.submit(
                served.post, TEXT, {**both, "target": target, "prompt": CALM, "max_tokens": 100, "stream": True}
            )
            for target in targets
        ]
        served.wait_until(lambda engine: len(engine.groups) == engine.num_running == len(targets))
        begun_at = len(turns)
        answers = list(pool.map(lambda body: served.post(TEXT, body), bodies))
        seen = turns[begun_at:-1]
        assert not any(stream.done() for stream in streams)
        assert [answer.status_code for answer in (*answers, *(stream.result() for stream in streams))] == [200] * 10
    reads = [not group.decodes or sum(read) > 0 for group, read in seen]
    assert sum(reads) >= 3 * 2 * 40 * 2 // part
    decoding = {id(group): group for group, _ in seen if group.decodes}
    assert len(decoding) == len(targets)
    for group in decoding.values():
        places = [place for place, (other, _) in enumerate(seen) if other is group]
        assert max(sum(reads[begin + 1 : end + 1]) for begin, end in pairwise(places)) == 1
