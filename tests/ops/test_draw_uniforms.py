"""Keyed uniforms against the published answers of Philox4x32-10 and an implementation in Python integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mpg_ext
import reference
from covering import cases_of
from memory import nothing_else_written
from seeds import seeded

# Counter, key and output of Philox4x32-10 from kat_vectors of Random123.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    mask = 0xFFFFFFFF
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & mask, (p0 >> 32) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def uniform(word0: int, word1: int) -> float:
    return ((word0 >> 5) * 2**26 + (word1 >> 6)) * 2.0**-53


def signed(low: int, high: int) -> int:
    number = low + (high << 32)
    return number - 2**64 if number >= 2**63 else number


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_python_integers_reproduce_the_known_answers(counter, key, words):
    assert philox(counter, key) == words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_twin_rounds_reproduce_the_known_answers(counter, key, words):
    columns = [torch.tensor([[word]]) for word in counter]
    out = reference._philox4x32_10(columns, tuple(torch.tensor([[word]]) for word in key))
    assert tuple(word.item() for word in out) == words


def test_op_reproduces_the_known_answer_of_an_index_it_can_reach(device):
    counter, key, words = KNOWN_ANSWERS[0]
    seeds, rounds = (torch.tensor([signed(*pair)], device=device) for pair in (key, counter[2:]))
    out = mpg_ext.draw_uniforms(seeds, rounds, purpose=counter[1], count=1)
    assert out.item() == uniform(words[0], words[1])


def test_every_backend_and_the_twin_give_the_same_bits(device):
    numbers = [0, 1, -1, 2**31, 2**32, 2**62, -(2**63), 2**63 - 1, 123456789012345]
    seeds = torch.tensor(numbers, device=device)
    rounds = torch.tensor(numbers[::-1], device=device)
    for purpose in (0, 1, 7, 2**32 - 1):
        out = mpg_ext.draw_uniforms(seeds, rounds, purpose=purpose, count=33)
        assert torch.equal(out, reference.draw_uniforms(seeds, rounds, purpose=purpose, count=33))
        for b, (seed, round_) in enumerate(zip(numbers, numbers[::-1], strict=True)):
            key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
            words = philox((32, purpose, round_ & 0xFFFFFFFF, round_ >> 32 & 0xFFFFFFFF), key)
            assert out[b, 32].item() == uniform(words[0], words[1])


@cases_of("draw_uniforms")
def test_op_and_twin_give_the_same_bits(device, K, B):
    generator = seeded(B)
    seeds, rounds = (torch.randint(-(2**63), 2**63 - 1, (B,), generator=generator).to(device) for _ in range(2))
    with nothing_else_written([seeds, rounds]):
        out = mpg_ext.draw_uniforms(seeds, rounds, purpose=3, count=K)
    assert torch.equal(out, reference.draw_uniforms(seeds, rounds, purpose=3, count=K))


WORDS, NUMBERS = st.integers(0, 2**32 - 1), st.integers(-(2**63), 2**63 - 1)


@given(seed=NUMBERS, round_=NUMBERS, purpose=WORDS, index=WORDS)
def test_every_key_gives_the_bits_of_python_integers(device, seed, round_, purpose, index):
    seeds, rounds = (torch.tensor([number], device=device) for number in (seed, round_))
    out = mpg_ext.draw_uniforms(seeds, rounds, purpose=purpose, count=1, first=index)
    key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    words = philox((index, purpose, round_ & 0xFFFFFFFF, round_ >> 32 & 0xFFFFFFFF), key)
    assert out.item() == uniform(words[0], words[1])


def test_a_uniform_depends_on_its_own_key_alone(device):
    seeds, rounds = torch.tensor([5, 9, 5], device=device), torch.tensor([0, 2, 0], device=device)
    batch = mpg_ext.draw_uniforms(seeds, rounds, purpose=3, count=8)
    assert torch.equal(batch[0], batch[2])
    assert torch.equal(batch[1:2, :3], mpg_ext.draw_uniforms(seeds[1:2], rounds[1:2], purpose=3, count=3))
    assert len(batch.unique()) == 16


def test_indices_may_start_anywhere(device):
    seeds, rounds = torch.tensor([5, -9], device=device), torch.tensor([0, 2], device=device)
    for ops in (mpg_ext, reference):
        row = ops.draw_uniforms(seeds, rounds, purpose=3, count=20)
        assert torch.equal(ops.draw_uniforms(seeds, rounds, purpose=3, count=6, first=11), row[:, 11:17])
        last = ops.draw_uniforms(seeds, rounds, purpose=3, count=1, first=2**32 - 1)
        words = philox((2**32 - 1, 3, 0, 0), (5, 0))
        assert last[0, 0].item() == uniform(words[0], words[1])


def test_uniforms_lie_in_the_half_open_interval_and_fill_it(device):
    out = mpg_ext.draw_uniforms(
        torch.arange(100, device=device), torch.zeros(100, dtype=torch.int64, device=device), purpose=0, count=1000
    )
    assert out.dtype == torch.float64
    assert out.min() >= 0
    assert out.max() < 1
    assert abs(out.mean().item() - 0.5) < 0.005  # five standard deviations of the mean of 100,000
    assert torch.histc(out.cpu(), bins=10, min=0, max=1).sub(10000).abs().max() < 500


def test_no_uniforms_asked_for_are_none(device):
    seeds = torch.zeros(3, dtype=torch.int64, device=device)
    assert mpg_ext.draw_uniforms(seeds, seeds, purpose=0, count=0).shape == (3, 0)
