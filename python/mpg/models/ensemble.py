"""The models of one combination by role (base, anchor, draft, attributes), and a session that feeds them.

Knows which model and adapter stand behind every role; nothing of targets, samplers or which tokens to keep.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mpg.models.runner import Member, OpenMember

ROLES = BASE, ANCHOR, DRAFT = "base", "anchor", "draft"
MERGED = "merged"
PREFILL_TOKENS = 512  # of a prompt, read at once: what a forward needs beside the cache does not grow with the prompt

logger = logging.getLogger("mpg")

Slot = tuple[int, int]  # (model, group of its adapter stack); roles that share a slot are one and the same


@dataclass
class Cost:
    """What a session has run since it was opened, prefill left out; three counts that are never mixed.

    model_calls: one slot in one forward is one call
    depth:       sequential model forwards
    positions:   token positions fed, per sequence, over all slots
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
    """

    def __init__(self, members: Sequence[Member], slots: Mapping[str, Slot], attribute_names: tuple[str, ...]) -> None:
        self._members = members
        self._slots = dict(slots)
        model = members[0].model
        self.attribute_names = attribute_names
        self.vocab_size: int = min(member.vocab_size for member in members)
        self.tokenizer = members[0].tokenizer
        self.eos_token_ids = members[0].eos_token_ids
        limits = [member.max_positions for member in members]
        self.max_positions: int | None = min((limit for limit in limits if limit is not None), default=None)
        self.device, self.dtype = model.device, model.dtype

    def is_same(self, role_a: str, role_b: str) -> bool:
        """Whether two roles are one model with one adapter, so that one row serves both."""
        return self._slots[role_a] == self._slots[role_b]

    def with_roles(self, **roles: str) -> Ensemble:
        """The same loaded models in other roles: `with_roles(base="E")` has the model of E for its base."""
        twin = copy.copy(self)
        twin._slots = self._slots | {role: self._slots[source] for role, source in roles.items()}
        return twin

    def merge(self, attributes: Sequence[str], shares: Tensor) -> Ensemble:
        """The same loaded models with one more role: "merged", the weighted sum of LoRA adapters.

        shares: (B, N), or (1, N) for all rows alike: weights a of these N attributes; every row of a session computes
                base(x) + sum_i a_i (x A_i) B_i with weights of its own, as the tensor has them when rows are replaced;
                no weights are merged

        Raises ValueError unless the attributes are adapters of one model.
        """
        slots = [self._slots[name] for name in attributes]
        for name, (index, group) in zip(attributes, slots, strict=True):
            if index != slots[0][0] or group == 0:
                wanted = "attributes that are LoRA adapters of one model"
                raise ValueError(f"draft 'merged', method 'soups': expected {wanted}, {name!r} is another model")
        if not slots:
            raise ValueError("draft 'merged', method 'soups': expected attributes with a weight to merge, got none")
        host, groups = self._members[slots[0][0]], [group for _, group in slots]
        source = f"{host.source} with the sum of {', '.join(attributes)}"
        twin = self.with_roles()
        twin._members = [*self._members, replace(host, source=source, adapters=[], merged=(groups, shares))]
        twin._slots[MERGED] = (len(self._members), 0)
        return twin

    def describe(self) -> dict[str, dict[str, Any]]:
        """Per role: source, model_type, parameters, device, adapter (its source, or None) and adapter_rank."""
        described = {}
        for role, (index, group) in self._slots.items():
            member = self._members[index]
            adapter = member.adapters[group - 1] if group else None
            described[role] = {
                "source": member.source,
                "model_type": member.model.config.model_type,
                "parameters": member.num_parameters,
                "device": ", ".join(map(str, member.devices)),
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
        return Session(self, prompts, roles, capacity)

    def cache_bytes(self, roles: Sequence[str], num_rows: int, capacity: int) -> int:
        """What the caches of a session take: keys and values of every slot behind the roles."""
        groups = self._groups(roles)
        return sum(self._members[index].cache_bytes(len(groups[index]), num_rows, capacity) for index in groups)

    def graph_bytes(self) -> int:
        """What captured graphs have taken beside the caches of their sessions, idle ones and others."""
        return _graph_bytes(self._members)

    def drop_idle(self) -> bool:
        """Free the oldest idle caches and graphs of a model; whether there were any."""
        return any(member.workspaces.drop() for member in self._members)

    def _groups(self, roles: Sequence[str]) -> dict[int, list[int]]:
        """The models behind the roles, each with the groups of its adapters."""
        slots = sorted({self._slots[role] for role in roles})
        return {index: [group for owner, group in slots if owner == index] for index, _ in slots}

    def _open_members(self, roles: Sequence[str], num_rows: int, capacity: int) -> dict[int, OpenMember]:
        """The models behind the roles with caches of these sizes: idle ones where there are, else new ones."""
        groups = self._groups(roles)
        opened = {index: OpenMember.take(self._members[index], groups[index], num_rows, capacity) for index in groups}
        self._check_memory({index: groups[index] for index in groups if opened[index] is None}, num_rows, capacity)
        return {
            index: member or OpenMember(self._members[index], groups[index], num_rows, capacity)
            for index, member in opened.items()
        }

    def _check_memory(self, groups: Mapping[int, list[int]], num_rows: int, capacity: int) -> None:
        """Report what new caches will take, device by device, and raise MemoryError where there is not as much once
        idle ones have been dropped. `groups`: of the models that need one"""
        for devices in {self._members[index].devices for index in groups}:
            new = {index: groups[index] for index in groups if self._members[index].devices == devices}
            needed = sum(self._members[index].cache_bytes(len(new[index]), num_rows, capacity) for index in new)
            while needed > (available := self._room(devices)) and self.drop_idle():
                logger.info("idle caches and graphs were dropped to make room")
            num_slots = sum(map(len, new.values()))
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
        here = [member for member in self._members if set(member.devices) & set(devices)]
        return sum(_available_bytes(device) for device in devices) - _graph_bytes(here)


class Session:
    """The caches of B sequences for some roles. Made by Ensemble.open; `cost` is a running total.

    Positions before a forward's start must have been fed before; feeding a position again replaces what was there, so
    rejecting tokens is starting earlier. No forward starts before the last token of a row's prompt.
    """

    def __init__(
        self, ensemble: Ensemble, prompts: Sequence[Sequence[int]], roles: Sequence[str], capacity: int
    ) -> None:
        self.cost = Cost()
        self._device, self._vocab_size = ensemble.device, ensemble.vocab_size
        self._slots = {role: ensemble._slots[role] for role in roles}
        self._is_bad = {role: torch.zeros(len(prompts), dtype=torch.bool, device=ensemble.device) for role in roles}
        self._prompts: list[tuple[int, ...]] = [()] * len(prompts)  # that rows hold; () where none is sure to be whole
        self._members = ensemble._open_members(roles, len(prompts), capacity)
        self.replace(range(len(prompts)), prompts)

    def replace(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Let some rows hold these prompts but for their last tokens, whatever was there. Counts in no cost.

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
        for is_bad in self._is_bad.values():
            is_bad[list(rows)] = False
        for member in self._members.values():
            member.read_shares()
            if member.is_one_model_a_row():
                self._read(member, list(rows))
            else:
                self._read(member, unread)
                member.copy(sources, copied, num_copied)

    def _read(self, member: OpenMember, rows: list[int]) -> None:
        """Feed the prompts of some rows, but for their last tokens, to a model."""
        prompts = [self._prompts[row] for row in rows]
        width = max((len(prompt) for prompt in prompts), default=1) - 1
        # right-padded: what a short row writes behind its end is written again before it is seen
        padded = [[*prompt[:-1], *[0] * (width + 1 - len(prompt))] for prompt in prompts]
        tokens = torch.tensor(padded, dtype=torch.int64, device=self._device)
        index = torch.tensor(rows, device=self._device)
        sequences = None if rows == list(range(member.batch)) else index
        for first in range(0, width, PREFILL_TOKENS):
            part = tokens[:, first : first + PREFILL_TOKENS]
            kv_length = first + part.shape[1]
            start = torch.full_like(index, first)
            member.forward(0, len(member.groups), part, start, kv_length, sequences, logits_to_keep=1)

    def forward(self, roles: Sequence[str], tokens: Tensor, start: Tensor, *, kv_length: int) -> Tensor:
        """Feed tokens[b] at positions start[b], start[b] + 1, ... to every role; the logits behind each of them.

        tokens:    (B, q) int64
        start:     (B,) int64
        kv_length: host upper bound on start + q, at most the capacity; what lies behind costs nothing. Rows that exceed
                   it get meaningless logits and leave the others alone

        out: (len(roles), B, q, V) in the models' dtype, in the order of `roles`; roles of one slot are run once
        """
        wanted = [self._slots[role] for role in roles]
        outputs: list[Tensor] = []
        order: list[Slot] = []
        for index, member in self._members.items():
            rows = sorted({member.groups.index(group) for owner, group in wanted if owner == index})
            for low, high in _runs(rows):
                outputs.append(member.forward(low, high, tokens, start, kv_length))
                order += [(index, group) for group in member.groups[low:high]]
        # Only here: every device has its work before one of them is waited for.
        outputs = [output.to(self._device)[..., : self._vocab_size] for output in outputs]
        self.cost.depth += len(outputs)
        self.cost.model_calls += len(order)
        self.cost.positions += len(order) * tokens.shape[1]
        if len(outputs) == 1 and order == wanted:
            logits = outputs[0]
        else:
            rows_of = dict(zip(order, (row for output in outputs for row in output), strict=True))
            logits = torch.stack([rows_of[slot] for slot in wanted])
        # What runs past kv_length is written at its end: a row that has ended, among shorter ones, loses its prompt.
        self._prompts = [prompt if len(prompt) <= kv_length else () for prompt in self._prompts]
        # NaN and +inf reach a row's maximum, -inf only where there is nothing else.
        is_bad = ~logits.amax(-1).isfinite().all(-1)  # (roles, B)
        for role, rows in zip(roles, is_bad, strict=True):
            self._is_bad[role] |= rows
        return logits

    def close(self) -> None:
        """Leave what graphs run on to the next session of these sizes; this one is over."""
        for member in self._members.values():
            member.leave()
        self._members = {}

    def blame(self, row: int | None = None) -> str | None:
        """The first role that has returned NaN, +inf or nothing but -inf since the session was opened, or None.

        row: the sequence to look at, default all

        Waits for the device: for error messages only.
        """
        rows = slice(None) if row is None else row
        return next((role for role, is_bad in self._is_bad.items() if is_bad[rows].any()), None)


def _graph_bytes(members: Sequence[Member]) -> int:
    return sum(workspaces.graph_bytes() for workspaces in {member.workspaces for member in members})


def _runs(rows: list[int]) -> list[tuple[int, int]]:
    """Ascending rows as half-open runs of neighbours: [0, 1, 3] is [(0, 2), (3, 4)]."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return runs


def _available_bytes(device: torch.device) -> float:
    """Memory that a session could take: what is free on a GPU, on the CPU all that the machine has."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if device.type == "cpu" else math.inf
