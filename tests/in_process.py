"""The server's application without a socket, for tests of what it answers."""

from __future__ import annotations

import time
from contextlib import contextmanager

from starlette.testclient import TestClient

from mpg.serve.desk import LocalDesk
from mpg.serve.server import make_app
from mpg.serve.settings import Settings


@contextmanager
def client_of(model):
    """A client of the application of this model, which is ready."""
    settings = Settings(name="demo")
    desk = LocalDesk(settings, lambda: model, lambda recipe, beside: model)
    with TestClient(make_app(settings, desk), raise_server_exceptions=False) as client:
        while desk.service.engine.state == "loading":
            time.sleep(0.001)
        yield client
