"""What is refused: by which status, and by the name of the field that is at fault."""

from __future__ import annotations

import json
import math
import socket
import time
import tracemalloc

import httpx
import openai
import pytest

from mpg.serve import connections
from mpg.serve.errors import ApiError
from mpg.serve.logs import JsonLines
from mpg.serve.protocol import ChatRequest, CompletionRequest, parse
from mpg.serve.server import address, check_host
from mpg.serve.settings import Settings
from serving import serving

USER = [{"role": "user", "content": "Hello?"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# (what a request says beside what makes it whole, status, the field that is named)
MALFORMED = [
    (CHAT, {"messages": None}, 400, "messages"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": "Hello?"}, 400, "messages"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": ""}]}, 400, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, 400, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages"),
    (CHAT, {"messages": [*USER, {"role": "assistant", "content": "I"}]}, 400, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "messages"),
    (CHAT, {"model": None}, 400, "model"),
    (CHAT, {"model": "gpt-4"}, 404, "model"),
    (CHAT, {"model": "E=x"}, 400, "weights"),
    (CHAT, {"model": "E=1,Q=1"}, 400, "weights"),
    (CHAT, {"model": "E", "weights": {"T": 1}}, 400, "weights"),
    (CHAT, {"model": "gpt-4", "weights": {"T": 1}}, 404, "model"),
    (CHAT, {"weights": {"Q": 1}}, 400, "weights"),
    (CHAT, {"weights": {"E": "much"}}, 400, "weights"),
    (CHAT, {"weights": {"E": 1e9}}, 400, "weights"),
    (CHAT, {"weights": {"E": 0}}, 400, "weights"),
    (CHAT, {"weights": {f"E{index}": 1 for index in range(65)}}, 400, "weights"),
    (CHAT, {"contexts": {f"a{index}": "Be calm." for index in range(65)}}, 400, "contexts"),
    (CHAT, {"weights": {"E": -1}, "target": "arithmetic"}, 400, "weights"),
    (CHAT, {"target": "harmonic"}, 400, "target"),
    (CHAT, {"model": "base", "target": "geometric"}, 400, "target"),
    (CHAT, {"sampler": "beam"}, 400, "sampler"),
    (CHAT, {"sampler": "auto"}, 400, "sampler"),
    (CHAT, {"draft": "a friend"}, 400, "draft"),
    (CHAT, {"sampler": "direct", "draft": "model"}, 400, "draft"),
    (CHAT, {"weights": {"a": 1}, "contexts": {"a": {"system": "x", "prefix": "y"}}}, 400, "contexts"),
    (CHAT, {"weights": {"a": 1}, "contexts": {"a": {"system": "x", "source": "/etc"}}}, 400, "contexts"),
    (CHAT, {"contexts": {"a": {"file": "/etc/passwd"}}}, 400, "contexts"),
    (CHAT, {"temperature": -1}, 400, "temperature"),
    (CHAT, {"temperature": "hot"}, 400, "temperature"),
    (CHAT, {"top_p": 0}, 400, "top_p"),
    (CHAT, {"top_k": -2}, 400, "top_k"),
    (CHAT, {"min_p": 2}, 400, "min_p"),
    (CHAT, {"repetition_penalty": -1}, 400, "repetition_penalty"),
    *((CHAT, {name: math.inf}, 400, name) for name in ("temperature", "top_p", "min_p", "repetition_penalty")),
    (CHAT, {"repetition_penalty": 1.2, "sampler": "scr"}, 400, "repetition_penalty"),
    (CHAT, {"n": 0}, 400, "n"),
    (CHAT, {"n": 99}, 400, "n"),
    (CHAT, {"seed": -1}, 400, "seed"),
    (CHAT, {"seed": 2**63}, 400, "seed"),
    (CHAT, {"max_tokens": -1}, 400, "max_tokens"),
    (CHAT, {"max_tokens": 0}, 400, "max_tokens"),
    (CHAT, {"max_tokens": 10**6}, 400, "max_tokens"),
    (CHAT, {"max_tokens": 3, "max_completion_tokens": 4}, 400, "max_completion_tokens"),
    (CHAT, {"stop": ["x"] * 17}, 400, "stop"),
    (CHAT, {"stop": ["x" * 1000]}, 400, "stop"),
    (CHAT, {"stop": [""]}, 400, "stop"),
    (CHAT, {"stop": ["\ud800"]}, 400, "stop"),
    (CHAT, {"top_logprobs": 2}, 400, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    (CHAT, {"logprobs": True, "sampler": "scr"}, 400, "logprobs"),
    (CHAT, {"stream_options": {"other": 1}}, 400, "stream_options"),
    (CHAT, {"tools": [{"type": "function"}]}, 400, "tools"),
    (CHAT, {"response_format": {"type": "json_object"}}, 400, "response_format"),
    (CHAT, {"logit_bias": {"5": 1}}, 400, "logit_bias"),
    (CHAT, {"presence_penalty": 0.5}, 400, "presence_penalty"),
    (CHAT, {"logits_processor": "os.system"}, 400, "logits_processor"),
    (CHAT, {"guidance": 3}, 400, "guidance"),
    (CHAT, {"\ud800": 3}, 400, "\ud800"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "\ud800": 1}]}, 400, "messages"),
    (CHAT, {"weights": {"a": 1}, "contexts": {"a": "Be calm."}, "draft": "merged"}, 400, "draft"),
    (TEXT, {"prompt": ""}, 400, "prompt"),
    (TEXT, {"prompt": []}, 400, "prompt"),
    (TEXT, {"prompt": [5, "x"]}, 400, "prompt"),
    (TEXT, {"prompt": [10**6]}, 400, "prompt"),
    (TEXT, {"prompt": [-1]}, 400, "prompt"),
    (TEXT, {"prompt": ["x"] * 65}, 400, "prompt"),
    (TEXT, {"logprobs": 21}, 400, "logprobs"),
    (TEXT, {"suffix": "end"}, 400, "suffix"),
    (TEXT, {"best_of": 2}, 400, "best_of"),
    (TEXT, {"max_tokens": 0}, 400, "max_tokens"),
    (TEXT, {"echo": True, "logprobs": 1, "stream": True}, 400, "stream"),
    (TEXT, {"weights": {"a": 1}, "contexts": {"a": "Be calm."}}, 400, "contexts"),
    (TEXT, {"weights": {"a": 1}, "contexts": {"a": {"prompt": "x"}}, "echo": True, "logprobs": 1}, 400, "echo"),
    (TEXT, {"echo": True, "logprobs": 1, "target": "arithmetic", "mixture_span": 4}, 400, "mixture_span"),
]


@pytest.mark.parametrize(("path", "wrong", "status", "param"), MALFORMED, ids=lambda value: json.dumps(value)[:60])
def test_a_malformed_request_is_refused_by_name(served, path, wrong, status, param):
    whole = {"model": "demo", "weights": {"E": 1}, "max_tokens": 3}
    whole |= {"messages": USER} if path == CHAT else {"prompt": "Hello?"}
    if "model" in wrong:
        del whole["weights"]
    body = {name: value for name, value in {**whole, **wrong}.items() if value is not None}
    content = json.dumps(body)
    answer = httpx.post(
        f"{served.url}{path}", content=content, headers={"content-type": "application/json"}, timeout=60
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert param.split("_")[0] in error["message"]
    assert error["type"] == "invalid_request_error"
    assert answer.headers["x-request-id"]


JSON = "application/json"
NESTED = [f'{{"weights": {"[" * depth}{"]" * depth}}}'.encode() for depth in (10, 900, 950, 980, 100_000)]


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        *((body, JSON, 400) for body in (b"{", b"[]", b'"x"', b"5", b"", b"\xff", b'{"seed": ' + b"9" * 5000, *NESTED)),
        *((b"{}", kind, 415) for kind in ("text/plain", "", "application/x-www-form-urlencoded")),
    ],
)
def test_a_body_that_is_no_object_is_refused(served, body, kind, status):
    answer = httpx.post(f"{served.url}{CHAT}", content=body, headers={"content-type": kind}, timeout=60)
    assert answer.status_code == status
    assert 10 < len(answer.json()["error"]["message"]) < 300


MANY = 50_000


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (ChatRequest, "messages", [{}] * MANY),
        (ChatRequest, "messages", [{f"x{index}": 0 for index in range(MANY)}]),
        (ChatRequest, "messages", USER * MANY),
        (ChatRequest, "messages", [{"role": "user", "content": [{"type": "text", "text": "x"}] * MANY}]),
        (ChatRequest, "contexts", {"a": {"prompt": USER * MANY}}),
        (ChatRequest, "stop", [5] * MANY),
        (ChatRequest, "contexts", {"a": {"prompt": [""] * MANY}}),
        (ChatRequest, "weights", {f"x{index}": "" for index in range(MANY)}),
        (CompletionRequest, "prompt", [1.5] * MANY),
        (CompletionRequest, "prompt", [[1.5]] * MANY),
    ],
    ids=lambda value: str(value)[:20],
)
def test_of_many_mistakes_one_is_told_and_no_memory_goes_into_others(kind, name, value):
    whole = {"model": "E"} | ({"messages": USER} if kind is ChatRequest else {})
    body = json.dumps({**whole, name: value}).encode()
    tracemalloc.start()
    with pytest.raises(ApiError) as refused:
        parse(kind, JSON, body)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused.value.param == name and len(refused.value.message) < 400
    assert most < 500 * MANY  # an error of each takes thousands


def test_messages_of_earlier_answers_are_taken_as_the_client_has_them(client):
    """The message itself, and what it dumps."""
    first = client.chat.completions.create(model="E", messages=USER, max_tokens=3, seed=1).choices[0].message
    texts = [
        client.chat.completions.create(model="E", messages=[*USER, earlier, *USER], max_tokens=3, seed=1).choices[0]
        for earlier in (first, first.model_dump(), {"role": "assistant", "content": first.content})
    ]
    assert texts[0].message == texts[1].message == texts[2].message


def test_what_asks_for_nothing_is_taken(served, client):
    idle = {
        "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "response_format": {"type": "text"}, 
        "tools": [], "user": "somebody", "store": False, "metadata": {"a": "b"},
    }  # fmt: skip
    assert client.chat.completions.create(model="E", messages=USER, max_tokens=2, **idle).choices[0].message.content


def test_other_paths_and_methods_have_the_shape_of_errors_too(served, client):
    answers = [served.get(path) for path in ("/v1/embeddings", CHAT, f"{CHAT}/")] + [served.post("/nowhere", {})]
    assert [answer.status_code for answer in answers] == [404, 405, 404, 404]
    for answer in answers:
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert answer.request.url.path in answer.json()["error"]["message"]
    assert answers[1].headers["allow"] == "POST"
    for path in ("/", "/health", "/metrics", "/v1/models"):
        assert httpx.head(f"{served.url}{path}").status_code == 200
    answer = served.post(TEXT, {"model": "E", "prompt": [""] * 10_000})
    assert answer.status_code == 400 and len(answer.content) < 1500  # it does not say all again
    with pytest.raises(openai.NotFoundError, match="expected demo, base, E"):
        client.chat.completions.create(model="gpt-4", messages=USER)
    with pytest.raises(openai.BadRequestError, match="tools") as refused:
        client.chat.completions.create(model="E", messages=USER, tools=[{"type": "function"}])
    assert refused.value.param == "tools"


def test_keys_sizes_and_logs(precise_model, caplog):
    caplog.set_level("INFO", logger="mpg.serve")
    body = {"model": "E", "messages": USER, "max_tokens": 2}
    with serving(precise_model, api_keys=("one", "zwö"), admin_key="three", max_body=500) as served:
        assert served.get("/health").json()["status"] == "ready"
        for given in (None, "Bearer wrong", "one", "Bearer é".encode("latin-1"), "Bearer", "Bearer one two"):
            answer = httpx.post(f"{served.url}{CHAT}", json=body, headers={"authorization": given} if given else {})
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert served.get("/metrics").status_code == 401
        for key, request_id in (("one", "mine-1"), ("zwö", "mine-2")):
            headers = {"authorization": f"Bearer {key}".encode(), "x-request-id": request_id}
            answer = httpx.post(f"{served.url}{CHAT}", json=body, headers=headers)
            assert answer.status_code == 200
            assert answer.headers["x-request-id"] == request_id
            assert "access-control-allow-origin" not in answer.headers
        assert served.post("/v1/attributes", {}, authorization="Bearer one").status_code == 401
        long = {**body, "messages": [{"role": "user", "content": "secret " * 200}]}
        assert served.post(CHAT, long, authorization="Bearer one").status_code == 413
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as raw:  # of a size that it does not say
            head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer one\r\ntransfer-encoding: chunked\r\n\r\n"
            raw.sendall(head.encode() + b"400\r\n" + b"x" * 1024 + b"\r\n")
            assert b" 413 " in raw.recv(1000).split(b"\r\n")[0]
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    assert {line["id"] for line in lines} >= {"mine-1", "mine-2"}
    assert not any(word in json.dumps(lines) for word in ("Hello", "secret", "Bearer"))
    assert {line["level"] for line in lines} == {"INFO"} and all(line["seconds"] >= 0 for line in lines)
    caplog.clear()
    with serving(precise_model, log_prompts=True) as served:
        served.post(CHAT, body)
    assert "Hello" in JsonLines().format(caplog.records[-1])


def test_heads_are_bounded_in_size_and_time(precise_model, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)

    def ask(*parts):
        """What comes until the server ends the connection."""
        with socket.create_connection((host, int(port)), timeout=20) as raw:
            for part in parts:
                raw.sendall(part)
                time.sleep(0.02)
            told = b""
            while more := raw.recv(10_000):
                told += more
        return told

    whole = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    with serving(precise_model) as served:
        host, port = served.url.removeprefix("http://").split(":")
        for parts in ([], [b"GET /hea"], [b"GET /health HTTP/1.1\r\nhost: x\r\n", b"a: b\r\n"]):
            assert ask(*parts).startswith(b"HTTP/1.1 408 ")
        again = ask(whole, whole[:9])  # of a connection that is kept
        assert again.startswith(b"HTTP/1.1 200 ") and b"HTTP/1.1 408 " in again
        for long in (b"x" * 100, b"x: 1\r\n"):  # one header, and many
            many = long * (connections.MAX_HEAD // len(long) + 1)
            told = ask(whole[:-2] + b"y: " + many[: len(many) // 2], many[len(many) // 2 :])
            assert told.startswith(b"HTTP/1.1 431 ")
            assert json.loads(told.split(b"\r\n\r\n")[1])["error"]["type"] == "invalid_request_error"
        assert ask(b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_a_server_on_loopback_answers_to_its_own_names_alone(precise_model):
    """Else a page of somebody else, whose name has come to mean this machine, could ask it."""
    with serving(precise_model, hosts=check_host("127.0.0.1", False, False)) as served:
        for host, status in [
            ("localhost", 200), ("LOCALHOST:80", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("[::1]", 200),
            ("evil.example", 403), ("evil.example:8000", 403), ("localhost.evil.example", 403), ("", 403), ("::1", 403),
        ]:  # fmt: skip
            for path in ("/", "/health", "/v1/models"):
                assert served.get(path, host=host).status_code == status
        assert served.get("/health", host="evil.example").json()["error"]["param"] == "host"
        asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
        for answer in (httpx.options(f"{served.url}{CHAT}", headers=asked), served.get("/v1/models", **asked)):
            assert not any("access-control" in name for name in answer.headers)


def test_beyond_loopback_a_key_is_needed():
    for host, name in [("127.0.0.1", "127.0.0.1"), ("localhost", "localhost"), ("::1", "[::1]"), ("127.1.2.3",) * 2]:
        assert name in check_host(host, has_key=False, allow_open=False)
    for host in ("0.0.0.0", "192.168.0.1", "example.org", "::"):
        with pytest.raises(ValueError, match="host: expected a loopback address"):
            check_host(host, has_key=False, allow_open=False)
        assert check_host(host, has_key=True, allow_open=False) == ()
        assert check_host(host, has_key=False, allow_open=True) == ()
    assert address("::1", 80) == "http://[::1]:80" and address("127.0.0.1", 80) == "http://127.0.0.1:80"
    for wrong in ({"max_rows": 0}, {"max_memory": -1}, {"grace": -1}, {"max_kept": -1}, {"api_keys": ("",)}):
        with pytest.raises(ValueError, match=next(iter(wrong)).removesuffix("s")):
            Settings(**wrong)
