"""A target's log-probabilities of texts against rows that are combined in plain Python."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

import mpg
from fakes import FakeModels
from laws import target_row
from mpg.decode.request import Request
from mpg.decode.scoring import NOTHING, score_texts
from mpg.demo import MODELS
from mpg.models.runner import ModelRunner
from mpg.options import Options

WEIGHTS = [{"E": 1.0}, {"T": 0.5, "C": 1.0, "E": 0.25}, {"C": 2.0}]


@pytest.mark.parametrize("target", ["geometric", "arithmetic", "anchored", "base"])
@pytest.mark.parametrize("same", [("anchor",), ()], ids=["anchor is base", "own anchor"])
def test_tokens_of_texts_have_the_log_probabilities_of_the_target(target, same):
    """Of texts of other lengths, one longer than a slice, whose prompts and attributes are each their own."""
    models = FakeModels(5, same=same, contexts={"C": ("T", [3, 1, 2])})
    rng = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, (size,), generator=rng).tolist() for size in (3, 40, 1)]
    prompts, requests = [[1, 0], [2], [4, 4, 1, 0]], []
    every = [{}] * 3 if target == "base" else WEIGHTS
    for prompt, weights in zip(prompts, every, strict=True):
        alpha = tuple(weights.get(name, 0.0) for name in models.attribute_names)
        contexts = {"C": [3, 1, 2]} if "C" in weights else {}
        requests.append(Request(prompt, alpha, weights, 0, 0, contexts=contexts))
    parts = list(score_texts(models, requests, texts, Options(target=target), num_top=2))
    own, top, ids = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    for index, (prompt, text, weights) in enumerate(zip(prompts, texts, every, strict=True)):
        for place, token in enumerate(text):
            row = target_row(models, prompt, text[:place], weights, target=target)
            row = [p / sum(row) for p in row]
            assert own[index, place].exp() == pytest.approx(row[token], abs=1e-12)
            assert top[index, place].exp().tolist() == pytest.approx(sorted(row, reverse=True)[:2], abs=1e-12)
            assert row[ids[index, place, 0]] == pytest.approx(max(row))
            assert not math.isnan(own[index, place])


def test_what_has_no_such_log_probabilities_is_refused():
    models = FakeModels(5)
    request = Request([1], (1.0, 0.0), {"E": 1}, 0, 0)
    for texts, options, name in (
        ([[]], Options(), "texts"),
        ([[1]], Options(target="arithmetic", mixture_span=3), "mixture_span"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            next(score_texts(models, [request], texts, options))


@pytest.mark.parametrize("part", [256, 40, 7])
def test_no_more_than_a_part_is_read_between_two_logprobs(part, monkeypatch):
    """Of three texts under two models each, behind a context of 90 tokens that two of them share with another model."""
    model, read, forward = mpg.load(MODELS, device="cpu", dtype="float64"), [], ModelRunner.forward

    def watched(self, rows, layout, tokens, *args, **kwargs):
        read.append(sum(count for _, count in layout.runs) * tokens.shape[1])
        return forward(self, rows, layout, tokens, *args, **kwargs)

    calm = mpg.Context(prefix=" ".join(["Stay calm, and say so at length."] * 9))
    call = model.read([[5, 6, 7], [8, 9], [10]], weights={"E": 0.5, "calm": 0.5}, contexts={"calm": calm})
    length = len(call.requests[0].contexts["calm"]) - 3
    assert length > 64
    texts = [list(range(20, 60)), list(range(60, 80)), [3] * 7]
    score = partial(score_texts, call.models, call.requests, texts, call.options, 2)
    whole = [torch.cat(parts, 1) for parts in zip(*score(), strict=True)]
    monkeypatch.setattr(ModelRunner, "forward", watched)
    model.models.kept.clear()
    found, most = [], []
    for logprobs in score(part=lambda: part):
        found += [] if logprobs is NOTHING else [logprobs]
        most.append(sum(read))
        read.clear()
    assert max(most) <= max(part, 6) and sum(most) >= 6 * 40 + length
    assert sum(of_step > part // 2 for of_step in most) >= sum(most) // part - 2
    for own, wanted in zip(zip(*found, strict=True), whole, strict=True):
        torch.testing.assert_close(torch.cat(own, 1), wanted)
