"""The bookkeeping of a round against a walk in plain Python: what could be committed and what is, what fails, what is
over."""

from __future__ import annotations

import math

import pytest
import torch

import mpg_ext
import reference
from covering import cases_of
from memory import guarded, nothing_else_written
from seeds import seeded

EOS, LIMIT = 9, 8
NAMES = ("tokens", "lengths", "last_tokens", "rounds", "active", "unusable", "empty")


def state(B, length, device, capacity=10):
    """Rows of so many tokens, the numbers from 100 on, none of which has ended."""
    tokens = torch.arange(100, 100 + capacity, device=device).repeat(B, 1)
    whole = torch.full((B,), length, device=device)
    none = torch.zeros(B, dtype=torch.bool, device=device)
    return [tokens, whole, tokens[:, length - 1].clone(), torch.zeros_like(whole), ~none, none.clone(), none.clone()]


@pytest.mark.parametrize("ops", [mpg_ext, reference], ids=["op", "twin"])
@pytest.mark.parametrize(
    ("chunk", "accepted", "token", "total", "new", "flags"),
    [  # flags: active, unusable, empty
        ([1, 2, 3], 0, 4, 0.0, [4], (1, 0, 0)),
        ([1, 2, 3], 2, 4, 0.0, [1, 2, 4], (1, 0, 0)),
        ([1, 2, 3], 3, 4, 0.0, [1, 2, 3, 4], (1, 0, 0)),
        ([1, 2, 3], 99, 4, 0.0, [1, 2, 3, 4], (1, 0, 0)),
        ([1, EOS, 3], 2, 4, math.nan, [1, EOS], (0, 0, 0)),  # it does not go on: no row is asked
        ([1, EOS, 3], 3, 4, 0.0, [1, EOS], (0, 0, 0)),
        ([1, 2, 3], 1, EOS, 0.0, [1, EOS], (0, 0, 0)),
        ([1, 2, 3, 4, 5], 4, 6, 0.0, [1, 2, 3, 4, 6], (0, 0, 0)),  # the limit
        ([1, 2, 3, 4, 5, 6], 5, 7, -math.inf, [1, 2, 3, 4, 5], (0, 0, 0)),
        ([1, 2, 3, 4, 5, 6], 6, 7, 0.0, [1, 2, 3, 4, 5], (0, 0, 0)),
        ([1, 2, 3], -1, 4, 0.0, [], (0, 1, 0)),
        ([1, 2, 3], 1, 4, math.nan, [], (0, 1, 0)),
        ([1, 2, 3], 1, 4, -math.inf, [], (0, 0, 1)),
        ([1, 2, 3], 0, -2, 0.0, [], (0, 1, 0)),
        ([1, 2, 3], 0, -1, 0.0, [], (0, 0, 1)),
        ([1, 2, 3], 2, -1, 0.0, [1, 2], (1, 0, 0)),  # none was drawn, as none was needed
        ([1, 2, 3], 2, None, None, [1, 2], (1, 0, 0)),
        ([1, 2, 3], 0, None, None, [], (1, 0, 0)),
        ([], 0, 4, 0.0, [4], (1, 0, 0)),
    ],
)
def test_by_hand(device, ops, chunk, accepted, token, total, new, flags):
    rows = state(1, 3, device)
    optional = {"token": None if token is None else torch.tensor([token], device=device)}
    optional["log_totals"] = None if total is None else torch.full((1, len(chunk) + 1), total, device=device)
    chunks = torch.tensor([chunk], dtype=torch.int64, device=device)
    accepted = torch.tensor([accepted], device=device)
    limits, eos = torch.tensor([LIMIT], device=device), torch.tensor([77, EOS], device=device)
    done = ops.commit_block_(rows, limits, eos, chunks, accepted, **optional)
    found = dict(zip(NAMES, (tensor[0].tolist() for tensor in rows), strict=True))
    assert (found["active"], found["unusable"], found["empty"]) == tuple(map(bool, flags))
    assert done[0, :4].tolist() == [len(new), *flags]
    assert done[0, 4 : 4 + len(new)].tolist() == new
    assert (done[0, 4:] >= 0).all()  # whatever failed is read again, to say why
    assert found["lengths"] == 3 + len(new)
    assert found["tokens"] == [100, 101, 102, *new, *range(103 + len(new), 110)]
    assert found["last_tokens"] == (new[-1] if new else 102)
    assert found["rounds"] == (1 if not flags[1] and not flags[2] else 0)


def test_rows_that_are_not_active_keep_every_byte(device):
    rows = state(2, 3, device)
    rows[4][0] = False
    before = [tensor.clone() for tensor in rows]
    chunk, accepted = torch.ones(2, 2, dtype=torch.int64, device=device), torch.tensor([-1, 1], device=device)
    limits, eos = torch.full((2,), LIMIT, device=device), torch.tensor([EOS], device=device)
    done = mpg_ext.commit_block_(
        rows, limits, eos, chunk, accepted, accepted, torch.full((2, 3), math.nan, device=device)
    )
    for tensor, old in zip(rows, before, strict=True):
        assert torch.equal(tensor[0], old[0])
    assert done[0, :4].tolist() == [0, 0, 0, 0]


def test_nothing_is_written_where_there_is_no_room(device):
    """The capacity is 10: of the last row one token fits."""
    lengths = [-5, 10**12, 10, 9]
    B = len(lengths)
    rows = [guarded(tensor) for tensor in state(B, 3, device)]
    rows[1].copy_(torch.tensor(lengths))
    chunk, limits = torch.ones(B, 3, dtype=torch.int64, device=device), torch.full((B,), 2**60, device=device)
    accepted = torch.full((B,), 3, device=device)
    with nothing_else_written([chunk, limits, accepted], written=rows):
        done = mpg_ext.commit_block_(rows, limits, accepted[:0], chunk, accepted, accepted)
    assert done[:, 0].tolist() == [0, 0, 0, 1]
    assert rows[0][:3].tolist() == [list(range(100, 110))] * 3


@cases_of("commit_block_")
def test_op_equals_twin(device, K, B, has_token, has_totals):
    generator = seeded(K)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator).to(device)

    capacity = K + 8
    rows = [integers(0, 20, B, capacity), integers(1, capacity + 1, B), integers(0, 20, B), integers(0, 9, B)]
    rows += [integers(0, 5, B) > 0, integers(0, 9, B) == 0, integers(0, 9, B) == 0]
    limits, eos, chunk = integers(1, capacity + 1, B), torch.arange(3, device=device), integers(0, 40, B, K)
    token = integers(-2, 40, B) if has_token else None
    totals = torch.zeros(B, K + 1, device=device)
    is_bad = integers(0, 6, B, K + 1)
    totals = totals.where(is_bad != 0, -math.inf).where(is_bad != 1, math.nan) if has_totals else None
    accepted = integers(-1, K + 2, B)
    twins, rows = [tensor.clone() for tensor in rows], [guarded(tensor) for tensor in rows]
    with nothing_else_written([limits, eos, chunk, accepted, token, totals], written=rows):
        done = mpg_ext.commit_block_(rows, limits, eos, chunk, accepted, token, totals)
    wanted = reference.commit_block_(twins, limits, eos, chunk, accepted, token, totals)
    assert torch.equal(done, wanted)
    for name, tensor, twin in zip(NAMES, rows, twins, strict=True):
        assert torch.equal(tensor, twin), name


@pytest.mark.parametrize("ops", [mpg_ext, reference], ids=["op", "twin"])
@pytest.mark.parametrize(
    ("chunk", "room", "most", "undrawn", "usable"),
    [
        ([1, 2, 3], 9, None, [], 3),
        ([1, EOS, 3], 9, None, [2], 2),
        ([EOS, EOS, 3], 9, None, [], 1),
        ([1, 2, EOS], 2, None, [2], 2),
        ([1, 2, 3], 0, None, [0], 0),
        ([1, 2, 3], -1, None, [0], 0),
        ([1, 2, 3], 9, 1, [1], 1),
        ([1, 2, 3], 9, -1, [0], 0),
        ([1, 2, 3], 9, 2, [1], None),  # fails
        ([1, 2, 3], 9, None, [0], None),
        ([1, 2, 99], 9, None, [], None),
        ([1, -2, 3], 9, None, [], None),
    ],
)
def test_usable_tokens_by_hand(device, ops, chunk, room, most, undrawn, usable):
    flags = [torch.tensor([True, False], device=device), torch.tensor([False, False], device=device)]
    lengths = torch.tensor([5, 5], device=device)
    probs = torch.ones(2, 3, 10, device=device)
    probs[0, undrawn] = 0
    chunks = torch.tensor([chunk] * 2, device=device)
    eos, mosts = (
        torch.tensor([EOS, 77], device=device),
        None if most is None else torch.tensor([most] * 2, device=device),
    )
    count = ops.count_usable_(flags, lengths, lengths + room, eos, chunks, probs, mosts)
    assert count.tolist() == [usable or 0, 0]
    assert [flag.tolist() for flag in flags] == [[usable is not None, False], [usable is None, False]]


def test_a_token_whose_row_is_nan_was_not_drawn(device):
    flags = [torch.ones(1, dtype=torch.bool, device=device), torch.zeros(1, dtype=torch.bool, device=device)]
    chunk, zero = torch.ones(1, 2, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    mpg_ext.count_usable_(flags, zero, zero + 9, zero[:0], chunk, torch.full((1, 2, 4), math.nan, device=device))
    assert [flag.item() for flag in flags] == [False, True]


@cases_of("count_usable_")
def test_usable_tokens_equal_the_twins(device, K, V, B, is_drawn, has_most):
    generator = seeded(K)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator).to(device)

    flags = [integers(0, 5, B) > 0, integers(0, 9, B) == 0]
    lengths, eos = integers(0, 40, B), torch.tensor([0, V], device=device)
    limits, chunk = lengths + integers(-1, K + 5, B), integers(-1, V + 1, B, K).clamp(0, V - 1)
    probs = (integers(0, 30, B, K, V) > 0).float() if is_drawn else None
    most = integers(-1, K + 2, B) if has_most else None
    twins, flags = [flag.clone() for flag in flags], [guarded(flag) for flag in flags]
    with nothing_else_written([lengths, limits, eos, chunk, probs, most], written=flags):
        count = mpg_ext.count_usable_(flags, lengths, limits, eos, chunk, probs, most)
    assert torch.equal(count, reference.count_usable_(twins, lengths, limits, eos, chunk, probs, most))
    assert torch.equal(torch.stack(flags), torch.stack(twins))
