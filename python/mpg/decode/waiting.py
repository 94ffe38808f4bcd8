"""Requests that wait for a row. Long prompts are read in parts, between the rounds of those that run.

Knows requests and how much of their prompts is unread; nothing of rounds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator, Sequence
from itertools import islice

from mpg.decode.request import Entry
from mpg.models.session import Session


class Waiting:
    """Entries in the order in which they came.

    part  tokens of prompts that may be read between two rounds, over all rows and models; None: all of them
    """

    def __init__(self, session: Session, part: int | None) -> None:
        self.session, self.part = session, part
        self._entries: deque[Entry] = deque()
        self._reading: tuple[Entry, Iterator[None]] | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._entries

    def add(self, entry: Entry) -> None:
        self._entries.append(entry)

    def remove(self, entry: Entry) -> None:
        self._entries.remove(entry)
        if self._reading is not None and self._reading[0] is entry:
            self._reading = None

    def take(self, most: int, live: Container[int] = (), gathers: bool = False) -> list[Entry]:
        """Those that may begin now, `most` at most, of whose prompts no more than a part is read then. None of them,
        and a part of the first has been read, while more than that of it is unread.

        live: rows of those that run; gathers: none either where all can be read at once
        """
        waiting, taken, unread = [*islice(self._entries, most)], list[Entry](), list[int]()
        is_little = self.part is None or self._fits(
            [len(text) - 1 for entry in waiting for _, text in self.session.asked(*entry.text)]
        )
        if gathers and is_little:
            return []
        for entry in waiting:
            if not is_little:
                unread += self.session.ahead.num_unread(self.session.asked(*entry.text), live)
                is_begun = self._reading is not None and self._reading[0] is entry
                if (is_begun or not self._fits(unread)) and (taken or self._read_part(entry)):
                    break
            taken.append(entry)
        for _ in taken:
            self._entries.popleft()
        return taken

    def _fits(self, unread: Sequence[int]) -> bool:
        """Whether so many tokens, of every row of a model, are no more than a part: rows are read to the end of the
        longest."""
        return self.part is None or len(unread) * max(unread, default=0) <= self.part

    def _read_part(self, entry: Entry) -> bool:
        """Read a part ahead; False where that has been done of all that can be."""
        assert self.part is not None
        if self._reading is None or self._reading[0] is not entry:
            self._reading = entry, self.session.ahead.read(self.session.asked(*entry.text), self.part)
        return next(self._reading[1], self) is None
