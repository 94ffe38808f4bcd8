"""The server's application without a socket, for tests of what it answers."""

from __future__ import annotations

import time
from contextlib import contextmanager

from starlette.testclient import TestClient

from mpg.serve.server import make_app
from mpg.serve.settings import Settings


@contextmanager
def client_of(model):
    """A client of the application of this model, which is ready."""
    app = make_app(Settings(name="demo"), lambda: model, lambda recipe, beside: model)
    with TestClient(app, raise_server_exceptions=False) as client:
        while app.state.engine.state == "loading":
            time.sleep(0.001)
        yield client
