"""The models of one combination by role (base, anchor, draft, attributes), and a session that feeds them.

Knows which model and adapter stand behind every role; nothing of targets, samplers or which tokens to keep.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mpg.models.runner import LoadedModel, ModelRunner

ROLES = BASE, ANCHOR, DRAFT = "base", "anchor", "draft"
MERGED = "merged"
PREFILL_TOKENS = 512  # of a prompt, read at once: what a forward needs beside the cache does not grow with the prompt

logger = logging.getLogger("mpg")

# What a forward runs in: called with whether it reads prompts
Observer: TypeAlias = Callable[[bool], AbstractContextManager[Any]]


@dataclass(frozen=True, eq=False)
class Merge:
    """Adapters of one model (their names and groups) that are added up with weights (B, N), or (1, N) for all rows."""

    names: Sequence[str]
    groups: Sequence[int]
    weights: Tensor


class Slot(NamedTuple):
    """A model with one of its adapters (group 0: none) or a sum of them. Roles that share a slot are the same."""

    model: LoadedModel
    group: int = 0
    merge: Merge | None = None


Pass: TypeAlias = tuple[tuple[str, ...], int]  # one forward for a sequence: the roles, and the tokens fed to each


@dataclass
class Cost:
    """What forwards cost a sequence, in three counts that are never mixed.

    model_calls: one slot in one forward is one call
    depth:       sequential model forwards
    positions:   token positions fed, over all slots
    """

    model_calls: int = 0
    depth: int = 0
    positions: int = 0


class Ensemble:
    """Loaded models by role. Attributes are read-only by convention; `open` starts decoding.

    attribute_names: in the order given to load()
    vocab_size:      the smallest of any member; what a larger one has beyond is padding
    eos_token_ids:   of the base (generation config, else config, else tokenizer)
    max_positions:   the smallest limit of any member, or None
    device, dtype:   of the base
    tokenizer:       of the base, or None
    observer:        may be set, before `open`, to what every forward is to run in
    """

    def __init__(
        self, models: Sequence[LoadedModel], slots: Mapping[str, Slot], attribute_names: tuple[str, ...]
    ) -> None:
        self._models = models
        self._slots = dict(slots)
        base = models[0]
        self.attribute_names = attribute_names
        self.vocab_size: int = min(model.vocab_size for model in models)
        self.tokenizer = base.tokenizer
        self.eos_token_ids = base.eos_token_ids
        limits = [model.max_positions for model in models if model.max_positions is not None]
        self.max_positions: int | None = min(limits, default=None)
        self.device, self.dtype = base.model.device, base.model.dtype
        self.observer: Observer = nullcontext

    def is_same(self, role_a: str, role_b: str) -> bool:
        """Whether two roles are one model with one adapter, so that one row serves both."""
        return self._slots[role_a] == self._slots[role_b]

    def with_roles(self, **roles: str) -> Ensemble:
        """The same loaded models in other roles: `with_roles(base="E")` has the model of E for its base."""
        twin = copy.copy(self)
        twin._slots = self._slots | {role: self._slots[source] for role, source in roles.items()}
        return twin

    def merge(self, attributes: Sequence[str], weights: Tensor) -> Ensemble:
        """The same loaded models with one more role: "merged", the weighted sum of LoRA adapters.

        weights: (B, N), or (1, N) for all rows alike: a of these N attributes; every row of a session computes
                 base(x) + sum_i a_i (x A_i) B_i with weights of its own, as the tensor has them when rows are replaced;
                 no matrices are merged

        Raises ValueError unless the attributes are adapters of one model.
        """
        if not attributes:
            raise ValueError("draft 'merged', method 'soups': expected attributes with a weight to merge, got none")
        slots = [self._slots[name] for name in attributes]
        for name, slot in zip(attributes, slots, strict=True):
            if slot.model is not slots[0].model or slot.group == 0:
                wanted = "attributes that are LoRA adapters of one model"
                raise ValueError(f"draft 'merged', method 'soups': expected {wanted}, {name!r} is another model")
        twin = self.with_roles()
        merge = Merge(attributes, [slot.group for slot in slots], weights)
        twin._slots[MERGED] = Slot(slots[0].model, merge=merge)
        return twin

    def cost(self, passes: Mapping[Pass, int], opened: Sequence[str]) -> Cost:
        """What passes, each so many times, cost a sequence in a session of these roles and no others."""
        cost, views = Cost(), self._views(opened)
        for (roles, num_tokens), times in passes.items():
            fed = {self._slots[role] for role in roles}
            cost.model_calls += times * len(fed)
            cost.depth += times * sum(len(_runs(view, fed)) for view in views)
            cost.positions += times * len(fed) * num_tokens
        return cost

    def describe(self) -> dict[str, dict[str, Any]]:
        """Per role: source, model_type, parameters, device, adapter (its source, or None) and adapter_rank."""
        described = {}
        for role, (loaded, group, merge) in self._slots.items():
            adapter = loaded.adapters[group - 1] if group else None
            described[role] = {
                "source": loaded.source + (f" with the sum of {', '.join(merge.names)}" if merge else ""),
                "model_type": loaded.model.config.model_type,
                "parameters": loaded.num_parameters,
                "device": ", ".join(map(str, loaded.devices)),
                "adapter": adapter.source if adapter else None,
                "adapter_rank": adapter.rank if adapter else None,
            }
        return described

    def open(self, prompts: Sequence[Sequence[int]], roles: Sequence[str], capacity: int) -> Session:
        """Start a session: caches for these roles, holding every prompt but its last token, which is yet to be fed.

        prompts:  B sequences of token ids
        roles:    the roles that will be fed; no other model runs
        capacity: positions per sequence, those of drafted tokens included

        Raises ValueError for an empty prompt, a token outside the vocabulary, an unknown role, and a capacity that the
        prompts do not fit into or that exceeds max_positions; MemoryError where the caches would not fit.
        """
        longest = max((len(prompt) for prompt in prompts), default=0)
        if unknown := [role for role in roles if role not in self._slots]:
            raise ValueError(f"roles: expected some of {list(self._slots)}, got {unknown[0]!r}")
        if not roles or not prompts:
            raise ValueError(f"prompts, roles: expected at least one of each, got {len(prompts)} and {len(roles)}")
        for index, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompts[{index}]: expected at least one token, got none")
            if wrong := [token for token in prompt if not 0 <= token < self.vocab_size]:
                raise ValueError(f"prompts[{index}]: expected token ids below {self.vocab_size}, got {wrong[0]}")
        if longest > capacity or (self.max_positions is not None and capacity > self.max_positions):
            wanted = f"{longest} (the longest prompt) to {self.max_positions or 'any number of'} positions"
            raise ValueError(f"capacity: expected {wanted}, got {capacity}")
        for loaded in {self._slots[role].model for role in roles}:
            loaded.follow()
        return Session(self, prompts, roles, capacity)

    def refresh(self) -> None:
        """Read the caller's models again, whether they were seen to change or not."""
        for loaded in self._models:
            loaded.follow(always=True)

    def cache_bytes(self, roles: Sequence[str], num_rows: int, capacity: int) -> int:
        """What the caches of a session take: keys and values of every slot behind the roles."""
        return sum(view[0].model.cache_bytes(len(view), num_rows, capacity) for view in self._views(roles))

    def graph_bytes(self) -> int:
        """What captured graphs have taken beside the caches of their sessions, idle ones and others."""
        return sum(model.graph_bytes() for model in self._models)

    def drop_idle(self) -> bool:
        """Free the oldest idle caches and graphs of a model; whether there were any."""
        return any(model.drop_idle() for model in self._models)

    def _views(self, roles: Sequence[str]) -> list[tuple[Slot, ...]]:
        """The slots behind the roles, by what one runner runs: those of one model, and each sum by itself."""

        def place(slot: Slot) -> tuple[bool, int, int]:
            return slot.merge is not None, self._models.index(slot.model), slot.group

        slots = sorted({self._slots[role] for role in roles}, key=place)
        return [tuple(view) for _, view in groupby(slots, key=lambda slot: (slot.model, slot.merge))]

    def _open_runners(self, roles: Sequence[str], num_rows: int, capacity: int) -> dict[tuple[Slot, ...], ModelRunner]:
        """A runner of each view with a cache of these sizes: idle ones where there are, else new ones."""
        keys = {}
        for view in self._views(roles):
            model, _, merge = view[0]
            groups = [slot.group for slot in view] if merge is None else merge.groups
            keys[view] = model.runner_key(groups, merge is not None, num_rows, capacity)
        runners = {view: view[0].model.take(key) for view, key in keys.items()}
        self._check_memory([view for view, runner in runners.items() if runner is None], num_rows, capacity)
        return {view: runner or ModelRunner(view[0].model, keys[view]) for view, runner in runners.items()}

    def _check_memory(self, views: Sequence[tuple[Slot, ...]], num_rows: int, capacity: int) -> None:
        """Report what new caches will take, device by device, and raise MemoryError where there is not as much once
        idle ones have been dropped. `views`: those that need one"""
        for devices in {view[0].model.devices for view in views}:
            new = [view for view in views if view[0].model.devices == devices]
            needed = sum(view[0].model.cache_bytes(len(view), num_rows, capacity) for view in new)
            while needed > (available := self._room(devices)) and self.drop_idle():
                logger.info("idle caches and graphs were dropped to make room")
            num_slots = sum(map(len, new))
            sizes = f"key/value caches of {num_rows} rows x {capacity} positions x {num_slots} models and adapters"
            logger.info("%s: %.1f MiB of %.0f MiB", sizes, needed / 2**20, available / 2**20)
            if needed > available:
                raise MemoryError(
                    f"batch_size, max_new_tokens: the {sizes} take {needed / 2**30:.1f} GiB, expected at most "
                    f"{available / 2**30:.1f} GiB on {', '.join(map(str, devices))}; lower either, or load with "
                    f"dtype='bfloat16'"
                )

    def _room(self, devices: Sequence[torch.device]) -> float:
        """Bytes that new caches can take: what is available, but for what graphs keep to themselves."""
        kept = sum(model.graph_bytes() for model in self._models if set(model.devices) & set(devices))
        return sum(_available_bytes(device) for device in devices) - kept


class Session:
    """The caches of B sequences for some roles. Made by Ensemble.open.

    Positions before a forward's start must have been fed before; feeding a position again replaces what was there, so
    rejecting tokens is starting earlier. No forward starts before the last token of a row's prompt, which every role's
    first forward feeds: where prompts of one length fill all rows, it has been read with them.
    """

    def __init__(
        self, ensemble: Ensemble, prompts: Sequence[Sequence[int]], roles: Sequence[str], capacity: int
    ) -> None:
        self._device, self._vocab_size = ensemble.device, ensemble.vocab_size
        self._slots = {role: ensemble._slots[role] for role in roles}
        self._capacity = capacity
        self._prompts: list[tuple[int, ...]] = [()] * len(prompts)  # that rows hold; () where none is sure to be whole
        self._spoiled: set[int] = set()  # rows whose caches may hold NaN
        self._first: dict[Slot, Tensor] = {}  # logits (B, 1, V) behind the prompts, until a slot's first forward
        self._observe = ensemble.observer
        self._runners = ensemble._open_runners(roles, len(prompts), capacity)
        self.replace(range(len(prompts)), prompts)

    def replace(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Let some rows hold these prompts but for their last tokens, whatever was there.

        A prompt is read once, or not at all where a row has it still, and copied. Only a merged model, which is another
        one in every row, reads each of them.
        """
        wanted = {row: tuple(prompt) for row, prompt in zip(rows, prompts, strict=True)}
        holder = {prompt: row for row, prompt in enumerate(self._prompts) if wanted.get(row, prompt) == prompt}
        unread = []
        for row, prompt in wanted.items():
            self._prompts[row] = prompt
            if prompt not in holder:
                holder[prompt] = row
                unread.append(row)
        copied = [row for row, prompt in wanted.items() if holder[prompt] != row]
        sources = [holder[wanted[row]] for row in copied]
        num_copied = max((len(wanted[row]) - 1 for row in copied), default=0)
        self._first = {}
        is_whole = unread == list(range(len(self._prompts))) and len({len(prompt) for prompt in prompts}) == 1
        for view, runner in self._runners.items():
            runner.clear(list(self._spoiled & wanted.keys()))
            slot = view[0]
            if slot.merge is not None:
                runner.merge(slot.merge.weights)
            if slot.merge is not None and len(slot.merge.weights) > 1:
                logits = self._read(runner, list(rows), is_whole)
            else:
                logits = self._read(runner, unread, is_whole)
                runner.copy(sources, copied, num_copied)
            if is_whole:
                self._first |= zip(view, logits, strict=True)
        self._spoiled -= wanted.keys()

    def _read(self, runner: ModelRunner, rows: list[int], is_whole: bool) -> Any:
        """Feed the prompts of some rows to a model, but for their last tokens unless `is_whole`.

        out: the logits (G, len(rows), 1, V) behind what was fed last, None where that is nothing
        """
        prompts, logits = [self._prompts[row] for row in rows], None
        width = max((len(prompt) for prompt in prompts), default=1) - (not is_whole)
        # right-padded: what a short row writes behind its end is written again before it is seen
        padded = [[*prompt, *[0] * (width - len(prompt))][:width] for prompt in prompts]
        tokens = torch.tensor(padded, dtype=torch.int64, device=self._device)
        index = torch.tensor(rows, device=self._device)
        of_rows = None if rows == list(range(runner.num_rows)) else index
        for first in range(0, width, PREFILL_TOKENS):
            part = tokens[:, first : first + PREFILL_TOKENS]
            kv_length = first + part.shape[1]
            start = torch.full_like(index, first)
            with self._observe(True):
                logits = runner.forward(range(runner.num_groups), part, start, kv_length, of_rows, logits_to_keep=1)
        return logits

    def forward(self, roles: Sequence[str], tokens: Tensor, start: Tensor, *, kv_length: int) -> Tensor:
        """Feed tokens[b] at positions start[b], start[b] + 1, ... to every role; the logits behind each of them.

        tokens:    (B, q) int64
        start:     (B,) int64
        kv_length: host upper bound on start + q, at most the capacity; what lies behind costs nothing. Rows that exceed
                   it get meaningless logits and leave the others alone

        out: (len(roles), B, q, V) in the models' dtype, in the order of `roles`; roles of one slot are run once
        """
        wanted = [self._slots[role] for role in roles]
        if self._first and kv_length > len(self._prompts[0]):  # a row goes beyond its prompt
            self._first = {}
        order = [slot for slot in self._first if slot in wanted]
        outputs = [self._first.pop(slot)[None] for slot in order]
        unknown = [slot for slot in wanted if slot not in order]
        for view, runner in self._runners.items():
            for places in _runs(view, unknown):
                with self._observe(False):
                    outputs.append(runner.forward(places, tokens, start, kv_length))
                order += view[places.start : places.stop]
        # Only here: every device has its work before one of them is waited for.
        outputs = [output.to(self._device)[..., : self._vocab_size] for output in outputs]
        if len(outputs) == 1 and order == wanted:
            logits = outputs[0]
        else:
            rows_of = dict(zip(order, (row for output in outputs for row in output), strict=True))
            logits = torch.stack([rows_of[slot] for slot in wanted])
        # What runs past kv_length is written at its end: a row that has ended, among shorter ones, loses its prompt.
        self._prompts = [prompt if len(prompt) <= kv_length else () for prompt in self._prompts]
        return logits

    def close(self) -> None:
        """Leave what graphs run on to the next session of these sizes, unless NaN is left in it; this one is over."""
        for runner in () if self._spoiled else self._runners.values():
            runner.loaded.leave(runner)
        self._runners = {}

    def blame(self, row: int, start: int, tokens: Sequence[int], roles: Sequence[str]) -> str | None:
        """What made a row unusable: "the 'E' model returned NaN", of these roles and tokens the first, or None.

        Feeds the tokens to the row again, at positions start, start + 1, ... Waits for the device: for error messages
        only.
        """
        self._spoiled.add(row)
        self._prompts[row] = ()
        index = torch.tensor([row], device=self._device)
        for first in range(start, min(start + len(tokens), self._capacity), PREFILL_TOKENS):
            part = tokens[first - start : min(first - start + PREFILL_TOKENS, self._capacity - start)]
            fed, at = torch.tensor([part], device=self._device), torch.full_like(index, first)
            largest: dict[Slot, list[float]] = {}
            for view, runner in self._runners.items():
                with self._observe(True):  # all of the row, as a captured forward may have read it
                    logits = runner.forward(range(runner.num_groups), fed, at, self._capacity, index)
                # NaN and +inf reach a row's maximum, -inf only where there is nothing else
                largest |= zip(view, logits[:, 0, :, : self._vocab_size].amax(-1).tolist(), strict=True)
            for place in range(len(part)):
                for role in roles:
                    if not math.isfinite(value := largest[self._slots[role]][place]):
                        cause = {math.inf: "+inf", -math.inf: "nothing but -inf"}.get(value, "NaN")
                        return f"the {role!r} model returned {cause}"
        return None


def _runs(view: Sequence[Slot], slots: Collection[Slot]) -> list[range]:
    """Where some slots stand in a view, as runs of neighbours: places 0, 1 and 3 are range(0, 2) and range(3, 4)."""
    places = [place for place, slot in enumerate(view) if slot in slots]
    starts = [place for place in places if place - 1 not in places]
    stops = [place + 1 for place in places if place + 1 not in places]
    return list(map(range, starts, stops))


def _available_bytes(device: torch.device) -> float:
    """Memory that a session could take: what is free on a GPU, on the CPU all that the machine has."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if device.type == "cpu" else math.inf
