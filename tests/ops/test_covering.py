"""That the cases of every op hold every pair of values that the limit on elements admits, and stay few; and that random
inputs follow the seed of the run."""

from __future__ import annotations

import itertools

import pytest

import mpg_ext
import seeds
from calls import calls
from covering import FACTORS, MAX_ELEMENTS, covering_array, num_elements


def test_every_op_has_factors():
    assert set(FACTORS) == set(mpg_ext.__all__) - {"build_info"}


@pytest.mark.parametrize("op", FACTORS)
def test_cases_hold_every_admitted_pair_of_values(op):
    factors = FACTORS[op]
    cases = covering_array(factors)
    assert len(cases) <= 75
    assert all(num_elements(case) <= MAX_ELEMENTS for case in cases)
    for first, second in itertools.combinations(factors, 2):
        for pair in itertools.product(factors[first], factors[second]):
            # With the rest at its smallest, B at 1: what counts for B = 0 are pairs of B alone.
            smallest = {name: values[name == "B"] for name, values in factors.items()}
            if num_elements(smallest | dict(zip((first, second), pair, strict=True))) > MAX_ELEMENTS:
                continue
            holding = [case for case in cases if (case[first], case[second]) == pair]
            assert any(case["B"] > 0 or "B" in (first, second) for case in holding), (first, second, pair)


def test_all_but_the_largest_pairs_are_within_the_limit():
    """2**23 elements leave out 99 sequences over the largest vocabulary where there is more than one row for each."""
    if MAX_ELEMENTS < 2**23:
        pytest.skip("made smaller")
    sizes = {name: FACTORS["verify_chunks"][name] for name in "VKNB"}
    smallest = {"V": 1, "K": 1, "N": 1, "B": 1}
    left_out = [
        {first: v, second: w}
        for first, second in itertools.combinations(sizes, 2)
        for v, w in itertools.product(sizes[first], sizes[second])
        if num_elements(smallest | {first: v, second: w}) > MAX_ELEMENTS
    ]
    assert left_out == [{"V": 128_256, "B": 99}]


def test_calls_follow_the_seed_of_the_run(monkeypatch):
    def drawn():
        return calls()["warp_rows"]["log_rows"]

    before = drawn()
    assert before.equal(drawn())
    monkeypatch.setattr(seeds, "SEED", seeds.SEED + 1)
    assert not before.equal(drawn())
