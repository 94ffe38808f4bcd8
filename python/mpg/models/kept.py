"""Beginnings of texts that models have read, kept beside the caches for later texts that begin like them.

Knows cache rows and token ids; nothing of who asks.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Hashable
from threading import Lock

from mpg.models import beginnings
from mpg.models.beginnings import Text, count_common, opening
from mpg.models.cache import RaggedCache


class Kept:
    """Texts by what has read them, each with its keys and values; the least recently used go first. Prefix caching, as
    servers call it.

    max_bytes  that they may take together, which may be set; 0 keeps nothing
    """

    def __init__(self, max_bytes: float) -> None:
        self._max_bytes = max_bytes
        self._texts: OrderedDict[Text, tuple[RaggedCache, int]] = OrderedDict()  # with its bytes
        self._openings = defaultdict[Text, set[Text]](set)  # texts by what those share that share enough
        self._lock = Lock()  # several threads may decode on one model

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def num_bytes(self) -> int:
        """What they take together: counted anew, as Ctrl-C may come between a text and a sum."""
        return sum(num_bytes for _, num_bytes in list(self._texts.values()))

    @property
    def max_bytes(self) -> float:
        return self._max_bytes

    @max_bytes.setter
    def max_bytes(self, max_bytes: float) -> None:
        with self._lock:
            self._max_bytes = max_bytes
            self._make_room()

    def add(self, reader: Hashable, text: tuple[int, ...], cache: RaggedCache, row: int) -> None:
        """Copy what a cache row holds of a text, which is all but its last token.

        reader  a model with an adapter, and all else that what it reads depends on
        """
        num_positions = len(text) - 1
        num_bytes = num_positions * cache.bytes_per_position()
        if num_positions < beginnings.MIN_SHARED or not 0 < num_bytes <= self.max_bytes:
            return
        if (found := self.find(reader, text)) is not None and found[1] == num_positions:
            return
        own = cache.excerpt(row, num_positions)
        with self._lock:
            for other in [other for other in self._alike(reader, text) if len(other[1]) <= len(text)]:
                if count_common(other[1], text) == len(other[1]) - 1:  # what goes on from it has all of it
                    self._drop(other)
            self._openings[opening(reader, text)].add((reader, text))
            self._texts[reader, text] = own, num_bytes
            self._make_room()

    def find(self, reader: Hashable, text: tuple[int, ...]) -> tuple[RaggedCache, int] | None:
        """The cache, of one row, that holds most of what a text begins with, and how many positions that is; None where
        that is not worth a copy."""
        with self._lock:
            shared = {other: count_common(text, other[1]) for other in self._alike(reader, text)}
            best = max(shared, key=shared.__getitem__, default=None)
            if best is None or shared[best] < beginnings.MIN_SHARED:
                return None
            self._texts.move_to_end(best)
            return self._texts[best][0], shared[best]

    def clear(self) -> bool:
        """Drop all of them; whether there were any."""
        with self._lock:
            had_some = bool(self._texts)
            self._texts.clear()
            self._openings.clear()
        return had_some

    def _alike(self, reader: Hashable, text: tuple[int, ...]) -> list[Text]:
        # what Ctrl-C kept from being added or dropped wholly is in the second alone
        return [other for other in self._openings.get(opening(reader, text), ()) if other in self._texts]

    def _make_room(self) -> None:
        num_bytes = self.num_bytes
        while num_bytes > self._max_bytes:
            oldest = next(iter(self._texts))
            num_bytes -= self._texts[oldest][1]
            self._drop(oldest)

    def _drop(self, kept: Text) -> None:
        del self._texts[kept]
        alike = self._openings[opening(*kept)]
        alike.discard(kept)
        if not alike:
            del self._openings[opening(*kept)]
