"""Numbers arrive as they were, all in one copy, and what is done with them is done in order."""

from __future__ import annotations

import math

import pytest
import torch

from mpg.models.upload import Addresses, Upload

CPU = torch.device("cpu")


def test_numbers_of_every_kind_arrive_as_they_are_and_in_one_piece():
    upload, reals = Upload(), torch.tensor([0.1, -0.0, math.inf, math.nan], dtype=torch.float64)
    whole, nothing, own = upload.add([[1, -2], [2**62, 3]]), upload.add(([], [])), upload.add(reals)
    flags, single = torch.empty(3, dtype=torch.bool), torch.empty(4)
    upload.put(torch.tensor([True, False, True]), flags)
    upload.put(reals, single)
    upload.send()
    assert whole.on(CPU).tolist() == [[1, -2], [2**62, 3]]
    assert nothing.on(CPU).shape == (2, 0)
    assert torch.equal(own.on(CPU).view(torch.int64), reals.view(torch.int64))  # to the last bit
    assert flags.tolist() == [True, False, True]
    torch.testing.assert_close(single, reals.float(), equal_nan=True)
    assert whole.on(CPU).untyped_storage().data_ptr() == own.on(CPU).untyped_storage().data_ptr()


def test_what_is_done_with_them_is_done_once_and_in_order():
    upload, done = Upload(), []
    for number in range(3):
        upload.then(lambda number=number: done.append(number))
    upload.send()
    upload.send()
    assert done == [0, 1, 2]


def test_nothing_is_lost_without_a_word():
    upload = Upload()
    with pytest.raises(AssertionError, match="digits would be lost"):
        upload.add([0.5])
    upload.add([1]).on(CPU)
    with pytest.raises(AssertionError, match="have been sent"):
        upload.add([2])


def test_numbers_of_one_name_and_shape_lie_where_the_last_ones_did():
    addresses, found = Addresses(), []
    for numbers in ([1, 2], [3, 4], [5, 6, 7]):
        upload = Upload()
        found.append(addresses.put("rows", torch.tensor(numbers), CPU, upload))
        upload.send()
    assert found[0] is found[1] and found[0].tolist() == [3, 4]
    assert found[2].tolist() == [5, 6, 7]
