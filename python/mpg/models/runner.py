"""One model of a combination, the adapters that run on it, and what its forwards run on.

Knows groups of adapters, cache rows and captured graphs; nothing of roles or of what is decoded.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Lock

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mpg.models.cache import RaggedCache
from mpg.models.graphs import CaptureError, bucket
from mpg.models.lora import Adapter, AdapterStack
from mpg.models.workspaces import Workspaces

# What is captured with graphs=True: forwards of at most so many tokens a row, at cache lengths of so many positions.
CAPTURED_TOKENS, CAPTURED_POSITIONS = 32, 64


@dataclass
class Member:
    """One physical model and the adapters that run on it.

    merged: groups of the stack whose weighted sum this model is, with the weights (B, N); such a member of one batch
            shares model and stack with the one that has the adapters
    workspaces: what sessions leave to others where graphs are captured; such a member shares them too
    """

    argument: str  # the first argument of load() that named it, for messages
    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    num_parameters: int
    bytes_per_position: int  # of the cache, for one row
    devices: tuple[torch.device, ...]  # one, or those that a model is split over
    adapters: list[Adapter] = field(default_factory=list)
    stack: AdapterStack | None = None
    merged: tuple[list[int], Tensor] | None = None
    lock: Lock = field(default_factory=Lock)  # held by a forward: what the stack runs is state that all threads share
    workspaces: Workspaces[OpenMember] = field(default_factory=Workspaces)

    @property
    def vocab_size(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @property
    def max_positions(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Of the generation config, else of the config, else of the tokenizer."""
        generation = self.model.generation_config.eos_token_id if self.model.generation_config is not None else None
        config = getattr(self.model.config.get_text_config(), "eos_token_id", None)
        for ids in (generation, config, self.tokenizer.eos_token_id if self.tokenizer is not None else None):
            if ids is not None:
                return (ids,) if isinstance(ids, int) else tuple(ids)
        return ()

    def cache_sizes(self, num_rows: int, capacity: int) -> tuple[int, int]:
        """Rows and positions of a session's cache: as asked for, or rounded up where its forwards are captured."""
        if self.workspaces.new_capture is None:
            return num_rows, capacity
        rounded = bucket(capacity, CAPTURED_POSITIONS)
        return bucket(num_rows, 1), min(rounded, self.max_positions or rounded)

    def workspace_key(self, groups: Sequence[int], num_rows: int, capacity: int) -> Hashable:
        """What an idle workspace must agree in with the session that takes it."""
        merged = tuple(self.merged[0]) if self.merged else None
        # Work of its last session may still be under way: only on the same stream the next one comes after that. And
        # what was made in inference mode cannot be written to outside of it.
        device = self.model.device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        sizes = self.cache_sizes(num_rows, capacity)
        return merged, tuple(groups), sizes, stream, torch.is_inference_mode_enabled()

    def cache_bytes(self, num_groups: int, num_rows: int, capacity: int) -> int:
        return self.bytes_per_position * num_groups * math.prod(self.cache_sizes(num_rows, capacity))


class OpenMember:
    """One model in a session: the adapter groups it runs, and the cache of their rows, model-major.

    Where forwards are captured it outlives the session: graphs hold the addresses of all that is in it.
    """

    def __init__(self, member: Member, groups: list[int], num_rows: int, capacity: int) -> None:
        self.member, self.model, self.stack, self.groups = member, member.model, member.stack, groups
        self.key = member.workspace_key(groups, num_rows, capacity)
        self.batch, capacity = member.cache_sizes(num_rows, capacity)
        num_layers = member.model.config.get_text_config().num_hidden_layers
        self.cache = RaggedCache(num_layers, len(groups) * self.batch, capacity)
        self.graphs = member.workspaces.new_graphs(self.batch)
        self.factors: list[tuple[Tensor, Tensor]] = []
        self.shares: Tensor | None = None  # (batch, N) in the model's dtype
        if member.stack and member.merged:
            merged, shares = member.merged
            self.factors = member.stack.merge(merged)
            self.shares = torch.zeros(self.batch, shares.shape[1], dtype=self.model.dtype, device=self.model.device)
        elif member.stack and groups != [0]:
            self.factors = member.stack.select(groups)
        self._factors_of_run: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}

    @classmethod
    def take(cls, member: Member, groups: list[int], num_rows: int, capacity: int) -> OpenMember | None:
        """An idle one of these groups and sizes, with nothing of its last session left in it."""
        opened = member.workspaces.take(member.workspace_key(groups, num_rows, capacity))
        if opened is not None:
            opened.member = member
            opened.cache.clear()
        return opened

    def leave(self) -> None:
        """Be idle, for `take`."""
        if self.graphs is not None:
            self.member.workspaces.leave(self.key, self)

    def read_shares(self) -> None:
        """Take the weights of merged adapters as they are now."""
        if self.shares is not None and self.member.merged:
            shares = self.member.merged[1]
            (self.shares if len(shares) == 1 else self.shares[: len(shares)]).copy_(shares)

    def is_one_model_a_row(self) -> bool:
        """Whether merged adapters have weights of every row's own."""
        return self.member.merged is not None and len(self.member.merged[1]) > 1

    def forward(
        self,
        low: int,
        high: int,
        tokens: Tensor,
        start: Tensor,
        kv_length: int,
        sequences: Tensor | None = None,
        **kwargs: int,
    ) -> Tensor:
        """The logits (high - low, B, q, V) of the groups in places low to high - 1, in one batched forward.

        sequences: (B,) int64, which of the session's they are; default the first B
        kwargs:    of the model's forward
        """
        tokens, start = tokens.to(self.model.device), start.to(self.model.device)
        if self.graphs is not None and sequences is None and not kwargs and tokens.shape[1] <= CAPTURED_TOKENS:
            assert kv_length <= self.cache.capacity
            rounded = min(bucket(kv_length, CAPTURED_POSITIONS), self.cache.capacity)
            key = low, high, tokens.shape[1], rounded
            try:
                logits = self.graphs.run(key, partial(self._run, low, high, kv_length=rounded), tokens, start)
                return logits[:, : len(tokens)].clone()
            except CaptureError as error:
                self.graphs = self.member.workspaces.new_capture = None
                text = f"its forward cannot be captured and runs as without graphs: {error}"
                warnings.warn(f"{self.member.argument}: {text}", stacklevel=2)
        return self._run(low, high, tokens, start, kv_length, sequences, **kwargs)

    @torch.no_grad()
    def _run(
        self,
        low: int,
        high: int,
        tokens: Tensor,
        start: Tensor,
        kv_length: int,
        sequences: Tensor | None = None,
        **kwargs: int,
    ) -> Tensor:
        """`forward`, kernel by kernel."""
        count, device = high - low, self.model.device
        rows: slice | Tensor = slice(low * self.batch, high * self.batch)
        if sequences is not None or len(tokens) < self.batch:
            numbers = torch.arange(len(tokens), device=device) if sequences is None else sequences.to(device)
            rows = (torch.arange(low, high, device=device)[:, None] * self.batch + numbers).flatten()
        with self.member.lock:
            positions = self.cache.place(rows, start.repeat(count), tokens.shape[1], kv_length)
            if self.stack is not None:
                num_rows, num_tokens = positions.shape
                shares = None if self.shares is None else self.shares[rows]
                self.stack.run_groups(self._factors(low, high), num_rows, num_tokens, shares)
            output = self.model(
                input_ids=tokens.repeat(count, 1),
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                **kwargs,
            )
        return output.logits.unflatten(0, (count, tokens.shape[0]))

    def copy(self, sources: Sequence[int], targets: Sequence[int], num_positions: int) -> None:
        """Let some sequences begin as others do, in every group."""
        first_rows = range(0, self.cache.num_rows, self.batch)
        self.cache.copy(
            [first + source for first in first_rows for source in sources],
            [first + target for first in first_rows for target in targets],
            num_positions,
        )

    def _factors(self, low: int, high: int) -> list[tuple[Tensor, Tensor]] | None:
        if self.groups[low:high] == [0] and self.shares is None:
            return None
        if (low, high) not in self._factors_of_run:
            # as parameters, whose sizes a compiled layer takes for constants
            self._factors_of_run[low, high] = [
                (nn.Parameter(down[low:high], requires_grad=False), nn.Parameter(up[low:high], requires_grad=False))
                for down, up in self.factors
            ]
        return self._factors_of_run[low, high]
