"""Draws under keys, and the enumeration of branches."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from mpg.decode.rng import Decisions, Purpose
from replaying import enumerate_branches


def test_keyed_draws_have_their_frequencies():
    """Chi-squared on 3 degrees of freedom; 16.27 is exceeded with probability 1e-3; the seed is fixed."""
    count, row = 20_000, torch.tensor([0.1, 0.2, 0.3, 0.4])
    decide = Decisions(torch.arange(count), torch.zeros(count, dtype=torch.int64))
    everyone = partial(torch.ones, count, dtype=torch.bool)
    drawn = decide.categorical(row.expand(count, -1), Purpose.LAST, 0, everyone).bincount(minlength=4)
    assert ((drawn - count * row) ** 2 / (count * row)).sum() < 16.27
    heads = decide.bernoulli(torch.full((count,), 0.3), Purpose.ACCEPT, 2, everyone).sum()
    assert abs(heads - 0.3 * count) < 3.3 * (count * 0.3 * 0.7) ** 0.5


def test_keys_that_differ_anywhere_give_other_uniforms():
    def uniform(seed, round_, purpose, index):
        decide = Decisions(torch.tensor([seed]), torch.tensor([round_]))
        return decide.uniforms(purpose, index + 1, lambda: torch.tensor([True]))[0, index].item()

    keys = [(5, 2, Purpose.DRAFT, 1), (6, 2, Purpose.DRAFT, 1), (5, 3, Purpose.DRAFT, 1), (5, 2, Purpose.ACCEPT, 1),
            (5, 2, Purpose.DRAFT, 0), (5 + 2**32, 2, Purpose.DRAFT, 1), (5, 2 + 2**32, Purpose.DRAFT, 1)]  # fmt: skip
    assert len({uniform(*key) for key in keys}) == len(keys)
    assert uniform(*keys[0]) == uniform(*keys[0])


@pytest.mark.parametrize("width", [1, 3, 100])
def test_enumeration_walks_every_branch_once(width):
    """A coin that decides whether a three-way draw with one impossible outcome follows."""

    def run(decide, batch_size):
        everyone = partial(torch.ones, batch_size, dtype=torch.bool)
        coin = decide.bernoulli(torch.full((batch_size,), 0.25), Purpose.ACCEPT, 0, everyone)
        row = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64).expand(batch_size, -1)
        drawn = decide.categorical(row, Purpose.LAST, 0, lambda: coin)
        return [("heads", d) if c else ("tails",) for c, d in zip(coin.tolist(), drawn.tolist(), strict=True)]

    branches = list(enumerate_branches(run, width=width))
    assert sorted(branches) == [(0.0625, ("heads", 0)), (0.1875, ("heads", 2)), (0.75, ("tails",))]
