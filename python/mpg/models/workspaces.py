"""What the forwards of one model run on, kept from session to session: captured graphs hold its addresses.

Knows which are idle and what their graphs take; nothing of what a workspace is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar
from weakref import WeakSet

from mpg.models.graphs import Capture, Graphs

MAX_IDLE = 4  # of one model

Workspace = TypeVar("Workspace")


class Workspaces(Generic[Workspace]):
    """Each is one session's, or idle. Several threads may use this.

    new_capture: makes what captures the forwards of one workspace; None where they run as they are
    """

    def __init__(self, new_capture: Callable[[], Capture] | None = None) -> None:
        self.new_capture = new_capture
        self._graphs: WeakSet[Graphs] = WeakSet()  # of every workspace there is
        self._idle: list[tuple[Hashable, Workspace]] = []  # the latest last
        self._lock = Lock()

    def new_graphs(self, num_rows: int) -> Graphs | None:
        """The graphs, none yet, of a new workspace."""
        new_capture = self.new_capture  # another thread may find meanwhile that the model cannot be captured
        if new_capture is None:
            return None
        graphs = Graphs(num_rows, new_capture())
        with self._lock:
            self._graphs.add(graphs)
        return graphs

    def graph_bytes(self) -> int:
        with self._lock:
            return sum(graphs.num_bytes for graphs in self._graphs)

    def take(self, key: Hashable) -> Workspace | None:
        """An idle workspace that was left under this key; it is then the caller's."""
        with self._lock:
            place = next((i for i, (of, _) in enumerate(self._idle) if of == key), None)
            return None if place is None else self._idle.pop(place)[1]

    def leave(self, key: Hashable, workspace: Workspace) -> None:
        """Keep a workspace for whoever takes it. Of more than MAX_IDLE the oldest is freed."""
        with self._lock:
            self._idle.append((key, workspace))
            del self._idle[:-MAX_IDLE]

    def drop(self) -> bool:
        """Free the oldest idle workspace; whether there was one."""
        with self._lock:
            return bool(self._idle and self._idle.pop(0))
