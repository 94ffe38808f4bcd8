"""A server in this process, on loopback, as clients see it."""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager

import httpx
import openai
import pytest
import uvicorn

import mpg
from mpg.demo import MODELS
from mpg.model import Model
from mpg.models import loading
from mpg.serve.server import make_app
from mpg.serve.settings import Settings

DEVICE = os.environ.get("MPG_DEVICE", "cpu")


@pytest.fixture(scope="package")
def precise_model():
    """In double precision, where a draw beside a boundary is as good as impossible."""
    return mpg.load(MODELS, device=DEVICE, dtype="float64")


class Served:
    """A running server: its address, its engine, and the model that it began with."""

    def __init__(self, url, app, model):
        self.url, self.engine, self.model = url, app.state.engine, model

    def post(self, path, body, **headers):
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=60)

    def get(self, path, **headers):
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=60)

    def wait_until(self, is_so, seconds=20):
        ends_at = time.monotonic() + seconds
        while not is_so(self.engine):
            assert time.monotonic() < ends_at, "it did not come to pass"
            time.sleep(0.005)

    def is_idle(self):
        self.wait_until(lambda engine: engine.num_running == engine.num_waiting == len(engine.groups) == 0)
        return True


@contextmanager
def serving(model, **settings):
    """A server of this model in a thread."""
    limits = Settings(**{"name": "demo", **settings})

    def load(recipe):
        if recipe is None:
            return model
        return Model(loading.load(recipe, dtype=model.models.dtype, device=model.models.device), recipe)

    app = make_app(limits, load)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started or app.state.engine.state == "loading":
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Served(f"http://127.0.0.1:{port}", app, model)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def served(precise_model):
    with serving(precise_model, max_rows=8) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
