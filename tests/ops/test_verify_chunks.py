"""Scores of prefixes, their acceptance, and the fused op that must equal them decision by decision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import mpg_ext
import reference
from covering import cases_of
from memory import guarded, laid_out, nothing_else_written
from seeds import seeded
from twins import U, around, assert_within, in_float64, ratio_error, score_range

INF, NAN = math.inf, math.nan
CONSTANTS = [math.log(2), math.log(1.2), 0.01]  # of the bound: log M_0, log gamma, tau


def score(
    attribute: list, anchor: list, weights: list, kind: str, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """score_prefixes of one sequence: attribute (N, K), anchor (K), weights (N)."""
    options = {"dtype": dtype, "device": device}
    log_ratios, scores = mpg_ext.score_prefixes(
        torch.tensor(attribute, **options)[:, None],
        torch.tensor(anchor, **options)[None],
        torch.tensor(weights, **options)[None],
        score=kind,
    )
    return log_ratios[:, 0], scores[0]


class TestScores:
    def test_arithmetic_score_is_the_log_of_the_weighted_sum_of_ratios(self, device):
        attribute = [[math.log(0.6), math.log(0.5)], [math.log(0.1), math.log(0.2)]]
        anchor = [math.log(0.2), math.log(0.4)]
        _, scores = score(attribute, anchor, [0.5, 0.25], "arithmetic", torch.float32, device)
        # ratios 3, .5 at the first token, 1.25, .5 at the second
        expected = [math.log(0.5 * 3 + 0.25 * 0.5), math.log(0.5 * 3.75 + 0.25 * 0.25)]
        torch.testing.assert_close(scores.cpu(), torch.tensor(expected))

    def test_geometric_score_is_the_weighted_sum_of_log_ratios(self, device):
        attribute, anchor = [[-1.0, -2.0], [-3.0, -1.0]], [-2.0, -2.0]
        log_ratios, scores = score(attribute, anchor, [2.0, -0.5], "geometric", torch.float32, device)
        assert log_ratios.tolist() == [[1.0, 0.0], [-1.0, 1.0]]
        assert scores.tolist() == [2.5, 2.0]

    def test_negative_weights_subtract(self, device):
        attribute, anchor = [[math.log(0.5)], [math.log(0.25)]], [math.log(0.5)]
        _, scores = score(attribute, anchor, [1.0, -1.0], "arithmetic", torch.float32, device)
        assert scores.item() == pytest.approx(math.log(0.5), rel=1e-6)

    def test_a_sum_that_is_not_positive_scores_minus_infinity(self, device):
        attribute, anchor = [[math.log(0.5)], [math.log(0.25)]], [math.log(0.5)]
        assert score(attribute, anchor, [0.5, -2.0], "arithmetic", torch.float32, device)[1].item() == -INF

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_what_cancellation_leaves_below_eight_roundings_is_zero(self, dtype):
        eps = torch.finfo(dtype).eps
        for excess, expected in [(0, True), (4 * eps, True), (12 * eps, True), (40 * eps, False)]:
            scores = score([[-1.0], [-1.0]], [-1.0], [1 + excess, -1.0], "arithmetic", dtype)[1]
            assert (scores.item() == -INF) == expected

    @pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
    @pytest.mark.parametrize("poison", [NAN, -INF, INF])
    def test_a_weight_of_zero_removes_its_model_before_any_arithmetic(self, device, kind, poison):
        attribute, anchor = [[-1.0, -2.0], [poison, poison]], [-2.0, -1.5]
        _, scores = score(attribute, anchor, [1.0, -0.0], kind, torch.float32, device)
        torch.testing.assert_close(scores.cpu(), torch.tensor([1.0, 0.5]))

    def test_without_any_weight_the_arithmetic_score_is_empty(self, device):
        assert score([[-1.0]], [-1.0], [0.0], "arithmetic", torch.float32, device)[1].item() == -INF
        assert score([[-1.0]], [-1.0], [0.0], "geometric", torch.float32, device)[1].item() == 0.0

    def test_minus_infinity_contributes_nothing_to_the_arithmetic_score(self, device):
        _, scores = score([[-INF, -1.0], [-1.0, -1.0]], [-1.0, -1.0], [1.0, 1.0], "arithmetic", torch.float32, device)
        assert scores.tolist() == [0.0, 0.0]  # and stays out of every longer prefix
        _, scores = score([[-INF]], [-1.0], [1.0], "arithmetic", torch.float32, device)
        assert scores.item() == -INF

    def test_geometric_log_ratio_under_a_negative_weight_is_capped_at_80(self, device):
        _, scores = score([[-INF, -1.0]], [-1.0, -1.0], [-0.5], "geometric", torch.float32, device)
        assert scores.tolist() == [40.0, 40.0]

    def test_geometric_exclusion_under_a_positive_weight_wins(self, device):
        _, scores = score([[-INF], [-INF]], [-1.0], [1.0, -1.0], "geometric", torch.float32, device)
        assert scores.item() == -INF

    @pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
    def test_token_that_both_models_exclude_has_ratio_one(self, device, kind):
        log_ratios, scores = score([[-INF]], [-INF], [1.0], kind, torch.float32, device)
        assert log_ratios.item() == 0.0
        assert scores.item() == 0.0

    @pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
    @pytest.mark.parametrize(
        ("attribute", "anchor"), [(-1.0, -INF), (NAN, -1.0), (-1.0, NAN), (INF, -1.0), (-1.0, INF), (NAN, -INF)]
    )
    def test_invalid_pairs_give_nan_from_there_on(self, device, kind, attribute, anchor):
        log_ratios, scores = score([[-1.0, attribute, -1.0]], [-1.0, anchor, -1.0], [1.0], kind, torch.float32, device)
        assert log_ratios[0].isnan().tolist() == [False, True, False]
        assert scores.isnan().tolist() == [False, True, True]

    @cases_of("score_prefixes")
    def test_scores_are_exact_to_rounding(self, device, K, N, B, score):
        generator = seeded(N * K)
        attribute, anchor = (torch.randn(N, B, K, generator=generator), torch.randn(B, K, generator=generator))
        attribute[torch.rand(N, B, K, generator=generator) < 0.05] = -INF
        weights = torch.randn(B, N, generator=generator).round(decimals=1)
        inputs = [tensor.to(device) for tensor in (attribute, anchor, weights)]
        with nothing_else_written(inputs):
            log_ratios, scores = mpg_ext.score_prefixes(*inputs, score=score)
        exact, _ = reference.score_prefixes(*in_float64(inputs), score=score)
        error = U * exact.abs()
        assert_within(log_ratios, around(exact, error))
        assert_within(scores, score_range(exact, error, inputs[2].double().T[:, :, None], score))


class TestAcceptance:
    def accept(self, scores: list, uniforms: list, length: int, log_bound: float = 0.0, device: str = "cpu") -> int:
        return mpg_ext.accept_prefixes(
            torch.tensor([scores], dtype=torch.float32, device=device),
            torch.tensor([log_bound], dtype=torch.float32, device=device),
            torch.tensor([uniforms], dtype=torch.float64, device=device),
            torch.tensor([length], device=device),
        ).item()

    def test_longest_passing_prefix_is_accepted_whatever_the_shorter_ones_do(self, device):
        assert self.accept([-9.0, -9.0, 0.0, -9.0], [0.5] * 4, 4, device=device) == 3

    def test_no_passing_prefix_accepts_nothing(self, device):
        assert self.accept([-9.0, -INF], [0.5, 0.0], 2, device=device) == 0

    def test_prefixes_beyond_the_length_do_not_count(self, device):
        assert self.accept([0.0, -9.0, 0.0], [0.5] * 3, 2, device=device) == 1
        assert self.accept([0.0, NAN], [0.5] * 2, 1, device=device) == 1
        assert self.accept([0.0, 0.0], [0.5] * 2, 0, device=device) == 0

    def test_lengths_are_clipped(self, device):
        assert self.accept([0.0, 0.0], [0.5] * 2, 9, device=device) == 2
        assert self.accept([NAN, 0.0], [0.5] * 2, -3, device=device) == 0

    def test_nan_among_the_counted_scores_is_reported(self, device):
        assert self.accept([NAN, 0.0], [0.5] * 2, 2, device=device) == -1

    def test_bound_divides_the_score(self, device):
        assert self.accept([math.log(1.5)], [0.74], 1, math.log(2), device=device) == 1
        assert self.accept([math.log(1.5)], [0.76], 1, math.log(2), device=device) == 0

    def test_comparison_is_strict_and_uniform_zero_accepts_any_finite_score(self, device):
        assert self.accept([0.0], [1.0], 1, device=device) == 0  # log 1 < 0 is false
        assert self.accept([-1e30], [0.0], 1, device=device) == 1
        assert self.accept([-INF], [0.0], 1, device=device) == 0

    def test_float64_decides_both_sides_of_a_threshold(self):
        uniform = torch.rand(200, 1, dtype=torch.float64, generator=seeded(0))
        lengths, bound = torch.ones(200, dtype=torch.int64), torch.full((200,), 0.25, dtype=torch.float64)
        at_threshold = uniform.log() + 0.25
        # a logarithm here and there, a sum and a difference: four roundings of values that are no larger than this
        margin = 4 * torch.finfo(torch.float64).eps * uniform.log().abs().clamp(min=1)
        for scores, accepted in ((at_threshold + margin, 1), (at_threshold - margin, 0)):
            for accept in (mpg_ext.accept_prefixes, reference.accept_prefixes):
                assert (accept(scores, bound, uniform, lengths) == accepted).all()

    @cases_of("accept_prefixes")
    def test_op_equals_twin(self, device, K, B):
        generator = seeded(B)
        scores = torch.randn(B, K, generator=generator) * 2 - 1
        scores[torch.rand(B, K, generator=generator) < 0.02] = NAN
        inputs = [
            scores,
            torch.randn(B, generator=generator),
            torch.rand(B, K, generator=generator, dtype=torch.float64),
            torch.randint(0, K + 1, (B,), generator=generator),
        ]
        inputs = [tensor.to(device) for tensor in inputs]
        with nothing_else_written(inputs):
            accepted = mpg_ext.accept_prefixes(*inputs)
        assert torch.equal(accepted, reference.accept_prefixes(*inputs))


def chunk(
    N: int, B: int, K: int, V: int, logits_dtype: torch.dtype, device: torch.device, spread: float = 0.5
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of verify_chunks, attributes near the anchor so that prefixes are accepted, and a fresh bound."""
    generator = seeded(N * 1000 + B * 100 + K * 10 + V)
    acc = torch.float64 if logits_dtype == torch.float64 else torch.float32
    anchor = torch.randn(B, K, V, generator=generator)
    attribute = anchor + spread * torch.randn(N, B, K, V, generator=generator)
    inputs = [
        anchor.to(logits_dtype),
        attribute.to(logits_dtype),
        torch.randint(0, V, (B, K), generator=generator),
        torch.randint(0, K + 1, (B,), generator=generator),
        torch.randn(B, N, generator=generator).round(decimals=1).to(acc).where(torch.arange(N) > 0, 1.0),
        torch.rand(B, K, dtype=torch.float64, generator=generator),
    ]
    return [tensor.to(device) for tensor in inputs], fresh_bound(B, 3, acc, device)


def fresh_bound(B: int, W: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [
        torch.zeros(B, W, dtype=dtype, device=device),
        torch.zeros(B, dtype=torch.int64, device=device),
        torch.zeros(B, dtype=torch.int64, device=device),
        torch.full((B,), CONSTANTS[0], dtype=dtype, device=device),
        torch.zeros(B, dtype=torch.bool, device=device),
    ]


def verify_by_the_four_ops(inputs: list[Tensor], bound: list[Tensor], kind: str) -> tuple[Tensor, Tensor, Tensor]:
    anchor, attributes, tokens, lengths, weights, uniforms = inputs
    anchor_logprobs = mpg_ext.gather_logprobs(anchor, tokens)
    attribute_logprobs = torch.stack([mpg_ext.gather_logprobs(logits, tokens) for logits in attributes])
    log_ratios, scores = mpg_ext.score_prefixes(attribute_logprobs, anchor_logprobs, weights, score=kind)
    accepted = mpg_ext.accept_prefixes(scores, bound[3], uniforms, lengths)
    accepted_scores = scores.gather(1, (accepted - 1).clamp(min=0)[:, None])
    mpg_ext.update_bound_(bound, accepted_scores, accepted >= 1, constants=CONSTANTS)
    return log_ratios, scores, accepted


class TestFused:
    @cases_of("verify_chunks")
    def test_op_scores_and_decides_as_the_twin(self, device, V, K, N, B, dtype, layout, score):
        """A few tokens lie outside the vocabulary."""
        inputs, bound = chunk(N, B, K, V, dtype, device)
        inputs[0], inputs[1] = laid_out(inputs[0], layout), laid_out(inputs[1], layout)
        inputs[2][:, 1::3] = inputs[2][:, 1::3].where(inputs[2][:, 1::3] % 5 > 0, V)
        twin_bound, bound = bound, [guarded(tensor) for tensor in bound]
        with nothing_else_written(inputs, written=bound):
            out = mpg_ext.verify_chunks(*inputs, bound, score=score, constants=CONSTANTS)
        anchor = reference.gather_logprobs(inputs[0].double(), inputs[2])
        attributes = torch.stack([reference.gather_logprobs(logits.double(), inputs[2]) for logits in inputs[1]])
        weights = inputs[4].double()
        exact, _ = reference.score_prefixes(attributes, anchor, weights, score=score)
        error = ratio_error(attributes, anchor, V)
        assert_within(out[0], around(exact, error))
        assert_within(out[1], score_range(exact, error, weights.T[:, :, None], score))
        # By the op's own scores: a rounding may put one on the other side of its threshold.
        accepted = reference.accept_prefixes(out[1].double(), twin_bound[3].double(), inputs[5], inputs[3])
        assert torch.equal(out[2], accepted)
        pushed = out[1].gather(1, (accepted - 1).clamp(min=0)[:, None])
        reference.update_bound_(twin_bound, pushed, accepted >= 1, constants=CONSTANTS)
        for tensor, wanted in zip(bound, twin_bound, strict=True):
            torch.testing.assert_close(tensor, wanted)

    @pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("N", "B", "K", "V"), [(2, 3, 4, 33), (4, 5, 3, 111)])
    def test_fused_equals_the_four_ops_bit_for_bit_over_rounds(self, device, kind, dtype, N, B, K, V):
        inputs, bound = chunk(N, B, K, V, dtype, device)
        expected_bound = [tensor.clone() for tensor in bound]
        for seed in range(6):
            generator = seeded(seed)
            inputs[5] = torch.rand(B, K, dtype=torch.float64, generator=generator).to(device)
            out = mpg_ext.verify_chunks(*inputs, bound, score=kind, constants=CONSTANTS)
            expected = verify_by_the_four_ops(inputs, expected_bound, kind)
            for tensor, wanted in zip((*out, *bound), (*expected, *expected_bound), strict=True):
                torch.testing.assert_close(tensor, wanted, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
    @pytest.mark.parametrize("V", [4, 4096])
    def test_float64_makes_the_decisions_of_the_twin(self, kind, V):
        inputs, bound = chunk(3, 40, 4, V, torch.float64, torch.device("cpu"))
        twin_bound = [tensor.clone() for tensor in bound]
        num_accepted = 0
        for seed in range(10):
            inputs[5] = torch.rand(40, 4, dtype=torch.float64, generator=seeded(seed))
            out = mpg_ext.verify_chunks(*inputs, bound, score=kind, constants=CONSTANTS)
            twin = reference.verify_chunks(*inputs, twin_bound, score=kind, constants=CONSTANTS)
            assert torch.equal(out[2], twin[2])
            for tensor, wanted in zip((*out, *bound), (*twin, *twin_bound), strict=True):
                torch.testing.assert_close(tensor, wanted, rtol=1e-10, atol=1e-10)
            num_accepted += (out[2] > 0).sum().item()
        assert num_accepted > 50

    def test_float64_decides_both_sides_of_every_threshold_as_the_twin(self):
        """Uniforms put a relative 1e-9 on either side of the threshold of every prefix in turn."""
        inputs, bound = chunk(3, 30, 4, 50, torch.float64, torch.device("cpu"), spread=0.1)
        inputs[3] = torch.full((30,), 4)
        scores = reference.score_prefixes(
            torch.stack([reference.gather_logprobs(logits, inputs[2]) for logits in inputs[1]]),
            reference.gather_logprobs(inputs[0], inputs[2]),
            inputs[4],
            score="arithmetic",
        )[1]
        threshold = (scores - bound[3][:, None]).exp()
        for k in range(4):
            for side, wanted in ((1 - 1e-9, k + 1), (1 + 1e-9, 0)):
                inputs[5] = torch.ones(30, 4, dtype=torch.float64)  # never accepted while the threshold is below 1
                inputs[5][:, k] = threshold[:, k] * side
                is_open = (threshold < 1 - 1e-6).all(-1) & (threshold[:, k] > 0)
                state = [tensor.clone() for tensor in bound]
                accepted = mpg_ext.verify_chunks(*inputs, state, score="arithmetic", constants=CONSTANTS)[2]
                assert is_open.any()
                assert (accepted[is_open] == wanted).all()

    def test_rows_that_accept_nothing_or_are_invalid_leave_every_byte_of_the_bound(self, device):
        inputs, _ = chunk(2, 6, 4, 20, torch.float32, device)
        bound = fresh_bound(6, 3, torch.float32, device)
        bound[0].fill_(NAN)
        before = [tensor.clone() for tensor in bound]
        inputs[3] = torch.tensor([0, 0, 0, 4, 4, 4], device=device)
        inputs[0][3:] = NAN
        accepted = mpg_ext.verify_chunks(*inputs, bound, score="arithmetic", constants=CONSTANTS)[2]
        assert accepted.tolist() == [0] * 3 + [-1] * 3
        for tensor, wanted in zip(bound, before, strict=True):
            torch.testing.assert_close(tensor, wanted, rtol=0, atol=0, equal_nan=True)

    def test_accepted_score_is_what_enters_the_window(self, device):
        inputs, bound = chunk(2, 20, 4, 20, torch.float32, device)
        _, scores, accepted = mpg_ext.verify_chunks(*inputs, bound, score="geometric", constants=CONSTANTS)
        rows = (accepted >= 1).nonzero()[:, 0]
        assert len(rows) > 0
        assert torch.equal(bound[0][rows, 0], scores[rows, accepted[rows] - 1])
        assert torch.equal(bound[1], (accepted >= 1).long())

    def test_one_sequences_zero_weight_model_cannot_poison_it(self, device):
        inputs, bound = chunk(2, 2, 3, 10, torch.float32, device)
        inputs[3] = torch.full_like(inputs[3], 3)
        inputs[4] = torch.tensor([[1.0, 0.0], [1.0, 1.0]], device=device)
        inputs[1][1] = NAN
        _, scores, accepted = mpg_ext.verify_chunks(*inputs, bound, score="arithmetic", constants=CONSTANTS)
        assert scores[0].isfinite().all()
        assert scores[1].isnan().all()
        assert accepted[0] >= 0
        assert accepted[1] == -1

    def test_identical_models_accept_whole_chunks_at_bound_one(self, device):
        inputs, bound = chunk(2, 5, 4, 30, torch.bfloat16, device, spread=0.0)
        inputs[4] = torch.full_like(inputs[4], 0.5)
        bound[3].zero_()
        accepted = mpg_ext.verify_chunks(*inputs, bound, score="arithmetic", constants=CONSTANTS)[2]
        assert torch.equal(accepted, inputs[3])
