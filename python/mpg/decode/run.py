"""The rounds of requests: they take free rows as they come, rounds follow one another, the host reads what they did.

Knows what runs and when; what a round does is its sampler's business (`decode`), what a forward does is `ensemble`'s.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch

from mpg.decode import SAMPLERS
from mpg.decode.batch import Batch, Processor, Round, Snapshot
from mpg.decode.drafts import merged_shares
from mpg.decode.rng import Decisions
from mpg.models.ensemble import Cost, Ensemble, Pass
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


@dataclass(eq=False)
class Entry:
    """A request that a scheduler has taken, and what becomes of it: in the end a result or an error.

    roles       the models that it needs: those of its sampler but for attributes that it does not weigh
    added_at    by `perf_counter`, as are all times
    entered_at  when it got its row, or when it was added to a row that was free
    num_drafts  tokens that it drafts in its next round, 0 where its sampler drafts none
    num_rounds  its rounds so far, by the tokens that it could draft in them
    """

    request: Request
    transcript: Transcript
    roles: tuple[str, ...]
    added_at: float
    num_drafts: int
    entered_at: float = 0.0
    num_rounds: Counter[int] = field(default_factory=Counter)
    result: Result | None = None
    error: Exception | None = None

    @property
    def is_over(self) -> bool:
        return self.result is not None or self.error is not None


@torch.no_grad()
def decode(
    models: Ensemble,
    requests: Sequence[Request],
    options: Options,
    eos_token_ids: tuple[int, ...],
    *,
    on_token: Callable[[Token], None] | None = None,
    on_result: Callable[[int, Result], None] | None = None,
    started_at: float | None = None,
    plan: str | None = None,
) -> list[Result]:
    """The results of requests, in order.

    on_result   called with the index of every result and the result as soon as it is there
    started_at  when the call began, default now
    plan        as in `Result`

    Raises what `Model.generate` says that decoding may raise.
    """
    try:
        scheduler = Scheduler.of(models, requests, options, eos_token_ids, plan=plan)
        return scheduler.finish(requests, on_token=on_token, on_result=on_result, started_at=started_at)
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


class Scheduler:
    """Decodes requests whenever they come: each takes a row that is free, or waits until another request has ended.

    A request's uniforms, and up to the models' own floating point its text and statistics, are those that it would have
    alone. What fails a request is its own error and leaves the others alone. What a forward raises, `step` raises; all
    that can be done then, as at the end, is to close.

    num_rows      requests that are decoded at once, at most
    capacity      tokens that one may have, its prompt among them
    attributes    those that requests may weigh; all of them run for every row
    rounds_ahead  how many rounds the device may be ahead of what `step` has read
    plan          as in `Result`
    """

    def __init__(
        self,
        models: Ensemble,
        options: Options,
        eos_token_ids: tuple[int, ...],
        *,
        num_rows: int,
        capacity: int,
        attributes: tuple[str, ...],
        rounds_ahead: int,
        plan: str | None = None,
    ):
        self.options, self.eos_token_ids, self.attributes, self.plan = options, eos_token_ids, attributes, plan
        self.weighed = [models.attribute_names.index(name) for name in attributes]
        # an adaptive chunk is as long as the host has read that it may be
        self.rounds_ahead = 0 if options.adaptive else rounds_ahead
        self.waiting: deque[Entry] = deque()
        self.rows: list[Entry | None] = [None] * num_rows
        self.num_added, self.read_at = 0, 0.0
        self._ahead: deque[tuple[Snapshot, list[Entry | None]]] = deque()

        # rows without a request hold one token and have no room for another
        prompts = [[0]] * num_rows
        weights = torch.ones(num_rows, len(attributes), dtype=torch.promote_types(models.dtype, torch.float32))
        weights, seeds = weights.to(models.device), torch.zeros(num_rows, dtype=torch.int64, device=models.device)
        self.shares = merged_shares(weights, options.target).clone()
        self.models = models.merge(attributes, self.shares) if options.draft == "merged" else models
        self.sampler = SAMPLERS[options.sampler](self.models, attributes, options)
        self.session = self.models.open(prompts, self.sampler.roles, capacity)
        self.batch = Batch(prompts, [0] * num_rows, weights, seeds, eos_token_ids, capacity=capacity)
        self.sampler.start(self.session, self.batch, Decisions(self.batch.seeds, self.batch.rounds))

    @classmethod
    def of(
        cls,
        models: Ensemble,
        requests: Sequence[Request],
        options: Options,
        eos_token_ids: tuple[int, ...],
        plan: str | None = None,
    ) -> Scheduler:
        """One that is just large enough for these requests."""
        return cls(
            models,
            options,
            eos_token_ids,
            num_rows=min(options.batch_size, len(requests)),
            capacity=max(len(request.token_ids) + request.max_new_tokens for request in requests),
            # an attribute that no request weighs takes no part
            attributes=tuple(
                name for i, name in enumerate(models.attribute_names) if any(request.alpha[i] for request in requests)
            ),
            rounds_ahead=ROUNDS_AHEAD[models.device.type],
            plan=plan,
        )

    def finish(
        self,
        requests: Sequence[Request],
        *,
        on_token: Callable[[Token], None] | None = None,
        on_result: Callable[[int, Result], None] | None = None,
        started_at: float | None = None,
    ) -> list[Result]:
        """The results of requests, in order; raises the first error among them. Closes the scheduler."""
        try:
            entries = [self.add(request, started_at) for request in requests]
            while self.has_work:
                for entry, tokens in self.step():
                    for token in tokens:
                        if on_token is not None:
                            on_token(token)
                    if entry.error is not None:
                        raise entry.error
                    if entry.result is not None and on_result is not None:
                        on_result(entry.transcript.request, entry.result)
        finally:
            self.close()
        return [entry.result for entry in entries if entry.result is not None]

    def add(self, request: Request, added_at: float | None = None) -> Entry:
        """Let a request wait for a row. `added_at`: when it came, default now.

        Raises ValueError where the scheduler was opened for shorter ones, or for other attributes.
        """
        length = len(request.token_ids) + request.max_new_tokens
        if length > self.batch.capacity:
            raise ValueError(f"max_new_tokens: expected at most {self.batch.capacity} with the prompt's, got {length}")
        weighed = {name for name, a in zip(self.models.attribute_names, request.alpha, strict=True) if a}
        if unknown := sorted(weighed.difference(self.attributes)):
            raise ValueError(f"weights: expected some of {', '.join(self.attributes)}, got {unknown[0]!r}")
        own = tuple(name for name in self.attributes if name in weighed)
        entry = Entry(
            request,
            Transcript(self.models.tokenizer, own, self.num_added, len(request.token_ids), request.ends),
            roles=tuple(role for role in self.sampler.roles if role in own or role not in self.attributes),
            added_at=perf_counter() if added_at is None else added_at,
            num_drafts=self.options.chunk_size or 0,
        )
        self.waiting.append(entry)
        self.num_added += 1
        return entry

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.waiting) or any(entry is not None and not entry.is_over for entry in self.rows)

    def step(self) -> list[tuple[Entry, list[Token]]]:
        """Let requests that wait begin in free rows, run a round, and read one.

        out: the requests that ran in the round that was read, by row, with their new tokens; none while the device is
        less than `rounds_ahead` ahead
        """
        self._admit()
        self.sampler.round()
        self._ahead.append((self.batch.snapshot(), self.rows.copy()))
        if len(self._ahead) <= self.rounds_ahead:
            return []
        snapshot, rows = self._ahead.popleft()
        return self._read(snapshot.read(), rows)

    def close(self) -> None:
        """Give up the caches, and the requests that are not over."""
        self.session.close()

    def _admit(self) -> None:
        """Let requests that wait begin in rows that are free."""
        free = [row for row, entry in enumerate(self.rows) if entry is None or entry.is_over][: len(self.waiting)]
        if not free:
            return
        entries = [self.waiting.popleft() for _ in free]
        for row, entry in zip(free, entries, strict=True):
            self.rows[row] = entry
            entry.entered_at = max(entry.added_at, self.read_at)
        requests, device = [entry.request for entry in entries], self.models.device
        prompts, limits = [request.token_ids for request in requests], [request.max_new_tokens for request in requests]
        alpha = torch.tensor(
            [[request.alpha[i] for i in self.weighed] for request in requests], dtype=self.batch.weights.dtype
        )
        seeds = torch.tensor([request.seed for request in requests])
        self.batch.replace(free, prompts, limits, alpha.to(device), seeds.to(device))
        processors = [entry.request.processor if entry is not None else None for entry in self.rows]
        self.batch.processors = processors if any(processor is not None for processor in processors) else None
        self.shares.copy_(merged_shares(self.batch.weights, self.options.target))
        self.session.replace(free, prompts)
        self.sampler.reset(torch.tensor(free, device=device))

    def _read(self, done: Round, rows: list[Entry | None]) -> list[tuple[Entry, list[Token]]]:
        """Extend the transcripts of the requests that a round ran, and close what has ended or failed."""
        self.read_at = perf_counter()
        news: list[tuple[Entry, list[Token]]] = []
        ended, stopped = [], []
        for row, entry in enumerate(rows):
            if entry is None or entry.is_over:
                continue
            tokens: list[Token] = []
            news.append((entry, tokens))
            entry.num_rounds[entry.num_drafts] += 1
            if self.options.adaptive:
                entry.num_drafts = done.draft_lengths[row]
            transcript, is_last = entry.transcript, not done.active[row]
            if is_last and (error := self._explain(row, entry, done)) is not None:
                entry.error = error
                continue
            count, log_ratios = done.counts[row], None
            if done.log_ratios is not None:
                own = [self.attributes.index(name) for name in transcript.attributes]
                log_ratios = [[of_token[i] for i in own] for of_token in done.log_ratios[row][:count]]
            try:
                for token in transcript.extend(done.tokens[row][:count], log_ratios, is_last=is_last):
                    tokens.append(token)
            except Exception as error:  # whatever a stopping criterion raises
                entry.error = error
            if entry.error is not None or transcript.is_stopped:
                stopped.append(row)
            if entry.error is None and (is_last or transcript.is_stopped):
                ended.append((row, entry))
        if ended:
            self._close(ended)
        if stopped:
            self.batch.stop(stopped)
        live = [entry for entry in self.rows if entry is not None and not entry.is_over]
        longest = max((entry.transcript.length for entry in live), default=1)
        self.batch.longest = min(longest + len(self._ahead) * len(done.tokens[0]), self.batch.capacity)
        self.batch.longest_draft = max((entry.num_drafts for entry in live), default=0)
        return news

    def _close(self, ended: list[tuple[int, Entry]]) -> None:
        """Write the results of requests that have ended, while their rows hold what was counted of them."""
        statistics = {"rounds": self.batch.rounds, **self.sampler.statistics()}
        columns = torch.stack([values.double() for values in statistics.values()], 1).tolist()  # all in one copy
        for row, entry in ended:
            request, transcript = entry.request, entry.transcript
            num_tokens, is_stopped = len(transcript.tokens), transcript.is_stopped
            counted = dict(zip(statistics, columns[row], strict=True))
            cost = self._cost(entry)
            entry.result = Result(
                text=transcript.text(),
                tokens=tuple(transcript.tokens),
                finish_reason="stop" if is_stopped or transcript.tokens[-1] in self.eos_token_ids else "length",
                prompt_tokens=len(request.token_ids),
                seed=request.seed,
                weights=request.weights,
                stats={
                    "rounds": int(counted.pop("rounds")),
                    "model_calls_per_token": cost.model_calls / num_tokens,
                    "depth_per_token": cost.depth / num_tokens,
                    "positions_per_token": cost.positions / num_tokens,
                    "tokens_per_second": num_tokens / (transcript.last_token_at - entry.entered_at),
                    "time_to_first_token": transcript.first_token_at - entry.added_at,
                    **counted,
                },
                log_ratios=tuple(transcript.log_ratios) if self.options.trace else None,
                plan=self.plan,
            )

    def _cost(self, entry: Entry) -> Cost:
        """What a request has cost by itself, whatever else its rounds ran."""
        passes: Counter[Pass] = Counter()
        for num_drafts, num_rounds in entry.num_rounds.items():
            for roles, num_tokens in self.sampler.passes(num_drafts):
                passes[tuple(role for role in roles if role in entry.roles), num_tokens] += num_rounds
        return self.models.cost(passes, entry.roles)

    def _explain(self, row: int, entry: Entry, done: Round) -> Exception | None:
        """Why a request failed in a round, if it did."""
        if row in self.batch.errors:
            return self.batch.errors.pop(row)
        where = entry.transcript.where()
        if done.unusable[row]:
            request = entry.request
            tokens = [request.token_ids[-1], *entry.transcript.tokens, *done.tokens[row]]
            blamed = self.session.blame(row, len(request.token_ids) - 1, tokens, entry.roles)
            if blamed is not None:
                return ValueError(f"{where}: {blamed}, expected finite logits or -inf")
            return ValueError(
                f"{where}: an attribute model gives probability to a token that the anchor excludes; was it trained "
                "against this anchor?"
            )
        if done.empty[row] and entry.request.processor is not None:
            return ValueError(f"logits_processor: {where}: no token is left, expected one at least")
        if done.empty[row]:
            return ValueError(
                f"weights: {where}: the combined row is empty, expected weights that leave some token a probability; "
                "raise the negative ones (or let sampler scr take the base's token: empty='base')"
            )
        return None
