"""What a group counts for a request is what it then holds for it."""

from __future__ import annotations

from time import monotonic

import pytest
import torch

import mpg
from mpg.demo import MODELS
from mpg.serve.groups import DecodeGroup
from mpg.serve.jobs import Job


@torch.no_grad()
@pytest.mark.parametrize(
    ("weights", "options", "num_rows"),
    [
        ({"E": 0.5, "T": 0.5}, {"sampler": "direct"}, 2),
        ({"E": 0.5, "T": 0.5}, {"sampler": "direct", "trace": True}, 3),
        ({"E": 0.5, "T": 0.5}, {"sampler": "exact"}, 3),
        ({"E": 0.5, "T": 0.4}, {"sampler": "direct"}, 3),
    ],
    ids=str,
)
def test_the_base_is_counted_where_it_is_run(weights, options, num_rows):
    model = mpg.load(MODELS, device="cpu")
    call = model.read([5, 6, 7], weights=weights, seed=3, max_new_tokens=8, **options)
    job = Job("id", model, call, call.requests[0], lambda events: None, monotonic() + 60)
    group = DecodeGroup(job, 4, 64, 64, gather=0.0)
    counted = group.num_bytes(job)
    group.begin(job)
    group.step()
    assert sum(count for _, count in job.need.rows) == num_rows
    assert sum(len(pool.pairs) for pool in group.scheduler.session._pools.values()) == num_rows
    assert group.num_bytes() == counted


def test_caches_grow_at_once_for_all_whose_prompts_are_read_in_turn():
    model = mpg.load(MODELS, device="cpu")

    def job(seed: int) -> Job:
        call = model.read([5, 6, 7], weights={"E": 0.5, "T": 0.4}, seed=seed, sampler="direct", max_new_tokens=40)
        return Job(seed, model, call, call.requests[0], lambda events: None, monotonic() + 60)

    model.models.eos_token_ids = ()
    jobs = [job(seed) for seed in range(5)]
    group = DecodeGroup(jobs[0], 5, 64, part=6, gather=0.0)  # the tokens of one prompt
    for one in jobs:
        group.begin(one)
    group.step()
    (pool,) = group.scheduler.session._pools.values()
    assert len(pool.pairs) == 3 and pool.runner.num_rows >= 15
    buffer = pool.runner.cache.any_keys()
    for _ in range(15):
        group.step()
    assert len(pool.pairs) == 15 and pool.runner.cache.any_keys() is buffer
