"""The rounds of requests: they take free rows as they come, rounds follow one another, the host reads what they did.

Knows what runs and when; what a round does is its sampler's business (`decode`), what a forward does is `ensemble`'s.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from time import perf_counter
from typing import Any

import torch

from mpg.context import Context
from mpg.decode import SAMPLERS
from mpg.decode.batch import Batch, Round, Snapshot
from mpg.decode.drafts import merged_shares, needs_base
from mpg.decode.request import Entry, Request
from mpg.decode.rng import Decisions
from mpg.decode.rounds import Rounds
from mpg.decode.waiting import Waiting
from mpg.decode.warps import Warps
from mpg.models.ensemble import Cost, Ensemble
from mpg.models.session import Attributes
from mpg.models.upload import Addresses, Upload
from mpg.options import Options
from mpg.results import Result, Token, Transcript

# Rounds that the device is ahead of what the host has read. A GPU runs the next round meanwhile; a row that has ended
# idles through it, for which a CPU, where nothing runs meanwhile, would only pay.
ROUNDS_AHEAD = {"cuda": 1, "cpu": 0}
# Of the requests that run, for so many to come others wait, and moves for so many rows that nothing waits for: what is
# spared by beginning and moving together, and lost by rows that idle meanwhile, are then alike on the tiny set.
GATHERED = 1 / 8


class Scheduler:
    """Decodes requests whenever they come: each takes a row that is free, or waits until another request has ended.

    A request's uniforms, and up to the models' own floating point its text and statistics, are those that it would have
    alone. What fails a request is its own error and leaves the others alone. What a forward raises, `step` raises; all
    that can be done then, as at the end, is to close.

    num_rows      requests that are decoded at once, at most
    capacity      tokens that one may have, its prompt among them, and positions that each of its models may
    attributes    those that requests may weigh. Only those that a request does weigh run for it, and a row that none
                  takes is not run
    rounds_ahead  how many rounds the device may be ahead of what `step` has read
    expected      the attributes of each request by role, where they are known: caches are then as large as the
                  `num_rows` largest of them need; else they grow with what comes, in rows and positions
    part          tokens of prompts that are read between two rounds, over all rows and models; default all that wait
    most          attributes that one request may weigh, default all; contexts that requests bring are such too
    gather        where it is not None: while more run, requests begin together and rows move together, so many seconds
                  after others did at the latest, and a free row waits a round for a request before another moves there
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
        expected: Sequence[Attributes] = (),
        most: int | None = None,
        part: int | None = None,
        gather: float | None = None,
        plan: str | None = None,
    ):
        self.options, self.eos_token_ids, self.attributes, self.plan = options, eos_token_ids, attributes, plan
        self.merged = [name for name in attributes if name not in models.contexts]  # by a draft that is their sum
        # an adaptive chunk is as long as the host has read that it may be
        self.rounds_ahead = 0 if options.adaptive else rounds_ahead
        self.rows: list[Entry] = []  # of those in use
        self.num_rows, self.num_added, self.read_at = num_rows, 0, 0.0
        self.gather, self.changed_at = gather, 0.0
        self.num_wanted = 0  # rows that requests took when some last could begin
        self._ahead: deque[tuple[Snapshot, list[Entry]]] = deque()
        self._addresses = Addresses()

        self.most = most = most or len(attributes)
        room = models.rows_to_run(num_rows, num_rows)
        dtype = torch.promote_types(models.dtype, torch.float32)
        self.shares = torch.zeros(room, len(self.merged), dtype=dtype, device=models.device)
        if options.draft == "merged":
            models = models.merge(self.merged, self.shares, is_draft=True)
        self.models = models
        numbers = tuple(range(most))  # a sampler's attributes are each request's own
        self.sampler = SAMPLERS[options.sampler](self.models, numbers, options)
        together = [roles for roles, _ in self.sampler.passes(1)]
        self.session = self.models.open(
            [], self.sampler.roles, capacity, num_rows=room, expected=expected, together=together
        )
        self.waiting = Waiting(self.session, part)
        none = torch.zeros(0, most, dtype=dtype, device=models.device)
        self.batch = Batch([], [], none, [], eos_token_ids, capacity=capacity, num_rows=room)
        self.decide = Decisions(self.batch.seeds, self.batch.rounds)
        self.sampler.start(self.session, self.batch, self.decide)
        self.rounds = Rounds(self.models, self.sampler, self.session, self.batch)

    @staticmethod
    def sizes(models: Ensemble, requests: Sequence[Request], options: Options) -> dict[str, Any]:
        """What makes one just large enough for these requests."""
        weighed = [request.weighed(models.attribute_names) for request in requests]
        needs = needs_base(models, options)
        return {
            "num_rows": min(options.batch_size, len(requests)),
            "capacity": max(request.num_positions for request in requests),
            "attributes": tuple(name for name in models.attribute_names if any(name in names for names in weighed)),
            "rounds_ahead": ROUNDS_AHEAD[models.device.type],
            "expected": [request.attributes(models, options, needs_base=needs) for request in requests],
            "most": max(map(len, weighed)),
        }

    def begin_call(self, num_rows: int, expected: Sequence[Attributes], plan: str | None) -> None:
        """Begin anew, after `close`, with as many rows at most."""
        self.rows, self.num_rows, self.num_added, self.plan = [], num_rows, 0, plan
        self._ahead.clear()
        self.batch.longest = self.batch.num_rounds = 0
        self.session.open(num_rows, expected)
        self.rounds.begin_call()

    def add(
        self, request: Request, added_at: float | None = None, contexts: Mapping[str, Context] | None = None
    ) -> Entry:
        """Let a request wait for a row.

        added_at  when it came, default now
        contexts  that it brings, beside those of the models

        Raises ValueError where the scheduler was opened for shorter ones, or for other or fewer attributes.
        """
        if (length := request.num_positions) > self.batch.capacity:
            raise ValueError(f"max_new_tokens: expected at most {self.batch.capacity} with the prompt's, got {length}")
        models = self.models.with_contexts([contexts]) if contexts else self.models
        own, known = request.weighed(models.attribute_names), (*self.attributes, *(contexts or ()))
        if unknown := sorted(set(own).difference(known)):
            raise ValueError(f"weights: expected some of {', '.join(known)}, got {unknown[0]!r}")
        if len(own) > self.most:
            raise ValueError(f"weights: expected at most {self.most} that are not 0, got {len(own)}")
        entry = Entry(
            request,
            Transcript(self.models.tokenizer, own, self.num_added, len(request.token_ids), request.ends),
            added_at=perf_counter() if added_at is None else added_at,
            num_drafts=self.options.chunk_size or 0,
            models=models,
            attributes=request.attributes(models, self.options, needs_base=needs_base(models, self.options)),
        )
        self.waiting.add(entry)
        self.num_added += 1
        return entry

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.waiting) or not all(entry.is_over for entry in self.rows)

    def step(self, admits: bool = True) -> list[tuple[Entry, list[Token]]]:
        """Let requests that wait begin in free rows, run a round, and read one.

        admits: whether any may begin now, and a part of a prompt be read

        out: the requests that ran in it, by row, with their new tokens; none while fewer than `rounds_ahead` are unread
        """
        self._admit(admits)
        if not self.rows:
            return []
        self.rounds.run()
        self._ahead.append((self.batch.snapshot(), self.rows.copy()))
        if len(self._ahead) <= self.rounds_ahead:
            return []
        snapshot, rows = self._ahead.popleft()
        return self._read(snapshot.read(), rows)

    def cancel(self, entry: Entry) -> None:
        """Give up a request: its row is free from the next round on."""
        if entry.is_over:
            return
        entry.error = RuntimeError("the request was given up")
        if entry in self.waiting:
            self.waiting.remove(entry)
        else:
            self.batch.stop([entry.row])

    def close(self) -> None:
        """Give up the caches, and the requests that are not over."""
        self.session.close()

    def _admit(self, admits: bool = True) -> None:
        """Let requests that wait begin in rows that are free, once those are given up for which there is none."""
        live, now = {row for row, entry in enumerate(self.rows) if not entry.is_over}, perf_counter()
        num_live, num_waiting = len(live), len(self.waiting)
        is_early = self.gather is not None and now < self.changed_at + self.gather
        num_unclaimed = len(self.rows) - num_live - num_waiting
        is_early = is_early and max(num_waiting, num_unclaimed) < num_live * GATHERED
        entries = self.waiting.take(self.num_rows - num_live, live, gathers=is_early) if admits else []
        if is_early and not entries:
            return
        before, self.num_wanted = self.num_wanted, num_live + len(entries)
        waits = self.gather is not None and num_live and not entries
        upload = Upload()  # all that the device is told, at once
        kept = self._close_ranks(max(before, self.num_wanted) if waits else self.num_wanted, upload)
        rows = self._place(entries)
        if kept is None and not rows:
            return
        self.changed_at = now
        self._use(upload)
        if rows:
            self._begin(rows, kept, upload)
        elif kept is not None:
            self.session.keep(kept, upload)
        upload.send()

    def _place(self, entries: list[Entry]) -> list[int]:
        """The rows in which requests begin: free ones, and new ones behind those in use; and with them rows that are to
        be run with nothing in them."""
        free = [row for row, entry in enumerate(self.rows) if entry.is_over]
        rows = [*free, *range(len(self.rows), self.num_rows)][: len(entries)]
        for row, entry in zip(rows, entries, strict=True):
            self.rows[row : row + 1] = [entry]
            entry.row, entry.entered_at = row, max(entry.added_at, self.read_at)
        for row in range(len(self.rows), self.models.rows_to_run(len(self.rows), self.num_rows)) if entries else ():
            rows.append(row)
            self.rows.append(entries[-1].idle())  # run as the last one is
        return rows

    def _begin(self, rows: list[int], kept: list[int] | None, upload: Upload) -> None:
        """Let the device begin the requests of some rows, once those that it has go on as rows 0, 1, ..."""
        entries = [self.rows[row] for row in rows]
        requests = [entry.request for entry in entries]
        prompts, limits = [request.token_ids for request in requests], [request.max_new_tokens for request in requests]
        weights = torch.zeros(len(rows), self.batch.weights.shape[1], dtype=self.batch.weights.dtype)
        for of_row, request in zip(weights, requests, strict=True):
            own = [alpha for alpha in request.alpha if alpha]
            of_row[: len(own)] = torch.tensor(own, dtype=weights.dtype)
        seeds = [request.seed for request in requests]
        begin = self.batch.lay_out(rows, prompts, limits, weights, seeds, upload)
        upload.then(lambda: self.sampler.reset(begin()))
        attributes, contexts = [entry.attributes for entry in entries], [request.contexts for request in requests]
        ensembles, ends = [entry.models for entry in entries], [r.num_positions for r in requests]
        awaited = [
            (entry.attributes, entry.models, entry.request.num_positions)
            for entry in islice(self.waiting, max(0, self.num_rows - len(self.rows)))
        ]
        self.session.replace(rows, prompts, attributes, contexts, ensembles, ends, kept, upload, awaited)

    def _close_ranks(self, num_rows: int, upload: Upload) -> list[int] | None:
        """Let the last rows move to where requests have ended, so that no more are in use than these. out: the rows
        that go on, as rows 0, 1, ..., or None where all do"""
        live = [row for row, entry in enumerate(self.rows) if not entry.is_over]
        size = self.models.rows_to_run(num_rows, self.num_rows)
        if size >= len(self.rows):
            return None
        kept, sources = list(range(size)), [row for row in live if row >= size]
        targets = [row for row in kept if self.rows[row].is_over][: len(sources)]
        for source, target in zip(sources, targets, strict=True):
            kept[target] = source
        self.batch.move(sources, targets, upload)
        self.rows = [self.rows[row] for row in kept]
        for row, entry in enumerate(self.rows):
            entry.row = row
        return kept

    def _use(self, upload: Upload) -> None:
        """Let what is remembered be that of the requests in `rows`."""
        put = partial(self._addresses.put, device=self.batch.state.device, upload=upload)
        most = max((len(entry.transcript.attributes) for entry in self.rows), default=0)
        self.batch.state.use(len(self.rows), most)
        self.decide.seeds, self.decide.rounds = self.batch.seeds, self.batch.rounds
        own = [entry.request.options or self.options for entry in self.rows]
        is_own = any(entry.request.options is not None for entry in self.rows)
        self.batch.warps = Warps(own, put) if is_own else None
        self.batch.is_traced = any(options.trace for options in own)
        wanted = [entry.request.num_top for entry in self.rows if entry.request.num_top is not None]
        self.batch.num_top = max(wanted, default=None)
        self.batch.process([entry.request.processor for entry in self.rows], partial(put, "has_processor"))
        if self.options.draft == "merged" and self.rows:
            alpha = [entry.request.alpha_of(self.merged, entry.models.attribute_names) for entry in self.rows]
            shares = merged_shares(torch.tensor(alpha, dtype=self.shares.dtype), self.options.target)
            upload.put(shares.double(), self.shares[: len(self.rows)])

    def _read(self, done: Round, rows: list[Entry]) -> list[tuple[Entry, list[Token]]]:
        """Extend the transcripts of the requests that a round ran, and close what has ended or failed."""
        self.read_at = perf_counter()
        news: list[tuple[Entry, list[Token]]] = []
        ended, stopped = [], []
        for row, entry in enumerate(rows):  # where they were in that round, and may not be any more
            if entry.is_over:
                continue
            tokens: list[Token] = []
            news.append((entry, tokens))
            entry.num_rounds[entry.num_drafts] += 1
            entry.num_read = len(entry.transcript.tokens)
            if done.draft_lengths is not None:
                entry.num_drafts = done.draft_lengths[row]
            transcript, is_last = entry.transcript, not done.active[row]
            if is_last and (error := self._explain(row, entry, done)) is not None:
                entry.error = error
                continue
            new, told = done.tokens[row][: done.counts[row]], entry.told(done, row, self.options)
            try:
                tokens.extend(transcript.extend(new, *told, is_last=is_last))
            except Exception as error:  # whatever a stopping criterion raises
                entry.error = error
            if entry.error is not None or transcript.is_stopped:
                stopped.append(entry.row)
            if entry.error is None and (is_last or transcript.is_stopped):
                ended.append(entry)
        if ended:
            self._close(ended)
        if stopped:
            self.batch.stop(stopped)
        live = [entry for entry in self.rows if not entry.is_over]
        longest = max((entry.transcript.length for entry in live), default=1)
        self.batch.longest = min(longest + len(self._ahead) * len(done.tokens[0]), self.batch.capacity)
        self.batch.longest_draft = max((entry.num_drafts for entry in live), default=0)
        return news

    def _close(self, ended: list[Entry]) -> None:
        """Write the results of requests that have ended, while their rows hold what was counted of them."""
        statistics = {"rounds": self.batch.rounds, **self.sampler.statistics()}
        columns = torch.stack([values.double() for values in statistics.values()], 1).tolist()  # all in one copy
        for entry in ended:
            request, transcript, options = entry.request, entry.transcript, entry.request.options or self.options
            self.session.retire(entry.row, transcript.tokens[: entry.num_read])
            num_tokens, is_stopped = len(transcript.tokens), transcript.is_stopped
            counted = dict(zip(statistics, columns[entry.row], strict=True))
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
                log_ratios=tuple(transcript.log_ratios) if options.trace else None,
                plan=self.plan,
                trace=transcript.trace(request.token_ids, options.told()) if options.trace else None,
            )

    def _cost(self, entry: Entry) -> Cost:
        """What a request has cost by itself, whatever else its rounds ran."""
        passes: Counter[tuple[tuple[str, ...], int]] = Counter()
        for num_drafts, num_rounds in entry.num_rounds.items():
            for roles, num_tokens in self.sampler.passes(num_drafts):
                passes[entry.names(roles), num_tokens] += num_rounds
        return entry.models.cost(passes, entry.names(self.sampler.roles))

    def _explain(self, row: int, entry: Entry, done: Round) -> Exception | None:
        """Why a request failed in a round, if it did."""
        if entry.row in self.batch.errors:
            return self.batch.errors.pop(entry.row)
        where = entry.transcript.where()
        if done.unusable[row]:
            request = entry.request
            tokens = [request.token_ids[-1], *entry.transcript.tokens, *done.tokens[row]]
            roles = entry.names(self.sampler.roles)
            blamed = self.session.blame(entry.row, len(request.token_ids) - 1, tokens, roles, entry.models)
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
