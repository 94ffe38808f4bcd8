"""The requests being decoded: their tokens, limits and state, all on the device. Knows no model and no sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

import mpg_ext
from mpg.decode.state import State
from mpg.decode.warps import Warps
from mpg.models.upload import Upload

Processor: TypeAlias = Callable[[Tensor, Tensor], Tensor]
NUM_FLAGS = 4  # before the tokens in what `commit_block_` gives


class Round(NamedTuple):
    """What a round did, as the host reads it; one entry a row.

    counts      tokens committed
    active, unusable, empty, draft_lengths  as in `Batch`, after the round
    tokens      the committed tokens, and behind them others that do not count
    log_ratios  of these tokens, one list of N a token, or None where they are not traced
    drafts      of the round's drafted tokens how many were accepted, and how many judged, where it is traced and its
                sampler drafts, else None
    logprobs    of these tokens, as `Logprobs` has them, or None where nobody asks
    """

    counts: list[int]
    active: list[int]
    unusable: list[int]
    empty: list[int]
    draft_lengths: list[int] | None
    tokens: list[list[int]]
    log_ratios: list[list[list[float]]] | None
    drafts: tuple[list[int], list[int]] | None
    logprobs: tuple[list[list[float]], list[list[list[float]]], list[list[list[int]]]] | None


class Logprobs(NamedTuple):
    """Log-probabilities in the combined rows that tokens were drawn from, before processors and warp.

    own   (B, K), of each token
    top   (B, K, T), the largest of its row, and `ids` (B, K, T) int64, whose these are
    """

    own: Tensor
    top: Tensor
    ids: Tensor


class Outputs(NamedTuple):
    """What a round leaves for the host to read, and may overwrite when it is run again.

    done  what `commit_block_` gave, int64: flags and tokens
    draft_lengths (B,), log_ratios (B, L, N), drafts (B,) each, logprobs: as in `Round`
    """

    done: Tensor
    draft_lengths: Tensor | None = None
    log_ratios: Tensor | None = None
    drafts: tuple[Tensor, Tensor] | None = None
    logprobs: Logprobs | None = None


class Snapshot:
    """A round on its way to the host: one copy, in the order of the device's work, waited for only by `read`."""

    def __init__(self, outputs: Outputs):
        parts, self._tree = tree_flatten(tuple(outputs))
        tensors = [part for part in parts if part is not None]
        self._kinds = [None if part is None else (part.shape, part.dtype) for part in parts]
        # float64 has every token and count too
        packed = torch.cat([part.flatten().double() for part in tensors]) if len(tensors) > 1 else outputs.done
        # copied on the CPU too: the next round may be a graph, which writes where this one did
        self._copied = packed.to("cpu", non_blocking=True, copy=True)
        self._arrived: torch.cuda.Event | None = None
        if packed.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> Round:
        if self._arrived is not None:
            self._arrived.synchronize()
        parts = self._copied.flatten().split([0 if kind is None else kind[0].numel() for kind in self._kinds])
        lists = [
            None if kind is None else part.view(kind[0]).to(kind[1]).tolist()
            for kind, part in zip(self._kinds, parts, strict=True)
        ]
        done, draft_lengths, *others = tree_unflatten(lists, self._tree)
        counts, active, unusable, empty = map(list, zip(*[of_row[:NUM_FLAGS] for of_row in done], strict=True))
        tokens = [of_row[NUM_FLAGS:] for of_row in done]
        return Round(counts, active, unusable, empty, draft_lengths, tokens, *others)


class Batch:
    """B rows that advance together, each by its own number of tokens a round; a row whose request has ended is free for
    another one. A round changes these tensors in place. B is the number of rows in use, N that of the attributes which
    one of them weighs: both are the state's, which has room for more.

    state       holds all that is remembered of the rows, a sampler's as well
    tokens      (B, capacity) int64, prompt and committed tokens; nothing meaningful from `lengths` on
    last_tokens  (B,) int64, the last committed token
    lengths     (B,) int64, committed tokens, the prompt among them
    limits      (B,) int64, what `lengths` may grow to
    weights     (B, N), alpha of each request's own attributes, and 0 for those that it has fewer of than others
    seeds       (B,) int64
    rounds      (B,) int64, rounds each request has seen: part of its uniforms' keys
    active      (B,) bool, neither ended by an end-of-sequence token nor full nor stopped by the host
    unusable    (B,) bool, a model returned NaN or +inf for it
    empty       (B,) bool, no token was left to draw
    draft_lengths  (B,) int64, tokens that each request drafts next, where its sampler adapts them, else None
    processors  per row what the target's rows pass through before the warp (see `rows`), or None; None where no
                request has any
    has_processor  (B,) bool, which requests have one; None where none has
    warps       how each request's rows are warped, or None where all are as the sampler's options say
    is_traced   whether some request wants its log-ratios
    num_top     the most that some request has of `Request.num_top`, or None
    errors      what a processor raised, by row, whose request is then no longer active

    What the host steers by, without waiting for the device:
    longest        upper bound on the length of every row that is still active
    longest_draft  upper bound on `draft_lengths`, 0 without any
    num_rounds     upper bound on the rounds that an active row has seen
    outputs        of the last round, for the host to read; None before the first

    A request that became unusable or empty is no longer active and committed nothing in that round.
    """

    prompt_lengths: Tensor
    lengths: Tensor
    limits: Tensor
    rounds: Tensor
    last_tokens: Tensor
    seeds: Tensor
    active: Tensor
    unusable: Tensor
    empty: Tensor
    tokens: Tensor
    weights: Tensor
    none: Tensor  # 0 a row, for what is counted where there is nothing

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        weights: Tensor,
        seeds: Sequence[int] | Tensor,
        eos_token_ids: Sequence[int],
        *,
        capacity: int | None = None,
        num_rows: int | None = None,
        processors: list[Processor | None] | None = None,
    ):
        """The first requests. `capacity`: tokens that a row may hold, default what these need; `num_rows`: that there
        is room for, default theirs."""
        device, lengths = weights.device, [len(prompt) for prompt in prompts]
        needed = max((length + new for length, new in zip(lengths, max_new_tokens, strict=True)), default=0)
        self.capacity = needed if capacity is None else capacity
        self.state = State(num_rows or len(prompts), weights.shape[1], device)
        for name in ("prompt_lengths", "lengths", "limits", "rounds", "last_tokens", "seeds", "none"):
            self.state.hold(self, name, self.state.zeros())
        for name in ("active", "unusable", "empty"):
            self.state.hold(self, name, self.state.zeros(dtype=torch.bool))
        self.state.hold(self, "tokens", self.state.zeros(self.capacity))
        self.state.hold(self, "weights", self.state.zeros(weights.shape[1], dtype=weights.dtype), by_attribute=True)
        self.eos_token_ids = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=device)
        self.draft_lengths: Tensor | None = None
        self.process(processors or (), lambda flags: flags.to(device))
        self.warps: Warps | None = None
        self.is_traced = False
        self.num_top: int | None = None
        self.errors: dict[int, Exception] = {}
        self.longest = self.longest_draft = self.num_rounds = 0
        self.outputs: Outputs | None = None
        self.state.use(len(prompts), weights.shape[1])
        if prompts:
            self.replace(range(len(prompts)), prompts, max_new_tokens, weights, seeds)

    def __len__(self) -> int:
        return self.state.num_rows

    def process(self, processors: Sequence[Processor | None], put: Callable[[Tensor], Tensor]) -> None:
        """Let the rows of every request pass through its processor; `put` brings numbers to the device."""
        flags = [processor is not None for processor in processors]
        self.processors = list(processors) if any(flags) else None
        self.has_processor = put(torch.tensor(flags)) if any(flags) else None

    def replace(
        self,
        rows: Sequence[int],
        prompts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        weights: Tensor,
        seeds: Sequence[int] | Tensor,
    ) -> Tensor:
        """Begin new requests in some rows in use, whatever these held; the other arguments in the order of `rows`.

        out: the rows (R,) int64, on the device
        """
        return self.lay_out(rows, prompts, max_new_tokens, weights, seeds, Upload())()

    def lay_out(
        self,
        rows: Sequence[int],
        prompts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        weights: Tensor,
        seeds: Sequence[int] | Tensor,
        upload: Upload,
    ) -> Callable[[], Tensor]:
        """What does as `replace`, with numbers that go to the device beside others."""
        longest = max(map(len, prompts))
        numbers = [
            [row, len(prompt), len(prompt) + new, int(seed), prompt[-1], *prompt, *[0] * (longest - len(prompt))]
            for row, prompt, new, seed in zip(rows, prompts, max_new_tokens, seeds, strict=True)
        ]
        sent = upload.add(numbers)
        alpha = upload.add(weights.double()) if weights.is_cpu else None

        def begin() -> Tensor:
            uploaded = sent.on(self.tokens.device)
            index, lengths, limits, of_rows, last_tokens = uploaded[:, :5].unbind(1)
            self.tokens[index, :longest] = uploaded[:, 5:]
            self.prompt_lengths[index] = self.lengths[index] = lengths
            self.limits[index], self.seeds[index], self.last_tokens[index] = limits, of_rows, last_tokens
            own = weights if alpha is None else alpha.on(self.tokens.device)
            self.weights[index], self.rounds[index] = own.to(self.weights.dtype), 0
            self.active[index] = lengths < limits
            self.unusable[index] = self.empty[index] = False
            self.longest = max(self.longest, longest)
            for row in rows:
                self.errors.pop(row, None)
            return index

        return begin

    def move(self, sources: Sequence[int], targets: Sequence[int], upload: Upload) -> None:
        """Let the requests of some rows go on in others, whose own are over, once an upload is sent."""
        if sources:
            self.state.move(sources, targets, upload)
        errors = {row: self.errors.pop(row) for row in [*sources, *targets] if row in self.errors}
        moved = zip(sources, targets, strict=True)
        self.errors |= {target: errors[source] for source, target in moved if source in errors}

    def snapshot(self) -> Snapshot:
        """What the last round did, on its way to the host, which counts the round here."""
        assert self.outputs is not None, "no round has been committed"
        self.longest = min(self.longest + self.outputs.done.shape[1] - NUM_FLAGS, self.capacity)
        self.num_rounds += 1
        return Snapshot(self.outputs)

    def num_new_tokens(self) -> Tensor:
        """Tokens committed since the prompt. out: (B,) int64"""
        return self.lengths - self.prompt_lengths

    def kv_length(self, width: int) -> int:
        """Cache positions in use once `width` tokens are fed from the last committed one on."""
        return min(self.longest - 1 + width, self.capacity)

    def is_eos(self, tokens: Tensor) -> Tensor:
        """Whether tokens end their sequence. out: bool, of the shape of `tokens`"""
        return (tokens[..., None] == self.eos_token_ids).any(-1)

    def is_open(self, drafted: Sequence[Tensor]) -> Tensor:
        """Whether one more token could be committed behind these drafted ones, each (B,) int64. out: (B,) bool"""
        is_open = self.active & (self.lengths + len(drafted) < self.limits)
        if self.draft_lengths is not None:
            is_open &= len(drafted) < self.draft_lengths
        for tokens in drafted:
            is_open &= ~self.is_eos(tokens)
        return is_open

    def ends_at(self, chunk: Tensor) -> Tensor:
        """How many tokens of the chunk (B, K) end each text, by an end-of-sequence token or the limit; above K where it
        goes on. out: (B,) int64"""
        is_inner = (chunk[..., None] != self.eos_token_ids).all(-1)
        return torch.minimum(is_inner.cumprod(1).sum(1) + 1, self.limits - self.lengths)

    def count_usable(self, chunk: Tensor, draft_rows: Tensor | None = None, most: Tensor | None = None) -> Tensor:
        """Tokens of the chunk (B, K) that could be committed, as the op `count_usable_` counts them. A row fails where
        one of them was not drawn from its row.

        out: (B,) int64 in 0..K
        """
        if self.draft_lengths is not None:
            most = self.draft_lengths if most is None else most.minimum(self.draft_lengths)
        rows = [self.active, self.unusable]
        return mpg_ext.count_usable_(rows, self.lengths, self.limits, self.eos_token_ids, chunk, draft_rows, most)

    def fail(self, unusable: Tensor) -> None:
        """Stop the active rows where a mask (B,) bool says that a model's numbers are unusable."""
        self.unusable |= unusable & self.active
        self.active.masked_fill_(unusable, False)

    def stop(self, rows: Sequence[int]) -> None:
        """End the requests in some rows, whose texts the host has seen to be at an end; what is committed stays."""
        for row in rows:  # few, and numbers of the host that nothing is uploaded for
            self.active[row].fill_(False)

    def commit(
        self, chunk: Tensor, accepted: Tensor, token: Tensor | None = None, log_totals: Tensor | None = None
    ) -> Tensor:
        """End the round of every active row, as the op `commit_block_` does.

        out: (B, L + 1) int64, the committed tokens, and behind them others that do not count
        """
        rows = [self.tokens, self.lengths, self.last_tokens, self.rounds, self.active, self.unusable, self.empty]
        done = mpg_ext.commit_block_(rows, self.limits, self.eos_token_ids, chunk, accepted, token, log_totals)
        self.outputs = Outputs(done, self.draft_lengths)
        return done[:, NUM_FLAGS:]

    def trace(self, log_ratios: Tensor, drafts: tuple[Tensor, Tensor] | None = None) -> None:
        """Note the log-ratios (N, B, L) of the tokens that were committed, and of drafted ones how many were accepted
        and how many judged, each (B,) int64."""
        assert self.outputs is not None, "no round has been committed"
        self.outputs = self.outputs._replace(log_ratios=log_ratios.permute(1, 2, 0), drafts=drafts)

    def tell(self, logprobs: Logprobs) -> None:
        """Note the log-probabilities of the tokens that were committed."""
        assert self.outputs is not None, "no round has been committed"
        self.outputs = self.outputs._replace(logprobs=logprobs)
