"""Text that is shown as it comes, and never what ended it."""

from __future__ import annotations

import random

import pytest

from mpg.serve.choices import Text


@pytest.mark.parametrize("seed", range(20))
def test_text_is_cut_before_the_first_stop_however_it_comes(seed):
    rng = random.Random(seed)
    whole = "".join(rng.choice("abc") for _ in range(40))
    stops = [whole[at : at + rng.randint(1, 4)] for at in (25, 30)] + ["abcabcabcabc"]
    text, shown, rest = Text(stops), "", whole
    while rest:
        size = rng.randint(1, 5)
        piece, rest = rest[:size], rest[size:]
        shown += text.add(piece, is_last=not rest)
        assert not any(stop in shown for stop in stops)
        assert whole.startswith(shown)
    assert shown == whole[: min(whole.find(stop) for stop in stops if stop in whole)]


def test_what_may_begin_a_stop_is_held_back_and_shown_when_it_does_not():
    text = Text(["END"])
    assert [text.add("some E", is_last=False), text.add("N", is_last=False)] == ["some ", ""]
    assert text.add("T EN", is_last=False) == "ENT "
    assert text.add("", is_last=True) == "EN"
    assert Text([]).add("anything", is_last=False) == "anything"
