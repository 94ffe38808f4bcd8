"""The three-phase bound of section 3.3 against a walk in plain Python."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mpg_ext
import reference
from covering import cases_of
from memory import guarded, nothing_else_written
from seeds import seeded

LOG_M0, LOG_GAMMA = math.log(2), math.log(1.2)


class ScalarBound:
    """One sequence, as the algorithm is written: a list of all scores, no ring, no tensors."""

    def __init__(self, W: int, tau: float) -> None:
        self.W, self.tau = W, tau
        self.scores: list[float] = []
        self.num_rounds, self.log_bound, self.is_frozen = 0, LOG_M0, False

    def step(self, scores: list[float]) -> None:
        self.scores += [score for score in scores if score > -math.inf]
        self.num_rounds += 1
        last = self.scores[-self.W :]
        if self.num_rounds <= self.W or len(self.scores) < 2:
            self.log_bound, self.is_frozen = LOG_M0, False
        elif not self.is_frozen:
            self.log_bound = max(last) + LOG_GAMMA
            self.is_frozen = statistics.pvariance(last) < self.tau
        else:
            self.is_frozen = statistics.pvariance(last) < self.tau


def fresh_bound(B: int, W: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [
        torch.full((B, W), math.nan, dtype=dtype, device=device),
        torch.zeros(B, dtype=torch.int64, device=device),
        torch.zeros(B, dtype=torch.int64, device=device),
        torch.full((B,), LOG_M0, dtype=dtype, device=device),
        torch.zeros(B, dtype=torch.bool, device=device),
    ]


@pytest.mark.parametrize("update", [mpg_ext.update_bound_, reference.update_bound_], ids=["op", "twin"])
@pytest.mark.parametrize(("W", "P"), [(1, 1), (2, 3), (5, 1), (5, 32), (20, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bound_follows_the_scalar_walk(device, update, W, P, dtype):
    if dtype == torch.float64 and device.type == "cuda":
        pytest.skip("float64 is for the CPU")
    draw = random.Random(seeded(W * 100 + P).initial_seed())
    B, tau = 4, 0.02
    walks = [ScalarBound(W, tau) for _ in range(B)]
    bound = fresh_bound(B, W, dtype, device)
    phases = set()
    for round_ in range(4 * W + 6):
        spread = 0.02 if (round_ // (W + 2)) % 2 else 1.0  # calm and restless stretches freeze and thaw the bound
        scores = [[draw.gauss(0, spread) if draw.random() < 0.9 else -math.inf for _ in range(P)] for _ in range(B)]
        scores = torch.tensor(scores, dtype=torch.float32).tolist()  # what a float32 op can see
        active = [draw.random() < 0.8 for _ in range(B)]
        for b in range(B):
            if active[b]:
                walks[b].step(scores[b])
        update(
            bound,
            torch.tensor(scores, dtype=dtype, device=device),
            torch.tensor(active, device=device),
            constants=[LOG_M0, LOG_GAMMA, tau],
        )
        assert bound[1].tolist() == [len(walk.scores) for walk in walks]
        assert bound[2].tolist() == [walk.num_rounds for walk in walks]
        assert bound[3].tolist() == pytest.approx([walk.log_bound for walk in walks], abs=1e-6)
        assert bound[4].tolist() == [walk.is_frozen for walk in walks]
        phases |= {(walk.num_rounds > W, walk.is_frozen) for walk in walks}
    assert (True, False) in phases or W == 1  # a single score has no variance
    assert (True, True) in phases


@given(
    pushed=st.lists(st.lists(st.integers(-8, 8).map(lambda x: x / 4) | st.just(-math.inf), max_size=4), max_size=12),
    W=st.integers(1, 5),
)
def test_any_scores_move_the_bound_as_the_scalar_walk(device, pushed, W):
    """Multiples of a quarter, so that no variance comes within a rounding of tau."""
    walk, bound = ScalarBound(W, tau=0.2987), fresh_bound(1, W, torch.float32, device)
    for scores in pushed:
        walk.step(scores)
        mpg_ext.update_bound_(
            bound,
            torch.tensor([scores + [-math.inf] * (5 - len(scores))], device=device),
            torch.ones(1, dtype=torch.bool, device=device),
            constants=[LOG_M0, LOG_GAMMA, walk.tau],
        )
        assert bound[3].item() == pytest.approx(walk.log_bound, abs=1e-6)
        assert bound[4].item() == walk.is_frozen


def run(scores: list[float], W: int, tau: float, device: torch.device) -> list[tuple[float, bool]]:
    bound = fresh_bound(1, W, torch.float32, device)
    history = []
    for score in scores:
        mpg_ext.update_bound_(
            bound,
            torch.tensor([[score]], device=device),
            torch.ones(1, dtype=torch.bool, device=device),
            constants=[0.5, 0.25, tau],
        )
        history.append((round(bound[3].item(), 5), bound[4].item()))
    return history


def test_phases_by_hand(device):
    # W = 2: rounds 1 and 2 warm up; round 3 sees (1, 5): max 5, variance 4; round 4 (5, 5): variance 0 freezes at
    # 5.25; round 5 pushes 7 into (5, 7): variance 1 is not below .5, so the bound thaws but keeps its value; round 6
    # estimates again from (7, 6).
    history = run([3.0, 1.0, 5.0, 5.0, 7.0, 6.0], 2, 0.5, device)
    assert history == [(0.5, False), (0.5, False), (5.25, False), (5.25, True), (5.25, False), (7.25, True)]


def test_frozen_bound_ignores_a_larger_score_while_the_variance_is_low(device):
    assert run([1.0, 1.0, 1.0, 1.5], 2, 0.5, device)[-1] == (1.25, True)


def test_scores_of_minus_infinity_count_as_rounds_only(device):
    assert run([-math.inf] * 4 + [2.0], 2, 0.5, device) == [(0.5, False)] * 5  # one score is too few
    assert run([-math.inf] * 4 + [2.0, 2.0], 2, 0.5, device)[-1] == (2.25, True)


def test_variance_equal_to_tau_does_not_freeze(device):
    assert run([0.0, 0.0, 2.0], 2, 1.0, device)[-1] == (2.25, False)


def test_nan_scores_are_not_pushed(device):
    bound = fresh_bound(1, 3, torch.float32, device)
    scores = torch.tensor([[math.nan, 1.0, -math.inf, 2.0]], device=device)
    active = torch.ones(1, dtype=torch.bool, device=device)
    mpg_ext.update_bound_(bound, scores, active, constants=[0.5, 0.0, 0.1])
    assert bound[1].item() == 2
    assert bound[0][0, :2].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("ops", [mpg_ext, reference], ids=["op", "twin"])
def test_negative_number_of_scores_is_read_as_none(device, ops):
    bound = [guarded(tensor) for tensor in fresh_bound(1, 3, torch.float32, device)]
    bound[1].fill_(-2)
    scores, active = torch.tensor([[1.0, 2.0]], device=device), torch.ones(1, dtype=torch.bool, device=device)
    with nothing_else_written([scores, active], written=bound):
        ops.update_bound_(bound, scores, active, constants=[0.5, 0.0, 0.1])
    assert bound[1].item() == 2
    assert bound[0][0, :2].tolist() == [1.0, 2.0]


def test_inactive_rows_keep_every_byte(device):
    bound = fresh_bound(3, 4, torch.float32, device)
    before = [tensor.clone() for tensor in bound]
    active = torch.tensor([False, True, False], device=device)
    mpg_ext.update_bound_(bound, torch.ones(3, 2, device=device), active, constants=[9.0, 0.0, 0.1])
    for tensor, old in zip(bound, before, strict=True):
        torch.testing.assert_close(tensor[[0, 2]], old[[0, 2]], rtol=0, atol=0, equal_nan=True)
    assert bound[3][1].item() == 9.0


@cases_of("update_bound_")
def test_op_equals_twin(device, K, B, W):
    """Multiples of a quarter, so that no variance of up to 20 comes within a rounding of tau."""
    generator = seeded(W)
    bound = fresh_bound(B, W, torch.float32, device)
    twin_bound, bound = bound, [guarded(tensor) for tensor in bound]
    for _ in range(3 + W):
        scores = ((torch.randn(B, K, generator=generator) * 4).round() / 4).to(device)
        active = (torch.rand(B, generator=generator) < 0.8).to(device)
        constants = [LOG_M0, LOG_GAMMA, 0.80007]
        with nothing_else_written([scores, active], written=bound):
            mpg_ext.update_bound_(bound, scores, active, constants=constants)
        reference.update_bound_(twin_bound, scores, active, constants=constants)
        for tensor, wanted in zip(bound, twin_bound, strict=True):
            torch.testing.assert_close(tensor, wanted, equal_nan=True)
