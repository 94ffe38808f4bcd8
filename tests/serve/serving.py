"""A server in a thread of this process, on loopback, as clients see it."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import httpx
import uvicorn

from mpg.model import Model
from mpg.models import loading
from mpg.serve.desk import LocalDesk
from mpg.serve.server import make_app, make_config
from mpg.serve.settings import Settings


class Served:
    """A running server: its address, its engine, and the model that it began with."""

    def __init__(self, url, app, model):
        self.url, self.engine, self.model = url, app.state.desk.service.engine, model

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

    def reload(recipe, beside):
        return Model(loading.load(recipe, dtype=beside.dtype, device=beside.device, beside=beside), recipe)

    app = make_app(limits, LocalDesk(limits, lambda: model, reload))
    server = uvicorn.Server(make_config(app, port=0))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started or app.state.desk.service.engine.state == "loading":
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Served(f"http://127.0.0.1:{port}", app, model)
    finally:
        server.should_exit = True
        thread.join()
