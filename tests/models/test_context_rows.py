"""Attributes that are a model under another text: against full forwards without a cache, and transformers' guidance."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from peft import LoraConfig, get_peft_model

import mpg
from longer import IS_LONG
from mpg.models import beginnings
from mpg.models.runner import ModelRunner

PROMPTS = [[3, 4, 5, 6, 7], [9, 8], [11, 12, 13]]
CONTEXTS = [[21, 22, 23, 24, 25, 26, 27, 7], [30], [31, 32, 33, 34]]  # longer, shorter, with the same end and without
WEIGHTS = {"E": 0.7, "calm": 0.9, "loud": -0.4}
NUM_TOKENS = 6
MODELS = {"llama": {}, "gpt2": {}, "mistral": {"sliding_window": 4}}
LOUD = [40, 41, 42]
NEGATIVE = {"longer": [21, 22, 23, 7], "a token": [30], "none": None}


def of_models(names, values):
    """Every second pair of a model and of the values of a test in the short form, all of them in the long one."""
    pairs = [
        pytest.param(model, *of_test, id=f"{model}-{name}")
        for (i, model), (j, (name, of_test)) in product(enumerate(MODELS), enumerate(values.items()))
        if IS_LONG or (i + j) % 2 == 0
    ]
    return pytest.mark.parametrize(("adapted", *names), pairs, indirect=["adapted"])


@pytest.fixture(params=MODELS)
def adapted(request, tiny_model):
    """A model with an adapter, and its own full forward: logprobs(adapter or None, tokens) of the last row."""
    base = tiny_model(request.param, **MODELS[request.param])
    modules = ["c_attn", "c_fc"] if request.param == "gpt2" else "all-linear"
    config = LoraConfig(target_modules=modules, init_lora_weights=False, fan_in_fan_out=request.param == "gpt2")
    plain = copy.deepcopy(base)  # PEFT takes longer to leave the adapter out than a forward takes
    model = get_peft_model(base, config, adapter_name="E").eval()

    @torch.no_grad()
    def logprobs(adapter, tokens):
        run = plain if adapter is None else model
        return run(torch.tensor([tokens]), use_cache=False).logits[0, -1].log_softmax(-1)

    return model, logprobs


def greedy(logprobs, prompt, context):
    """The geometric target's likeliest text, and its tokens' log-ratios, by forwards of everything so far."""
    text, ratios = [], []
    for _ in range(NUM_TOKENS):
        base = logprobs(None, prompt + text)
        rows = {
            "E": logprobs("E", prompt + text),
            "calm": logprobs(None, context + text),
            "loud": logprobs("E", LOUD + text),
        }
        combined = base + sum(WEIGHTS[name] * (row - base) for name, row in rows.items())
        token = int(combined.argmax())
        text.append(token)
        ratios.append({name: float(row[token] - base[token]) for name, row in rows.items()})
    return text, ratios


@of_models(["context"], {str(len(context)): [context] for context in CONTEXTS})
def test_a_context_that_drafts_reads_its_own_text_to_the_end(context, adapted, monkeypatch):
    """Whatever its last tokens are, and be it one token: drafts are the context's own, and the target's where that
    is its model."""
    model, logprobs = adapted
    loaded = mpg.load(model, {"E": "E", "calm": mpg.Context(prompt=context)}, draft="calm", device="cpu")
    options = {"weights": {"calm": 1}, "temperature": 0, "max_new_tokens": NUM_TOKENS, "chunk_size": 2}
    for prompt in PROMPTS:
        text = []
        for _ in range(NUM_TOKENS):
            text.append(int(logprobs(None, context + text).argmax()))
        result = loaded.generate(prompt, draft="model", verify="token", **options)
        assert list(result.tokens) == text[: len(result.tokens)]
        assert result.stats["accept_rate"] == 1


WAYS = [{"sampler": "direct"}, {"draft": "reference"}, {"draft": "lookup"}, {"draft": "model", "verify": "token"}]


@of_models(["options"], {"-".join(options.values()): [options] for options in WAYS})
def test_text_and_log_ratios_are_those_of_forwards_without_a_cache(options, adapted):
    """Three prompts of other lengths with contexts of other lengths, one without any, and a row less than texts."""
    model, logprobs = adapted
    loaded = mpg.load(model, {"E": "E", "loud": mpg.Context(prompt=LOUD, source="E")}, draft="E", device="cpu")
    contexts = [{"calm": mpg.Context(prompt=context)} for context in CONTEXTS]
    results = loaded.generate(
        [*PROMPTS, [5, 6]], weights=[*[WEIGHTS] * 3, {"E": 1.0}], contexts=[*contexts, {}], temperature=0,
        max_new_tokens=NUM_TOKENS, trace=True, batch_size=3, **options,
    )  # fmt: skip
    for result, prompt, context in zip(results, PROMPTS, CONTEXTS, strict=False):
        text, ratios = greedy(logprobs, prompt, context)
        end = len(result.tokens)  # it may have come to an end-of-sequence token
        assert list(result.tokens) == text[:end]
        for found, wanted in zip(result.log_ratios, ratios[:end], strict=True):
            assert found == pytest.approx(wanted, abs=1e-3)
    if options == {"sampler": "direct"}:  # a position of the base and of each attribute that is weighed
        assert [result.stats["positions_per_token"] for result in results] == [4, 4, 4, 2]


@pytest.mark.parametrize(
    ("negative", "sampler"),
    [
        pytest.param(NEGATIVE[name], sampler, id=f"{name}-{sampler}")
        for (i, name), (j, sampler) in product(enumerate(NEGATIVE), enumerate(("direct", "exact")))
        if IS_LONG or (i + j) % 2 == 0
    ],
)
def test_guidance_is_that_of_transformers(negative, sampler, adapted):
    """Token for token; without a negative prompt it is the prompt's last token."""
    model, _ = adapted
    plain, inputs = mpg.load(model, {}, device="cpu"), torch.tensor([PROMPTS[0], [0, 0, *PROMPTS[2]]])
    how = {
        "guidance_scale": 1.5, "max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": 60, "pad_token_id": 0,
        "attention_mask": (inputs > 0).long(),
        "negative_prompt_ids": None if negative is None else torch.tensor([negative] * 2),
    }  # fmt: skip
    with model.disable_adapter():
        theirs = model.generate(input_ids=inputs, **how)
    for result, row in zip(plain.generate(input_ids=inputs, sampler=sampler, **how), theirs, strict=True):
        new = row[inputs.shape[1] :].tolist()
        assert new == [*result.tokens, *[0] * (len(new) - len(result.tokens))]


def test_the_same_text_is_read_once_whatever_it_is_called_and_by_however_many_requests(adapted, monkeypatch):
    model, _ = adapted
    loaded, forward, read = mpg.load(model, {}, device="cpu"), ModelRunner.forward, []

    def counting(self, fed, runs, tokens, *arguments, **how):
        if how:  # logits_to_keep: it reads prompts
            read.append(len(tokens))
        return forward(self, fed, runs, tokens, *arguments, **how)

    monkeypatch.setattr(ModelRunner, "forward", counting)
    one = mpg.Context(prompt=CONTEXTS[0])
    how = {"weights": {"a": 0.5, "b": 0.5}, "contexts": {"a": one, "b": one}, "max_new_tokens": 2}
    loaded.generate([PROMPTS[1]] * 2, seed=0, **how)
    assert read == [2]  # the prompt, and the context, though there are two rows of the one and four of the other


RAGGED, EQUAL = ([3], [4, 5, 6], [7, 8], [9, 10]), ([3, 4], [5, 6], [7, 8], [9, 10])


SHARING = {
    "direct": ("direct", RAGGED, 2),
    "exact": ("exact", RAGGED, 2),
    "of equal length in all rows": ("direct", EQUAL, 4),
    "one after another": ("direct", RAGGED, 1),
}


@of_models(["sampler", "tails", "num_rows"], SHARING)
def test_what_texts_begin_with_alike_is_read_once(sampler, tails, num_rows, adapted, monkeypatch):
    """By prompts that come together, by those that come while another goes on, and by those that come where another
    was; texts are those without it."""
    model, _ = adapted
    shared = [20 + i % 30 for i in range(12)]
    prompts = [[*shared, *tail] for tail in tails]
    contexts = [{"calm": mpg.Context(prompt=[*shared, 33, *prompt[-2:]])} for prompt in prompts]
    texts, read = {}, {}
    for least in (64, 8):
        monkeypatch.setattr(beginnings, "MIN_SHARED", least)
        loaded, forward, positions = mpg.load(model, {"E": "E"}, device="cpu"), ModelRunner.forward, []

        def counting(self, fed, runs, tokens, *arguments, forward=forward, positions=positions, **how):
            if how:
                positions.append(tokens.numel())
            return forward(self, fed, runs, tokens, *arguments, **how)

        with monkeypatch.context() as patch:
            patch.setattr(ModelRunner, "forward", counting)
            results = loaded.generate(
                prompts, contexts=contexts, weights={"E": 0.5, "calm": 0.8}, batch_size=num_rows, seed=0,
                sampler=sampler, max_new_tokens=[3, 5][sampler == "exact"],
            )  # fmt: skip
        texts[least], read[least] = [result.tokens for result in results], sum(positions)
    assert texts[8] == texts[64]
    assert read[8] < read[64] / 2
