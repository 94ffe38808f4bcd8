"""The bootstrap: what it estimates and how wide its intervals are."""

from __future__ import annotations

import numpy as np

from mpg.paper.statistics import Bootstrap, Estimate


def test_a_ratio_is_that_of_the_sums():
    ratios = Bootstrap(3, seed=0).ratios(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 8.0]))
    assert ratios[0] == 0.5
    assert ratios[1:].min() >= 0.375 and ratios[1:].max() <= 1


def test_ratios_of_one_bootstrap_share_its_resamples():
    bootstrap, values = Bootstrap(5, seed=0), np.arange(5.0)
    np.testing.assert_array_equal(bootstrap.ratios(values, np.ones(5)) + 1, bootstrap.ratios(values + 1, np.ones(5)))


def test_an_interval_is_about_two_standard_errors_to_each_side():
    values = np.random.default_rng(1).normal(size=400)
    estimate = Bootstrap.estimate(Bootstrap(400, seed=0).ratios(values, np.ones(400)))
    error = values.std() / 20
    np.testing.assert_allclose(
        [estimate.low, estimate.high], values.mean() + np.array([-1.96, 1.96]) * error, atol=error / 4
    )


def test_nothing_varies_where_prompts_do_not():
    assert Bootstrap.estimate(Bootstrap(4, seed=0).ratios(np.ones(4), np.full(4, 2.0))) == Estimate(0.5, 0.5, 0.5)
