"""Requests that wait for a row. Long prompts are read in parts, between the rounds of those that run.

Knows requests and how much of their prompts is unread; nothing of rounds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from itertools import islice

from mpg.decode.request import Entry
from mpg.models.session import Session


class Waiting:
    """Entries in the order in which they came.

    part  tokens of prompts that every model may read between two rounds; None: all of them
    """

    def __init__(self, session: Session, part: int | None) -> None:
        self.session, self.part = session, part
        self._entries: deque[Entry] = deque()
        self._reading: tuple[Entry, Iterator[None]] | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._entries

    def add(self, entry: Entry) -> None:
        self._entries.append(entry)

    def remove(self, entry: Entry) -> None:
        self._entries.remove(entry)
        if self._reading is not None and self._reading[0] is entry:
            self._reading = None

    def take(self, most: int, gathers: bool = False) -> list[Entry]:
        """Those that may begin now, `most` at most: none of them, and one model has read a part of the first, while
        more than a part of it is unread. gathers: none either where all can be read at once"""
        taken: list[Entry] = []
        left = math.inf if self.part is None else self.part
        is_little = sum(entry.request.longest_prompt for entry in islice(self._entries, most)) <= left
        if gathers and is_little:
            return []
        while self._entries and len(taken) < most:
            unread = 0 if is_little else self._num_unread(self._entries[0])
            if unread > left:
                if not taken:
                    self._read_part(self._entries[0])
                break
            left -= unread
            taken.append(self._entries.popleft())
        return taken

    def _read_part(self, entry: Entry) -> None:
        assert self.part is not None
        if self._reading is None or self._reading[0] is not entry:
            self._reading = entry, self.session.ahead.read(self.session.asked(*entry.text), self.part)
        next(self._reading[1], None)

    def _num_unread(self, entry: Entry) -> int:
        return self.session.ahead.num_unread(self.session.asked(*entry.text))
