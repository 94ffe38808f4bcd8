"""Times of products are kept for other processes, so that all of a machine choose alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpg.models import linear, timings

KIND, OTHER = (512, 256, torch.float32, 1, "plain"), (64, 128, torch.bfloat16, 2, "int4")
OURS, THEIRS = [[1.0, 2.0], [3.0, 4.0]], [[2.0, 1.0], [4.0, 3.0]]


def test_what_one_process_has_timed_the_next_one_takes(monkeypatch):
    monkeypatch.setattr(linear, "_times", {})
    monkeypatch.setattr(linear, "TIMED_SECONDS", 0)
    layers = [nn.Linear(256, 512), nn.Linear(256, 640)]
    first = linear.time_layers(layers, linear.PLAIN)
    monkeypatch.setattr(linear, "_times", {})  # as of another process
    monkeypatch.setattr(linear, "_time", lambda weights, other: pytest.fail(f"{list(weights)} timed again"))
    assert linear.time_layers(layers, linear.PLAIN) == first


def test_of_processes_that_time_at_once_the_first_one_decides():
    assert timings.keep({KIND: THEIRS}) == {KIND: THEIRS}
    assert timings.keep({KIND: OURS, OTHER: OURS}) == {KIND: THEIRS, OTHER: OURS} == timings.read()


@pytest.mark.parametrize("text", ["", "{", "[1]", '[[[1, 2, "nothing", 1, "plain"], []]]', "null"])
def test_a_damaged_file_is_replaced(text, timings_file):
    timings_file.write_text(text)
    assert timings.read() == {}
    assert timings.keep({KIND: OURS}) == {KIND: OURS} == timings.read()


def test_where_a_file_is_the_cache_times_are_of_the_process(monkeypatch, tmp_path):
    (tmp_path / "cache").touch()
    monkeypatch.setattr(timings, "file", lambda: tmp_path / "cache" / "products.json")
    assert (timings.keep({KIND: OURS}), timings.read()) == ({KIND: OURS}, {})


def test_another_processor_has_times_of_its_own(monkeypatch, tmp_path):
    monkeypatch.undo()  # of the suite's own file
    monkeypatch.setenv("MPG_CACHE", str(tmp_path))
    first = timings.file()
    assert first.parent == tmp_path
    assert timings.file() == first
    monkeypatch.setattr(timings, "processor", lambda: "another")
    assert timings.file() != first
