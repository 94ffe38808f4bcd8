"""One model of a combination with the adapters that run on it, and what its forwards run on.

Knows adapters, cache rows and captured graphs; nothing of roles, of texts or of what is decoded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any, NamedTuple, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mpg.models.attention import own_precision
from mpg.models.cache import RaggedCache, as_argument
from mpg.models.graphs import Capture, CaptureError, Graphs, bucket
from mpg.models.idle import Idle
from mpg.models.lora import Adapter
from mpg.models.origin import Origin
from mpg.models.stack import Layout, LoraStack

# What is captured with graphs=True: forwards of at most so many tokens a row, at cache lengths of so many positions.
CAPTURED_TOKENS, CAPTURED_POSITIONS = 32, 64
# Up to so many tokens a group, mpg's own adapter ops are faster on the CPU, in 16 bits, than products batched over the
# groups. In more bits they always run: what comes out of a row then depends on no other one.
OWN_TOKENS = 8


class RunnerKey(NamedTuple):
    """What an idle runner must agree in with the session that takes it.

    merged: every row runs the sum of these groups, its group 1, with weights of its own; none where each runs a group
    """

    merged: tuple[int, ...]
    num_rows: int
    capacity: int
    # Work of its last session may still be under way: only on the same stream the next one comes after that. And what
    # was made in inference mode cannot be written to outside of it.
    stream: torch.cuda.Stream | None
    is_inference: bool
    version: int  # of the model's weights


@dataclass(eq=False)
class LoadedModel:
    """One physical model, its tokenizer, the adapters that run on it, and the runners that no session is using.

    argument:    the first argument of `mpg.load` that named it, for messages
    devices:     one, or those that the model is split over
    new_capture: makes what captures the forwards of one runner; None where they run as they are
    captures_rounds: of a base, until a round of it could not be captured
    is_compiled: decoder layers run as code that is made for no forward in particular
    lock:        held by a forward, as what the stack runs is state that all threads share
    """

    argument: str
    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    num_parameters: int
    bytes_per_position: int  # of the cache, for one row
    devices: tuple[torch.device, ...]
    adapters: list[Adapter] = field(default_factory=list)
    stack: LoraStack | None = None
    origin: Origin | None = None  # where the caller gave a model, not a folder
    new_capture: Callable[[], Capture] | None = None
    is_compiled: bool = False
    captures_rounds: bool = True
    lock: Any = field(default_factory=Lock)
    idle: Idle[ModelRunner] = field(default_factory=Idle)
    graphs: WeakSet[Graphs] = field(default_factory=WeakSet)  # of every runner there is
    by_lengths: int = 0  # up to how many queries of a row attend by lengths, not by a mask
    by_rows: int = 0  # up to how many do by mpg's own op
    version: int = 0  # grows where the weights change

    @property
    def vocab_size(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @property
    def max_positions(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def num_layers(self) -> int:
        return self.model.config.get_text_config().num_hidden_layers

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Those of the generation config, else of the config, else of the tokenizer."""
        generation = self.model.generation_config.eos_token_id if self.model.generation_config is not None else None
        config = getattr(self.model.config.get_text_config(), "eos_token_id", None)
        for ids in (generation, config, self.tokenizer.eos_token_id if self.tokenizer is not None else None):
            if ids is not None:
                return (ids,) if isinstance(ids, int) else tuple(ids)
        return ()

    def reader(self, group: Hashable) -> Hashable:
        """What the keys and values of a text under one of its adapters depend on, beside its tokens."""
        return self, self.version, self._stream(), group

    def _stream(self) -> torch.cuda.Stream | None:
        device = self.model.device
        return torch.cuda.current_stream(device) if device.type == "cuda" else None

    def runner_key(self, merged: Sequence[int], num_rows: int, capacity: int) -> RunnerKey:
        sizes = self._cache_sizes(num_rows, capacity)
        return RunnerKey(tuple(merged), *sizes, self._stream(), torch.is_inference_mode_enabled(), self.version)

    def cache_bytes(self, num_rows: int, capacity: int) -> int:
        num_rows, capacity = self._cache_sizes(num_rows, capacity)
        return self.bytes_per_position * num_rows * capacity

    def _cache_sizes(self, num_rows: int, capacity: int) -> tuple[int, int]:
        """Rows and positions of a session's cache: as asked for, or rounded up where its forwards are captured."""
        if self.new_capture is None:
            return num_rows, capacity
        rounded = bucket(capacity, CAPTURED_POSITIONS)
        return bucket(num_rows, 1), min(rounded, self.max_positions or rounded)

    def follow(self, always: bool = False) -> bool:
        """Take over what the caller has changed in the model that was given, if anything, or `always` all of it.
        out: whether there was something"""
        with self.lock:
            if self.origin is None or not (self.origin.has_changed() or always):
                return False
            self.origin.read(self.model, self.adapters, self.stack)
            self.idle.clear()  # they hold addresses, and copies
            self.version += 1
            return True

    def is_stale(self, version: int) -> bool:
        """Whether what was read with this version of the weights was read with others than the caller's by now."""
        with self.lock:
            return version != self.version or (self.origin is not None and self.origin.has_changed())

    def graph_bytes(self) -> int:
        with self.lock:
            return sum(graphs.num_bytes for graphs in self.graphs)

    def leave(self, runner: ModelRunner) -> None:
        """Keep a runner that has graphs, as they hold the addresses of all that it is, for later sessions."""
        if runner.graphs is not None:
            self.idle.leave(runner.key, runner)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a loaded model cannot be copied or pickled: call mpg.load where another one is wanted, with the recipe "
            "that save_pretrained() writes"
        )


@dataclass(frozen=True, eq=False)
class Merge:
    """Adapters of one model (their names and groups) that are added up with weights (B, N), or (N,) for all rows."""

    names: Sequence[str]
    groups: Sequence[int]
    weights: Tensor

    @property
    def differs_by_row(self) -> bool:
        return self.weights.ndim == 2


class Slot(NamedTuple):
    """A model with one of its adapters (group 0: none) or a sum of them (group 1), under the prompt or a context of
    this name.

    Roles that share a slot are the same.
    """

    model: LoadedModel
    group: int = 0
    merge: Merge | None = None
    context: str = ""


class ModelRunner:
    """Cache rows of a model, and the forwards on them, each row under an adapter of its own.

    Where forwards are captured it outlives the session: graphs hold the addresses of all that is in it.
    """

    def __init__(self, loaded: LoadedModel, key: RunnerKey) -> None:
        self.loaded, self.key, self.num_rows = loaded, key, key.num_rows
        self.cache = RaggedCache(
            loaded.num_layers, key.num_rows, key.capacity, loaded.by_lengths, by_rows=loaded.by_rows
        )
        self.merge_weights: Tensor | None = None  # (num_rows, N) in the model's dtype
        self._factors: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}  # of groups from one to another
        self._groups: dict[tuple[tuple[int, int], ...], Tensor] = {}  # of rows by their runs
        self.graphs: Graphs | None = None
        # another thread may find meanwhile that the model cannot be captured
        if (new_capture := loaded.new_capture) is not None:
            self.graphs = Graphs(new_capture())
            with loaded.lock:
                loaded.graphs.add(self.graphs)
        self._stacked: list[tuple[Tensor, Tensor]] = []
        if loaded.stack is not None:
            self._stacked = loaded.stack.merge(key.merged) if key.merged else loaded.stack.factors
        if key.merged:
            dtype, device = loaded.model.dtype, loaded.model.device
            self.merge_weights = torch.zeros(key.num_rows, len(key.merged), dtype=dtype, device=device)

    def resize(self, num_rows: int, capacity: int, num_positions: int) -> None:
        """As `RaggedCache.resize`, where no graphs hold addresses; a sum has no weights until it gets new ones."""
        key = self.loaded.runner_key(self.key.merged, num_rows, capacity)
        self.key = key._replace(version=self.key.version)
        self.num_rows = self.key.num_rows
        self.cache.resize(self.key.num_rows, self.key.capacity, num_positions)
        if self.merge_weights is not None:
            self.merge_weights = self.merge_weights.new_zeros(self.num_rows, self.merge_weights.shape[1])

    def forward(
        self,
        fed: slice | Tensor,
        layout: Layout,
        tokens: Tensor,
        start: Tensor,
        kv_length: int,
        source: Tensor | None = None,
        is_recorded: bool = False,
        **kwargs: int,
    ) -> Tensor:
        """The logits (R, q, V) of these R cache rows, neighbours as a slice or any as numbers, in one forward.

        tokens: (B, q) int64
        start:  (B,) int64
        source: (R,) int64, which of B each row is fed; default all of them in order
        is_recorded: as a part of what is captured, to which `kv_length` belongs
        kwargs: of the model's forward
        """
        device = self.loaded.model.device
        tokens, start = tokens.to(device), start.to(device)
        if source is not None:
            source = source.to(device)
            tokens, start = tokens.index_select(0, source), start.index_select(0, source)
        is_short = not kwargs and tokens.shape[1] <= CAPTURED_TOKENS
        if self.graphs is not None and isinstance(fed, slice) and is_short and not is_recorded:
            assert kv_length <= self.cache.capacity
            rounded = min(bucket(kv_length, CAPTURED_POSITIONS), self.cache.capacity)
            inputs = [tokens, start] if layout.groups is None else [tokens, start, layout.groups]
            key = fed.start, fed.stop, len(inputs) > 2 or layout.runs, tokens.shape[1], rounded

            def run(tokens: Tensor, start: Tensor, groups: Tensor | None = None) -> Tensor:
                return self._run(fed, Layout(layout.runs, groups), tokens, start, rounded)

            try:
                return self.graphs.run(key, run, *inputs).clone()
            except CaptureError as error:
                self.graphs = self.loaded.new_capture = None
                text = f"its forward cannot be captured and runs as without graphs: {error}"
                warnings.warn(f"{self.loaded.argument}: {text}", stacklevel=2)
        return self._run(fed, layout, tokens, start, kv_length, **kwargs)

    @torch.no_grad()
    def _run(
        self, fed: slice | Tensor, layout: Layout, tokens: Tensor, start: Tensor, kv_length: int, **kwargs: int
    ) -> Tensor:
        """`forward`, kernel by kernel."""
        stack, device = self.loaded.stack, tokens.device
        fed = fed if isinstance(fed, slice) else fed.to(device)
        with self.loaded.lock, own_precision(device):
            start_at = self._start_of_all(start, tokens.shape[1], kv_length) if isinstance(fed, slice) else None
            positions = self.cache.place(fed, start, tokens.shape[1], kv_length, start_at)
            if stack is not None:
                merge_weights = None if self.merge_weights is None else self.merge_weights[fed]
                layout = self._named(layout, tokens.shape[1])
                stack.set_active(
                    self._factors_of(layout),
                    *positions.shape,
                    first_group=layout.first_group,
                    merge_weights=merge_weights,
                    groups=layout.groups,
                )
            output = self.loaded.model(
                input_ids=tokens,
                position_ids=positions,
                **as_argument(self.loaded.model, self.cache),
                use_cache=True,
                **kwargs,
            )
        return output.logits

    def merge(self, weights: Tensor) -> None:
        """Let the sum that the rows of a merged runner run have these weights, (B, N) or (N,), from now on."""
        assert self.merge_weights is not None
        (self.merge_weights if weights.ndim == 1 else self.merge_weights[: len(weights)]).copy_(weights)

    def _is_for_itself(self) -> bool:
        """Whether a forward neither waits for a device nor is what it runs made for others too."""
        is_alone = self.graphs is None and not self.loaded.is_compiled
        return is_alone and self.loaded.devices == (torch.device("cpu"),)

    def _start_of_all(self, start: Tensor, num_tokens: int, kv_length: int) -> int | None:
        """Where rows (R,) that all start behind their first token do, for `place`, if the host can know."""
        if not self._is_for_itself():
            return None
        first, *others = start.tolist()
        is_one = 0 < first <= kv_length - num_tokens and all(other == first for other in others)
        return first if is_one else None

    def _named(self, layout: Layout, num_tokens: int) -> Layout:
        """The layout of a forward, by row where mpg's own ops are to run it."""
        runs, width = layout.runs, len(self.key.merged) or 1  # a sum's factors are those of so many adapters
        is_many = max(rows for _, rows in runs) * num_tokens * width > OWN_TOKENS
        if (
            (is_many and torch.finfo(self.loaded.model.dtype).bits == 16)
            or layout.groups is not None
            or not self._is_for_itself()
        ):
            return layout
        if runs not in self._groups:
            self._groups[runs] = torch.tensor([group for group, rows in runs for _ in range(rows)])
        return Layout(runs, self._groups[runs])

    def _factors_of(self, layout: Layout) -> list[tuple[Tensor, Tensor]] | None:
        """Those of its groups alone, where it names none by row; None of the plain base."""
        runs = layout.runs
        if [group for group, _ in runs] == [0]:
            return None
        first = layout.first_group
        stop = runs[-1][0] + 1 if layout.groups is None else len(self._stacked[0][0])
        if (first, stop) not in self._factors:
            # as parameters, whose sizes a compiled layer takes for constants
            self._factors[first, stop] = [
                (nn.Parameter(down[first:stop], requires_grad=False), nn.Parameter(up[first:stop], requires_grad=False))
                for down, up in self._stacked
            ]
        return self._factors[first, stop]
