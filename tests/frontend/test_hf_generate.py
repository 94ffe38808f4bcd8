"""The habits of transformers' generate: what works does what it does there, and the rest is refused by name."""

from __future__ import annotations

import asyncio
import re
import sys
from itertools import pairwise, product
from pathlib import Path
from threading import Thread

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import (
    AsyncTextIteratorStreamer,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

import mpg
from longer import IS_LONG, thinned
from mpg.decode import run
from mpg.demo import MODELS
from mpg.demo.corpus import DEMO_QUESTIONS
from mpg.frontend.hf_generate import HONOURED, IDLE, REASONS, HFGenerationConfig
from mpg.models.cache import as_argument
from mpg.recipe import Recipe

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"
BOTH = {"E": 1.0, "T": 1.0}
SHORT = {"weights": BOTH, "seed": 0, "max_new_tokens": 16}
LONG, QUICK = DEMO_QUESTIONS[0], "Hello?"
EOS, DOT = 3, 17


class Silent(transformers.generation.BaseStreamer):
    def put(self, value):
        pass

    def end(self):
        pass


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODELS)


@pytest.fixture(scope="module")
def plain(model):
    """A plain transformers model with the weights of the session's."""
    return AutoModelForCausalLM.from_pretrained(MODELS, dtype=torch.float32).to(model.models.device)


@pytest.fixture(scope="module")
def combined(plain, tokenizer):
    return mpg.load(plain, {name: MODELS / "adapters" / name for name in BOTH}, tokenizer=tokenizer)


@pytest.fixture
def inputs(tokenizer, model):
    """inputs(question, ..., side) as a tokenizer returns them."""

    def make(*questions, side="left"):
        tokenizer.padding_side = side
        talks = [[{"role": "user", "content": question}] for question in questions]
        options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "padding": True}
        return tokenizer.apply_chat_template(talks, **options).to(model.models.device)

    return make


def tokens(results):
    return [result.tokens for result in results]


class TestFields:
    @pytest.mark.parametrize("name", [name for name in vars(GenerationConfig()) if not name.startswith("_")])
    def test_every_field_of_the_installed_configuration_is_honoured_or_idle_or_refused(self, name):
        theirs = GenerationConfig._get_default_generation_params().get(name)
        for value in (None, theirs):  # asks for nothing
            assert set(HFGenerationConfig.of(None, {name: value})[1].fields) <= {"max_length"}
        if name not in {*HONOURED, *IDLE}:
            HFGenerationConfig.of(None, {name: False})
            for value in (7.5, "x", [1]):
                with pytest.raises(ValueError, match=rf"^{name}: expected {theirs!r}, as .*; got (7.5|'x'|list)$"):
                    HFGenerationConfig.of(None, {name: value})

    def test_configuration_without_a_wish_asks_for_nothing(self):
        assert HFGenerationConfig.of(GenerationConfig(), {}) == ({}, HFGenerationConfig(fields={}))

    def test_transformers_own_defaults_ask_for_greedy_text_alone(self):
        filled = GenerationConfig(**GenerationConfig._get_default_generation_params())
        options, hf_config = HFGenerationConfig.of(filled, {})
        assert options == {"temperature": 0}
        assert hf_config.fields == {"max_length": 20}

    @pytest.mark.parametrize("name", REASONS)
    def test_refusal_names_the_way_out(self, name):
        with pytest.raises(ValueError, match=rf"^{name}: expected \S+, as {re.escape(REASONS[name])}; got 7$"):
            HFGenerationConfig.of(None, {name: 7})

    def test_refusal_of_a_model_does_not_print_it(self, plain):
        with pytest.raises(ValueError, match=r"^assistant_model: .* mpg.load\(draft=...\); got LlamaForCausalLM$"):
            HFGenerationConfig.of(None, {"assistant_model": plain})

    def test_refused_field_of_a_configuration_is_named(self, model):
        with pytest.raises(ValueError, match=r"^num_beams: expected 1, as there is no beam search.*got 4"):
            model.generate(LONG, generation_config=GenerationConfig(num_beams=4), **SHORT)

    def test_keyword_goes_before_the_configuration(self, model):
        config = GenerationConfig(max_new_tokens=3, do_sample=True, temperature=0.5, repetition_penalty=1.5)
        given = {"max_new_tokens": 5, "temperature": 1.3, "repetition_penalty": 1.0}
        options, hf_config = HFGenerationConfig.of(config, given)
        assert options == {"max_new_tokens": 5, "temperature": 1.3}
        assert not hf_config.fields
        short = {name: value for name, value in SHORT.items() if name != "max_new_tokens"}
        assert len(model.generate(LONG, generation_config=config, **short).tokens) == 3

    def test_an_unknown_option_is_told_every_name_once(self, model):
        with pytest.raises(
            ValueError, match=r"^zzz: unknown option; expected one of (?!.*, temperature,.*, temperature,)"
        ):
            model.generate(LONG, zzz=1, **SHORT)

    def test_max_length_counts_the_prompt(self, model):
        long = {name: value for name, value in SHORT.items() if name != "max_new_tokens"}
        prompt = [5, 6, 7]
        assert len(model.generate(prompt, max_length=10, **long).tokens) == 7
        assert len(model.generate(prompt, max_length=10, **SHORT).tokens) == 16  # max_new_tokens goes before it
        with pytest.raises(ValueError, match="max_length: expected an integer above the 3 tokens of prompt 0, got 3"):
            model.generate(prompt, max_length=3, **long)

    def test_what_a_call_says_goes_before_the_recipe(self, model):
        recipe = Recipe(options={"max_new_tokens": 3, "top_k": 1, "sampler": "direct"})
        cooked, how = mpg.Model(model.models, recipe), {"weights": BOTH, "seed": 0, "eos_token_id": []}
        assert len(cooked.generate([5, 6, 7], **how).tokens) == 3
        assert len(cooked.generate([5, 6, 7], max_length=10, **how).tokens) == 7
        assert len(cooked.generate([5, 6, 7], generation_config=GenerationConfig(max_new_tokens=5), **how).tokens) == 5
        free = model.generate([5, 6, 7], max_new_tokens=3, sampler="direct", **how)
        assert cooked.generate([5, 6, 7], top_k=0, **how).tokens == free.tokens

    def test_configuration_that_leaves_top_k_off_suits_every_sampler(self, model):
        config = GenerationConfig(do_sample=True, top_k=0, temperature=0.9)
        for sampler in ("scr", "token-rs"):
            assert model.generate(LONG, generation_config=config, sampler=sampler, **SHORT).text

    def test_no_sampling_is_the_argmax(self, model):
        expected = model.generate(LONG, temperature=0, **SHORT)
        config = GenerationConfig(do_sample=False, top_k=3, temperature=0.7)
        assert model.generate(LONG, generation_config=config, **SHORT).tokens == expected.tokens
        assert model.generate(LONG, do_sample=False, top_p=0.5, **SHORT).tokens == expected.tokens

    def test_several_sequences_per_prompt_count_their_seeds_up(self, model):
        weights = [{"E": 1}, {"T": 1}]
        how = {"seed": 4, "max_new_tokens": 8}
        several = model.generate([LONG, QUICK], weights=weights, num_return_sequences=2, **how)
        assert [result.seed for result in several] == [4, 5, 6, 7]
        one_by_one = model.generate([LONG, LONG, QUICK, QUICK], weights=[weights[0]] * 2 + [weights[1]] * 2, **how)
        assert tokens(several) == tokens(one_by_one)
        assert len(model.generate(LONG, num_return_sequences=3, **SHORT)) == 3

    def test_other_end_of_sequence_ends_a_text(self, model):
        result = model.generate(LONG, **SHORT | {"max_new_tokens": 60}, eos_token_id=[DOT, EOS])
        assert result.tokens[-1] == DOT
        assert result.finish_reason == "stop"
        none = model.generate(LONG, **SHORT | {"max_new_tokens": 120}, eos_token_id=[])
        assert len(none.tokens) == 120


class TestProcessors:
    @pytest.mark.parametrize("sampler", ["exact", "direct"])
    def test_processors_hold_in_what_is_generated(self, model, sampler):
        how = SHORT | {"max_new_tokens": 24, "sampler": sampler}
        prompts = [LONG, QUICK]
        for result in model.generate(prompts, no_repeat_ngram_size=2, **how):
            pairs = list(pairwise(result.tokens))
            assert len(pairs) == len(set(pairs))
        banned = set(model.generate(LONG, **how).tokens[:3])
        assert not banned & set(model.generate(LONG, suppress_tokens=list(banned), **how).tokens)
        assert not banned & set(model.generate(LONG, bad_words_ids=[[token] for token in banned], **how).tokens)
        for result in model.generate(prompts, min_new_tokens=23, **how):
            assert len(result.tokens) >= 23
        for result in model.generate(prompts, forced_eos_token_id=EOS, **how | {"max_new_tokens": 4}):
            assert result.tokens[-1] == EOS

    def test_processed_request_returns_the_same_alone_and_in_a_batch(self, model):
        how = {"max_new_tokens": 16, "repetition_penalty": 1.3, "begin_suppress_tokens": [44], "min_length": 16}
        together = model.generate([LONG, QUICK], weights=BOTH, seed=5, **how)
        for i, prompt in enumerate((LONG, QUICK)):
            assert model.generate(prompt, weights=BOTH, seed=5 + i, **how).tokens == together[i].tokens
        late = model.generate([LONG, QUICK], weights=BOTH, seed=5, batch_size=1, **how)
        assert tokens(late) == tokens(together)
        plain = model.generate([LONG, QUICK], weights=BOTH, seed=5, max_new_tokens=16)
        assert tokens(plain) != tokens(together)

    def test_request_that_begins_in_a_row_takes_its_own_processor_there(self, model):
        prompts, how = (
            [[5, 6], [7, 8, 9], [5, 6, 7]],
            {"weights": BOTH, "seed": 0, "max_new_tokens": 9, "batch_size": 1},
        )
        allowed = {0: [20, 21], 1: [30, 31], 2: [40, 41]}
        results = model.generate(prompts, prefix_allowed_tokens_fn=lambda index, ids: allowed[index], **how)
        assert all(set(result.tokens) <= set(allowed[index]) for index, result in enumerate(results))

    def test_allowed_tokens_are_asked_for_by_the_results_index(self, model):
        allowed = {0: [20, 21], 1: [30, 31], 2: [40, 41]}
        seen = set()

        def fn(index, tokens):
            seen.add(index)
            assert tokens.ndim == 1
            return allowed[index]

        results = model.generate([LONG, QUICK, LONG], prefix_allowed_tokens_fn=fn, **SHORT)
        assert seen == {0, 1, 2}
        for index, result in enumerate(results):
            assert set(result.tokens) <= set(allowed[index])

    def test_own_processor_replaces_the_fields_of_its_class_and_runs_last(self):
        own = transformers.RepetitionPenaltyLogitsProcessor(3.0), lambda input_ids, scores: scores
        fields = {"repetition_penalty": 1.2, "suppress_tokens": [3]}
        _, hf_config = HFGenerationConfig.of(None, fields, logits_processor=LogitsProcessorList(own))
        chain = hf_config.processor(0, [1, 2], 0, 5, torch.device("cpu"))
        assert chain[0] is own[0]
        assert isinstance(chain[1], transformers.SuppressTokensLogitsProcessor)
        assert chain[2:] == [own[1]]

    def test_nothing_is_done_about_an_end_that_a_call_does_not_have(self):
        _, hf_config = HFGenerationConfig.of(None, {"min_new_tokens": 3, "exponential_decay_length_penalty": (1, 1.1)})
        assert hf_config.processor(0, [1], 0, 5, torch.device("cpu")) is None

    def test_processor_with_a_state_is_refused(self, model):
        mark = transformers.SynthIDTextWatermarkLogitsProcessor(5, [1, 2], 2**8, 0, 4, model.models.device)
        with pytest.raises(ValueError, match=r"logits_processor: .* drafted tokens may be taken back, got SynthID"):
            model.generate(LONG, logits_processor=[mark], **SHORT)

    def test_row_that_processors_leave_empty_is_named(self, model):
        def nothing_left(input_ids, scores):
            return torch.full_like(scores, -torch.inf) if input_ids.shape[1] >= 5 else scores

        for sampler, where in {"exact": 0, "direct": 2}.items():  # exact names the round's first token
            with pytest.raises(ValueError, match=f"logits_processor: prompt 0, new token {where}: no token is left"):
                model.generate([5, 6, 7], logits_processor=[nothing_left], sampler=sampler, **SHORT)

    def test_lossless_verification_accepts_processed_drafts(self, model):
        """The draft is processed as the target is: a penalty that keeps out what the base likes costs no acceptance."""
        liked = list(set(model.generate([LONG] * 8, target="base", seed=0, max_new_tokens=24)[0].tokens))
        rates = {}
        ways = {"free": {}, "suppressed": {"suppress_tokens": liked}, "penalised": {"repetition_penalty": 1.5}}
        for how, options in ways.items():
            results = model.generate([LONG] * 8, target="base", seed=0, max_new_tokens=24, **options)
            rates[how] = sum(result.stats["accept_rate"] for result in results) / 8
        assert rates["suppressed"] == rates["penalised"] == rates["free"] == 1


class TestStops:
    @pytest.mark.parametrize("sampler", thinned(["exact", "direct", "scr", "token-rs"]))
    def test_stop_string_ends_the_text_that_would_have_gone_on(self, model, sampler):
        how = SHORT | {"max_new_tokens": 40, "sampler": sampler}
        free = model.generate([LONG, QUICK], **how)
        stop = free[0].text[10:15]
        pieces = []
        stopped = model.generate([LONG, QUICK], stop_strings=stop, on_token=pieces.append, trace=True, **how)
        for index, (before, after) in enumerate(zip(free, stopped, strict=True)):
            assert before.tokens[: len(after.tokens)] == after.tokens
            assert "".join(piece.text for piece in pieces if piece.request == index) == after.text
            assert len(after.log_ratios) == len(after.tokens)
            assert (stop in after.text) == (stop in before.text)
        assert len(stopped[0].tokens) < len(free[0].tokens)
        assert stopped[0].text.find(stop) + len(stop) > len(model.models.tokenizer.decode(stopped[0].tokens[:-1]))
        assert stopped[0].finish_reason == "stop"

    def test_sampler_auto_shows_no_trial_to_a_criterion_and_keeps_processors(self, model):
        asked = []
        criteria = [lambda *of: bool(asked.append(of))]
        how = SHORT | {"sampler": "auto", "suppress_tokens": [44], "stopping_criteria": criteria}
        result = mpg.Model(model.models).generate(LONG, **how)
        assert len(asked) == len(result.tokens)
        assert 44 not in result.tokens
        assert result.plan

    @pytest.mark.parametrize("batch_size", [1, 32])
    def test_rounds_read_late_are_cut_at_the_same_token(self, model, batch_size, monkeypatch):
        how = SHORT | {"max_new_tokens": 60, "stop_strings": [".", "ing"], "batch_size": batch_size}
        at_once = model.generate([LONG, QUICK, LONG], **how)
        monkeypatch.setitem(run.ROUNDS_AHEAD, model.models.device.type, 2)
        pieces = []
        late = model.generate([LONG, QUICK, LONG], on_token=pieces.append, **how)
        assert tokens(late) == tokens(at_once)
        assert {result.finish_reason for result in late} == {"stop"}
        assert "".join(piece.text for piece in pieces if piece.request == 2) == late[2].text

    def test_criteria_of_transformers_end_a_text(self, model):
        criteria = StoppingCriteriaList([lambda input_ids, scores: input_ids[:, -1] == DOT])
        result = model.generate(LONG, stopping_criteria=criteria, **SHORT | {"max_new_tokens": 60})
        assert result.tokens.index(DOT) == len(result.tokens) - 1
        assert result.finish_reason == "stop"
        assert len(model.generate(LONG, max_time=0.0, **SHORT).tokens) == 1

    def test_stop_string_needs_a_tokenizer(self, plain, tokenizer):
        silent = mpg.load(plain, {"E": MODELS / "adapters/E"})
        how = {"weights": {"E": 1}, "seed": 0, "max_new_tokens": 60}
        with pytest.raises(ValueError, match=r"stop_strings: this model has no tokenizer, expected tokenizer=..., got"):
            silent.generate([5, 6], stop_strings="a", **how)
        assert silent.generate([5, 6], stop_strings=".", tokenizer=tokenizer, **how).tokens[-1] == DOT


class TestPrompts:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padded_tensors_are_the_prompts_whichever_side_the_padding_is_on(self, model, inputs, side):
        padded, expected = inputs(LONG, QUICK, side=side), tokens(model.generate([LONG, QUICK], **SHORT))
        assert tokens(model.generate(**padded, **SHORT)) == expected
        ids, mask = padded["input_ids"], padded["attention_mask"]
        assert tokens(model.generate(ids, attention_mask=mask, **SHORT)) == expected
        assert tokens(model.generate(input_ids=ids, **SHORT)) == expected  # the padding token tells
        lists = {"input_ids": ids.tolist(), "attention_mask": mask.tolist()}
        assert tokens(model.generate(**lists, **SHORT)) == expected
        assert model.generate(ids[0], attention_mask=mask[0], **SHORT).tokens == expected[0]

    def test_system_prompt_goes_through_the_chat_template(self, model, tokenizer):
        talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUICK}]
        ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        with_system, without = model.generate(talk, **SHORT), model.generate(QUICK, **SHORT)
        assert with_system.prompt_tokens == ids["input_ids"].shape[1] > without.prompt_tokens
        assert model.generate(**ids, **SHORT)[0].tokens == with_system.tokens


class TestStreamers:
    def test_text_streamer_prints_what_the_result_holds(self, model, tokenizer, capsys):
        seen = []
        result = model.generate(LONG, streamer=TextStreamer(tokenizer), on_token=seen.append, **SHORT)
        ids = tokenizer.apply_chat_template([{"role": "user", "content": LONG}], return_dict=False)
        assert capsys.readouterr().out == tokenizer.decode([*ids, *result.tokens]) + "\n"
        assert tuple(token.id for token in seen) == result.tokens

    def test_iterator_yields_the_text_while_a_thread_generates(self, model, tokenizer):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
        Thread(target=model.generate, args=(LONG,), kwargs={"streamer": streamer, **SHORT}).start()
        assert "".join(streamer) == model.generate(LONG, **SHORT).text

    @pytest.mark.skipif(sys.version_info < (3, 11), reason="transformers' streamer uses asyncio.timeout")
    def test_async_iterator_yields_the_text(self, model, tokenizer):
        async def collect():
            streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
            Thread(target=model.generate, args=(LONG,), kwargs={"streamer": streamer, **SHORT}).start()
            return "".join([piece async for piece in streamer])

        assert asyncio.run(collect()) == model.generate(LONG, **SHORT).text

    def test_stream_ends_where_generation_fails(self, model, tokenizer):
        def fails(input_ids, scores):
            raise RuntimeError("no")

        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        with pytest.raises(RuntimeError, match="no"):
            model.generate(LONG, streamer=streamer, logits_processor=[fails], **SHORT)
        assert "".join(streamer) == ""


SAME_AS_THERE = {
    "nothing": {},
    "repetition penalty": {"repetition_penalty": 1.3},
    "prompt's tokens raised": {"encoder_repetition_penalty": 1.3},
    "ever shorter": {"exponential_decay_length_penalty": (4, 1.05)},
    "own penalty": {"logits_processor": [transformers.RepetitionPenaltyLogitsProcessor(1.5)]},
    "no repeated pair": {"no_repeat_ngram_size": 2},
    "none of the prompt's pairs": {"encoder_no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[44, 413], [44]]},
    "suppressed": {"suppress_tokens": [44, 413, 312]},
    "suppressed at first": {"begin_suppress_tokens": [44]},
    "biased": {"sequence_bias": [[[44, 413], -5.0], [[263], 4.0]]},
    "new tokens at least": {"min_new_tokens": 20, "eos_token_id": [DOT, EOS]},
    "length at least": {"min_length": 30, "eos_token_id": [DOT, EOS]},
    "forced end": {"forced_eos_token_id": 3},
    "own processor": {"logits_processor": [transformers.MinLengthLogitsProcessor(30, DOT)], "eos_token_id": [DOT, EOS]},
    "allowed tokens": {"prefix_allowed_tokens_fn": lambda index, ids: list(range(40 + 10 * index, 500))},
    "own criterion": {"stopping_criteria": [lambda ids, scores: ids[:, -1] == DOT]},
    "total length": {"max_new_tokens": None, "max_length": 30},
    "default length": {"max_new_tokens": None},
    "another end": {"eos_token_id": [DOT, EOS]},
    "another padding": {"pad_token_id": 9, "eos_token_id": [DOT]},
}


class TestCustomGenerate:
    @pytest.mark.parametrize(
        ("name", "sampler"),
        [
            (name, sampler)
            for (i, name), (j, sampler) in product(enumerate(SAME_AS_THERE), enumerate(("exact", "direct")))
            if IS_LONG or (i + j) % 2 == 0
        ],
    )
    def test_greedy_base_is_what_transformers_returns(self, plain, combined, inputs, name, sampler):
        how = {"max_new_tokens": 28, **SAME_AS_THERE[name]}
        if "logits_processor" in how:  # left padding counts in transformers' lengths: take prompts without
            batch = inputs(LONG, LONG)
            how["logits_processor"] = LogitsProcessorList(how["logits_processor"])
        else:
            batch = inputs(LONG, QUICK)
        if "stopping_criteria" in how:
            how["stopping_criteria"] = StoppingCriteriaList(how["stopping_criteria"])
        expected = plain.generate(**batch, **how)
        decode = mpg.custom_generate(combined, target="base", sampler=sampler)
        assert plain.generate(**batch, custom_generate=decode, **how).equal(expected)

    def test_greedy_texts_under_a_penalty_are_those_of_transformers(self, plain, combined, tokenizer):
        decode = mpg.custom_generate(combined, target="base")
        for question in DEMO_QUESTIONS[: 4 if IS_LONG else 2]:
            talk = [{"role": "user", "content": question}]
            batch = tokenizer.apply_chat_template(
                talk, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            for penalty in (1.1, 1.3, 2.0):
                how = {**batch, "max_new_tokens": 24, "repetition_penalty": penalty}
                assert plain.generate(**how, custom_generate=decode).equal(plain.generate(**how))

    @pytest.mark.parametrize("target", thinned(["arithmetic", "geometric", "anchored"]))
    def test_a_model_that_alone_is_the_target_is_penalised_as_by_transformers(self, combined, inputs, target):
        base = AutoModelForCausalLM.from_pretrained(MODELS, dtype=torch.float32)
        peft_model = PeftModel.from_pretrained(base, MODELS / "adapters/E").to(combined.models.device)
        alone = mpg.custom_generate(combined, weights={"E": 1}, target=target)
        for question in DEMO_QUESTIONS[:2]:
            how = {**inputs(question), "max_new_tokens": 24, "repetition_penalty": 1.5}
            assert peft_model.generate(**how, custom_generate=alone).equal(peft_model.generate(**how))

    @pytest.mark.parametrize("length", ["max_length", "min_length"])
    def test_lengths_of_padded_prompts_are_counted_as_transformers_counts_them(self, plain, model, inputs, length):
        batch = inputs(LONG, QUICK)
        width = batch["input_ids"].shape[1]
        how = {length: width + 9, "max_new_tokens": 30} if length == "min_length" else {length: width + 9}
        there = plain.generate(**batch, **how, pad_token_id=9)[:, width:].tolist()
        here = model.generate(**batch, **how, target="base", do_sample=False)
        assert [row[: len(result.tokens)] for row, result in zip(there, here, strict=True)] == [
            list(result.tokens) for result in here
        ]
        if length == "max_length":
            wanted = f"an integer above the {width} tokens of prompt 0"
            with pytest.raises(ValueError, match=f"^max_length: expected {wanted}, got {width}"):
                model.generate(**batch, max_length=width, target="base")

    def test_stop_strings_go_to_mpg(self, plain, combined, inputs, tokenizer):
        batch = inputs(LONG)
        expected = plain.generate(**batch, max_new_tokens=40, stop_strings=["ing"], tokenizer=tokenizer)
        decode = mpg.custom_generate(combined, target="base", stop_strings=["ing"])
        assert plain.generate(**batch, max_new_tokens=40, custom_generate=decode).equal(expected)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_combination_is_sampled_by_the_seed_of_torch(self, plain, combined, inputs, side):
        decode = mpg.custom_generate(combined, weights=BOTH)
        batch, how = inputs(LONG, QUICK, side=side), {"max_new_tokens": 12, "do_sample": True, "top_k": 0}
        torch.manual_seed(3)
        sampled = plain.generate(**batch, custom_generate=decode, num_return_sequences=2, **how)
        torch.manual_seed(3)
        seed = int(torch.randint(2**62, ()))
        expected = combined.generate([LONG, QUICK], weights=BOTH, seed=seed, max_new_tokens=12, num_return_sequences=2)
        assert sampled[:, : batch["input_ids"].shape[1]].equal(batch["input_ids"].repeat_interleave(2, 0))
        for row, result in zip(sampled[:, batch["input_ids"].shape[1] :].tolist(), expected, strict=True):
            assert row[: len(result.tokens)] == list(result.tokens)
            assert not any(row[len(result.tokens) :])  # padding is token 0
        torch.manual_seed(3)
        as_dict = plain.generate(
            **batch, custom_generate=decode, num_return_sequences=2, return_dict_in_generate=True, **how
        )
        assert isinstance(as_dict, transformers.generation.GenerateDecoderOnlyOutput)
        assert as_dict.sequences.equal(sampled)

    def test_sampling_defaults_are_transformers(self, plain, combined, inputs):
        seen = {}

        def keep(**options):
            seen.update(options)
            raise KeyError("seen")

        fake = mpg.Model(combined.models)
        fake.generate = keep
        config = GenerationConfig(do_sample=True, temperature=0.6)
        with pytest.raises(KeyError, match="seen"):
            plain.generate(**inputs(LONG), generation_config=config, custom_generate=mpg.custom_generate(fake))
        options, hf_config = HFGenerationConfig.of(seen["generation_config"], {})
        assert options == {"temperature": 0.6, "top_k": 50, "top_p": 1.0}
        assert hf_config.fields["max_length"] == 20 + seen["input_ids"].shape[1]

    def test_streamer_gets_prompt_tokens_and_end(self, plain, combined, inputs, tokenizer):
        decode, batch = mpg.custom_generate(combined, weights=BOTH, seed=0), inputs(LONG)
        streamer = TextIteratorStreamer(tokenizer, timeout=60)
        kwargs = {**batch, "streamer": streamer, "max_new_tokens": 12, "do_sample": True, "custom_generate": decode}
        Thread(target=plain.generate, kwargs=kwargs).start()
        streamed = "".join(streamer)
        del kwargs["streamer"]
        assert streamed == tokenizer.decode(plain.generate(**kwargs)[0])

    def test_peft_model_switches_too(self, inputs, tokenizer):
        base = AutoModelForCausalLM.from_pretrained(MODELS, dtype=torch.float32)
        peft_model = PeftModel.from_pretrained(base, MODELS / "adapters/E", adapter_name="E")
        batch = inputs(LONG).to("cpu")
        expected = peft_model.generate(**batch, max_new_tokens=20)
        alone = mpg.custom_generate(mpg.load(peft_model), weights={"E": 1}, target="arithmetic")
        assert peft_model.generate(**batch, max_new_tokens=20, custom_generate=alone).equal(expected)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_beams": 2}, "num_beams: expected 1, as"),
            ({"repetition_penalty": 1.1, "sampler": "scr", "do_sample": True, "top_k": 0}, "repetition_penalty: act"),
            ({"output_scores": True, "return_dict_in_generate": True}, "output_scores: expected False, as"),
            ({"typical_p": 0.5, "do_sample": True}, "typical_p: expected 1.0, as rows are warped by"),
            ({"negative_prompt_ids": torch.ones(1, 1)}, "negative_prompt_ids: expected guidance_scale beside it"),
            ({"position_ids": torch.zeros(1, 10, dtype=torch.int64)}, "position_ids: expected none"),
            ({"seed": -1}, "seed: expected an integer"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_honoured_is_refused_by_name(self, plain, combined, inputs, arguments, message):
        own = {name: arguments.pop(name) for name in ("sampler", "seed") if name in arguments}
        batch = inputs(LONG)
        if "position_ids" in arguments:
            arguments["position_ids"] = torch.zeros_like(batch["input_ids"])
        with pytest.raises(ValueError, match=message):
            plain.generate(**batch, custom_generate=mpg.custom_generate(combined, weights=BOTH, **own), **arguments)

    def test_embeddings_a_filled_cache_a_batch_of_streams_and_other_callers_are_refused(
        self, plain, combined, inputs, tokenizer
    ):
        decode, batch = mpg.custom_generate(combined, weights=BOTH), inputs(LONG)
        ids = batch["input_ids"]
        with pytest.raises(ValueError, match="inputs_embeds: expected none, as prompts are tokens alone"):
            plain.generate(inputs_embeds=plain.get_input_embeddings()(ids), custom_generate=decode)
        [name] = as_argument(plain, DynamicCache())
        filled = {name: plain(ids[:, :3], use_cache=True)[name]}
        with pytest.raises(ValueError, match=f"{name}: expected none, as mpg has a cache of its own"):
            plain.generate(**batch, **filled, custom_generate=decode)

        with pytest.raises(ValueError, match="streamer: expected one prompt and one sequence, got 2"):
            plain.generate(**inputs(LONG, QUICK), streamer=Silent(), custom_generate=decode)
        with pytest.raises(ValueError, match="custom_generate: expected to be called by the generate of"):
            decode(plain, ids)
        with pytest.raises(ValueError, match=r"model: expected what mpg.load returns, got LlamaForCausalLM"):
            mpg.custom_generate(plain)
        other = AutoModelForCausalLM.from_config(transformers.LlamaConfig(vocab_size=7, hidden_size=8,
            intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))  # fmt: skip
        with pytest.raises(ValueError, match="custom_generate: expected a transformers model with mpg's vocabulary of"):
            other.generate(torch.tensor([[1]]), custom_generate=decode)


def test_script_of_the_page_switches_by_one_line(tmp_path, monkeypatch, capsys):
    """It is run as it stands, and as it was before its one changed line."""
    script = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1)
    (before,) = re.findall(r"^# (output = .*\n)", script, re.MULTILINE)
    (after,) = re.findall(r"^output = .*?^\)\n", script, re.MULTILINE | re.DOTALL)
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/base").symlink_to(MODELS)
    for name in "et":
        (tmp_path / f"path/to/adapter_{name}").symlink_to(MODELS / "adapters" / name.upper())
    monkeypatch.chdir(tmp_path)
    outputs = []
    for text in (script, script.replace(after, before)):
        torch.manual_seed(0)
        exec(compile(text, "transformers.md", "exec"), {})
        outputs.append(capsys.readouterr().out)
        assert DEMO_QUESTIONS[0] in outputs[-1]
        assert len(outputs[-1]) > len(DEMO_QUESTIONS[0]) + 20
    assert outputs[0] != outputs[1]
