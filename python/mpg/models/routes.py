"""How roles are run: the forwards that feed their cache rows, and the order of what these give.

Knows whose a cache row is; nothing of the tokens that it is fed.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from mpg.models.pool import Pair, Pool, View
from mpg.models.runner import Slot
from mpg.models.shift import Shift
from mpg.models.stack import Layout
from mpg.models.upload import Addresses, Upload

if TYPE_CHECKING:
    from mpg.models.session import Role


class Forward(NamedTuple):
    """One forward of a route: neighbours of a pool, the rows that they are of, None for all in order, and where they
    read something else than the base. Spare rows among them run what the last pair does."""

    pool: Pool
    places: range
    layout: Layout
    rows: Tensor | None
    shift: Shift | None

    @property
    def shape(self) -> Hashable:
        """What it depends on beside its tokens and the numbers in its tensors."""
        runs = self.layout.runs if self.layout.groups is None else None
        return ref(self.pool.runner), self.places, self.rows is None, runs


class Route(NamedTuple):
    """How some roles are run.

    taken     slots whose logits were read with the prompts
    forwards  for all others
    order     where among the logits of both each row of each role is, None where they lie so
    num_roles that some row has
    """

    taken: list[Slot]
    forwards: list[Forward]
    order: Tensor | None
    num_roles: int


class Routes:
    """The routes of a session as its rows stand, each found when it is first asked for. Their tensors lie where those
    of the same roles and sizes lay before, so that a captured round finds them."""

    def __init__(
        self, pools: Mapping[View, Pool], device: torch.device, together: Iterable[tuple[Role, ...]] = ()
    ) -> None:
        """together: roles that will be run together; others are met when they are"""
        self._pools, self._device, self._addresses = pools, device, Addresses()
        self._asked = dict.fromkeys(together)  # in order
        self.begin([])

    def begin(self, rows: Sequence[Mapping[Role, Slot]]) -> None:
        """Let these be the slots of every row, and forget what was found for others."""
        self._rows = rows
        self._found: dict[tuple[tuple[Role, ...], frozenset[Slot]], Route] = {}

    def of(self, roles: tuple[Role, ...], read: frozenset[Slot]) -> Route:
        """That of some roles, where the logits of some slots have been read."""
        self._asked[roles] = None
        if (roles, read) not in self._found:
            upload = Upload()
            self._found[roles, read] = self._find(roles, read, upload)
            upload.send()
        return self._found[roles, read]

    def find(self, read: frozenset[Slot], upload: Upload) -> None:
        """Find those of all roles that are run together, with numbers that go to the device beside others, where the
        logits of some slots will have been read in the first forward, and none in later ones."""
        for roles, of_first in product(self._asked, {read, frozenset()}) if self._rows else ():
            self._found[roles, of_first] = self._find(roles, of_first, upload)

    def signature(self) -> Hashable | None:
        """What the forwards of a round depend on beside their tokens and cache length, where all that rounds run has
        been asked for before; None where one is not captured, or reads other texts than the base's."""
        routes = [self.of(roles, frozenset()) for roles in self._asked]
        forwards = [forward for route in routes for forward in route.forwards]
        if not routes or any(each.pool.runner.graphs is None or each.shift is not None for each in forwards):
            return None
        return tuple((each.num_roles, each.order is None, *(one.shape for one in each.forwards)) for each in routes)

    def _find(self, asked: tuple[Role, ...], read: Collection[Slot], upload: Upload) -> Route:
        present = {role for slots in self._rows for role in slots}
        roles = tuple(role for role in asked if role in present)
        wanted = {slots[role] for slots in self._rows for role in roles if role in slots}
        pairs, taken, forwards = list[Pair](), list[Slot](), list[Forward]()  # pairs: in the order of their logits
        for pool in self._pools.values():
            for slot in dict.fromkeys(pair.slot for pair in pool.pairs):
                if slot in wanted and slot in read:
                    taken.append(slot)
                    pairs += [pair for pair in pool.pairs if pair.slot == slot]
        put, every_row = partial(self._addresses.put, upload=upload), list(range(len(self._rows)))
        for pool in self._pools.values():
            for places in pool.places(wanted.difference(read)):
                fed = pool.pairs[places.start : places.stop]
                fed += fed[-1:] * pool.fill_up(places)
                rows, name = [pair.row for pair in fed], (asked, read, len(forwards))
                to_device = partial(put, device=self._device)
                index = None if rows == every_row else to_device((*name, "rows"), torch.tensor(rows))
                layout = Layout.of([pair.slot.group for pair in fed], "cpu")
                if layout.groups is not None:
                    device = pool.runner.loaded.model.device
                    layout = layout._replace(groups=put((*name, "groups"), layout.groups, device))
                places = range(places.start, places.start + len(fed))
                shift = Shift.of([pair.own for pair in fed], partial(to_device, (*name, "shift")))
                forwards.append(Forward(pool, places, layout, index, shift))
                pairs += fed
        numbers: dict[tuple[int, Slot], int] = {}
        for number, pair in enumerate(pairs):
            numbers.setdefault((pair.row, pair.slot), number)  # not that of a spare row
        found = []
        for role in roles:
            for row, slots in enumerate(self._rows):
                own = slots.get(role) or next((slots[other] for other in roles if other in slots), None)
                found.append(0 if own is None else numbers[row, own])
        is_in_order = found == list(range(len(pairs)))
        order = None if is_in_order else put((asked, read, "order"), torch.tensor(found), self._device)
        return Route(taken, forwards, order, len(roles))
