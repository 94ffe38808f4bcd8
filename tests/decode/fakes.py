"""Models of a few tokens whose every row is known, behind the interface that the decode loops use.

A row depends on every token before it and on nothing else, and a session knows only the tokens it was fed: a loop that
leaves a rejected token in a cache, or feeds one at the wrong position, samples other rows than the test lists.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, cycle, product
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from composed import Composed
from mpg.decode import SAMPLERS
from mpg.decode.batch import Batch, Round
from mpg.decode.request import Entry, Request
from mpg.decode.run import Scheduler
from mpg.models.ensemble import Cost, Pass
from mpg.models.session import Role
from mpg.options import Options
from mpg.results import Transcript
from replaying import Replaying, enumerate_branches

LONGEST_CONTEXT = 6
NUM_ROWS = 997  # distinct rows of one model; a prime, so that few prefixes share one


class FakeModels:
    """An ensemble of random tabular models in float64.

    attributes  their names
    same        roles that are one model with the base; the others each have rows of their own
    others      more roles, and the standard deviation of their logits around the base's
    spread      standard deviation of the attributes' logits around the base's
    contexts    more attributes, by name: the role whose rows each has, and the tokens that it reads for a prompt; of
                the name "anchor" those of the anchor
    """

    dtype, device, tokenizer, max_positions = torch.float64, torch.device("cpu"), None, None

    def __init__(
        self,
        vocab_size: int,
        attributes: Sequence[str] = ("E", "T"),
        *,
        same: Iterable[str] = ("anchor",),
        others: Mapping[str, float] | None = None,
        eos_token_ids: Sequence[int] = (),
        spread: float = 1.0,
        contexts: Mapping[str, tuple[str, Sequence[int]]] | None = None,
        seed: int = 0,
    ):
        rng = torch.Generator().manual_seed(seed)
        self.vocab_size, self.attribute_names = vocab_size, tuple(attributes)
        self.eos_token_ids = tuple(eos_token_ids)
        base = torch.randn(NUM_ROWS, vocab_size, generator=rng, dtype=torch.float64)
        self.logits = {"base": base} | {role: base for role in same}
        for role, deviation in {"anchor": spread, **dict.fromkeys(attributes, spread), **(others or {})}.items():
            noise = torch.randn(NUM_ROWS, vocab_size, generator=rng, dtype=torch.float64)
            self.logits.setdefault(role, base + deviation * noise)
        self.logits.setdefault("draft", base)
        self.contexts = contexts or {}
        self.attribute_names += tuple(name for name in self.contexts if name != "anchor")
        for name, (role, _) in self.contexts.items():
            self.logits[name] = self.logits[role].clone()  # which is_same tells apart
        self._log_rows: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def is_same(self, role: str, other: str) -> bool:
        return self.logits[role] is self.logits[other]

    def open(
        self,
        prompts: Sequence[Sequence[int]],
        roles: Sequence[Role],
        capacity: int,
        *,
        num_rows: int = 0,
        expected: Any = (),
        together: Any = (),
    ) -> FakeSession:
        return FakeSession(self, prompts, roles, capacity, num_rows or len(prompts))

    def merge(self, attributes: Sequence[str], weights: Tensor, *, is_draft: bool = False) -> FakeModels:
        """Itself: the role "merged" is a table as any."""
        assert not {*attributes} & {*self.contexts}
        return self

    def rows_to_run(self, num_rows: int, most: int) -> int:
        return num_rows

    def new_graphs(self) -> None:
        """Its rounds are not captured."""

    def call_key(self, capacity: int) -> None:
        """Its calls leave nothing to one another."""

    def cost(self, passes: Any, opened: Any) -> Cost:
        return Cost()

    def log_row(self, role: str, prompt: Sequence[int], text: Sequence[int] = ()) -> Tensor:
        """log pi_role(. | prompt or its context, text), (V,), for the tests' own enumeration."""
        prefix = [*self.contexts[role][1], *text] if role in self.contexts else [*prompt, *text]
        key = role, tuple(prefix)
        if key not in self._log_rows:
            self._log_rows[key] = self.logits[role][row_numbers(torch.tensor([prefix]))[0, -1]].log_softmax(-1)
        return self._log_rows[key]


class FakeSession:
    """A session of tables. Roles of one model share what it has read."""

    def __init__(
        self, models: FakeModels, prompts: Sequence[Sequence[int]], roles: Sequence[Role], capacity: int, num_rows: int
    ):
        self.models = models
        self.passes: list[Pass] = []
        self.attributes: list[Mapping[Role, str]] = []  # of every row
        self.fixed = [role for role in roles if isinstance(role, str)]
        names = {*self.fixed} or {*models.attribute_names}
        names |= {*models.attribute_names} if any(isinstance(role, int) for role in roles) else set()
        unread = torch.full((num_rows, capacity), 7)  # a token that no vocabulary here has
        self.read = {id(models.logits[name]): unread.clone() for name in names}
        # of every context what it reads, by row, and how much longer that is than the prompt
        self.shifts = {name: torch.zeros(num_rows, dtype=torch.int64) for name in models.contexts}
        self.prompt_lengths = torch.zeros(num_rows, dtype=torch.int64)
        if prompts:
            self.replace(range(len(prompts)), prompts)

    def replace(
        self,
        rows: Sequence[int],
        prompts: Sequence[Sequence[int]],
        attributes: Sequence[Mapping[Role, str]] | None = None,
        contexts: Sequence[Mapping[str, Sequence[int]]] | None = None,
        ensembles: Any = None,
        ends: Any = None,
        kept: Sequence[int] | None = None,
        upload: Any = None,
        awaited: Any = (),
    ) -> None:
        if kept is not None:
            self.keep(kept)
        for row, own in zip(rows, attributes or [{}] * len(rows), strict=True):
            self.attributes[row : row + 1] = [own]
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in zip(rows, prompts, strict=True):
            rows_of.setdefault(tuple(prompt[:-1]), []).append(row)
        for read, (prompt, own) in product(self.read.values(), rows_of.items()):
            read[own] = 7
            read[own, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        for row, prompt, of_row in zip(rows, prompts, contexts or [{}] * len(rows), strict=True):
            self.prompt_lengths[row] = len(prompt)
            for name, text in of_row.items():
                self.shifts[name][row] = len(text) - len(prompt)
                read = self.read[id(self.models.logits[name])]
                read[row] = 7
                read[row, : len(text) - 1] = torch.tensor(text[:-1], dtype=torch.int64)

    def asked(self, prompt: Any, attributes: Mapping[Role, str], contexts: Any, ensemble: Any) -> list[Any]:
        return [(role, tuple(prompt)) for role in (*self.fixed, *attributes)]

    def keep(self, rows: Sequence[int], upload: Any = None) -> None:
        self.attributes = [self.attributes[row] for row in rows]
        for read in self.read.values():
            read[: len(rows)] = read[list(rows)]
            read[len(rows) :] = 7
        for of_rows in (*self.shifts.values(), self.prompt_lengths):
            of_rows[: len(rows)] = of_rows[list(rows)]

    def retire(self, row: int, tokens: Sequence[int]) -> None:
        """What later texts may begin with, which every role of the row must have read but for the last token."""
        own = self.attributes[row]
        for name in (*(own.get(role, role) for role in self.fixed), *own.values()):
            first = int(self.prompt_lengths[row] + (self.shifts[name][row] if name in self.shifts else 0))
            read = self.read[id(self.models.logits[name])][row, first : first + len(tokens)]
            assert name == "merged" or read.tolist()[: len(tokens) - 1] == list(tokens[:-1])

    def forward(self, roles: Sequence[Role], tokens: Tensor, start: Tensor, *, kv_length: int) -> Tensor:
        self.passes.append((tuple(roles), tokens.shape[1]))
        positions = start[:, None] + torch.arange(tokens.shape[1])
        positions = positions.clamp_max(next(iter(self.read.values())).shape[1] - 1)
        most = max(sum(isinstance(role, int) for role in own) for own in self.attributes)
        return torch.stack([
            self._rows_of(role, tokens, positions, kv_length) for role in roles if isinstance(role, str) or role < most
        ])  # fmt: skip

    def close(self) -> None:
        pass

    def _rows_of(self, role: Role, tokens: Tensor, positions: Tensor, kv_length: int) -> Tensor:
        """The logits of one role. Where a row has no such attribute they are another's, and nothing is read."""
        names = [own.get(role, role) for own in self.attributes]
        logits = torch.zeros(*tokens.shape, self.models.vocab_size, dtype=torch.float64)
        for name in {name for name in names if isinstance(name, str)}:
            own = torch.tensor([place for place, other in enumerate(names) if other == name])
            read = self.read[id(self.models.logits[name])]
            shift = self.shifts[name][own][:, None] if name in self.shifts else torch.zeros(1, 1, dtype=torch.int64)
            at = (positions[own] + shift).clamp_max(read.shape[1] - 1)
            fed = tokens[own]
            if name in self.shifts:  # the last token of a context is its own
                last = torch.tensor(self.models.contexts[name][1][-1])
                fed = torch.where(positions[own] == self.prompt_lengths[own][:, None] - 1, last, fed)
            read[own] = read[own].scatter(1, at, fed)
            length = kv_length + int(shift.amax())
            numbers = row_numbers(read[own, :length]).gather(1, at.clamp_max(length - 1))
            logits[own] = self.models.logits[name][numbers]
        return logits


# Requests that share every enumerated batch, so that it is ragged: other prompts, limits and decisions of their own.
COMPANIONS = (([1, 0, 1, 1, 0, 2], 2), ([0], 6))


class _WithCompanions(Composed):
    """Replays the first rows of a batch and draws for the companions, its last rows, by their keys."""

    def __init__(self, replaying: Replaying, batch: Batch):
        super().__init__(batch.seeds, batch.rounds)
        self.replaying, self.split = replaying, len(replaying.probs)

    def bernoulli(self, probs: Tensor, purpose: Any, index: int, active: Callable[[], Tensor]) -> Tensor:
        followed = self.replaying.bernoulli(probs[: self.split], purpose, index, lambda: active()[: self.split])
        return torch.cat([followed, super().bernoulli(probs, purpose, index, active)[self.split :]])

    def categorical(self, rows: Tensor, purpose: Any, index: int, active: Callable[[], Tensor]) -> Tensor:
        followed = self.replaying.categorical(rows[: self.split], purpose, index, lambda: active()[: self.split])
        return torch.cat([followed, super().categorical(rows, purpose, index, active)[self.split :]])


def enumerate_sampler(
    models: FakeModels,
    prompt: Sequence[int],
    max_new_tokens: int,
    weights: dict[str, float],
    *,
    predecessor: tuple[Sequence[int], int] | None = None,
    processor: Any = None,
    stops: Callable[[Sequence[int]], bool] | None = None,
    rounds_ahead: int = 0,
    **options: Any,
) -> dict[tuple[int, ...], float]:
    """The exact law of a sampler's production loop over the new tokens, by walking every branch of it.

    predecessor   prompt and limit of a request that had each row before, and all of whose branches are walked too
    processor     of every row but the last companion's
    stops         whether a text ends with its last token; rows are stopped as `mpg.decode.run` does it, by rounds
                  read so late
    """
    checked = Options.of(options)

    def run(replaying: Replaying, batch_size: int) -> list[tuple[int, ...]]:
        first_prompt, first_limit = predecessor or (prompt, max_new_tokens)
        prompts = [first_prompt] * batch_size + [companion for companion, _ in COMPANIONS]
        limits = [first_limit] * batch_size + [limit for _, limit in COMPANIONS]
        alpha = torch.tensor([list(weights.values())] * len(prompts), dtype=torch.float64).view(len(prompts), -1)
        ends = [len(start) + limit for start, limit in zip(prompts, limits, strict=True)]
        capacity = max(len(prompt) + max_new_tokens, *ends)
        processors = None if processor is None else [processor] * (len(prompts) - 1) + [None]
        seeds = torch.arange(len(prompts))
        batch = Batch(prompts, limits, alpha, seeds, models.eos_token_ids, capacity=capacity, processors=processors)
        transcripts = [Transcript(None, (), row, len(start), stops) for row, start in enumerate(prompts)]
        unread: deque[Round] = deque()
        sampler = SAMPLERS[checked.sampler](models, tuple(weights), checked)
        session = models.open(prompts, sampler.roles, batch.capacity)
        sampler.start(session, batch, _WithCompanions(replaying, batch))
        waiting = set(range(batch_size)) if predecessor else set()
        for done in rounds_of(sampler, batch):
            unread.append(done)
            if stops is not None and len(unread) > rounds_ahead:
                batch.stop(_read(unread.popleft(), transcripts))
            if free := [row for row in sorted(waiting) if not batch.active[row]]:
                count = len(free)
                batch.replace(free, [prompt] * count, [max_new_tokens] * count, alpha[free], torch.tensor(free))
                session.replace(free, [prompt] * count)
                sampler.reset(torch.tensor(free))
                waiting -= set(free)
        assert not batch.unusable.any()
        assert not batch.empty.any()
        if stops is not None:
            for done in unread:
                _read(done, transcripts)
            return [tuple(transcript.tokens) for transcript in transcripts][:batch_size]
        rows = zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True)
        return [tuple(row[len(prompt) : length]) for row, length in rows][:batch_size]

    law: dict[tuple[int, ...], float] = {}
    for prob, text in enumerate_branches(run):
        law[text] = law.get(text, 0.0) + prob
    return law


class OfRequests(Composed):
    """Replays the decisions of some requests of a scheduler, wherever their rows are; others draw by their keys."""

    def __init__(self, replaying: Replaying, seeds: Tensor, rounds: Tensor):
        super().__init__(seeds, rounds)
        self.replaying = replaying

    def follow(self, scheduler: Scheduler, entries: Sequence[Entry]) -> None:
        self.scheduler, self.places = scheduler, {entry: place for place, entry in enumerate(entries)}

    def bernoulli(self, probs: Tensor, purpose: Any, index: int, active: Callable[[], Tensor]) -> Tensor:
        drawn = super().bernoulli(probs, purpose, index, active)
        return self._follow(self.replaying.bernoulli, drawn, probs, purpose, index, active)

    def categorical(self, rows: Tensor, purpose: Any, index: int, active: Callable[[], Tensor]) -> Tensor:
        drawn = super().categorical(rows, purpose, index, active)
        return self._follow(self.replaying.categorical, drawn, rows, purpose, index, active)

    def _follow(
        self, follow: Any, drawn: Tensor, probs: Tensor, purpose: Any, index: int, active: Callable[[], Tensor]
    ) -> Tensor:
        if not self.places:
            return drawn
        own = [(row, self.places[entry]) for row, entry in enumerate(self.scheduler.rows) if entry in self.places]
        rows, places = torch.tensor(own, dtype=torch.int64).view(-1, 2).T
        whole = probs.new_full((len(self.places), *probs.shape[1:]), 0.5)
        whole[places] = probs[rows]
        is_active = torch.zeros(len(self.places), dtype=torch.bool)
        is_active[places] = active()[rows]
        drawn[rows] = follow(whole, purpose, index, lambda: is_active)[places]
        return drawn


def enumerate_in_company(
    models: FakeModels,
    prompt: Sequence[int],
    max_new_tokens: int,
    weights: dict[str, float],
    *,
    company: Sequence[tuple[Sequence[int], int, dict[str, float]]],
    **options: Any,
) -> dict[tuple[int, ...], float]:
    """The exact law of a request in the scheduler, by walking every branch of it: it enters, copy by copy, where one of
    the company has ended, and moves where others end before it.

    company: prompts, limits and weights of requests that come before it, over and over, two more than there are copies
    """
    checked = Options.of(options)

    def request(prompt: Sequence[int], limit: int, weights: dict[str, float], seed: int) -> Request:
        alpha = tuple(weights.get(name, 0.0) for name in models.attribute_names)
        contexts = {name: list(text) for name, (_, text) in models.contexts.items() if name in {*weights, "anchor"}}
        return Request(list(prompt), alpha, weights, limit, seed, contexts=contexts)

    def run(replaying: Replaying, batch_size: int) -> list[tuple[int, ...]]:
        before = [request(*one, seed) for seed, one in zip(range(batch_size + 2), cycle(company), strict=False)]
        with patch("mpg.decode.run.Decisions", partial(OfRequests, replaying)):
            scheduler = Scheduler(
                models, checked, models.eos_token_ids, num_rows=len(before), rounds_ahead=0,
                capacity=max(one.num_positions for one in before) + max_new_tokens + LONGEST_CONTEXT,
                attributes=models.attribute_names,
            )  # fmt: skip
        for one in before:
            scheduler.add(one)
        entries = [scheduler.add(request(prompt, max_new_tokens, weights, 0)) for _ in range(batch_size)]
        scheduler.decide.follow(scheduler, entries)
        while scheduler.has_work:
            scheduler.step()
        return [entry.result.tokens for entry in entries]

    law: dict[tuple[int, ...], float] = {}
    for prob, text in enumerate_branches(run):
        law[text] = law.get(text, 0.0) + prob
    return law


def _read(done: Round, transcripts: Sequence[Transcript]) -> list[int]:
    """Extend the transcripts by a round. out: the rows that are stopped"""
    for row, transcript in enumerate(transcripts):
        if not transcript.is_stopped:
            list(transcript.extend(done.tokens[row][: done.counts[row]], None, is_last=False))
    return [row for row, transcript in enumerate(transcripts) if transcript.is_stopped]


def rounds_of(sampler: Any, batch: Batch) -> Iterator[Round]:
    """Run rounds until every request of the batch has ended; each as the host reads it."""
    while batch.active.any():
        sampler.round()
        done = batch.snapshot().read()
        batch.longest_draft = max(done.draft_lengths or [0])
        yield done


def total_variation(law: dict[tuple[int, ...], float], other: dict[tuple[int, ...], float]) -> float:
    return sum(abs(law.get(text, 0.0) - other.get(text, 0.0)) for text in {*law, *other}) / 2


def row_numbers(tokens: Tensor) -> Tensor:
    """For every prefix of each sequence (B, L), the number of the row that follows it."""
    factors = torch.tensor(list(accumulate(range(tokens.shape[1] - 1), lambda f, _: f * 31 % NUM_ROWS, initial=17)))
    return ((tokens + 1) * factors).cumsum(1) % NUM_ROWS
