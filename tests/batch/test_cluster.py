"""Clusters that cannot be joined: each is refused in a line that says what helps, and none is waited for."""

from __future__ import annotations

import platform
import socket

import pytest

pytest.importorskip("ray", reason="needs mpg[ray]")

import ray
from ray._private.utils import check_version_info

from mpg.batch.cluster import check_room, connect


@pytest.fixture
def never(monkeypatch):
    """No Ray is started, whatever connect makes of an address."""

    def start(*arguments, **how):
        raise AssertionError("Ray is started")

    monkeypatch.setattr(ray, "init", start)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", r"expected the head of a cluster that runs, got \S+:1 \(Connection refused\): 'ray start"),
        ("nowhere.invalid:6379", r"expected the head of a cluster that runs, got nowhere\.invalid:6379 \("),
        ("somewhere", "expected HOST:PORT of the head of a cluster, got 'somewhere'"),
        ("ray://127.0.0.1:10001", "expected HOST:PORT of the head of a cluster, got 'ray://127.0.0.1:10001'"),
        ("127.0.0.1:port", "expected HOST:PORT of the head of a cluster, got '127.0.0.1:port'"),
    ],
)
def test_addresses_at_which_no_cluster_is_are_refused(monkeypatch, never, address, message):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=f"^RAY_ADDRESS: {message}.*; RAY_ADDRESS=local runs on this machine alone$"):
        connect()


def test_a_cluster_that_ended_without_a_word_is_refused(monkeypatch, never):
    """Its address stays in a file of Ray: a job of a hundred machines would go on here alone."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", lambda address: "127.0.0.1:1")
    with pytest.raises(ValueError, match=r"'ray stop' forgets one that has ended; RAY_ADDRESS=local"):
        connect()


@pytest.fixture
def listening(monkeypatch):
    """A head, as far as its port tells."""
    with socket.create_server(("", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        yield


def test_a_cluster_of_another_ray_or_python_is_refused(monkeypatch, listening):
    def mismatch(*arguments, **how):
        try:
            check_version_info({"ray_version": "2.9.3", "python_version": "3.10.4"}, "here")
        except RuntimeError as error:
            raise ConnectionError("Failed to connect to Ray cluster") from error

    monkeypatch.setattr(ray, "init", mismatch)
    here = f"Ray {ray.__version__} and Python {platform.python_version()}, as here"
    with pytest.raises(ValueError, match=r"expected a cluster of .*: install these here; RAY_ADDRESS=local") as refused:
        connect()
    assert here in str(refused.value) and "got Ray 2.9.3 and Python 3.10.4 at" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_cluster_with_another_token_is_refused(monkeypatch, listening):
    def refuse(*arguments, **how):
        raise ConnectionError("Failed") from RuntimeError("InvalidAuthToken: Authentication token is missing")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ValueError, match=r"expected the token of the cluster, .*'ray get-auth-token' says it"):
        connect()


def test_workers_without_room_wait_on_a_cluster_alone(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    check_room("workers", 4, 1, 0, is_alone=True)
    message = r"workers: expected as many as there are GPUs for \(0, 1 each\), got 2"
    with pytest.raises(ValueError, match=message):
        check_room("workers", 2, 1, 1, is_alone=True)
    with pytest.warns(UserWarning, match=f"{message}: the others wait for nodes"):
        check_room("workers", 2, 1, 1, is_alone=False)
