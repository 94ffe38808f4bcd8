"""A folder laid out as the paper's data release, with a few items of our own."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

QA = ["How do you spend a free evening?", "What makes a good plan?", "How do you meet a stranger?"]
CHOICES = [
    ("On a free day you", "J", "plan every hour", "P", "see what comes"),
    ("Which word do you prefer?", "T", "Logic", "F", "Mercy"),
    ("Which word do you prefer?", "I", "Quiet", "E", "Company"),
    ("You would rather", "S", "trust what you see", "N", "guess what could be"),
]
PLAYS = [("He bakes bread.", "He is calm."), ("She sails.", "She laughs a lot.")]


@pytest.fixture
def data(tmp_path):
    questions, roleplay = tmp_path / "data/mbti/questions", tmp_path / "data/roleplay"
    questions.mkdir(parents=True)
    roleplay.mkdir()
    qa = [{"instruction": question, "input": " ", "output": f" {question} I go out."} for question in QA]
    (questions / "qa_ESTJ.json").write_text(json.dumps(qa))
    mcqa = {
        str(number): {"question": f"{stem}:\\nA.{one}\\nB.{other}", "A": pole, "B": opposite}
        for number, (stem, pole, one, opposite, other) in enumerate(CHOICES, 1)
    }
    (questions / "mcqa.json").write_text(json.dumps(mcqa))
    agree = {"1": {"rewritten_en": "Do you like crowds?", "dimension": "E/I", "category": "E"}}
    (questions / "16personalities.json").write_text(json.dumps(agree))
    plays = [
        {"profile": profile, "personality": personality, "reference_answer": f"Hi, {profile}"}
        for profile, personality in PLAYS
    ]
    (roleplay / "test.jsonl").write_text("".join(json.dumps(play) + "\n" for play in plays))
    return tmp_path / "data"


class Endpoint(ThreadingHTTPServer):
    """A chat endpoint on loopback. `replies` are used up in order, the last for ever: a text, or (status, body), or
    bytes of a body that ends too soon, or seconds to sleep before the text "late", or None to hang up. `requests` are
    the bodies that came, with keys."""

    def __init__(self, *replies):
        self.replies, self.requests, self.most_at_once = list(replies), [], 0
        self.lock, self.at_once = threading.Lock(), 0
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that does not wait


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        with server.lock:
            server.requests.append(body | {"key": self.headers["authorization"]})
            reply = server.replies.pop(0) if len(server.replies) > 1 else server.replies[0]
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        if isinstance(reply, float):
            time.sleep(reply)
            reply = "late"
        with server.lock:
            server.at_once -= 1
        if reply is None:
            self.close_connection = True
            return
        message = {"role": "assistant", "content": reply}
        whole = {"id": "0", "object": "chat.completion", "created": 0, "model": body["model"]}
        whole["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
        missing = 0
        if isinstance(reply, bytes):
            status, text, missing, self.close_connection = 200, reply.decode(), 100, True
        else:
            status, text = reply if isinstance(reply, tuple) else (200, json.dumps(whole))
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("retry-after-ms", "1")
        self.send_header("content-length", str(len(text) + missing))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    """Starts endpoints, and lets OpenAI's client wait for next to nothing between its tries."""
    base_client = pytest.importorskip("openai._base_client", reason="needs mpg[evaluate]")
    monkeypatch.setattr(base_client, "INITIAL_RETRY_DELAY", 0.001)
    started = []

    def start(*replies):
        started.append(Endpoint(*replies))
        threading.Thread(target=started[-1].serve_forever, args=(0.01,), daemon=True).start()
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def own_judge(tmp_path_factory):
    """A classifier in a folder, which tells no pole from another."""
    pytest.importorskip("sklearn", reason="needs mpg[evaluate]")
    from mpg.evaluate.judges.classifier import TraitClassifier

    pairs = {of: (["a", "b"], [True, False]) for of in ("EI", "SN", "TF", "JP")}
    TraitClassifier.train(pairs, pairs).save(folder := tmp_path_factory.mktemp("own", numbered=False))
    return folder
