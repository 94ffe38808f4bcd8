"""What is refused: by which status, and by the name of the field that is at fault."""

from __future__ import annotations

import json
import socket
import time
import tracemalloc

import httpx
import openai
import pytest
from openai.types import completion_create_params

from mpg.options import OPTIONS, Options
from mpg.serve import connections
from mpg.serve.errors import ApiError
from mpg.serve.logs import JsonLines
from mpg.serve.protocol import IGNORED, REFUSED, ChatRequest, CompletionRequest, parse, read_body
from mpg.serve.server import address, check_host
from mpg.serve.settings import Settings
from serving import serving

USER = [{"role": "user", "content": "Hello?"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


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
        parse(kind, "application/json", body)
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


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [(ChatRequest, openai.types.chat.completion_create_params), (CompletionRequest, completion_create_params)],
)
def test_every_field_of_the_installed_client_is_taken_or_refused_by_name(kind, theirs):
    """A release that adds one fails here."""
    fields = theirs.CompletionCreateParamsBase.__annotations__ | theirs.CompletionCreateParamsStreaming.__annotations__
    assert {"model", "temperature", "stream", "service_tier" if kind is ChatRequest else "suffix"} <= fields.keys()
    for name in sorted(fields.keys() - kind.model_fields.keys() - set(IGNORED)):
        body = {"model": "E", name: {"no such": "thing"}}
        with pytest.raises(ApiError) as refused:
            read_body(kind, json.dumps(body).encode())
        assert (refused.value.status, refused.value.param) == (400, name)
        assert (refused.value.code, name in REFUSED) == ("unsupported_parameter", True)


def test_what_is_an_option_is_checked_by_the_options_alone(served):
    """A bound of the server's own would be another one some day."""
    wrong = {
        "temperature": -0.5,
        "top_p": 1.5,
        "top_k": -1,
        "min_p": 1.5,
        "chunk_size": 0,
        "verify": "x",
        "mixture_span": 0,
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name) as told:
            Options(**{name: value})
        answer = served.post(TEXT, {"model": "E", "prompt": "Hello?", name: value})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["message"]) == (400, name, str(told.value))
    for kind in (ChatRequest, CompletionRequest):
        bounded = {name for name, field in kind.model_fields.items() if field.metadata} & OPTIONS.keys()
        assert bounded == {"seed"}  # which the options see wrapped around
    how = {"seed": 3, "temperature": 1e30}
    answer = served.post(TEXT, {"model": "E", "prompt": [5, 6, 7], "max_tokens": 8, **how})
    wanted = served.model.generate([5, 6, 7], weights={"E": 1}, max_new_tokens=8, **how)
    assert answer.json()["choices"][0]["text"] == wanted.text


def test_other_paths_and_methods_have_the_shape_of_errors_too(served, client):
    answers = [served.get(path) for path in ("/v1/embeddings", CHAT, f"{CHAT}/")] + [served.post("/nowhere", {})]
    assert [answer.status_code for answer in answers] == [404, 405, 404, 404]
    for answer in answers:
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert answer.request.url.path in answer.json()["error"]["message"]
    assert answers[1].headers["allow"] == "POST"
    for path in ("/", "/health", "/metrics", "/v1/models"):
        assert httpx.head(f"{served.url}{path}").status_code == 200
    for name, status, told in (
        ("nobody", 404, "model: expected demo, base, E, S"),
        ("E=x", 400, "model: expected a number for 'E'"),
        ("E=1,Q=1", 400, "model: expected some of E, S, T, J, got 'Q'"),
        ("E%3D0", 400, "model: expected at least one that is not 0"),
    ):
        answer = served.get(f"/v1/models/{name}")
        assert answer.status_code == status and answer.json()["error"]["message"].startswith(told)
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
        for wrong in ({"messages": [{"role": "user", "content": ["secret"]}]}, {"unheard-of" * 10: "secret"}):
            assert served.post(CHAT, {**body, **wrong}, authorization="Bearer one").status_code == 400
        unknown = (400, "unknown_parameter", ("unheard-of" * 10)[:64])
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    assert {line["id"] for line in lines} >= {"mine-1", "mine-2"}
    reasons = {(line["status"], line.get("error"), line.get("param")) for line in lines}
    keys, sizes = (401, "invalid_api_key", None), (413, "body_too_large", None)
    assert reasons == {(200, None, None), keys, sizes, (400, "invalid_request_error", "messages"), unknown}
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
            told = b""
            for part in parts:
                raw.sendall(part)
                if part == whole:  # whose answer comes before the next is begun
                    told += raw.recv(10_000)
                time.sleep(0.02)
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
            head = whole[:-2] + b"y: " + many
            for parts in ([head], [head + b"\r\n\r\n"], [head[:20_000], head[20_000:]], [whole, head]):
                told = ask(*parts)
                assert told.startswith(b"HTTP/1.1 200 ") == (parts[0] == whole)  # a kept connection's first
                refusal = told[told.index(b"HTTP/1.1 431 ") :]
                assert json.loads(refusal.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
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
