"""Models of a few tokens whose every row is known, behind the interface that the decode loops use.

A row depends on every token before it and on nothing else, and a session knows only the tokens it was fed: a loop that
leaves a rejected token in a cache, or feeds one at the wrong position, samples other rows than the test lists.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, product
from typing import Any

import torch
from torch import Tensor

from composed import Composed
from mpg.decode import SAMPLERS
from mpg.decode.batch import Batch, Round
from mpg.models.ensemble import Pass
from mpg.options import Options
from mpg.results import Transcript
from replaying import Replaying, enumerate_branches

NUM_ROWS = 997  # distinct rows of one model; a prime, so that few prefixes share one


class FakeModels:
    """An ensemble of random tabular models in float64.

    attributes  their names
    same        roles that are one model with the base; the others each have rows of their own
    others      more roles, and the standard deviation of their logits around the base's
    spread      standard deviation of the attributes' logits around the base's
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
        self._log_rows: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def is_same(self, role: str, other: str) -> bool:
        return self.logits[role] is self.logits[other]

    def open(self, prompts: Sequence[Sequence[int]], roles: Sequence[str], capacity: int) -> FakeSession:
        return FakeSession(self, prompts, roles, capacity)

    def log_row(self, role: str, prefix: Sequence[int]) -> Tensor:
        """log pi_role(. | prefix), (V,), for the tests' own enumeration."""
        key = role, tuple(prefix)
        if key not in self._log_rows:
            self._log_rows[key] = self.logits[role][row_numbers(torch.tensor([prefix]))[0, -1]].log_softmax(-1)
        return self._log_rows[key]


class FakeSession:
    def __init__(self, models: FakeModels, prompts: Sequence[Sequence[int]], roles: Sequence[str], capacity: int):
        self.models = models
        self.passes: list[Pass] = []
        unread = torch.full((len(prompts), capacity), 7)  # a token that no vocabulary here has
        self.read = {id(models.logits[role]): unread.clone() for role in roles}  # roles of one model share it
        self.replace(range(len(prompts)), prompts)

    def replace(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in zip(rows, prompts, strict=True):
            rows_of.setdefault(tuple(prompt[:-1]), []).append(row)
        for read, (prompt, own) in product(self.read.values(), rows_of.items()):
            read[own, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)

    def forward(self, roles: Sequence[str], tokens: Tensor, start: Tensor, *, kv_length: int) -> Tensor:
        self.passes.append((tuple(roles), tokens.shape[1]))
        positions = start[:, None] + torch.arange(tokens.shape[1])
        positions = positions.clamp_max(next(iter(self.read.values())).shape[1] - 1)
        rows = []
        for role in roles:
            read = self.read[id(self.models.logits[role])].scatter_(1, positions, tokens)
            numbers = row_numbers(read[:, :kv_length]).gather(1, positions.clamp_max(kv_length - 1))
            rows.append(self.models.logits[role][numbers])
        return torch.stack(rows)


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
        batch.longest_draft = max(done.draft_lengths)
        yield done


def total_variation(law: dict[tuple[int, ...], float], other: dict[tuple[int, ...], float]) -> float:
    return sum(abs(law.get(text, 0.0) - other.get(text, 0.0)) for text in {*law, *other}) / 2


def row_numbers(tokens: Tensor) -> Tensor:
    """For every prefix of each sequence (B, L), the number of the row that follows it."""
    factors = torch.tensor(list(accumulate(range(tokens.shape[1] - 1), lambda f, _: f * 31 % NUM_ROWS, initial=17)))
    return ((tokens + 1) * factors).cumsum(1) % NUM_ROWS
