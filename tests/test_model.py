"""`Model.generate` from prompts to results, on the demo models."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

import mpg
from mpg.decode.exact import STATISTICS as EXACT_STATISTICS
from mpg.decode.rejection import STATISTICS as REJECTION_STATISTICS
from mpg.decode.scr import STATISTICS as SCR_STATISTICS
from mpg.demo import MODELS
from mpg.demo.corpus import DEMO_QUESTIONS
from mpg.models.runner import ModelRunner

BOTH = {"E": 1, "T": 1}
COSTS = set(mpg.STATISTICS) - set(EXACT_STATISTICS) - set(SCR_STATISTICS) - set(REJECTION_STATISTICS)
WAYS = [
    {"sampler": "exact", "target": "arithmetic"},
    {"sampler": "exact", "target": "geometric"},
    {"sampler": "scr", "target": "arithmetic"},
    {"sampler": "scr", "target": "geometric"},
    {"sampler": "direct", "target": "arithmetic"},
    {"sampler": "direct", "target": "geometric"},
]
REJECTION_WAYS = [{"sampler": "token-rs", "target": "arithmetic"}, {"sampler": "seq-rs", "target": "geometric"}]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(way.values()))
def test_result_holds_the_text_its_tokens_and_what_it_cost(model, way):
    result = model.generate(DEMO_QUESTIONS[0], weights=BOTH, seed=0, **way)
    tokenizer = model.models.tokenizer
    assert result.text == tokenizer.decode(result.tokens, skip_special_tokens=True)
    assert result.finish_reason == ("stop" if result.tokens[-1] == tokenizer.eos_token_id else "length")
    assert result.weights == BOTH
    stats, num_tokens = result.stats, len(result.tokens)
    num_models = 2 if way["target"] == "arithmetic" else 3  # arithmetic needs no base
    if way["sampler"] == "direct":
        assert set(stats) == COSTS
        assert stats["rounds"] == num_tokens
        assert stats["model_calls_per_token"] == stats["positions_per_token"] == num_models
        assert stats["depth_per_token"] == 1
        return
    # counts and their ratios are as exact as doubles are
    inexact = {"tokens_per_second", "time_to_first_token", "expected_rs1_tries", "log_bound"}
    for name in stats.keys() - inexact:
        assert float(Fraction(stats[name]).limit_denominator(10_000)) == stats[name], name
    # a round drafts 4 tokens one by one, then feeds each model of the target once
    assert stats["depth_per_token"] == pytest.approx(stats["rounds"] * 5 / num_tokens)
    if way["sampler"] == "exact":
        assert set(stats) == COSTS | set(EXACT_STATISTICS)
        assert stats["model_calls_per_token"] == pytest.approx(stats["rounds"] * (4 + num_models) / num_tokens)
        assert 0 < stats["accept_rate"] <= 1
        assert stats["rounds"] <= num_tokens <= stats["rounds"] * (stats["accepted_per_round"] + 1) + 1e-9
    else:
        assert set(stats) == COSTS | set(SCR_STATISTICS)
        assert stats["model_calls_per_token"] == pytest.approx(stats["rounds"] * 6 / num_tokens)
        assert stats["positions_per_token"] == pytest.approx(stats["rounds"] * 12 / num_tokens)
        for name in ("reject_rate", "salvage_rate", "fallback_rate", "clip_rate", "warmup_share"):
            assert 0 <= stats[name] <= 1
        assert stats["reject_rate"] == pytest.approx(stats["salvage_rate"] + stats["fallback_rate"])


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(way.values()))
def test_request_returns_the_same_alone_and_in_a_batch(model, way):
    questions = list(DEMO_QUESTIONS[:3])
    weights = [{"E": 1}, {"T": 0.5, "J": 1}, BOTH]  # every request its own
    together = model.generate(questions, weights=weights, seed=5, max_new_tokens=14, **way)
    for i, result in enumerate(together):
        alone = model.generate(questions[i], weights=weights[i], seed=5 + i, max_new_tokens=14, **way)
        assert alone.tokens == result.tokens
        assert alone.seed == result.seed == 5 + i


@pytest.mark.parametrize(
    ("weights", "num_models"),
    [({"E": 1}, 1), ({"E": 0.5, "T": 0.5}, 2), ({"E": 1.5, "T": -0.5}, 3), (BOTH, 3)],
    ids=str,
)
def test_the_base_is_not_run_where_it_cancels_but_for_a_trace(model, weights, num_models):
    own, traced = (
        model.generate(DEMO_QUESTIONS[0], weights=weights, seed=3, max_new_tokens=12, sampler="direct", trace=trace)
        for trace in (False, True)
    )
    assert own.stats["model_calls_per_token"] == num_models
    assert traced.stats["model_calls_per_token"] == 1 + len(weights)
    assert traced.tokens == own.tokens  # which rounding alone could change
    drafted = model.generate(DEMO_QUESTIONS[0], weights=weights, seed=3, max_new_tokens=12, draft="reference")
    calls = drafted.stats["rounds"] * (4 + 1 + len(weights)) / len(drafted.tokens)  # drafts, the base and the others
    assert drafted.stats["model_calls_per_token"] == pytest.approx(calls)


def test_numbers_of_numpy_give_a_result_of_plain_ones(model):
    result = model.generate(DEMO_QUESTIONS[0], weights={"E": np.float32(1)}, seed=np.int64(3), max_new_tokens=4)
    assert json.loads(json.dumps(dataclasses.asdict(result)))["weights"] == {"E": 1.0}
    assert result.tokens == model.generate(DEMO_QUESTIONS[0], weights={"E": 1}, seed=3, max_new_tokens=4).tokens


def test_seed_decides_and_is_reported(model):
    how = {"weights": BOTH, "max_new_tokens": 12}
    drawn = model.generate(DEMO_QUESTIONS[0], **how)
    assert model.generate(DEMO_QUESTIONS[0], seed=drawn.seed, **how).tokens == drawn.tokens
    texts = {model.generate(DEMO_QUESTIONS[0], seed=seed, **how).text for seed in range(4)}
    assert len(texts) > 1


def test_streamed_pieces_join_to_the_text(model):
    pieces = []
    results = model.generate(list(DEMO_QUESTIONS[:2]), weights=BOTH, seed=1, trace=True, on_token=pieces.append)
    for i, result in enumerate(results):
        mine = [piece for piece in pieces if piece.request == i]
        assert "".join(piece.text for piece in mine) == result.text
        assert tuple(piece.id for piece in mine) == result.tokens
        assert tuple(piece.log_ratios for piece in mine) == result.log_ratios


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(way.values()))
def test_trace_is_the_log_ratio_of_every_token(model, way):
    """Against plain forwards over the whole text; arithmetic, which runs no anchor, counts from the combined row."""
    result = model.generate(DEMO_QUESTIONS[1], weights=BOTH, seed=2, trace=True, max_new_tokens=20, **way)
    ids = model.models.tokenizer.apply_chat_template(
        [{"role": "user", "content": DEMO_QUESTIONS[1]}], add_generation_prompt=True, return_dict=False
    )
    logprobs = {}
    for role in ("base", "E", "T"):
        session = model.models.open([[ids[0]]], [role], len(ids) + 20)
        whole = torch.tensor([[*ids, *result.tokens]], device=model.models.device)
        start = torch.zeros(1, dtype=torch.int64, device=model.models.device)
        logits = session.forward([role], whole, start, kv_length=whole.shape[1])
        logprobs[role] = logits[0, 0, len(ids) - 1 : -1].log_softmax(-1).cpu()
    anchor = logprobs["base"]
    if way["sampler"] != "scr" and way["target"] == "arithmetic":
        anchor = torch.logaddexp(logprobs["E"], logprobs["T"]) - math.log(2)
    tokens = torch.tensor(result.tokens)[:, None]
    for name in BOTH:
        expected = (logprobs[name] - anchor).gather(1, tokens)[:, 0]
        traced = torch.tensor([ratios[name] for ratios in result.log_ratios])
        torch.testing.assert_close(traced, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", [{"draft": "lookup"}, {"verify": "token"}, {"sampler": "scr"}], ids=str)
def test_marks_are_what_the_sampler_counted(model, way):
    """Of texts that no stop string cuts."""
    rejected = Counter()
    for seed in range(3):
        pieces = []
        how = {"weights": BOTH, "seed": seed, "max_new_tokens": 33, "trace": True, "on_token": pieces.append, **way}
        result = model.generate(DEMO_QUESTIONS[1], **how)
        trace, stats = result.trace, result.stats
        assert trace.texts == tuple(piece.text for piece in pieces) and "".join(trace.texts) == result.text
        assert trace.marks == tuple(piece.mark for piece in pieces)
        assert trace.rejected == tuple(piece.rejected for piece in pieces)
        marks = Counter(trace.marks)
        rejected += Counter(mark for mark, number in zip(trace.marks, trace.rejected, strict=True) if number)
        if "accept_rate" in stats:
            assert marks["accepted"] / stats["rounds"] == pytest.approx(stats["accepted_per_round"])
            offered = marks["accepted"] + sum(trace.rejected)
            assert offered / stats["rounds"] == pytest.approx(stats["drafted_per_round"])
            assert marks["accepted"] / max(offered, 1) == pytest.approx(stats["accept_rate"])
        else:
            assert marks["residual"] / stats["rounds"] == pytest.approx(stats["fallback_rate"])
            assert sum(map(bool, trace.rejected)) / stats["rounds"] == pytest.approx(stats["reject_rate"])
    assert rejected["residual"] and not rejected["drawn"]
    assert bool(rejected["accepted"]) == ("sampler" in way)  # a prefix that scr keeps has no token behind it


def test_a_trace_tells_prompt_and_options_and_is_a_page_without_markup_in_its_texts(model):
    nasty = "</script><script>alert(1)</script>"
    result = model.generate(nasty, weights=BOTH, seed=4, max_new_tokens=5, trace=True, sampler="direct", top_k=9)
    assert nasty in result.trace.prompt and result.trace.marks == (None,) * len(result.tokens)
    wanted = {"sampler": "direct", "top_k": 9, "max_new_tokens": 5, "target": "geometric", "temperature": 1.0}
    assert wanted.items() <= result.trace.options.items() and "seed" not in result.trace.options
    page = result.to_html()
    assert page.count("<script>") == page.count("</script>") == 1 and "alert(1)" in page
    assert not re.search(r"{{|https?://|\b(src|href)=(?!.data:)|@import|url\(", page)
    untraced = model.generate(nasty, weights=BOTH, seed=4, max_new_tokens=5)
    assert untraced.trace is None
    with pytest.raises(ValueError, match="trace: expected"):
        untraced.to_html()


def test_identical_attributes_are_always_accepted_up_to_the_bound(model):
    """With every ratio 1 and M below 1 nothing is ever rejected: SCR is then the draft itself, k tokens a round."""
    same = mpg.load(MODELS, {"a": MODELS}, device=model.models.device)
    result = same.generate(DEMO_QUESTIONS[0], weights={"a": 1}, seed=0, sampler="scr", initial_bound=0.9, window=1000)
    assert result.stats["reject_rate"] == 0
    assert result.stats["rounds"] == math.ceil(len(result.tokens) / 4)


def test_prompt_forms_agree(model):
    question = DEMO_QUESTIONS[0]
    template = model.models.tokenizer.apply_chat_template
    messages = [{"role": "user", "content": question}]
    verbatim = template(messages, add_generation_prompt=True, tokenize=False)
    ids = template(messages, add_generation_prompt=True, return_dict=False)
    options = {"weights": BOTH, "seed": 3, "max_new_tokens": 12}
    expected = model.generate(question, **options)
    assert isinstance(expected, mpg.Result)
    for form in (messages, ids):
        assert model.generate(form, **options).tokens == expected.tokens
    assert model.generate(verbatim, raw=True, **options).tokens == expected.tokens
    (one,) = model.generate([question], **options)
    assert one.tokens == expected.tokens


def test_default_length_is_what_the_positions_leave(model):
    long = list(range(10, 210))
    result = model.generate(long, weights=BOTH, seed=0)
    assert len(result.tokens) <= model.models.max_positions - 200


def test_result_is_frozen(model):
    result = model.generate(DEMO_QUESTIONS[0], weights=BOTH, seed=0, max_new_tokens=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.text = ""


def test_temperature_zero_is_the_argmax_of_the_target(model):
    options = {"weights": BOTH, "sampler": "direct", "temperature": 0}
    first, second = (model.generate(DEMO_QUESTIONS[0], seed=seed, **options) for seed in (0, 1))
    assert first.tokens == second.tokens


@pytest.mark.parametrize("raw", [False, True])
def test_prompt_that_is_too_long_gets_our_error_and_no_warning_of_the_tokenizer(model, raw, monkeypatch, caplog):
    monkeypatch.setattr(model.models.tokenizer, "model_max_length", 256)
    monkeypatch.setattr(model.models.tokenizer, "deprecation_warnings", {})  # it warns once
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(ValueError, match="prompt: the model has 256 positions and prompt 0 takes"):
        model.generate("word " * 600, weights=BOTH, raw=raw)
    assert not caplog.records


@pytest.mark.parametrize("way", [*WAYS, *REJECTION_WAYS], ids=lambda way: " ".join(way.values()))
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("role", ["base", "T"])
def test_model_that_returns_nan_or_infinity_is_named(model, way, value, role, monkeypatch):
    if role == "base" and way["sampler"] == "direct" and way["target"] == "arithmetic":
        pytest.skip("runs no base")
    forward = ModelRunner.forward
    broken_group = model.models._slots[role].group

    def broken(self, fed, layout, *arguments, **options):
        logits = forward(self, fed, layout, *arguments, **options).clone()
        groups = torch.tensor([group for group, count in layout.runs for _ in range(count)])
        logits[groups == broken_group, ..., 3] = value
        return logits

    monkeypatch.setattr(ModelRunner, "forward", broken)
    blamed = "(base|draft)" if role == "base" else role  # the base is the draft, and named as what it was run as
    cause = "NaN" if math.isnan(value) else r"\+inf"
    with pytest.raises(ValueError, match=rf"prompt 0, new token 0: the '{blamed}' model returned {cause}, expected"):
        model.generate(DEMO_QUESTIONS[0], weights=BOTH, seed=0, **way)


@pytest.mark.parametrize("draft", ["reference", "model", "merged"])
@pytest.mark.parametrize("first_bad", [0, 2], ids=["at once", "behind drafted tokens"])
def test_draft_that_leaves_no_token_is_named(model, first_bad, draft, monkeypatch):
    """Whether the target runs the draft's model or not, and though no token behind the prompt is ever committed."""
    forward, prompt = ModelRunner.forward, [5, 6, 7]

    def broken(self, fed, layout, tokens, start, *arguments, **options):
        logits = forward(self, fed, layout, tokens, start, *arguments, **options).clone()
        positions = (start[:, None] + torch.arange(tokens.shape[1]))[:1, -logits.shape[1] :]  # of one request
        for group, of_row in zip((group for group, count in layout.runs for _ in range(count)), logits, strict=True):
            if self.key.merged if draft == "merged" else group == 0:
                of_row[positions[0] >= len(prompt) - 1 + first_bad] = -math.inf
        return logits

    monkeypatch.setattr(ModelRunner, "forward", broken)
    role = {"reference": "base", "model": "draft"}.get(draft, draft)
    with pytest.raises(ValueError, match=rf"prompt 0, new token 0: the '{role}' model returned nothing but -inf, exp"):
        model.generate(prompt, weights=BOTH, sampler="exact", draft=draft, target="arithmetic", seed=0)


def test_attribute_that_weighs_nothing_is_not_blamed(model, monkeypatch):
    """Both attributes are broken, and the first request weighs only the second of them."""
    forward = ModelRunner.forward
    monkeypatch.setattr(ModelRunner, "forward", lambda *arguments, **options: forward(*arguments, **options) * math.nan)
    with pytest.raises(ValueError, match="prompt 0, new token 0: the 'T' model returned NaN"):
        model.generate([[5, 6], [7]], weights=[{"T": 1.0}, {"E": 1.0}], sampler="direct", target="arithmetic", seed=0)


def test_empty_row_is_refused_by_name_or_taken_from_the_base(model):
    """Two attributes that are the base, at weights that cancel up to rounding: no token has a score above 0."""
    same = mpg.load(MODELS, {"a": MODELS, "b": MODELS}, device=model.models.device)
    weights = {"a": 1.0 + 1e-9, "b": -1.0}
    with pytest.raises(ValueError, match="weights: prompt 0, new token 0: the combined row is empty"):
        same.generate([5, 6], weights=weights, seed=0, sampler="scr")
    result = same.generate([5, 6], weights=weights, seed=0, sampler="scr", empty="base", max_new_tokens=8)
    assert len(result.tokens) >= 1
