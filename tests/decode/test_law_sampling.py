"""The fused path end to end by frequencies: what the enumeration of the composed path does not run."""

from __future__ import annotations

import pytest
import torch

from fakes import FakeModels, rounds_of
from laws import target_law
from mpg.decode import SAMPLERS
from mpg.decode.batch import Batch
from mpg.decode.rng import Decisions
from mpg.options import Options

NUM_TEXTS = 6_000
FALSE_ALARM = 1e-4  # of each test below; the seeds are fixed, so that an alarm stays one
PROMPT, MAX_NEW_TOKENS, WEIGHTS = [1, 0], 3, {"E": 0.5, "T": 0.5}


def g_test(models, options: Options, **target) -> float:
    """p-value of the texts' frequencies under the target's law (G-test, likelihood ratio)."""
    alpha = torch.tensor([list(WEIGHTS.values())] * NUM_TEXTS, dtype=torch.float64)
    batch = Batch(
        [PROMPT] * NUM_TEXTS, [MAX_NEW_TOKENS] * NUM_TEXTS, alpha, torch.arange(NUM_TEXTS), models.eos_token_ids
    )
    sampler = SAMPLERS[options.sampler](models, tuple(WEIGHTS), options)
    session = models.open([PROMPT] * NUM_TEXTS, sampler.roles, batch.capacity)
    sampler.start(session, batch, Decisions(batch.seeds, batch.rounds))
    for _ in rounds_of(sampler, batch):
        pass
    law = target_law(models, PROMPT, MAX_NEW_TOKENS, WEIGHTS, **target)
    counts = dict.fromkeys(law, 0)
    for row, length in zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True):
        counts[tuple(row[len(PROMPT) : length])] += 1
    assert min(law.values()) * NUM_TEXTS > 1  # no cell so rare that the chi-squared law of G breaks down
    observed = torch.tensor([counts[text] for text in law], dtype=torch.float64)
    expected = torch.tensor(list(law.values()), dtype=torch.float64) * NUM_TEXTS
    statistic = 2 * torch.special.xlogy(observed, observed / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(law) - 1) / 2, dtype=torch.float64), statistic / 2).item()


def models() -> FakeModels:
    return FakeModels(3, others={"draft": 0.7}, eos_token_ids=[2], spread=0.5, seed=2)


@pytest.mark.parametrize("target", ["arithmetic", "geometric"])
@pytest.mark.parametrize("sampler", [{"sampler": "exact", "draft": "model", "chunk_size": 2}, {"sampler": "direct"}])
def test_frequencies_fit_the_target(sampler, target):
    assert g_test(models(), Options(target=target, **sampler), target=target) > FALSE_ALARM


def test_frequencies_of_scr_do_not_fit(record_property):
    """The positive control: a sampler that is known to be biased must be found out."""
    options = Options(sampler="scr", chunk_size=2, initial_bound=1.43, temperature=1.0, top_p=1.0)
    p_value = g_test(models(), options, target="arithmetic")
    record_property("positive_control_rejected", p_value < FALSE_ALARM)
    assert p_value < FALSE_ALARM
