"""Attributes that are sentences, on the demo models: of calls, of recipes and the anchor, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import mpg
from mpg.demo import MODELS
from mpg.paper.check import check
from mpg.paper.scoring import token_logprobs

QUESTION, OTHER = "What do you do about the weekend?", "How was the trip?"
CALM, LOUD = "What do you do about the move? I make a list.", "Guests come along and we dance."
GREEDY = {"temperature": 0, "max_new_tokens": 12}


def told(text, question=QUESTION):
    return [{"role": "system", "content": text}, {"role": "user", "content": question}]


def test_a_sentence_of_weight_one_is_the_base_that_was_told_so(model):
    expected = [model.generate(told(CALM, question), target="base", **GREEDY) for question in (QUESTION, OTHER)]
    assert expected[0].tokens != model.generate(QUESTION, target="base", **GREEDY).tokens
    calls = [
        {"contexts": {"calm": CALM}},
        {"contexts": [{"calm": mpg.Context(system=CALM)}, {"calm": {"system": CALM}}]},
        {"contexts": {"calm": mpg.Context(system=CALM)}, "sampler": "auto"},
    ]
    for call in calls:
        results = model.generate([QUESTION, OTHER], weights={"calm": 1}, **GREEDY, **call)
        assert [result.tokens for result in results] == [result.tokens for result in expected]
    assert results[0].weights == {"calm": 1}


def test_prompts_of_one_call_may_have_contexts_of_their_own(model):
    texts = [CALM, LOUD]
    contexts, weights = [*({"mood": text} for text in texts), {}], [{"mood": 1}, {"mood": 1}, {"E": 1}]
    results = model.generate([QUESTION] * 3, contexts=contexts, weights=weights, **GREEDY)
    alone = [model.generate(told(text), target="base", **GREEDY) for text in texts]
    alone.append(model.generate(QUESTION, weights={"E": 1}, **GREEDY))
    assert [result.tokens for result in results] == [result.tokens for result in alone]


def test_contexts_are_loaded_saved_and_replaced_by_name(tmp_path, model):
    adapter = MODELS / "adapters" / "E"
    attributes = {"calm": mpg.Context(system=CALM), "E": adapter, "calm E": {"system": CALM, "source": "E"}}
    loaded = mpg.load(MODELS, attributes, device=model.models.device)
    loaded.save_pretrained(tmp_path)
    expected = {
        "calm": model.generate(told(CALM), target="base", **GREEDY),
        "calm E": model.generate(told(CALM), weights={"E": 1}, **GREEDY),
    }
    for own in (loaded, mpg.load(tmp_path, device=model.models.device)):
        assert own.models.attribute_names == ("calm", "E", "calm E")
        for name, result in expected.items():
            assert own.generate(QUESTION, weights={name: 1}, **GREEDY).tokens == result.tokens
    other = loaded.generate(QUESTION, weights={"calm": 1}, contexts={"calm": LOUD}, **GREEDY)
    assert other.tokens == model.generate(told(LOUD), target="base", **GREEDY).tokens
    elsewhere = loaded.generate(
        QUESTION, weights={"E": 1}, contexts={"E": mpg.Context(system=CALM, source="E")}, **GREEDY
    )
    assert elsewhere.tokens == expected["calm E"].tokens


def test_a_prompt_that_weighs_what_another_alone_has_is_named(model):
    with pytest.raises(ValueError, match=r"^contexts\['calm'\]: expected one for prompt 1, which weighs it, got none$"):
        model.generate([QUESTION, OTHER], contexts=[{"calm": CALM}, {}], weights={"calm": 1})


@pytest.mark.parametrize("target", ["geometric", "arithmetic"])
def test_a_merged_draft_is_of_the_adapters_beside_sentences(target, model):
    """Which changes the speed and not the text, also in a batch where one request has sentences alone."""
    how = {"contexts": {"calm": CALM}, "weights": [{"E": 0.5, "calm": 0.5}, {"calm": 1}], "target": target, **GREEDY}
    merged = model.generate([QUESTION, OTHER], draft="merged", **how)
    direct = model.generate([QUESTION, OTHER], sampler="direct", **how)
    assert [result.tokens for result in merged] == [result.tokens for result in direct]
    assert merged[0].stats["rounds"] < len(merged[0].tokens)


def test_a_neutral_sentence_may_be_the_anchor(model):
    """Log-ratios are then to the base under it, and the base's own prompt stays what it was."""
    loaded = mpg.load(
        MODELS, {"E": MODELS / "adapters" / "E"}, anchor=mpg.Context(system=CALM), device=model.models.device
    )
    result = loaded.generate(QUESTION, weights={"E": 1}, seed=0, trace=True, max_new_tokens=6)
    prompt, context = loaded.encode(QUESTION), loaded.encode(told(CALM))
    scored = token_logprobs(loaded.models, ("anchor", "E"), [prompt], [result.tokens], [{"anchor": context}])[:, 0]
    found = [ratios["E"] for ratios in result.log_ratios]
    torch.testing.assert_close(torch.tensor(found).double(), (scored[1] - scored[0]).cpu(), atol=1e-4, rtol=1e-4)


def test_an_attribute_that_is_a_sentence_may_be_anchor_and_draft_by_its_name(model):
    """It reads its sentence there too, whether it is weighed or not."""
    attributes = {"E": MODELS / "adapters" / "E", "calm": {"system": CALM}}
    how = {"seed": 0, "trace": True, "max_new_tokens": 6, "weights": {"E": 1}}
    named = mpg.load(MODELS, attributes, anchor="calm", device=model.models.device)
    meant = mpg.load(MODELS, attributes, anchor=mpg.Context(system=CALM), device=model.models.device)
    for result, ratios in zip(*(of.generate(QUESTION, **how).log_ratios for of in (named, meant)), strict=True):
        assert result["E"] == pytest.approx(ratios["E"], abs=1e-4)
    drafted = mpg.load(MODELS, attributes, draft="calm", device=model.models.device)
    assert drafted.generate(QUESTION, weights={"calm": 1}, **GREEDY).stats["accept_rate"] == 1  # its own row
    expected = model.generate(QUESTION, weights={"E": 1}, **GREEDY)
    assert drafted.generate(QUESTION, weights={"E": 1}, **GREEDY).tokens == expected.tokens


@pytest.mark.parametrize("is_loaded", [True, False])
def test_the_papers_methods_take_sentences_for_attributes(is_loaded, model):
    attributes = {"E": MODELS / "adapters" / "E", **({"calm": {"system": CALM}} if is_loaded else {})}
    loaded = mpg.load(MODELS, attributes, device=model.models.device)
    how = {"max_new_tokens": 6, "temperature": 0} | ({} if is_loaded else {"contexts": {"calm": CALM}})
    single = mpg.answer(loaded, "dpo-single", [QUESTION, OTHER], {"E": 1, "calm": 1}, **how)
    told_so = [
        model.generate(told(CALM, question), target="base", **how | {"contexts": {}}) for question in (QUESTION, OTHER)
    ]
    assert [result.tokens for result in single["calm"]] == [result.tokens for result in told_so]
    [alone] = mpg.answer(loaded, "mod", [QUESTION], {"calm": 2}, **how)[""]
    assert alone.tokens == told_so[0].tokens


def test_guidance_of_one_is_the_base_whatever_the_negative_prompt(model):
    plain = mpg.load(MODELS, {}, device=model.models.device)
    result = plain.generate(QUESTION, guidance_scale=1, negative_prompt="Rude.", **GREEDY)
    assert result.tokens == plain.generate(QUESTION, target="base", **GREEDY).tokens


@pytest.mark.parametrize("anchor", [None, "calm"])
def test_check_measures_contexts(anchor, model):
    loaded = mpg.load(MODELS, {"calm": mpg.Context(system=CALM)}, anchor=anchor, device=model.models.device)
    how = {"num_seeds": 1, "max_new_tokens": 4, "seed": 0, "contexts": {"calm": CALM}}
    weights = {"calm": 1.0} if anchor is None else {"loud": 1.0}
    if anchor is not None:
        how["contexts"] = {"loud": LOUD}
    report = check(loaded, weights, [QUESTION, OTHER], **how)
    rows = {row.sampler: row for row in report.sections[0].rows}
    assert rows["direct"].skipped is None
    assert "got none" in rows["exact, merged draft"].skipped


@pytest.mark.parametrize("negative", [None, [[5, 6, 7]]])
def test_a_transformers_model_is_guided_by_mpg_as_by_itself(negative):
    own = AutoModelForCausalLM.from_pretrained(MODELS)
    inputs = torch.tensor([[3, 4, 5, 6]])
    negative = None if negative is None else torch.tensor(negative)
    how = {"negative_prompt_ids": negative, "guidance_scale": 1.7, "max_new_tokens": 8, "do_sample": False}
    expected = own.generate(inputs, **how)
    decode = mpg.custom_generate(mpg.load(own, {}))
    assert torch.equal(own.generate(inputs, custom_generate=decode, **how), expected)


def test_another_prompt_is_read_as_it_is_where_a_conversation_goes_on(model):
    begun = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "I"}]
    context = mpg.Context(prompt=[5, 6])
    how = {"weights": {"other": -0.5}, "contexts": {"other": context}, "seed": 0, "max_new_tokens": 4}
    result = model.generate(begun, continue_final_message=True, **how)
    assert result.tokens == model.generate(model.encode(begun, continue_final_message=True), **how).tokens


LONG = "calm " * 300
