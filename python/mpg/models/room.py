"""How large the caches of a session are, and how they grow. Knows rows and positions; nothing of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mpg.models.graphs import bucket
from mpg.models.pool import Pool, View

if TYPE_CHECKING:
    from mpg.models.ensemble import Ensemble

POSITIONS = 64  # rows that grow have a multiple of it


class Room:
    """The runners of a session's pools.

    capacity   positions that a row may have, at most
    positions  that every row has
    """

    def __init__(self, ensemble: Ensemble, pools: dict[View, Pool], capacity: int) -> None:
        self.ensemble, self.pools, self.capacity, self.positions = ensemble, pools, capacity, 0

    def open(self, sizes: Mapping[View, int], positions: int, num_held: int = 0) -> None:
        """Give every view so many cache rows of so many positions, of which the first `num_held` keep what they hold;
        others, which have no rows in use, give theirs up.

        Raises MemoryError where they would not fit.
        """
        for view in set(self.pools).difference(sizes):
            unused = self.pools.pop(view).runner
            unused.loaded.leave(unused)
        has = {view: (pool.runner.num_rows, self.positions) for view, pool in self.pools.items()}
        changed = {view: num_rows for view, num_rows in sizes.items() if has.get(view) != (num_rows, positions)}
        resized = [view for view in changed if view in self.pools and self.pools[view].runner.graphs is None]
        self.ensemble.check_memory([(view[0], changed[view]) for view in resized], positions)
        for view in resized:
            self.pools[view].runner.resize(changed.pop(view), positions, num_held)
        runners = self.ensemble.open_runners(changed, positions)
        for view, runner in runners.items():
            if (old := self.pools.get(view)) is not None:  # graphs hold its addresses
                runner.cache.take(range(len(old.pairs)), min(num_held, positions), old.runner.cache)
                old.runner.loaded.leave(old.runner)
            self.pools[view] = Pool(runner, [] if old is None else old.pairs)
        self.positions = positions

    def grow(self, rows: Mapping[View, int], end: int, num_held: int) -> None:
        """Have room for so many rows of `end` positions; where there was not, for some more, so that it is seldom."""
        self.open(*self._sizes(rows, end, False), num_held)

    def fit(self, rows: Mapping[View, int], end: int, num_held: int) -> None:
        """Have room as `grow`, but give back what is more."""
        self.open(*self._sizes(rows, end, True), num_held)

    def limit(self, kv_length: int) -> int:
        """The positions that rows have at most, which texts need no more of. Raises ValueError beyond the capacity."""
        if not 0 < kv_length <= self.capacity:
            raise ValueError(f"kv_length: expected 1 to the capacity {self.capacity}, got {kv_length}")
        return min(kv_length, self.positions)

    def num_bytes(self, rows: Mapping[View, int], end: int, is_fitted: bool = False) -> int:
        """What caches take, or will when they have been written to, after `grow`, or `fit`: what is there twice while
        they change is among it."""
        sizes, positions = self._sizes(rows, end, is_fitted)
        taken = {view: view[0].cache_bytes(num_rows, positions) for view, num_rows in sizes.items()}
        return sum(taken.values()) + max((size // (2 * view[0].num_layers) for view, size in taken.items()), default=0)

    def _sizes(self, rows: Mapping[View, int], end: int, is_fitted: bool) -> tuple[dict[View, int], int]:
        has = {} if is_fitted else {view: pool.runner.num_rows for view, pool in self.pools.items()}
        wanted = {view: bucket(num_rows, 1) for view, num_rows in rows.items() if num_rows > has.get(view, 0)}
        positions = min(bucket(max(end, 1), POSITIONS), self.capacity)
        return has | wanted, positions if is_fitted else max(positions, self.positions)
