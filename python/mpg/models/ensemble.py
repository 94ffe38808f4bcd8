"""The models of one combination by role: base, anchor, draft, attributes.

Knows which model and adapter stand behind every role; nothing of targets, samplers or which tokens to keep.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mpg.context import Context
from mpg.models.graphs import Graphs, bucket
from mpg.models.idle import Idle
from mpg.models.kept import Kept
from mpg.models.pool import View
from mpg.models.runner import LoadedModel, Merge, ModelRunner, Slot
from mpg.models.session import Role, Session

ROLES = BASE, ANCHOR, DRAFT = "base", "anchor", "draft"
MERGED = "merged"
KEPT_SHARE = 1 / 16  # of a device's memory, that texts kept for later ones may take

logger = logging.getLogger("mpg")

# What a forward runs in: called with whether it reads prompts
Observer: TypeAlias = Callable[[bool], AbstractContextManager[Any]]

Pass: TypeAlias = tuple[tuple[Role, ...], int]  # one forward for a sequence: the roles, and the tokens fed to each


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
    contexts:        of attributes, and of the anchor, that read something else than the prompt
    observer:        may be set, before `open`, to what every forward is to run in; no round is then captured
    idle:            what calls have left for later ones
    """

    def __init__(
        self,
        models: Sequence[LoadedModel],
        slots: Mapping[str, Slot],
        attribute_names: tuple[str, ...],
        contexts: Mapping[str, Context] = MappingProxyType({}),
    ) -> None:
        self._models, self.contexts = models, contexts
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
        self.idle: Idle[Any] = Idle()
        self._process = os.getpid()
        self.kept = Kept(KEPT_SHARE * available_bytes(self.device) if self.device.type in ("cpu", "cuda") else 0)

    def is_same(self, role_a: str, role_b: str) -> bool:
        """Whether two roles are one model with one adapter, so that one row serves both."""
        return self._slots[role_a] == self._slots[role_b]

    def with_roles(self, **roles: str) -> Ensemble:
        """The same loaded models in other roles: `with_roles(base="E")` has the model of E for its base."""
        twin = copy.copy(self)
        twin._slots = self._slots | {role: self._slots[source] for role, source in roles.items()}
        return twin

    def with_contexts(self, of_prompts: Sequence[Mapping[str, Context]]) -> Ensemble:
        """The same loaded models with the contexts of a call, of every prompt its own; new names are attributes too.

        Raises ValueError, naming contexts and the name, for a source that is no attribute, for another one than it has
        in other prompts or was loaded with, and for an attribute that is an adapter or a model without saying so.
        """
        twin, sources = self.with_roles(), dict[str, Any]()
        for name, context in [item for of_prompt in of_prompts for item in of_prompt.items()]:
            if self.contexts.get(name) is context:
                continue
            argument, known = f"contexts[{name!r}]", [BASE, *self.attribute_names]
            if not isinstance(name, str) or not name.strip() or name in (*ROLES, MERGED):
                wanted = f"text as a name, and none of {', '.join((*ROLES, MERGED))}"
                raise ValueError(f"{argument}: expected {wanted}, got {name!r}")
            source = context.source if context.source is not None else BASE
            if name in self.contexts and context.source is None:
                source = name
            elif not isinstance(source, str) or source not in known or source in self.contexts:
                wanted = f"{' or '.join(n for n in known if n not in self.contexts)}; others are given to mpg.load"
                raise ValueError(f"{argument}: source: expected {wanted}, got {source!r}")
            if name in self.attribute_names and name not in self.contexts and source != name:
                way_out = f"Context(..., source={name!r})"
                raise ValueError(
                    f"{argument}: {name!r} is an adapter or a model already; to let it read this: {way_out}"
                )
            if sources.setdefault(name, source) != source:
                raise ValueError(
                    f"{argument}: expected one source for all prompts, got {sources[name]!r} and {source!r}"
                )
            twin._slots[name] = self._slots[source]._replace(context=name)
        twin.contexts = {
            **self.contexts,
            **{name: context for of_prompt in of_prompts for name, context in of_prompt.items()},
        }
        twin.attribute_names = tuple(dict.fromkeys((*self.attribute_names, *sources)))
        return twin

    def contexts_of(self, roles: Collection[str]) -> list[str]:
        """The names of the contexts that these roles read."""
        read = {self._slots[role].context for role in roles}
        return [name for name in self.contexts if name in read]

    def merge(self, attributes: Sequence[str], weights: Tensor, *, is_draft: bool = False) -> Ensemble:
        """The same loaded models with one more role: "merged", the weighted sum of LoRA adapters.

        weights: (B, N), or (N,) for all rows alike: a of these N attributes; every row of a session computes
                 base(x) + sum_i a_i (x A_i) B_i with weights of its own, as the tensor has them when rows are replaced;
                 no matrices are merged
        is_draft: whether it may run on the copy in four bits that is the draft, where that has the same adapters

        Raises ValueError unless the attributes are adapters of one model.
        """
        if not attributes:
            raise ValueError("draft 'merged', method 'soups': expected LoRA adapters with a weight to merge, got none")
        slots = [self._slots[name] for name in attributes]
        for name, slot in zip(attributes, slots, strict=True):
            if slot.model is not slots[0].model or slot.group == 0 or slot.context:
                got = "a context" if slot.context else "another model"
                wanted = "attributes that are LoRA adapters of one model"
                raise ValueError(f"draft 'merged', method 'soups': expected {wanted}, {name!r} is {got}")
        twin, model = self.with_roles(), slots[0].model
        if is_draft and self._slots[DRAFT].model.adapters:  # the same ones: they attach to one model
            model = self._slots[DRAFT].model
        twin._slots[MERGED] = Slot(model, 1, Merge(attributes, [slot.group for slot in slots], weights))
        return twin

    def cost(self, passes: Mapping[tuple[tuple[str, ...], int], int], opened: Sequence[str]) -> Cost:
        """What passes, each so many times, cost a sequence in a session of these roles and no others."""
        cost, views = Cost(), self._views(opened)
        for (roles, num_tokens), times in passes.items():
            fed = {self._slots[role] for role in roles}
            cost.model_calls += times * len(fed)
            cost.depth += times * sum(len(_runs(view, fed)) for view in views)
            cost.positions += times * len(fed) * num_tokens
        return cost

    def describe(self) -> dict[str, dict[str, Any]]:
        """Source, model_type, parameters, device, adapter (its source, or None) and adapter_rank of each role."""
        described = {}
        for role, (loaded, group, merge, _) in self._slots.items():
            adapter = loaded.adapters[group - 1] if group and merge is None else None
            described[role] = {
                "source": loaded.source + (f" with the sum of {', '.join(merge.names)}" if merge else ""),
                "model_type": loaded.model.config.model_type,
                "parameters": loaded.num_parameters,
                "device": ", ".join(map(str, loaded.devices)),
                "adapter": adapter.source if adapter else None,
                "adapter_rank": adapter.rank if adapter else None,
            }
        return described

    def open(
        self,
        prompts: Sequence[Sequence[int]],
        roles: Sequence[Role],
        capacity: int,
        *,
        contexts: Sequence[Mapping[str, Sequence[int]]] | None = None,
        num_rows: int | None = None,
        expected: Sequence[Mapping[Role, str]] = (),
        together: Sequence[tuple[Role, ...]] = (),
    ) -> Session:
        """Start a session: caches for these roles, holding every prompt but its last token, which is yet to be fed.

        prompts:  B sequences of token ids
        roles:    the roles that will be fed; no other model runs. Numbers are the attributes of each prompt: as there
                  are none yet, prompts come later, with `replace`
        capacity: positions per sequence, those of drafted tokens included
        contexts: of every prompt, what roles of these names read in its place
        num_rows, expected: sequences that there will be at once, and the attributes by role of any that are known:
                  caches have room for as many, and grow where others need more; default the prompts. Without either,
                  caches grow from nothing to what the sequences need that are there
        together: of the roles those that forwards will feed, as far as is known: they are prepared with the prompts

        Raises ValueError for an empty prompt, a token outside the vocabulary, an unknown role, and a capacity that the
        prompts do not fit into or that exceeds max_positions; MemoryError where the caches would not fit; RuntimeError
        in a process that was forked after the models were loaded.
        """
        texts = [*prompts, *(text for of_prompt in contexts or () for text in of_prompt.values())]
        longest = max(map(len, texts), default=0)
        if unknown := [role for role in roles if isinstance(role, str) and role not in self._slots]:
            raise ValueError(f"roles: expected some of {list(self._slots)}, got {unknown[0]!r}")
        if not roles or not (prompts or num_rows):
            raise ValueError(f"prompts, roles: expected at least one of each, got {len(prompts)} and {len(roles)}")
        for index, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompts[{index}]: expected at least one token, got none")
            if wrong := [token for token in prompt if not 0 <= token < self.vocab_size]:
                raise ValueError(f"prompts[{index}]: expected token ids below {self.vocab_size}, got {wrong[0]}")
        if longest > capacity or (self.max_positions is not None and capacity > self.max_positions):
            wanted = f"{longest} (the longest prompt) to {self.max_positions or 'any number of'} positions"
            raise ValueError(f"capacity: expected {wanted}, got {capacity}")
        # without a list of them, any attribute may be asked for
        attributes = {name for of_text in expected for name in of_text.values()} or set(
            self.attribute_names if num_rows else ()
        )
        named = [role for role in roles if isinstance(role, str)]
        self._follow({self._slots[name].model for name in (*named, *attributes)})
        expected = expected or [{}] * bool(prompts)
        session = Session(self, roles, capacity, num_rows or len(prompts), expected, together)
        if prompts:
            session.replace(range(len(prompts)), prompts, contexts=contexts)
        return session

    def rows_to_run(self, num_rows: int, most: int) -> int:
        """Rows that are run for so many, of so many at most: few sizes where forwards are captured, each size anew."""
        if num_rows == 0 or all(model.new_capture is None for model in self._models):
            return num_rows
        return min(1 << (num_rows - 1).bit_length(), bucket(most, 1))

    def call_key(self, capacity: int) -> tuple[Hashable, int] | None:
        """What calls must agree in, beside what they ask for, to take what others have left, once the caller's changes
        are taken over; and the capacity rounded up as that of caches is. None where no round is captured."""
        if not self._captures_rounds():
            return None
        self._follow(self._models)
        keys = tuple(model.runner_key((), 0, capacity) for model in self._models)
        return (keys, tuple(self._slots.items()), self.attribute_names), min(key.capacity for key in keys)

    def refresh(self) -> None:
        """Read the caller's models again, whether they were seen to change or not."""
        self._follow(self._models, always=True)

    def _follow(self, models: Collection[LoadedModel], always: bool = False) -> None:
        """Take over what the caller has changed, before anything runs and any lock is taken."""
        if os.getpid() != self._process:  # where torch would wait for threads, and locks be held, that it does not have
            raise RuntimeError(
                f"model: expected the process {self._process} that loaded it, got {os.getpid()}, a fork of it; load it "
                "there, or start processes with 'spawn'"
            )
        if any([loaded.follow(always) for loaded in models]):
            self.idle.clear()

    def cache_bytes(self, roles: Sequence[str], num_rows: int, capacity: int) -> int:
        """What the caches of a session take: keys and values of every slot behind the roles."""
        return sum(view[0].model.cache_bytes(len(view) * num_rows, capacity) for view in self._views(roles))

    def graph_bytes(self) -> int:
        """What captured graphs have taken beside the caches of their sessions, idle ones and others."""
        return sum(model.graph_bytes() for model in self._models)

    def new_graphs(self) -> Graphs | None:
        """Graphs for rounds of these models; None where these are not captured."""
        base = self._models[0]
        if base.new_capture is None or not self._captures_rounds():
            return None
        graphs = Graphs(base.new_capture())
        with base.lock:
            base.graphs.add(graphs)
        return graphs

    def give_up_rounds(self) -> None:
        """Capture no more of them."""
        self._models[0].captures_rounds = False

    def _captures_rounds(self) -> bool:
        """Whether all is captured that a round runs, on one device, and no observer is to see every forward."""
        devices = {device for model in self._models for device in model.devices}
        is_captured = all(model.new_capture is not None for model in self._models)
        return is_captured and self._models[0].captures_rounds and len(devices) == 1 and self.observer is nullcontext

    def drop_idle(self) -> bool:
        """Free the oldest idle graphs of rounds, caches and graphs of a model, or else what is kept of texts; whether
        there were any."""
        return self.idle.drop() or any(model.idle.drop() for model in self._models) or self.kept.clear()

    def _views(self, roles: Sequence[str]) -> list[tuple[Slot, ...]]:
        """The slots behind the roles, by what one runner runs: those of one model, and each sum by itself."""

        def place(slot: Slot) -> tuple[bool, int, int]:
            return slot.merge is not None, self._models.index(slot.model), slot.group

        slots = sorted({self._slots[role] for role in roles}, key=place)
        return [tuple(view) for _, view in groupby(slots, key=lambda slot: (slot.model, slot.merge))]

    def open_runners(self, sizes: Mapping[View, int], capacity: int) -> dict[View, ModelRunner]:
        """A runner of each view with a cache of so many rows: idle ones where there are, else new ones."""
        keys = {}
        for model, merge in sorted(sizes, key=lambda view: (view[1] is not None, self._models.index(view[0]))):
            groups = () if merge is None else merge.groups
            keys[model, merge] = model.runner_key(groups, sizes[model, merge], capacity)
        runners = {view: view[0].idle.take(key) for view, key in keys.items()}
        self.check_memory([(view[0], sizes[view]) for view, runner in runners.items() if runner is None], capacity)
        return {view: runner or ModelRunner(view[0], keys[view]) for view, runner in runners.items()}

    def check_memory(self, sizes: Sequence[tuple[LoadedModel, int]], capacity: int) -> None:
        """Report what new caches will take, device by device, and raise MemoryError where there is not as much once
        idle ones have been dropped. `sizes`: their models and numbers of rows"""
        for devices in {model.devices for model, _ in sizes}:
            new = [(model, num_rows) for model, num_rows in sizes if model.devices == devices]
            needed = sum(model.cache_bytes(num_rows, capacity) for model, num_rows in new)
            while needed > (available := self._room(devices)) and self.drop_idle():
                logger.info("idle caches and graphs were dropped to make room")
            num_rows = sum(num_rows for _, num_rows in new)
            named = (
                f"key/value caches of {num_rows} rows (one for each model or adapter of a text) x {capacity} positions"
            )
            logger.info("%s: %.1f MiB of %.0f MiB", named, needed / 2**20, available / 2**20)
            if needed > available:
                raise MemoryError(
                    f"batch_size, max_new_tokens: the {named} take {needed / 2**30:.1f} GiB, expected at most "
                    f"{available / 2**30:.1f} GiB on {', '.join(map(str, devices))}; lower either, or load with "
                    f"dtype='bfloat16'"
                )

    def _room(self, devices: Sequence[torch.device]) -> float:
        """Bytes that new caches can take: what is available, but for what graphs and texts keep to themselves."""
        kept = sum(model.graph_bytes() for model in self._models if set(model.devices) & set(devices))
        kept += self.kept.num_bytes if self.device.type == "cpu" else 0  # of a GPU it is not available anyway
        return sum(available_bytes(device) for device in devices) - kept


def _runs(view: Sequence[Slot], slots: Collection[Slot]) -> list[range]:
    """Where some slots stand in a view, as runs of neighbours: places 0, 1 and 3 are range(0, 2) and range(3, 4)."""
    places = [place for place, slot in enumerate(view) if slot in slots]
    starts = [place for place in places if place - 1 not in places]
    stops = [place + 1 for place in places if place + 1 not in places]
    return list(map(range, starts, stops))


def available_bytes(device: torch.device) -> float:
    """Memory that a session could take: what is free on a GPU, on the CPU all that the machine has."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if device.type == "cpu" else math.inf
