"""The rounds of one call: requests take free rows, rounds follow one another, the host reads what they did.

Knows what runs and when; what a round does is its sampler's business (`decode`), what a forward does is `ensemble`'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor

from mpg.decode import SAMPLERS
from mpg.decode.batch import Batch, Processor, Round, Snapshot
from mpg.decode.drafts import merged_shares
from mpg.decode.rng import Decisions
from mpg.models.ensemble import Cost, Ensemble
from mpg.options import Options
from mpg.results import Result, Token, Transcript

# Rounds that the device is ahead of what the host has read. A GPU runs the next round meanwhile; a row that has ended
# idles through it, for which a CPU, where nothing runs meanwhile, would only pay.
ROUNDS_AHEAD = {"cuda": 1, "cpu": 0}


@dataclass(frozen=True)
class Request:
    """One prompt of a call, checked. `alpha` by attribute of the models, in their order; `weights` as asked for.

    processor  as in `Batch.processors`
    ends       as in `Transcript`
    """

    token_ids: list[int]
    alpha: tuple[float, ...]
    weights: dict[str, float]
    max_new_tokens: int
    seed: int
    processor: Processor | None = None
    ends: Callable[[Sequence[int]], bool] | None = None


@torch.no_grad()
def decode(
    models: Ensemble,
    requests: Sequence[Request],
    options: Options,
    eos_token_ids: tuple[int, ...],
    on_token: Callable[[Token], None] | None,
    started_at: float,
    on_result: Callable[[int, Result], None] | None = None,
) -> list[Result]:
    """The results of requests, in order. `started_at`: when the call began, by `perf_counter`.

    Raises what `Model.generate` says that decoding may raise.
    """
    try:
        return Run(models, requests, options, eos_token_ids, on_token, started_at, on_result).finish()
    except torch.OutOfMemoryError as error:
        reason = ". ".join(str(error).split(". ")[:2])
    # here, where nothing holds the caches any more: the error's traceback did
    while models.drop_idle():
        pass
    if models.device.type == "cuda":
        torch.cuda.empty_cache()
    rows = min(options.batch_size, len(requests))
    raise MemoryError(
        f"batch_size, max_new_tokens: {rows} rows at once are too many ({reason}); lower either, or load with "
        "dtype='bfloat16'"
    )


@dataclass
class _Entry:
    """A request, its transcript, and the time and the session's costs when it got its row."""

    request: Request
    transcript: Transcript
    entered_at: float
    costs: Cost
    result: Result | None = None


class Run:
    """Decodes requests in at most `options.batch_size` rows; the next one that waits begins where another has ended.

    A request's uniforms, and up to the models' own floating point its text, are those that it would have alone.
    """

    def __init__(
        self,
        models: Ensemble,
        requests: Sequence[Request],
        options: Options,
        eos_token_ids: tuple[int, ...],
        on_token: Callable[[Token], None] | None,
        started_at: float,
        on_result: Callable[[int, Result], None] | None = None,
    ):
        self.options, self.on_token, self.on_result, self.started_at = options, on_token, on_result, started_at
        self.models, self.eos_token_ids, self.device = models, eos_token_ids, models.device
        # an attribute that no request weighs takes no part
        self.used = [i for i in range(len(models.attribute_names)) if any(request.alpha[i] for request in requests)]
        attributes = tuple(models.attribute_names[i] for i in self.used)
        self.entries = [
            _Entry(r, Transcript(models.tokenizer, attributes, i, len(r.token_ids), r.ends), started_at, Cost())
            for i, r in enumerate(requests)
        ]
        self.waiting = deque(self.entries)
        self.rows = [self.waiting.popleft() for _ in range(min(options.batch_size, len(requests)))]

        self.dtype = torch.promote_types(models.dtype, torch.float32)
        capacity = max(len(request.token_ids) + request.max_new_tokens for request in requests)
        prompts, limits, weights, seeds = self._arguments(self.rows)
        self.shares = merged_shares(weights, options.target).clone()
        if options.draft == "merged":
            models = models.merge(attributes, self.shares)
        self.sampler = SAMPLERS[options.sampler](models, attributes, options)
        self.session = models.open(prompts, self.sampler.roles, capacity)
        processors = [entry.request.processor for entry in self.rows] if any(r.processor for r in requests) else None
        self.batch = Batch(prompts, limits, weights, seeds, eos_token_ids, capacity=capacity, processors=processors)
        self.sampler.start(self.session, self.batch, Decisions(self.batch.seeds, self.batch.rounds))
        # an adaptive chunk is as long as the host has read that it may be
        self.rounds_ahead = 0 if options.adaptive else ROUNDS_AHEAD[models.device.type]

    def finish(self) -> list[Result]:
        """Run rounds until every request has ended. out: their results, in order"""
        ahead: deque[tuple[Snapshot, list[_Entry], Cost]] = deque()
        try:
            while any(entry.result is None for entry in self.entries):
                self._admit()
                self.sampler.round()
                ahead.append((self.batch.snapshot(), self.rows.copy(), replace(self.session.cost)))
                if len(ahead) > self.rounds_ahead:
                    snapshot, rows, costs = ahead.popleft()
                    self._read(snapshot.read(), rows, costs, num_ahead=len(ahead))
        finally:
            self.session.close()
        return [entry.result for entry in self.entries if entry.result is not None]

    def _admit(self) -> None:
        """Let requests that wait begin in the rows whose own has ended."""
        free = [row for row, entry in enumerate(self.rows) if entry.result is not None][: len(self.waiting)]
        if not free:
            return
        for row in free:
            entry = self.rows[row] = self.waiting.popleft()
            entry.entered_at, entry.costs = perf_counter(), replace(self.session.cost)
            if self.batch.processors is not None:
                self.batch.processors[row] = entry.request.processor
        prompts, limits, weights, seeds = self._arguments([self.rows[row] for row in free])
        self.batch.replace(free, prompts, limits, weights, seeds)
        self.shares.copy_(merged_shares(self.batch.weights, self.options.target))
        self.session.replace(free, prompts)
        self.sampler.reset(torch.tensor(free, device=self.device))

    def _arguments(self, entries: Sequence[_Entry]) -> tuple[list[list[int]], list[int], Tensor, Tensor]:
        """Prompts, limits, weights and seeds, as a batch takes them."""
        requests = [entry.request for entry in entries]
        alpha = torch.tensor([[request.alpha[i] for i in self.used] for request in requests], dtype=self.dtype)
        seeds = torch.tensor([request.seed for request in requests])
        prompts, limits = [r.token_ids for r in requests], [r.max_new_tokens for r in requests]
        return prompts, limits, alpha.to(self.device), seeds.to(self.device)

    def _read(self, done: Round, rows: list[_Entry], costs: Cost, num_ahead: int) -> None:
        """Extend the transcripts by a round, hand out its tokens, close what has ended, raise for what failed.

        rows, costs: the requests that the round ran, and what the session had cost after it
        """
        ended = []
        for row, entry in enumerate(rows):
            if entry.result is not None:
                continue
            transcript = entry.transcript
            if done.unusable[row]:
                raise ValueError(f"{transcript.where()}: {self._explain_unusable(row, entry, done.tokens[row])}")
            if done.empty[row] and entry.request.processor is not None:
                raise ValueError(f"logits_processor: {transcript.where()}: no token is left, expected one at least")
            if done.empty[row]:
                raise ValueError(
                    f"weights: {transcript.where()}: the combined row is empty, expected weights that leave some token "
                    "a probability; raise the negative ones (or let sampler scr take the base's token: empty='base')"
                )
            is_last, count = not done.active[row], done.counts[row]
            log_ratios = None if done.log_ratios is None else done.log_ratios[row][:count]
            for token in transcript.extend(done.tokens[row][:count], log_ratios, is_last=is_last):
                if self.on_token is not None:
                    self.on_token(token)
            if is_last or transcript.is_stopped:
                ended.append((row, entry))
        if ended:
            self._close(ended, costs)
        if stopped := [row for row, entry in ended if entry.transcript.is_stopped]:
            self.batch.stop(stopped)
        lengths = [entry.transcript.length for entry in self.rows if entry.result is None]
        longest = max(lengths, default=1) + num_ahead * len(done.tokens[0])
        self.batch.longest, self.batch.longest_draft = min(longest, self.batch.capacity), max(done.draft_lengths)

    def _close(self, ended: list[tuple[int, _Entry]], costs: Cost) -> None:
        """Write the results of requests that have ended, while their rows hold what was counted of them."""
        statistics = {name: values.tolist() for name, values in self.sampler.statistics().items()}
        rounds = self.batch.rounds.tolist()
        for row, entry in ended:
            request, transcript, before = entry.request, entry.transcript, entry.costs
            num_tokens, is_stopped = len(transcript.tokens), transcript.is_stopped
            entry.result = Result(
                text=transcript.text(),
                tokens=tuple(transcript.tokens),
                finish_reason="stop" if is_stopped or transcript.tokens[-1] in self.eos_token_ids else "length",
                prompt_tokens=len(request.token_ids),
                seed=request.seed,
                weights=request.weights,
                stats={
                    "rounds": rounds[row],
                    "model_calls_per_token": (costs.model_calls - before.model_calls) / num_tokens,
                    "depth_per_token": (costs.depth - before.depth) / num_tokens,
                    "positions_per_token": (costs.positions - before.positions) / num_tokens,
                    "tokens_per_second": num_tokens / (transcript.last_token_at - entry.entered_at),
                    "time_to_first_token": transcript.first_token_at - self.started_at,
                    **{name: values[row] for name, values in statistics.items()},
                },
                log_ratios=tuple(transcript.log_ratios) if self.options.trace else None,
            )
            if self.on_result is not None:
                self.on_result(transcript.request, entry.result)

    def _explain_unusable(self, row: int, entry: _Entry, drafted: list[int]) -> str:
        """Why a row failed with this chunk behind what it has committed."""
        request = entry.request
        unweighed = {name for i, name in enumerate(self.models.attribute_names) if not request.alpha[i]}
        roles = [role for role in self.sampler.roles if role not in unweighed]
        tokens = [request.token_ids[-1], *entry.transcript.tokens, *drafted]
        blamed = self.session.blame(row, len(request.token_ids) - 1, tokens, roles)
        if blamed is not None:
            return f"{blamed}, expected finite logits or -inf"
        return (
            "an attribute model gives probability to a token that the anchor excludes; was it trained against this "
            "anchor?"
        )
