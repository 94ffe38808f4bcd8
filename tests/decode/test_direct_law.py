"""`direct` samples its target: every branch of the production loop, against the target enumerated on its own."""

from __future__ import annotations

import pytest

from fakes import FakeModels, enumerate_sampler, total_variation
from laws import target_law

EOS = 2


@pytest.mark.parametrize("same", [("anchor",), ()], ids=["anchor is base", "own anchor"])
@pytest.mark.parametrize("target", ["arithmetic", "geometric"])
@pytest.mark.parametrize(
    "weights", [{"E": 1.0}, {"E": 0.3, "T": 1.2}, {"E": 1.5, "T": -0.4}], ids=["one", "two", "negative"]
)
def test_direct_samples_its_target(same, target, weights):
    models = FakeModels(4, same=same, eos_token_ids=[EOS])
    law = enumerate_sampler(models, [1, 3, 0], 4, weights, sampler="direct", target=target)
    assert total_variation(law, target_law(models, (1, 3, 0), 4, weights, target=target)) < 1e-12


@pytest.mark.parametrize(("temperature", "top_p"), [(0.6, 1.0), (1.0, 0.7), (1.7, 0.8), (0, 1.0)])
def test_direct_warps_the_combined_row(temperature, top_p):
    models, weights = FakeModels(4, eos_token_ids=[EOS]), {"E": 1.0, "T": 1.0}
    law = enumerate_sampler(
        models, [1], 3, weights, sampler="direct", target="geometric", temperature=temperature, top_p=top_p
    )
    assert total_variation(law, target_law(models, (1,), 3, weights, temperature=temperature, top_p=top_p)) < 1e-12


def test_base_target_samples_the_base():
    models = FakeModels(4, eos_token_ids=[EOS])
    law = enumerate_sampler(models, [1], 3, {}, sampler="direct", target="base")
    assert total_variation(law, target_law(models, (1,), 3, {}, target="base")) < 1e-12


def test_one_hot_weight_samples_that_attribute():
    models = FakeModels(4, eos_token_ids=[EOS])
    single = target_law(models, (1,), 3, {"T": 1.0}, target="arithmetic")
    for target in ("arithmetic", "geometric"):
        law = enumerate_sampler(models, [1], 3, {"E": 0.0, "T": 1.0}, sampler="direct", target=target)
        assert total_variation(law, single) < 1e-12


def test_another_target_is_told_apart():
    models, weights = FakeModels(4, eos_token_ids=[EOS]), {"E": 0.5, "T": 0.5}
    law = enumerate_sampler(models, [1], 3, weights, sampler="direct", target="arithmetic")
    assert total_variation(law, target_law(models, (1,), 3, weights)) > 1e-3
