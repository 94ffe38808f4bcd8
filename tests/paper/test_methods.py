"""Every method of the paper's tables on the demo models: what it runs, what it equals, what it refuses."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import mpg
from mpg.demo import MODELS
from mpg.demo.corpus import DEMO_QUESTIONS
from mpg.paper.methods import DESCRIPTIONS, METHODS, PAPERS_DRAW, SINGLE_METHODS, answer

BOTH = {"E": 1, "T": 1}
PROMPTS = list(DEMO_QUESTIONS[:2])
SHORT = {"seed": 3, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def specialised_model(model):
    """The base with the adapter J merged in as base, the original as anchor."""
    base = AutoModelForCausalLM.from_pretrained(MODELS, dtype=torch.float32)
    base = PeftModel.from_pretrained(base, MODELS / "adapters/J").merge_and_unload()
    return mpg.load(base, anchor=MODELS, tokenizer=MODELS, device=model.models.device)


def tokens(results):
    return [result.tokens for result in results]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers(method, model, specialised_model):
    chosen = specialised_model if method.endswith("-specialized") else model
    options = {"tries": 3} if method == "seq-rs" else {}
    answers = answer(chosen, method, PROMPTS, BOTH, **SHORT, **options)
    assert list(answers) == (list(BOTH) if method in SINGLE_METHODS else [""])
    for results in answers.values():
        assert [result.seed for result in results] == [3, 4]
        for result in results:
            assert result.text
            assert 1 <= len(result.tokens) <= 12
            assert result.weights == ({} if method in ("base", "base-specialized") else BOTH)
            assert set(result.stats) <= set(mpg.STATISTICS)


def test_a_single_attributes_model_alone_is_the_target_at_weight_one_on_it(model):
    expected = model.generate(PROMPTS, weights={"E": 1}, sampler="direct", target="arithmetic", **PAPERS_DRAW, **SHORT)
    assert tokens(answer(model, "dpo-single", PROMPTS, BOTH, **SHORT)["E"]) == tokens(expected)
    for method in ("mod", "soups"):
        assert tokens(answer(model, method, PROMPTS, {"E": 2, "T": 0}, **SHORT)[""]) == tokens(expected)


def test_base_is_the_target_without_attributes_drawn_as_the_paper_draws_unless_told_otherwise(model):
    how = {"sampler": "direct", "target": "base"}
    expected = model.generate(PROMPTS, **how, **PAPERS_DRAW, **SHORT)
    assert tokens(answer(model, "base", PROMPTS, **SHORT)[""]) == tokens(expected)
    expected = model.generate(PROMPTS, **how, temperature=1.5, top_p=1.0, **SHORT)
    assert tokens(answer(model, "base", PROMPTS, temperature=1.5, top_p=1.0, **SHORT)[""]) == tokens(expected)


def test_mod_is_the_geometric_target_at_weights_that_add_up_to_one(model):
    how = {"sampler": "direct", "target": "geometric", **PAPERS_DRAW, **SHORT}
    expected = model.generate(PROMPTS, weights={"E": 0.75, "T": 0.25}, **how)
    assert tokens(answer(model, "mod", PROMPTS, {"E": 3, "T": 1}, **SHORT)[""]) == tokens(expected)


@pytest.mark.parametrize(("method", "num_models"), [("base", 1), ("soups", 1), ("mod", 2), ("token-rs", 3)])
def test_cost_counts_the_models_that_a_method_is_made_of(model, method, num_models):
    for result in answer(model, method, PROMPTS, BOTH, **SHORT)[""]:
        assert result.stats["model_calls_per_token"] == num_models
        assert result.stats["depth_per_token"] == 1


def test_soups_differs_from_mod_where_the_adapters_are_pushed_hard(model):
    weights = {"E": 4, "T": -3}
    soup, mod = (answer(model, method, PROMPTS * 4, weights, **SHORT)[""] for method in ("soups", "mod"))
    assert tokens(soup) != tokens(mod)


@pytest.mark.parametrize("method", [name for name in METHODS if not name.endswith("-specialized")])
def test_only_specialised_methods_look_at_a_specialised_base(method, model, specialised_model):
    few = {"tries": 3} if method == "seq-rs" else {}
    plain, specialised = (answer(m, method, PROMPTS, BOTH, **SHORT, **few) for m in (model, specialised_model))
    assert {name: tokens(plain[name]) for name in plain} == {name: tokens(specialised[name]) for name in plain}


def test_specialised_methods_start_from_the_specialised_base(model, specialised_model):
    alone = answer(specialised_model, "base-specialized", PROMPTS, BOTH, **SHORT)[""]
    assert tokens(alone) == tokens(answer(model, "dpo-single", PROMPTS, {"J": 1}, **SHORT)["J"])
    combined = answer(specialised_model, "scr-specialized", PROMPTS, BOTH, **SHORT)[""]
    expected = answer(model, "scr-dpo-single", PROMPTS, {"J": 1e-6, **BOTH}, **SHORT)["J"]
    assert tokens(combined) == tokens(expected)  # base and draft are the same model there, the anchor the original


def test_scr_and_its_options_pass_through(model):
    expected = model.generate(PROMPTS, weights=BOTH, sampler="scr", chunk_size=2, initial_bound=1.2, **SHORT)
    assert tokens(answer(model, "scr", PROMPTS, BOTH, chunk_size=2, initial_bound=1.2, **SHORT)[""]) == tokens(expected)


def test_preference_prompting_states_what_to_show_and_what_to_avoid(model, monkeypatch):
    asked = []
    generate = mpg.Model.generate
    monkeypatch.setattr(
        mpg.Model, "generate", lambda self, prompt, **how: asked.append(prompt) or generate(self, prompt, **how)
    )
    talk = [
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "So?"},
    ]
    answer(model, "pp", ["Well?", talk], {"E": 1, "J": -0.5, "S": 0}, descriptions={"E": "loud"}, **SHORT)
    ((text, conversation),) = asked
    assert text == (
        "Answer as a person with these traits:\n- loud\n"
        f"Answer as a person without these traits:\n- {DESCRIPTIONS['J']}\n\nWell?"
    )
    assert conversation == [{"role": "user", "content": text.replace("Well?", "Hello?")}, *talk[1:]]
    assert talk[0]["content"] == "Hello?"


def test_preference_prompting_of_single_models_asks_all_of_it_of_each(model):
    prompted = answer(model, "pp-single", PROMPTS, BOTH, **SHORT)
    plain = answer(model, "dpo-single", PROMPTS, BOTH, **SHORT)
    for name in BOTH:
        for with_traits, without in zip(prompted[name], plain[name], strict=True):
            assert with_traits.prompt_tokens > without.prompt_tokens + 10


@pytest.mark.parametrize("sampler", ["token-rs", "seq-rs"])
@pytest.mark.parametrize("target", ["arithmetic", "geometric"])
def test_rejection_samplers_return_the_same_alone_and_in_a_batch_and_stream_what_they_return(model, sampler, target):
    how = {"weights": BOTH, "sampler": sampler, "target": target, "max_new_tokens": 20, "trace": True, "tries": 4}
    pieces = []
    together = model.generate(PROMPTS, seed=5, on_token=pieces.append, **how)
    for i, result in enumerate(together):
        alone = model.generate(PROMPTS[i], seed=5 + i, **how)
        assert alone.tokens == result.tokens
        assert alone.stats["num_tries"] == pytest.approx(result.stats["num_tries"], rel=1e-3)
        mine = [piece for piece in pieces if piece.request == i]
        assert "".join(piece.text for piece in mine) == result.text
        assert [piece.log_ratios for piece in mine] == list(result.log_ratios)
        if sampler == "seq-rs":  # every token of every candidate was read by the base and both attributes
            assert result.stats["num_tries"] <= 4
            assert result.stats["rounds"] >= len(result.tokens)


def test_attribute_without_a_description_is_named(model):
    described = mpg.load(MODELS, {"Z": MODELS / "adapters/E"}, device=model.models.device)
    with pytest.raises(ValueError, match=r"descriptions: preference prompting expected one for 'Z', got none"):
        answer(described, "pp", PROMPTS, {"Z": 1}, **SHORT)
    assert answer(described, "pp", PROMPTS, {"Z": 1}, descriptions={"Z": "loud"}, **SHORT)[""][0].text


def test_soups_and_the_merged_draft_need_adapters_of_one_model(model):
    full = AutoModelForCausalLM.from_pretrained(MODELS, dtype=torch.float32)
    mixed = mpg.load(MODELS, {"E": MODELS / "adapters/E", "full": full}, device=model.models.device)
    weights = {"E": 1, "full": 1}
    with pytest.raises(ValueError, match=r"draft 'merged', method 'soups': expected .*adapters of one model, 'full'"):
        answer(mixed, "soups", PROMPTS, weights, **SHORT)
    with pytest.raises(ValueError, match=r"draft 'merged', method 'soups': expected .*adapters of one model, 'full'"):
        mixed.generate(PROMPTS, weights=weights, draft="merged", **SHORT)


@pytest.mark.parametrize("target", ["arithmetic", "geometric", "anchored"])
def test_merged_draft_is_nearer_to_the_target_than_the_base(model, target):
    weights = [{"E": 1, "T": 1}, {"E": 0.5, "S": 0.5}]
    rates = {}
    for draft in ("merged", "reference"):
        results = model.generate(
            PROMPTS * 4, weights=weights * 4, seed=0, max_new_tokens=24, target=target, draft=draft
        )
        rates[draft] = sum(result.stats["accept_rate"] for result in results) / len(results)
    assert rates["merged"] > rates["reference"]
