"""Logits processors act on the combined row with the right history, and `exact` stays exact under them: enumerated."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from composed import Composed
from fakes import FakeModels, enumerate_sampler, rounds_of, total_variation
from laws import target_law
from longer import IS_LONG, thinned
from mpg.decode import SAMPLERS
from mpg.decode import rows as rows_module
from mpg.decode.batch import Batch
from mpg.decode.rng import Decisions
from mpg.decode.rows import process_rows
from mpg.options import Options

EOS, PROMPT, MAX_NEW_TOKENS = 2, [1, 0, 1], 4
WEIGHTS = {"E": 0.7, "T": 0.6}
PENALTY = 1.7


# What each processor does, once more in plain Python: (history, probabilities) -> unnormalised probabilities.


def penalised(history, row):
    return [p**PENALTY if token in history else p for token, p in enumerate(row)]


def without_repeated_pairs(history, row):
    followers = [after for before, after in pairwise(history) if before == history[-1]]
    return [0.0 if token in followers else p for token, p in enumerate(row)]


def longer_than_two(history, row):
    return [0.0 if token == EOS and len(history) < len(PROMPT) + 2 else p for token, p in enumerate(row)]


def biased_pair(history, row):
    return [p * math.exp(1.5) if token == 1 and history[-1] == 1 else p for token, p in enumerate(row)]


def both(history, row):
    return longer_than_two(history, penalised(history, row))


class Parity:
    """One that a user might write: after an even number of tokens, the row of temperature 2. Changes its argument."""

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] % 2 == 0:
            scores /= 2
        return scores


def parity(history, row):
    return [p**0.5 for p in row] if len(history) % 2 == 0 else row


PROCESSORS = {
    "repetition penalty": (RepetitionPenaltyLogitsProcessor(PENALTY), penalised),
    "no repeated pair": (NoRepeatNGramLogitsProcessor(2), without_repeated_pairs),
    "biased pair": (SequenceBiasLogitsProcessor([[[1, 1], 1.5]]), biased_pair),
    "penalty, minimum length": (
        LogitsProcessorList([RepetitionPenaltyLogitsProcessor(PENALTY), MinNewTokensLengthLogitsProcessor(3, 2, EOS)]),
        both,
    ),
    "a user's own": (Parity(), parity),
}
DRAFTS = {"reference": {}, "model": {"draft": 1.0}, "merged": {"merged": 1.0}, "lookup": {}}


def check(processor, process, *, others=None, weights=WEIGHTS, **options):
    models = FakeModels(3, others=others, eos_token_ids=[EOS], seed=1)
    law = enumerate_sampler(models, PROMPT, MAX_NEW_TOKENS, weights, processor=processor, **options)
    expected = target_law(models, PROMPT, MAX_NEW_TOKENS, weights, process=process, **options)
    unprocessed = target_law(models, PROMPT, MAX_NEW_TOKENS, weights, **options)
    assert total_variation(expected, unprocessed) > 1e-3  # so that a processor left out is noticed
    return total_variation(law, expected)


@pytest.mark.parametrize(
    ("name", "draft", "verify"),
    [
        (name, draft, verify)
        for (i, name), (j, draft), (k, verify) in product(
            enumerate(PROCESSORS), enumerate(thinned([*DRAFTS], first=1)), enumerate(("block", "token"))
        )
        if IS_LONG or (i + j + k) % 2 == 0
    ],
)
def test_exact_samples_the_processed_target(name, draft, verify, record_property):
    options = {"sampler": "exact", "draft": draft, "verify": verify, "chunk_size": 2, "target": "geometric"}
    defect = check(*PROCESSORS[name], others=DRAFTS[draft], **options)
    record_property("defect", defect)
    assert defect < 1e-12


@pytest.mark.parametrize("name", PROCESSORS)
def test_direct_samples_the_processed_target(name, record_property):
    defect = check(*PROCESSORS[name], sampler="direct", target="geometric")
    record_property("defect", defect)
    assert defect < 1e-12


WAYS = {
    "arithmetic, spans of 2": {"target": "arithmetic", "mixture_span": 2},
    "arithmetic, whole sequence": {"target": "arithmetic", "mixture_span": "sequence"},
    "anchored": {"target": "anchored"},
    "greedy": {"target": "geometric", "temperature": 0},
    "warped": {"target": "geometric", "temperature": 0.7, "top_p": 0.8, "min_p": 0.05},
    "adapted chunks": {"target": "geometric", "adaptive": True},
}


@pytest.mark.parametrize(
    ("name", "way", "sampler"),
    [
        (name, way, sampler)
        for (i, name), (j, way), (k, sampler) in product(
            enumerate(("penalty, minimum length", "no repeated pair")), enumerate(WAYS), enumerate(("exact", "direct"))
        )
        if (way, name) != ("greedy", "no repeated pair")  # the largest stays the largest here
        if (way, sampler) != ("adapted chunks", "direct")  # which drafts nothing
        if IS_LONG or way in ("greedy", "adapted chunks") or (i + j + k) % 2 == 0
    ],
)
def test_processors_come_after_the_combination_and_before_the_warp(name, way, sampler, record_property):
    options = {"sampler": sampler, **WAYS[way]}
    if sampler == "exact":
        options |= {"draft": "model", "chunk_size": 2}
    defect = check(*PROCESSORS[name], others={"draft": 1.0}, **options)
    record_property("defect", defect)
    assert defect < 1e-12


@pytest.mark.parametrize("sampler", ["exact", "direct"])
def test_fused_ops_decide_as_composed_ones_under_processors(sampler):
    models = FakeModels(6, others={"draft": 1.0}, eos_token_ids=[5], seed=1)
    options = Options(sampler=sampler)
    texts = []
    for decisions in (Decisions, Composed):
        batch = Batch(
            [[1, 0], [3], [0, 2, 1]] * 8, [12] * 24, torch.tensor([[0.8, 0.5]] * 24, dtype=torch.float64),
            torch.arange(24), [5], processors=[RepetitionPenaltyLogitsProcessor(1.5), None, Parity()] * 8,
        )  # fmt: skip
        one = SAMPLERS[sampler](models, ("E", "T"), options)
        session = models.open([[1, 0], [3], [0, 2, 1]] * 8, one.roles, batch.capacity)
        one.start(session, batch, decisions(batch.seeds, batch.rounds))
        for _ in rounds_of(one, batch):
            pass
        texts.append([row[:length] for row, length in zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True)])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("draft", ["model", "reference", "merged"])
@pytest.mark.parametrize("target", ["geometric", "arithmetic"])
def test_request_without_a_processor_drafts_and_decides_from_the_rows_that_it_has_alone(target, draft):
    """To the last bit, whatever processors its neighbours have: rounding alone turns a draw now and then."""
    models = FakeModels(6, others={"draft": 1.0, "merged": 1.0}, eos_token_ids=[5], seed=1)
    options = Options(sampler="exact", draft=draft, target=target)

    class Watching(Decisions):
        def verify_block(self, target_probs, draft_probs, *rest):
            self.seen = [target_probs[1], draft_probs[1]]
            return super().verify_block(target_probs, draft_probs, *rest)

    def decided_from(processors):
        prompts, weights = [[1, 0], [3], [0, 2, 1]], torch.tensor([[0.8, 0.5]] * 3, dtype=torch.float64)
        batch = Batch(prompts, [9] * 3, weights, torch.arange(3), [5], processors=processors)
        one, decisions = SAMPLERS["exact"](models, ("E", "T"), options), Watching(batch.seeds, batch.rounds)
        one.start(models.open(prompts, one.roles, batch.capacity), batch, decisions)
        one.round()
        return decisions.seen

    alone, beside = decided_from(None), decided_from([Parity(), None, RepetitionPenaltyLogitsProcessor(1.5)])
    assert all(map(torch.equal, alone, beside))


@pytest.mark.parametrize("draft", ["model", "lookup"])
def test_history_without_the_drafted_tokens_is_flagged(draft, monkeypatch, record_property):
    def forgets_drafted(batch, log_rows, drafted, num_wanted):
        rows = [
            process_rows(batch, row[:, None], drafted[:, :0], (num_wanted > 0).long()) for row in log_rows.unbind(1)
        ]
        return torch.cat(rows, 1)

    monkeypatch.setattr(rows_module, "process_rows", forgets_drafted)
    options = {"sampler": "exact", "draft": draft, "chunk_size": 2, "target": "geometric"}
    defect = check(*PROCESSORS["a user's own"], others={"draft": 1.0}, **options)
    record_property("mutant_flagged", defect > 1e-6)
    assert defect > 1e-6


@pytest.mark.parametrize("draft", ["model", "lookup"])
def test_processor_is_never_shown_padding_or_a_text_that_cannot_be(draft):
    """Nothing of a neighbour, and nothing behind an end of sequence, a limit or a drafted token that the target
    excludes: the grammar here, of rising texts, will not hear of another. `lookup` drafts such tokens."""
    prompt, num_calls = [0, 0, 1], 0

    def rising(input_ids, scores):
        nonlocal num_calls
        history = input_ids[0].tolist()
        if history[:3] != prompt:  # a companion's
            return scores
        num_calls += 1
        new = history[3:]
        assert new == sorted(new)
        assert EOS not in new
        assert len(new) < MAX_NEW_TOKENS
        return scores.masked_fill(torch.arange(scores.shape[1]) < max([*new, 0]), -torch.inf)

    models = FakeModels(4, others={"draft": 1.0}, eos_token_ids=[EOS], seed=1)
    options = {"sampler": "exact", "draft": draft, "chunk_size": 3}
    law = enumerate_sampler(models, prompt, MAX_NEW_TOKENS, WEIGHTS, processor=rising, **options)
    assert num_calls
    assert all(list(text) == sorted(text) for text in law)


def make_batch(processor):
    weights = torch.ones(2, 1, dtype=torch.float64)
    return Batch([[1, 2, 3], [4]], [4, 4], weights, torch.tensor([0, 1]), [], processors=[processor, None])


def test_rows_nobody_can_draw_from_stay_as_they_are():
    calls = []

    def exclude_five(input_ids, scores):
        calls.append(input_ids.tolist())
        return scores.index_fill(1, torch.tensor([5]), -torch.inf)

    rows = torch.zeros(2, 4, 7, dtype=torch.float64).log_softmax(-1)
    drafted = torch.tensor([[6, 5, 6], [5, 5, 5]])
    processed = process_rows(make_batch(exclude_five), rows, drafted, torch.tensor([4, 4]))
    assert calls == [[[1, 2, 3]], [[1, 2, 3, 6]]]  # the second row excludes the token drafted next
    assert processed[0, :2, 5].isneginf().all()
    assert processed[0, 2:].equal(rows[0, 2:])
    assert processed[1].equal(rows[1])


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda ids, scores: scores * torch.nan, "logits_processor: expected finite scores or -inf .*, got NaN"),
        (lambda ids, scores: scores + torch.inf, r"logits_processor: expected finite scores or -inf .*\+inf"),
        (lambda ids, scores: scores[0], r"logits_processor: expected scores \(1, 7\) from every processor, got \(7,\)"),
        (lambda ids, scores: None, r"logits_processor: expected scores \(1, 7\) .*, got NoneType"),
    ],
)
def test_processor_that_returns_no_scores_fails_its_row_alone(processor, message):
    rows, batch = torch.zeros(2, 1, 7, dtype=torch.float64).log_softmax(-1), make_batch(processor)
    processed = process_rows(batch, rows, torch.zeros(2, 0, dtype=torch.int64), torch.tensor([1, 1]))
    assert batch.active.tolist() == [False, True]
    assert processed.equal(rows)
    with pytest.raises(ValueError, match=message):
        raise batch.errors[0]
