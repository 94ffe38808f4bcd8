"""Stop strings and stopping criteria end a text at their token, inside a chunk too, and `exact` stays exact."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor

from fakes import FakeModels, enumerate_sampler, total_variation
from laws import target_law
from longer import IS_LONG
from mpg.frontend.hf_generate import end_of_text
from mpg.results import Transcript
from test_processors import without_repeated_pairs

EOS, PROMPT, MAX_NEW_TOKENS = 3, [1, 0, 1], 4
WEIGHTS = {"E": 0.7, "T": 0.6}


class Letters:
    """A tokenizer whose tokens are letters; the last is special, and beyond it are ids that it does not know."""

    def decode(self, tokens, *, skip_special_tokens):
        return "".join("ab\u00e9$"[token : token + 1] for token in tokens if token != 3 or not skip_special_tokens)


def stops(*strings, criteria=(), prompt=PROMPT):
    return end_of_text(prompt, strings, criteria, Letters(), torch.device("cpu"))


def sum_is_three(input_ids, scores):
    assert scores is None
    return input_ids.sum(1) - sum(PROMPT) == 3


STOPS = {  # and the same in plain Python, of the new tokens
    "string": (stops("ab"), lambda text: text[-2:] == (0, 1)),
    "strings": (stops("a\u00e9a", "bb"), lambda text: text[-2:] == (1, 1) or text[-3:] == (0, 2, 0)),
    "criterion": (stops(criteria=(sum_is_three,)), lambda text: sum(text) == 3),
    "string and criterion": (stops("bb", criteria=(sum_is_three,)), lambda t: t[-2:] == (1, 1) or sum(t) == 3),
}


def cases():
    """Every stop with every other sampler, rounds read at once and late in turn; in the long form all with all."""
    samplers = ("exact, block", "exact, token", "exact, lookup", "direct")
    for (i, name), (j, sampler), rounds_ahead in product(enumerate(STOPS), enumerate(samplers), (0, 1)):
        if IS_LONG or ((i + j) % 2 == 0 and rounds_ahead == (i + j) // 2 % 2):
            yield name, sampler, rounds_ahead


@pytest.mark.parametrize(("name", "sampler", "rounds_ahead"), [*cases()])
def test_text_has_the_law_of_the_target_up_to_the_stop(name, sampler, rounds_ahead, record_property):
    which, stopped = STOPS[name]
    sampler, _, how = sampler.partition(", ")
    options = {"sampler": sampler, "rounds_ahead": rounds_ahead}
    if sampler == "exact":
        options |= {"chunk_size": 2, "draft": "lookup"} if how == "lookup" else {"chunk_size": 2, "verify": how}
    models = FakeModels(4, eos_token_ids=[EOS], seed=1)
    law = enumerate_sampler(models, PROMPT, MAX_NEW_TOKENS, WEIGHTS, stops=which, **options)
    expected = target_law(models, PROMPT, MAX_NEW_TOKENS, WEIGHTS, stops=stopped)
    assert any(stopped(text) and len(text) < MAX_NEW_TOKENS for text in law)
    defect = total_variation(law, expected)
    record_property("defect", defect)
    assert defect < 1e-12


def test_stop_and_processor_together(record_property):
    which, stopped = STOPS["string and criterion"]
    models = FakeModels(4, eos_token_ids=[EOS], seed=1)
    processor = NoRepeatNGramLogitsProcessor(2)
    law = enumerate_sampler(models, PROMPT, 4, WEIGHTS, stops=which, processor=processor, chunk_size=2)
    expected = target_law(models, PROMPT, 4, WEIGHTS, stops=stopped, process=without_repeated_pairs)
    defect = total_variation(law, expected)
    record_property("defect", defect)
    assert defect < 1e-12


def transcript(which):
    return Transcript(Letters(), (), 0, len(PROMPT), which)


def test_what_a_round_holds_behind_the_stop_is_cut_off():
    one = transcript(stops("ab"))
    pieces = [list(one.extend(tokens, None, is_last=False)) for tokens in ([1, 0], [1, 2, 2])]
    assert [[piece.text for piece in of_round] for of_round in pieces] == [["b", "a"], ["b"]]
    assert one.tokens == [1, 0, 1]
    assert one.text() == "bab"
    assert one.is_stopped


def test_stop_string_is_found_across_rounds_and_bytes_and_not_in_the_prompt():
    assert not stops("ab", prompt=[0])([1])  # the prompt's end does not count
    one = transcript(stops("$\u00e9b"))  # special tokens are spelled out
    for token in (3, 2, 1):
        assert not one.is_stopped
        list(one.extend([token], None, is_last=False))
    assert one.is_stopped
    assert one.text() == "\u00e9b"


@pytest.mark.parametrize("num_unknown", [1, 2, 3, 50])
def test_stop_string_is_found_where_ids_that_nothing_stands_for_lie_within(num_unknown):
    unknown = [99] * num_unknown
    assert stops("ab")([1, 0, *unknown, 1])
    assert stops("ba\u00e9b")([0, 1, *unknown, 0, *unknown, 2, 1])
    assert not stops("ab")([1, *unknown, 1])
    assert not stops("ab")(unknown)


def test_parts_of_a_character_do_not_hide_a_stop_string():
    """Three ids are the bytes of one sign: until the last has come, they stand for less than they show."""

    class Bytes:
        def decode(self, tokens, *, skip_special_tokens):
            return bytes(token for token in tokens if token < 256).decode(errors="replace")

    which = end_of_text([], ("x\u20ac",), (), Bytes(), torch.device("cpu"))
    text = [ord("a"), ord("x"), 300, 300, 300, *"\u20ac".encode()]
    assert [which(text[:length]) for length in range(1, 9)] == [False] * 7 + [True]


@pytest.mark.parametrize("answer", [None, [], [True, False], "yes"])
def test_criterion_without_a_truth_value_is_refused(answer):
    one = transcript(stops(criteria=(lambda input_ids, scores: answer,)))
    with pytest.raises(ValueError, match="stopping_criteria: expected True, False or a tensor of one of them, got "):
        list(one.extend([0], None, is_last=False))


def test_every_criterion_is_asked_after_every_token_with_the_prompt_before_it():
    asked = []

    def counts(input_ids, scores):
        asked.append(input_ids.tolist())
        return False

    def says_so(input_ids, scores):
        return torch.tensor([input_ids.shape[1] == len(PROMPT) + 2])

    one = transcript(stops(criteria=(says_so, counts)))
    list(one.extend([0, 1, 2], None, is_last=False))
    assert one.tokens == [0, 1]
    assert asked == [[[*PROMPT, 0]], [[*PROMPT, 0, 1]]]
