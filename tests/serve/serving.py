"""A server on loopback, in a thread of this process or in processes of its own, as clients see it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from socket import socketpair

import httpx
import uvicorn

from mpg.model import Model
from mpg.models import loading
from mpg.serve.desk import LocalDesk
from mpg.serve.process import Remote, Teller, attend
from mpg.serve.server import make_app, make_config
from mpg.serve.service import Service
from mpg.serve.settings import Settings


class Served:
    """A running server: its address, its engine, and the model that it began with."""

    def __init__(self, url, engine, model):
        self.url, self.engine, self.model = url, engine, model

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


def start(do, *args):
    thread = threading.Thread(target=do, args=args)
    thread.start()
    return thread


@contextmanager
def serving(model, *, is_apart=False, **settings):
    """A server of this model in a thread. is_apart: in front of a service that is reached as one in another process"""
    limits = Settings(**{"name": "demo", **settings})

    def reload(recipe, beside):
        return Model(loading.load(recipe, dtype=beside.dtype, device=beside.device, beside=beside), recipe)

    with ExitStack() as stack:
        if is_apart:
            here, there = map(stack.enter_context, socketpair())
            service = Service(limits, lambda: model, reload, Teller(here).tell)
            service.start()
            desk = Remote(there, lambda: None)
            stack.callback(start(attend, here, service).join)
        else:
            desk = LocalDesk(limits, lambda: model, reload)
            service = desk.service
        yield from _run(make_app(limits, desk), service.engine, model)


def _run(app, engine, model):
    server = uvicorn.Server(make_config(app, port=0))
    thread = start(server.run)
    try:
        while not server.started or engine.state == "loading":
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Served(f"http://127.0.0.1:{port}", engine, model)
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def started(*arguments, seconds=60):
    """The command in a process of its own, and the address that it says it serves at. seconds: that it may load"""
    command = [sys.executable, "-m", "mpg", "serve", "--models", "demo", "--port", "0", "--device", "cpu", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    try:
        found = next(filter(None, (re.search(r"serving at (http://\S+)/v1", line) for line in process.stderr)))
        process.said, logged = found.string, []
        process.logged = logged
        threading.Thread(target=lambda: logged.extend(process.stderr), daemon=True).start()  # else a full pipe stops it
        wait_for(lambda: httpx.get(f"{found[1]}/health").json()["status"] == "ready", seconds)
        yield process, found[1]
    finally:
        process.kill()
        process.wait()


def wait_for(is_so, seconds=60):
    ends_at = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < ends_at, "it did not come to pass"
        time.sleep(0.02)
