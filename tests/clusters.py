"""Clusters of `ray start` on this machine: as many nodes as a test asks for, each a process that stays in front."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

TOOLS = Path(sys.executable).parent
STARTED = "Ray runtime started"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


class Cluster:
    """address      of its head, as RAY_ADDRESS has it
    dashboard    URL
    environment  of whoever belongs to it: it has a token of Ray's of its own, as accounts have one by default
    """

    def __init__(self, stack, folder):
        self.stack, self.folder, port, self.dashboard_port = stack, folder, free_port(), free_port()
        self.address, self.dashboard = f"127.0.0.1:{port}", f"http://127.0.0.1:{self.dashboard_port}"
        self.environment = {**os.environ, "HOME": str(folder), "RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1",
                            "RAY_USAGE_STATS_ENABLED": "0"}  # fmt: skip
        self.environment.pop("RAY_ADDRESS", None)
        self.run("ray", "get-auth-token", "--generate")
        self.head = ["--head", "--port", str(port), "--dashboard-port", str(self.dashboard_port), "--temp-dir", folder,
                     "--ray-client-server-port", str(free_port())]  # fmt: skip

    def run(self, tool, *arguments, **more):
        command = [str(TOOLS / tool), *map(str, arguments)]
        return subprocess.run(command, env={**self.environment, **more}, capture_output=True, text=True, timeout=600)

    def start(self, *, cpus=1, gpus=0, before=(), without=()):
        """One more node, the head first. before: a command that the node's is an argument of"""
        place = self.head or ["--address", self.address]
        ports = ["--dashboard-agent-listen-port", str(free_port()), "--min-worker-port", "0", "--max-worker-port", "0"]
        command = [*before, TOOLS / "ray", "start", *place, *ports, "--block", "--num-cpus", cpus, "--num-gpus", gpus,
                   "--object-store-memory", 10**8]  # fmt: skip
        self.head = []
        environment = {name: value for name, value in self.environment.items() if name not in without}
        node = subprocess.Popen(
            list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.stack.callback(end, node)
        lines = []
        assert any(STARTED in (lines.append(line) or line) for line in node.stdout), "".join(lines)
        threading.Thread(target=node.stdout.read, daemon=True).start()  # else a full pipe stops it
        return node


def end(node):
    """End a node and all that it has started."""
    with suppress(psutil.NoSuchProcess):
        family = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        node.terminate()
        _, alive = psutil.wait_procs(family, timeout=30)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    node.wait()


@contextmanager
def cluster():
    """A cluster without nodes."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # sockets have short names
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield Cluster(stack, folder)
