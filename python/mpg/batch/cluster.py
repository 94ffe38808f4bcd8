"""A cluster of Ray that is joined, or a Ray of this machine alone that is started, and whether it has room. Knows no
job."""

from __future__ import annotations

import logging
import os
import platform
import re
import socket
import time
import warnings
from typing import Any

import mpg
from mpg.extras import install

# Ray's own: its processes are given time to start on a machine that is busy, and say nothing of themselves to anybody
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}  # fmt: skip
HOW: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
START_TRIES = 3  # Ray gives its own processes 30 s to start in, which they may not on a busy machine
ANSWER_SECONDS = 10.0  # that the head of a cluster has to answer in
NODE_SECONDS = 120  # that its nodes have
ALIVE_SECONDS = 2.0  # in which Ray ends a worker if there is no memory for any: it looks four times a second
JOIN_TRIES = {"RAY_gcs_server_port_wait_time_s": "1"}  # one, of 40 s; Ray's own five are without a word
ALONE = "RAY_ADDRESS=local runs on this machine alone"


def connect() -> bool:
    """Join the cluster that RAY_ADDRESS names, or one that this machine is of, else start Ray for this machine alone.
    out: whether it is that

    Raises ValueError where the cluster cannot be joined, after a minute at most, where its nodes have another mpg or
    none, or no memory, and where Ray does not start.
    """
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    head = _find_head()
    if head is None:
        _start()
    else:
        _join(head)
    import ray

    try:
        _check_nodes()
    except ValueError:
        ray.shutdown()
        raise
    return head is None


def check_room(argument: str, count: int, cpus: float, gpus: float, is_alone: bool) -> None:
    """Raises ValueError where this machine, alone, has no room for so many actors, who would wait for ever. Those of a
    cluster wait for nodes that may yet come; a warning says so."""
    import ray

    has = ray.cluster_resources()
    for name, each in (("CPU", cpus), ("GPU", gpus)):
        if each * count > has.get(name, 0):
            wanted = f"as many as there are {name}s for ({has.get(name, 0):g}, {each:g} each)"
            if is_alone:
                raise ValueError(f"{argument}: expected {wanted}, got {count}")
            warnings.warn(f"{argument}: expected {wanted}, got {count}: the others wait for nodes", stacklevel=2)


def _find_head() -> str | None:
    """HOST:PORT of the cluster's head; None: Ray is to start here."""
    from ray._private.services import canonicalize_bootstrap_address  # what ray.init does before it waits

    given = os.environ.get("RAY_ADDRESS")
    try:
        if given and given != "auto" and not re.fullmatch(r"[^/]+:\d+|local", given):
            raise ValueError
        head: str | None = canonicalize_bootstrap_address(given or "auto")
    except ConnectionError:  # this machine is of no cluster
        return None
    except (ValueError, OSError):
        wanted = "HOST:PORT of the head of a cluster"
        raise ValueError(f"RAY_ADDRESS: expected {wanted}, got {given!r}; {ALONE}") from None
    return head


def _join(head: str) -> None:
    import ray
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    logging.getLogger("ray").setLevel(logging.CRITICAL)
    host, _, port = head.rpartition(":")
    before = {name: os.environ.get(name) for name in JOIN_TRIES}
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
        os.environ.update(JOIN_TRIES)
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # ray.init does, where no address is given
        ray.init(head, **HOW)
    except (OSError, OverflowError, RuntimeError) as error:  # Ray's ConnectionError is an OSError
        raise ValueError(f"RAY_ADDRESS: {_told(error, head)}; {ALONE}") from error
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


def _told(error: Exception, head: str) -> str:
    """What was wanted of a cluster, what came, and what helps."""
    import ray

    cause = str(error.__cause__ or error)
    if versions := re.findall(r"(?:Ray|Python): (\S+)", cause):
        wanted = f"a cluster of Ray {ray.__version__} and Python {platform.python_version()}, as here"
        return f"expected {wanted}, got Ray {versions[0]} and Python {versions[1]} at {head}: install these here"
    if "token" in cause:
        remedy = "'ray get-auth-token' says it where the cluster was started, RAY_AUTH_TOKEN has it here"
        return f"expected the token of the cluster, got another one or none for {head}: {remedy}"
    got = getattr(error, "strerror", None) or "nothing of Ray answers there"
    remedy = "'ray start --head' starts one, 'ray stop' forgets one that has ended"
    return f"expected the head of a cluster that runs, got {head} ({got}): {remedy}"


def _check_nodes() -> None:
    """Raises ValueError where a node that can run anything has no mpg, or another version, or no memory for it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def read_version(alive: float) -> str:  # inside, or nodes would have to import mpg to know it
        try:
            import mpg
        except ImportError:
            return "none"
        time.sleep(alive)
        return mpg.__version__

    remote = ray.remote(num_cpus=0, max_retries=0)(read_version)
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    ways = (NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes)
    asked = [remote.options(scheduling_strategy=way).remote(ALIVE_SECONDS) for way in ways]
    ends_at = time.monotonic() + NODE_SECONDS
    for node, answer in zip(nodes, asked, strict=True):
        name = node["NodeManagerAddress"]
        try:
            found = ray.get(answer, timeout=max(ends_at - time.monotonic(), 0))
        except ray.exceptions.OutOfMemoryError as error:
            raise ValueError(f"nodes: expected memory for a worker, got none on {name}: Ray ended it") from error
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"nodes: expected an answer within {NODE_SECONDS} s, got {name}: {reason}") from error
        if found != mpg.__version__:
            wanted = f"mpg {mpg.__version__} on every node of the cluster, as here"
            remedy = f"{install('ray')} of that version there, before 'ray start'"
            raise ValueError(f"nodes: expected {wanted}, got {found} on {name}: {remedy}")


def _start() -> None:
    import ray

    for tries_left in reversed(range(START_TRIES)):
        try:
            ray.init("local", include_dashboard=False, **HOW)
            return
        except Exception as error:  # it has no type of its own
            ray.shutdown()
            if not tries_left:
                raise ValueError(f"ray: expected it to start, got: {error}") from error
