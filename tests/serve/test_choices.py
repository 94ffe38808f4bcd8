"""Text that is shown as it comes, and never what ended it."""

from __future__ import annotations

import json
import math
import random

import pytest

from mpg.results import Token
from mpg.serve.choices import Choice, Text
from mpg.serve.messages import New


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


def test_what_is_told_of_tokens_is_json():
    """Of a token that is no whole character, and of rows that exclude one."""
    choice, none = Choice([]), -math.inf
    ratios = {"a": math.inf, "b": none, "c": math.nan, "d": 0.5}
    tokens = [
        Token(request=0, id=token_id, text="", log_ratios=ratios, logprob=none, top_logprobs=((1, -1.0),))
        for token_id in (1, 2)
    ]
    choice.take(New("", 2, tokens, {1: "\u00e9", 2: "\ufffd"}))
    told = choice.chat_logprobs(tokens)["content"]
    assert [token["bytes"] for token in told] == [[0xC3, 0xA9], None]
    assert [token["logprob"] for token in told] == [-9999.0] * 2
    own = json.loads(json.dumps(choice.own(tokens, True), allow_nan=False))
    assert own["log_ratios"][0] == {"a": 9999.0, "b": -9999.0, "c": 0.0, "d": 0.5}
