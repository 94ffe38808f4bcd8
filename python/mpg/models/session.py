"""The cache rows of some texts, one for each model or adapter that a text needs, and the forwards that fill them.

Knows pairs of a text and a model; nothing of targets, samplers or which tokens to keep.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from mpg.models.ahead import Ahead, Asked
from mpg.models.beginnings import find_beginnings
from mpg.models.graphs import bucket
from mpg.models.pool import Pair, Pool, View
from mpg.models.reading import PREFILL_TOKENS, Reading, columns
from mpg.models.room import Room
from mpg.models.routes import Routes
from mpg.models.runner import CAPTURED_POSITIONS, Slot
from mpg.models.shift import OwnText, Shift
from mpg.models.upload import Numbers, Upload

if TYPE_CHECKING:
    from mpg.models.ensemble import Ensemble

Role: TypeAlias = str | int  # a number: of each text, its own attribute of this number
Attributes: TypeAlias = Mapping[Role, str]  # of a text by role: by number its own, and those that stand in for others
Awaited: TypeAlias = tuple[Attributes, "Ensemble", int]  # of a text, what knows them, and positions that it needs


class Session:
    """The caches of B texts for some roles. Made by Ensemble.open.

    Positions before a forward's start must have been fed before; feeding a position again replaces what was there, so
    rejecting tokens is starting earlier. No forward starts before the last token of a row's prompt, which every role's
    first forward feeds: where prompts of one length fill all rows and none begins as another, it has been read with
    them.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        roles: Sequence[Role],
        capacity: int,
        num_rows: int,
        expected: Sequence[Attributes],
        together: Sequence[tuple[Role, ...]] = (),
    ) -> None:
        """expected: attributes of texts, any `num_rows` of which caches are to have room for; for others they grow, and
        without any in positions too; together: of the roles those that forwards will feed, as far as is known"""
        self._ensemble = ensemble
        self._fixed: dict[Role, Slot] = {role: ensemble._slots[role] for role in roles if isinstance(role, str)}
        self._pools: dict[View, Pool] = {}
        self.room = Room(ensemble, self._pools, capacity)
        self.ahead = Ahead(ensemble, self._pools)
        self.routes = Routes(self._pools, ensemble.device, together)
        self.recorded: int | None = None  # positions that every forward has of a round that is captured
        self.open(num_rows, expected)

    def open(self, num_rows: int, expected: Sequence[Attributes]) -> None:
        """Begin without a text, as when it was made; after `close` too."""
        self._rows: list[dict[Role, Slot]] = []  # the slots of every row
        self._ends: list[int] = []  # positions that the text of every row needs
        self._first: dict[Slot, Tensor] = {}  # logits (R, 1, V) behind the prompts, until a slot's first forward
        self._longest_prompt = self._longest = 0  # of prompts that are held; of positions that have been fed
        counts = [self.count_rows(attributes, self._ensemble) for attributes in expected]
        sizes = {}
        for view in dict.fromkeys(view for count in counts for view in count):
            of_view = sorted((count[view] for count in counts), reverse=True)
            sizes[view] = sum(of_view[:num_rows]) + of_view[0] * max(0, num_rows - len(of_view))
        if sizes:
            self.room.open(sizes, self.room.capacity)

    def replace(
        self,
        rows: Sequence[int],
        prompts: Sequence[Sequence[int]],
        attributes: Sequence[Attributes] | None = None,
        contexts: Sequence[Mapping[str, Sequence[int]]] | None = None,
        ensembles: Sequence[Ensemble] | None = None,
        ends: Sequence[int] | None = None,
        kept: Sequence[int] | None = None,
        upload: Upload | None = None,
        awaited: Sequence[Awaited] = (),
    ) -> None:
        """Let some rows hold these prompts but for their last tokens, whatever was there; new ones follow the last row.

        attributes: of every prompt, what the roles 0, 1, ... are, and roles whose place one of them takes; default none
        contexts:   of every prompt, what roles of these names read in its place; default none
        ensembles:  of every prompt, what knows its attributes: the session's, or that with contexts of its own
        ends:       positions that the text of every prompt will need, contexts among them; default the capacity
        kept:       rows that go on before that, as rows 0, 1, ...; default all
        upload:     what the numbers of all this go to the device with, and what is done there first; default none
        awaited:    texts that will come in further rows, for which caches that grow have room, too

        A prompt is read once by a model, or not at all where a row has it still, and copied, as its beginning is where
        many tokens of it are another one's. Only a merged model, another one in every row, reads each of them.

        Raises MemoryError where caches have to grow and would not fit.
        """
        self._renumber(kept)
        knowing = ensembles or [self._ensemble] * len(prompts)
        ends = ends or [self.room.capacity] * len(prompts)
        for row, own, ensemble, end in zip(rows, attributes or [{}] * len(prompts), knowing, ends, strict=True):
            self._rows[row : row + 1] = [self._slots_of(own, ensemble)]
            self._ends[row : row + 1] = [end]
        upload = upload or Upload()
        moves = self._arrange(upload, awaited)
        wanted = {
            row: {name: tuple(text) for name, text in {"": prompt, **of_row}.items()}
            for row, prompt, of_row in zip(rows, prompts, contexts or [{}] * len(prompts), strict=True)
        }
        todo = [(pool, *self._hand_out(pool, wanted)) for pool in self._pools.values()]
        pairs = [pair for pool in self._pools.values() for pair in pool.pairs]
        held = {len(pair.prompt) for pair in pairs}
        is_whole = len(held) == 1 and all(
            len(pool.pairs) == len(unread) and not begun for pool, unread, begun, _ in todo
        )
        self._longest_prompt = max(len(pair.prompt) - pair.own.shift for pair in pairs)
        self._longest = max(self._longest, *held)
        self._first = {}
        readings = [Reading(*of_pool, is_whole, upload) for of_pool in todo]
        self.routes.find(frozenset(pair.slot for pair in pairs if is_whole), upload)
        upload.send()
        self._move(moves)
        for reading in readings:
            logits = reading.run(self._ensemble, self.room.positions, max(held) - 1)
            if is_whole and logits is not None:
                for slot in dict.fromkeys(pair.slot for pair in reading.pool.pairs):
                    (places,) = reading.pool.places([slot])
                    self._first[slot] = logits[places.start : places.stop]
        self.ahead.forget()

    def asked(
        self,
        prompt: Sequence[int],
        attributes: Attributes,
        contexts: Mapping[str, Sequence[int]],
        ensemble: Ensemble,
    ) -> Asked:
        """What every model would have to read of a text, which is given as to `replace`."""
        texts = {name: tuple(text) for name, text in {"": prompt, **contexts}.items()}
        return [(slot, texts[slot.context]) for slot in dict.fromkeys(self._slots_of(attributes, ensemble).values())]

    def keep(self, rows: Sequence[int], upload: Upload | None = None) -> None:
        """Let these rows go on, as rows 0, 1, ..., and no others. `upload`: as in `replace`"""
        upload = upload or Upload()
        self._renumber(rows)
        moves = self._arrange(upload)
        self.routes.find(frozenset(), upload)
        upload.send()
        self._move(moves)

    def retire(self, row: int, tokens: Sequence[int]) -> None:
        """Keep what is held of a row, whose prompt these tokens followed, for later texts that begin like it."""
        for pool in self._pools.values():
            for place, pair in enumerate(pool.pairs) if not pool.is_merged else ():
                if pair.row == row and pair.prompt:
                    text, slot = (*pair.prompt, *tokens), pair.slot
                    self._ensemble.kept.add(slot.model.reader(slot.group), text, pool.runner.cache, place)

    def forward(self, roles: Sequence[Role], tokens: Tensor, start: Tensor, *, kv_length: int) -> Tensor:
        """Feed tokens[b] at positions start[b], start[b] + 1, ... to every role; the logits behind each of them.

        tokens:    (B, q) int64
        start:     (B,) int64
        kv_length: host upper bound on start + q, at most the capacity; what lies behind costs nothing. Rows that exceed
                   it get meaningless logits and leave the others alone

        out: (R, B, q, V) in the models' dtype, in the order of `roles` but for the numbers that no row has an attribute
        of; roles of one slot are run once. Where a row has none, its logits are those of another role.
        """
        kv_length = self.recorded or self.room.limit(kv_length)
        if self._first and kv_length > self._longest_prompt:  # a row goes beyond its prompt
            self._first = {}
        route = self.routes.of(tuple(roles), frozenset(self._first))
        device, vocab_size = self._ensemble.device, self._ensemble.vocab_size
        outputs = [self._first.pop(slot) for slot in route.taken]
        for pool, places, layout, rows, shift in route.forwards:
            own, length = (tokens, start), kv_length
            if shift is not None:
                own = own if rows is None else (tokens.index_select(0, rows), start.index_select(0, rows))
                own, length, rows = shift.apply(*own), min(kv_length + shift.longest, self.room.positions), None
            with self._ensemble.observer(False):
                fed = slice(places.start, places.stop)
                outputs.append(pool.runner.forward(fed, layout, *own, length, rows, self.recorded is not None))
            self._longest = max(self._longest, length)
        # Only here: every device has its work before one of them is waited for.
        outputs = [output.to(device)[..., :vocab_size] for output in outputs]
        logits = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if route.order is not None:
            logits = logits.index_select(0, route.order)
        self._forget_beyond(kv_length)
        return logits.unflatten(0, (route.num_roles, len(self._rows)))

    def round_key(self, kv_length: int) -> tuple[Hashable, int] | None:
        """What the forwards of the next round depend on, where they feed `kv_length` positions at most, and how many
        they are to have where it is captured; None where it cannot be."""
        signature = None if self._first else self.routes.signature()
        rounded = min(bucket(self.room.limit(kv_length), CAPTURED_POSITIONS), self.room.positions)
        return None if signature is None else (signature, rounded)

    def note_fed(self, kv_length: int) -> None:
        """Note that rows have been fed up to there, not by `forward`."""
        self._longest = max(self._longest, kv_length)
        self._forget_beyond(kv_length)

    def count_rows(self, attributes: Attributes, ensemble: Ensemble) -> Counter[View]:
        """The cache rows that a text with these attributes takes, by what runs them."""
        return Counter(map(_view, set(self._slots_of(attributes, ensemble).values())))

    def stale(self) -> str | None:
        """The argument of a model that the caller has changed since rows began to be fed to it, if there is one.

        Raises ValueError where it is so changed that it must be loaded again.
        """
        runners = [pool.runner for pool in self._pools.values()]
        return next((one.loaded.argument for one in runners if one.loaded.is_stale(one.key.version)), None)

    def fit(self) -> None:
        """Give back the rows and positions that no text needs."""
        rows = {view: len(pool.pairs) for view, pool in self._pools.items() if pool.pairs}
        self.room.fit(rows, max(self._ends, default=0), self._longest)
        self._longest = min(self._longest, self.room.positions)
        self.routes.begin(self._rows)

    def close(self) -> None:
        """Leave what graphs run on to the next session of these sizes, unless NaN is left in it; this one holds no
        text any more."""
        is_spoiled = any(pair.is_spoiled for pool in self._pools.values() for pair in pool.pairs)
        for pool in () if is_spoiled else self._pools.values():
            pool.runner.loaded.leave(pool.runner)
        self._pools.clear()
        self.room.positions = 0
        self.routes.begin([])

    def blame(
        self, row: int, start: int, tokens: Sequence[int], roles: Sequence[str], ensemble: Ensemble | None = None
    ) -> str | None:
        """What made a row unusable: "the 'E' model returned NaN", of these roles and tokens the first, or None.

        Feeds the tokens to the row again, at positions start, start + 1, ... Waits for the device: for error messages
        only.
        """
        device = self._ensemble.device
        own = [(pool, [i for i, pair in enumerate(pool.pairs) if pair.row == row]) for pool in self._pools.values()]
        for pool, places in own:
            for place in places:
                pool.pairs[place].prompt, pool.pairs[place].is_spoiled = (), True
        for first in range(start, min(start + len(tokens), self.room.positions), PREFILL_TOKENS):
            part = tokens[first - start : min(first - start + PREFILL_TOKENS, self.room.positions - start)]
            largest: dict[Slot, list[float]] = {}
            for pool, places in [(pool, places) for pool, places in own if places]:
                index = torch.tensor(places, device=device)
                fed, at = torch.tensor([part] * len(places), device=device), torch.full_like(index, first)
                own_texts = [pool.pairs[place].own for place in places]
                if (shift := Shift.of(own_texts, lambda numbers: numbers.to(device))) is not None:
                    fed, at = shift.apply(fed, at)
                with self._ensemble.observer(True):  # all of the row, as a captured forward may have read it
                    layout = pool.layout(places, pool.runner.loaded.model.device)
                    logits = pool.runner.forward(index, layout, fed, at, self.room.positions)
                # NaN and +inf reach a row's maximum, -inf only where there is nothing else
                of_place = logits[..., : self._ensemble.vocab_size].amax(-1).tolist()
                largest |= zip((pool.pairs[place].slot for place in places), of_place, strict=True)
            for place in range(len(part)):
                for role in roles:
                    if not math.isfinite(value := largest[(ensemble or self._ensemble)._slots[role]][place]):
                        cause = {math.inf: "+inf", -math.inf: "nothing but -inf"}.get(value, "NaN")
                        return f"the {role!r} model returned {cause}"
        return None

    def _slots_of(self, attributes: Attributes, ensemble: Ensemble) -> dict[Role, Slot]:
        """The slots of a row with these attributes, by role."""
        return self._fixed | {role: ensemble._slots[name] for role, name in attributes.items()}

    def _renumber(self, kept: Sequence[int] | None) -> None:
        """Let these rows be 0, 1, ..., and no others be there; None changes nothing."""
        if kept is None:
            return
        numbers = {row: number for number, row in enumerate(kept)}
        self._rows, self._ends = [self._rows[row] for row in kept], [self._ends[row] for row in kept]
        for pool in self._pools.values():
            for pair in pool.pairs:
                pair.row = numbers.get(pair.row, -1)

    def _arrange(self, upload: Upload, awaited: Sequence[Awaited] = ()) -> list[tuple[Pool, Numbers]]:
        """Give every row its pairs, and every pair its place. out: what has to move for it, with `_move`"""
        self.routes.begin(self._rows)
        before = {(pair.row, pair.slot): pair for pool in self._pools.values() for pair in pool.pairs}
        pairs: dict[View, list[Pair]] = {view: [] for view in self._pools}
        for row, slots in enumerate(self._rows):
            for slot in dict.fromkeys(slots.values()):
                pairs.setdefault(_view(slot), []).append(before.get((row, slot)) or Pair(row, slot))
        for view, pool in self._pools.items():  # before any of them moves
            spoiled = [place for place, pair in enumerate(pool.pairs) if pair.is_spoiled]
            # NaN of a request that is not known to have failed may be in a spare row already
            ending = {place for place in pool.spare if spoiled or place < len(pairs[view])}
            pool.runner.cache.clear([*spoiled, *ending])
            pool.spare -= ending
        rows = Counter({view: len(of) for view, of in pairs.items()})
        for attributes, ensemble, _ in awaited:
            rows += self.count_rows(attributes, ensemble)
        self.room.grow(rows, max([*self._ends, *(end for _, _, end in awaited)], default=0), self._longest)
        found, are_unlike = [], any(slots != self._rows[0] for slots in self._rows)
        for view, of_view in pairs.items():
            pool = self._pools[view]
            of_view.sort(key=lambda pair: (pair.slot.group, pair.slot.context, pair.row))
            old = {pair: place for place, pair in enumerate(pool.pairs)}
            if are_unlike and not pool.is_merged:
                of_view = _stay(of_view, old)
            moves = [(old[pair], place) for place, pair in enumerate(of_view) if old.get(pair, place) != place]
            found.append((pool, upload.add(columns(moves))))
            pool.pairs = of_view
        return found

    def _move(self, moves: Sequence[tuple[Pool, Numbers]]) -> None:
        for pool, of_pool in moves:
            pool.runner.cache.copy(of_pool, self._longest)
        for (_, merge), pool in self._pools.items():
            if merge is not None:
                pool.runner.merge(merge.weights[: len(self._rows)] if merge.differs_by_row else merge.weights)

    def _hand_out(
        self, pool: Pool, wanted: Mapping[int, Mapping[str, tuple[int, ...]]]
    ) -> tuple[list[int], dict[int, tuple[Any, int]], list[tuple[int, int]]]:
        """Note the prompts of some rows, by context.

        out: places where theirs has to be read; as `find_beginnings`, where it begins as another one; and (from, to)
        where it is copied
        """
        holders = {
            (pair.slot.group, pair.prompt): place
            for place, pair in enumerate(pool.pairs)
            if pair.row not in wanted or wanted[pair.row][pair.slot.context] == pair.prompt
        }
        held = [pair.prompt for pair in pool.pairs]
        unread, copied = [], []
        for place, pair in enumerate(pool.pairs):
            if (texts := wanted.get(pair.row)) is None:
                continue
            prompt = texts[pair.slot.context]
            pair.own = OwnText.of(prompt, texts[""])
            if pair.slot.merge is not None and pair.slot.merge.differs_by_row:
                unread.append(place)
            elif pair.prompt != prompt:
                holder = holders.setdefault((pair.slot.group, prompt), place)
                if holder == place:
                    unread.append(place)
                else:
                    copied.append((holder, place))
            pair.prompt, pair.is_spoiled = prompt, False
        read = {place: (pair.slot.group, pair.prompt) for place, pair in enumerate(pool.pairs)}
        known = [place for place, pair in enumerate(pool.pairs) if pair.row not in wanted and not pair.is_spoiled]
        loaded, begun = pool.runner.loaded, dict[int, tuple[Any, int]]()
        if not pool.is_merged:
            begun = find_beginnings(
                read, unread, known, held, lambda group, text: self.ahead.find(loaded.reader(group), text)
            )
        lengths = {at: len(pair.prompt) - 1 for at, pair in enumerate(pool.pairs) if pair.row in wanted}
        self.ahead.count(lengths, unread, begun)
        return unread, begun, copied

    def _forget_beyond(self, kv_length: int) -> None:
        """What runs past kv_length is written at its end: among shorter rows one that has ended loses its prompt."""
        if kv_length < self._longest_prompt:
            for pair in [pair for pool in self._pools.values() for pair in pool.pairs]:
                if len(pair.prompt) - pair.own.shift > kv_length:
                    pair.prompt = ()


def _stay(pairs: Sequence[Pair], old: Mapping[Pair, int]) -> list[Pair]:
    """Pairs by slot, each where it was if that is still its slot's: of requests that are not alike one that begins or
    ends would else move most rows. Their logits are put in order of the rows in any case."""
    settled = list[Pair]()
    for _, of_slot in groupby(pairs, key=lambda pair: pair.slot):
        own = list(of_slot)
        places = range(len(settled), len(settled) + len(own))
        staying = {old[pair]: pair for pair in own if old.get(pair) in places}
        moving = iter([pair for pair in own if old.get(pair) not in places])
        settled += [staying.get(place) or next(moving) for place in places]
    return settled


def _view(slot: Slot) -> View:
    return slot.model, slot.merge
