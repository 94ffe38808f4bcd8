"""Ranks the samplers of a target on these models, the fastest first: a cost model, fed by measured rounds and
acceptance. Drafts of which nothing is accepted go last, however fast they seem.

    seconds a token = seconds a round / (1 + a + a^2 + ... + a^k)

A round of `exact` takes k draft passes and one pass of the target over k + 1 positions, so its time is taken as linear
in k, through rounds that were timed at two k; `direct` is timed as it is (k = 0). a is the share of drafted tokens that
the target accepts, sum_y min(p(y), q(y)) averaged along a trial text, taken for independent along a chunk (Leviathan
et al., 2023). Knows nothing of quality: all candidates sample one law.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor

import mpg_ext
from mpg.decode.batch import Batch
from mpg.decode.call import finish
from mpg.decode.drafts import ROLES, LookupDraft, merged_shares
from mpg.decode.request import Request
from mpg.decode.rows import TargetRows
from mpg.decode.run import Scheduler
from mpg.models.ensemble import Ensemble
from mpg.options import MAX_CHUNK, Options

MAX_PROMPTS = 8  # that the trial continues
TRIAL_TOKENS = MAX_CHUNK  # at most, of each
CHUNK_SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
TIMED_CHUNK_SIZES = (1, 8)
LEAST_ACCEPTED = 0.005  # of a draft that may win: less is shown as 0 %, and its rounds were faster by noise alone
TIMED_ROUNDS = 5  # of which the fastest counts: what disturbs a round only adds to it


@dataclass(frozen=True)
class Candidate:
    """One way to sample.

    options           sampler, draft and chunk_size among them
    acceptance        a, None without a draft
    tokens_per_round  that each request is expected to commit
    """

    options: Options
    acceptance: float | None
    tokens_per_round: float
    seconds_per_round: float

    @property
    def seconds_per_token(self) -> float:
        return self.seconds_per_round / self.tokens_per_round

    def __str__(self) -> str:
        cost = f"{self.seconds_per_token * 1e3:.3g} ms a token"
        if self.acceptance is None:
            return f"direct ({cost})"
        name = f"exact, {self.options.draft} draft, k = {self.options.chunk_size}"
        return f"{name} ({cost}: {self.acceptance:.0%} accepted, {self.tokens_per_round:.2f} tokens a round)"


@dataclass(frozen=True)
class Plan:
    """The candidates, the fastest first; but those of drafts of which nothing is accepted behind all others."""

    candidates: tuple[Candidate, ...]

    @property
    def options(self) -> Options:
        return self.candidates[0].options

    def __str__(self) -> str:
        """What was picked, and the best with every other draft."""
        best: dict[str, Candidate] = {}
        for candidate in self.candidates:
            best.setdefault(candidate.options.draft, candidate)
        return " rather than ".join(map(str, best.values()))


@torch.no_grad()
def plan(models: Ensemble, requests: Sequence[Request], options: Options, eos_token_ids: tuple[int, ...]) -> Plan:
    """Continue some of the requests for up to TRIAL_TOKENS tokens, time rounds, and rank the ways to go on.

    The requests run as many at once as `options` says, and whole rounds from their graphs where these are captured, so
    that rounds are timed as they will be.

    options  of sampler "auto": those of the target

    Logits processors run in the trial and in the timed rounds, but not on the rows whose overlap is a.
    """
    requests = requests[: options.batch_size]
    # a stopping criterion may count what it is shown, so it is shown no trial
    short = [replace(r, max_new_tokens=min(r.max_new_tokens, TRIAL_TOKENS), ends=None) for r in requests]
    direct = replace(options, sampler="direct")
    acceptances = _measure_acceptance(models, short[:MAX_PROMPTS], direct, eos_token_ids)
    candidates = [Candidate(direct, None, 1.0, _time_round(models, short, direct))]
    for draft, a in acceptances.items():
        ways = {k: replace(direct, sampler="exact", draft=draft, chunk_size=k) for k in CHUNK_SIZES}
        low, high = TIMED_CHUNK_SIZES
        at_low, at_high = (_time_round(models, short, ways[k]) for k in TIMED_CHUNK_SIZES)
        for k, way in ways.items():
            seconds = at_low + (at_high - at_low) * (k - low) / (high - low)
            candidates.append(Candidate(way, a, sum(a**i for i in range(k + 1)), seconds))
    return Plan(tuple(sorted(candidates, key=_rank)))


def _rank(candidate: Candidate) -> tuple[bool, float]:
    is_in_vain = candidate.acceptance is not None and candidate.acceptance < LEAST_ACCEPTED
    return is_in_vain, candidate.seconds_per_token


def _time_round(models: Ensemble, requests: Sequence[Request], options: Options) -> float:
    """Seconds of a round, the host's reading of it included."""
    sizes = Scheduler.sizes(models, requests, options)
    scheduler = Scheduler(models, options, (), **sizes)  # no end, so that all rows go on
    for request in requests:
        scheduler.add(request)
    rounds, batch = scheduler.rounds, scheduler.batch
    scheduler.step()  # not counted
    batch.longest = batch.capacity  # rounds of one cache length, so that one graph runs them all
    for _ in range(0 if rounds.graphs is None else 2):  # what the first meets the second captures
        rounds.begin_call()
        rounds.run()
    seconds = []
    for _ in range(TIMED_ROUNDS):
        started_at = perf_counter()
        rounds.run()
        batch.snapshot().read()
        seconds.append(perf_counter() - started_at)
    scheduler.close()
    return min(seconds)


def _measure_acceptance(
    models: Ensemble, requests: Sequence[Request], direct: Options, eos_token_ids: tuple[int, ...]
) -> dict[str, float]:
    """a of every draft that these models have, along texts of the target itself."""
    scheduler = Scheduler(models, direct, eos_token_ids, **Scheduler.sizes(models, requests, direct))
    prompts = [request.token_ids for request in requests]
    texts = [result.tokens for result in finish(scheduler, requests)]
    attributes, merged = scheduler.attributes, scheduler.merged
    alpha = [request.alpha_of(attributes, models.attribute_names) for request in requests]
    weights = torch.tensor(alpha, dtype=scheduler.batch.weights.dtype, device=models.device)
    seeds = torch.tensor([request.seed for request in requests], device=models.device)
    drafts = {draft: role for draft, role in ROLES.items() if draft != "model" or not models.is_same("draft", "base")}
    try:
        of_merged = weights[:, [attributes.index(name) for name in merged]]
        models = models.merge(merged, merged_shares(of_merged, direct.target), is_draft=True)
    except ValueError:  # attributes of more than one model, or none
        del drafts["merged"]

    # the target's rows before each token of the texts, as if all had been drafted
    width = max(map(len, texts))
    chunk = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=models.device)
    lengths = torch.tensor([[len(text)] for text in texts], device=models.device)
    is_text = torch.arange(width, device=models.device) < lengths
    batch = Batch(prompts, [width] * len(texts), weights, seeds, ())
    target = TargetRows(models, attributes, direct)
    contexts = [request.contexts for request in requests]
    longest = max(request.longest_prompt for request in requests) + width
    session = models.open(prompts, (*target.roles, *drafts.values()), longest, contexts=contexts)
    target.start(batch)
    input_tokens, start = torch.cat([batch.last_tokens[:, None], chunk], 1), batch.lengths - 1
    logits = session.forward(target.roles, input_tokens, start, kv_length=batch.capacity)
    rows = target.of(logits, chunk, lengths[:, 0])[0][:, :-1]

    def overlap(draft_rows: Tensor) -> float:
        return torch.minimum(rows, draft_rows).sum(-1)[is_text].mean().clamp(0, 1).item()

    acceptances = {"lookup": overlap(_lookup_rows(prompts, texts, batch, rows))}
    for draft, role in drafts.items():
        logits = session.forward((role,), input_tokens[:, :-1], start, kv_length=batch.capacity)[0]
        draft_rows = mpg_ext.warp_rows(logits.flatten(0, 1).to(rows.dtype), **direct.warp())
        acceptances[draft] = overlap(draft_rows.view_as(rows))
    session.close()
    return acceptances


def _lookup_rows(
    prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], batch: Batch, rows: Tensor
) -> Tensor:
    """Prompt lookup's rows before each token of the texts: one-hot, or 0 where it drafts nothing. out: as `rows`"""
    lookup_rows, draft = torch.zeros_like(rows), LookupDraft()
    for t in range(rows.shape[1]):
        so_far = [[*prompt, *text[:t]] for prompt, text in zip(prompts, texts, strict=True)]
        draft.batch = Batch(so_far, [1] * len(so_far), batch.weights, batch.seeds, ())
        proposal = draft.propose(1)
        lookup_rows[:, t].scatter_(1, proposal.chunk, proposal.num_usable[:, None].to(rows.dtype))
    return lookup_rows
