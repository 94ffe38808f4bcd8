"""What calls have left behind for later ones. Knows keys; nothing of what is kept."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from threading import Lock
from typing import Generic, TypeVar

MAX_IDLE = 4

Left = TypeVar("Left")


class Idle(Generic[Left]):
    """The MAX_IDLE latest that were left, each with all that who takes it must agree in; the oldest first."""

    def __init__(self) -> None:
        self._left: list[tuple[Hashable, Left]] = []
        self._lock = Lock()  # several threads may decode on one model

    def __iter__(self) -> Iterator[Left]:
        return iter([left for _, left in self._left])

    def __len__(self) -> int:
        return len(self._left)

    def take(self, key: Hashable) -> Left | None:
        """One that was left with this key, which is then the caller's."""
        with self._lock:
            place = next((place for place, (of_left, _) in enumerate(self._left) if of_left == key), None)
            return None if place is None else self._left.pop(place)[1]

    def leave(self, key: Hashable, left: Left) -> None:
        with self._lock:
            self._left.append((key, left))
            del self._left[:-MAX_IDLE]

    def drop(self) -> bool:
        """Free the oldest; whether there was one."""
        with self._lock:
            return bool(self._left and self._left.pop(0))

    def clear(self) -> None:
        with self._lock:
            self._left.clear()
