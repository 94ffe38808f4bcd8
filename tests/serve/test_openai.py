"""OpenAI's own client against the server: what it gets is what `generate` returns, whatever else runs."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from longer import IS_LONG
from mpg.demo.corpus import DEMO_QUESTIONS, HELD_OUT_QUESTIONS

QUESTIONS = [*DEMO_QUESTIONS, *(question.text for question in HELD_OUT_QUESTIONS)]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTIONS[0]}]


def chat(client, question, model="demo", stream=False, **fields):
    """Text, finish reason and the chunks or the one answer, of one choice."""
    own = {name: fields.pop(name) for name in list(fields) if name in OWN}
    messages = question if isinstance(question, list) else [{"role": "user", "content": question}]
    got = client.chat.completions.create(model=model, messages=messages, stream=stream, extra_body=own, **fields)
    if not stream:
        return got.choices[0].message.content, got.choices[0].finish_reason, got
    chunks = list(got)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    return text, next(chunk.choices[0].finish_reason for chunk in reversed(chunks) if chunk.choices), chunks


OWN = {
    "weights", "contexts", "target", "sampler", "draft", "chunk_size", "verify", "adaptive", "mixture_span", "top_k",
    "min_p", "repetition_penalty", "trace",
}  # fmt: skip
KINDS = [
    {"weights": {"E": 1}},
    {"weights": {"E": 1, "T": 0.5}, "temperature": 0.5, "top_k": 7, "trace": True},
    {"weights": "E=-0.5,J=1", "temperature": 0},
    {"weights": "ESTJ", "top_p": 0.8, "min_p": 0.01, "sampler": "direct"},
    {"weights": {"E": 1, "calm": 0.5}, "contexts": {"calm": "Be calm.", "calmer": "Be calmer."}},
    {"weights": {"calm": 0.7}, "contexts": {"calm": {"system": "Be calm.", "source": "T"}}, "temperature": 1.3},
    {"target": "base", "repetition_penalty": 1.2},
    {"weights": {"E": 1}, "target": "arithmetic", "draft": "lookup", "mixture_span": 3},
    {"weights": {"S": 1}, "draft": "merged", "adaptive": True},
    {"weights": {"S": 1, "T": -0.5}, "draft": "merged", "repetition_penalty": 1.3},
    {"weights": {"S": 1, "J": 0.5}, "sampler": "scr", "target": "geometric"},
    {"weights": {"T": 1}, "sampler": "seq-rs"},
    {"weights": {"T": 1}, "target": "anchored", "verify": "token", "chunk_size": 2},
]


SYSTEM = {"role": "system", "content": "You plan trips and parties. " * 14}


def asked_of(index):
    """Every third with a long beginning that it shares with others, which is read in parts, or not again."""
    return [SYSTEM] * (index % 3 == 0) + [{"role": "user", "content": QUESTIONS[index % 9]}]


def test_texts_of_all_kinds_at_once_are_those_of_generate(served, client, monkeypatch):
    """Streamed and not, in two groups and more, with fewer rows than requests; of generate where nothing is kept."""
    asked = [
        {**kind, "seed": 7 + index, "max_tokens": 6 + index, "stream": bool(index % 2)}
        for index, kind in enumerate(KINDS * 2 if IS_LONG else KINDS)
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda at: chat(client, asked_of(at), **asked[at]), range(len(asked))))
    assert served.is_idle()
    kept = served.model.models.kept
    assert kept.num_bytes > 0
    kept.clear()
    monkeypatch.setattr(kept, "max_bytes", 0)
    for index, ((text, reason, _), fields) in enumerate(zip(answers, asked, strict=True)):
        own = {name: value for name, value in fields.items() if name not in ("max_tokens", "stream")}
        wanted = served.model.generate(asked_of(index), max_new_tokens=fields["max_tokens"], **own)
        assert (text, reason) == (wanted.text, wanted.finish_reason)


def test_models_are_the_combination_the_base_attributes_presets_and_weights_as_a_name(served, client):
    names = [model.id for model in client.models.list()]
    assert names == ["demo", "base", "E", "S", "T", "J", "ESTJ", "INFP"]
    assert client.models.retrieve("E").mpg == {"kind": "attribute", "weights": {"E": 1}}
    assert client.models.retrieve("E=1,T=0.5").mpg == {"kind": "weights", "weights": {"E": 1, "T": 0.5}}
    own = {model.id: model.mpg for model in client.models.list()}
    assert [own[name]["kind"] for name in ("demo", "base", "ESTJ")] == ["combination", "base", "preset"]
    assert own["ESTJ"]["weights"] == served.model.recipe.presets["ESTJ"]
    for name in [*names[1:], "E=1,T=0.5"]:  # the combination has no weights of its own
        weights = {"base": None, "E=1,T=0.5": name}.get(name, name)
        weights = {name: 1} if name in served.model.models.attribute_names else weights
        how = {"target": "base"} if weights is None else {"weights": weights}
        text, _, answer = chat(client, QUESTIONS[1], name, seed=3, max_tokens=8)
        assert text == served.model.generate(QUESTIONS[1], seed=3, max_new_tokens=8, **how).text
        assert answer.model == name


def test_choices_and_usage_streamed_and_not(served, client):
    results = served.model.generate(
        MESSAGES, weights={"E": 1}, seed=5, max_new_tokens=9, num_return_sequences=3, stop_strings=["e ", "zzz"]
    )
    fields = {"model": "E", "messages": MESSAGES, "seed": 5, "n": 3, "stop": ["e ", "zzz"], "logprobs": True}
    answer = client.chat.completions.create(max_completion_tokens=9, **fields)
    texts = [choice.message.content for choice in answer.choices]
    assert texts == [result.text.split("e ")[0] for result in results]
    assert any(result.finish_reason == "stop" and "e " in result.text for result in results)
    assert [choice.finish_reason for choice in answer.choices] == [result.finish_reason for result in results]
    num_new = sum(len(result.tokens) for result in results)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (results[0].prompt_tokens, num_new)
    assert [choice.mpg["seed"] for choice in answer.choices] == [5, 6, 7]
    assert answer.choices[0].mpg["stats"]["rounds"] == results[0].stats["rounds"]

    chunks = list(
        client.chat.completions.create(max_tokens=9, stream=True, stream_options={"include_usage": True}, **fields)
    )
    assert chunks[-1].usage == answer.usage and chunks[-1].choices == []
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks[:-1])
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    for index, text in enumerate(texts):
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in own) == text
        assert [choice.finish_reason for choice in own[:-1]] == [None] * (len(own) - 1)
        assert [choice.delta.role for choice in own] == ["assistant", *[None] * (len(own) - 1)]
        told = [token for choice in own if choice.logprobs for token in choice.logprobs.content]
        assert told == answer.choices[index].logprobs.content
        # one event a round, and one for the end
        assert len(own) <= results[index].stats["rounds"] + 1
    answer = client.chat.completions.create(max_tokens=9, temperature=0, **fields)  # nothing is drawn
    wanted = served.model.generate(MESSAGES, weights={"E": 1}, max_new_tokens=9, stop_strings="e ", temperature=0)
    assert [choice.message.content for choice in answer.choices] == [wanted.text.split("e ")[0]] * 3
    assert [choice.mpg["seed"] for choice in answer.choices] == [5, 6, 7]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_and_traces_are_told_token_by_token(served, client, stream):
    fields = {"weights": {"E": 1, "T": 0.5}, "seed": 1, "max_tokens": 12, "trace": True, "temperature": 0}
    _, _, got = chat(client, QUESTIONS[2], stream=stream, logprobs=True, top_logprobs=3, **fields)
    wanted = served.model.generate(
        QUESTIONS[2], weights=fields["weights"], seed=1, max_new_tokens=12, trace=True, temperature=0
    )
    choices = [chunk.choices[0] for chunk in got] if stream else [got.choices[0]]
    tokens = [token for choice in choices for token in choice.mpg.get("tokens", [])]
    ratios = [ratio for choice in choices for ratio in choice.mpg.get("log_ratios", [])]
    assert tokens == list(wanted.tokens)
    for name in ("texts", "marks", "rejected"):
        assert [one for choice in choices for one in choice.mpg.get(name, [])] == list(getattr(wanted.trace, name))
    for ratio, expected in zip(ratios, wanted.log_ratios, strict=True):
        assert ratio == pytest.approx(expected, abs=1e-9)
    told = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert len(told) == len(tokens)
    spell = served.model.tokenizer.decode
    for token, token_id in zip(told, tokens, strict=True):
        assert token.token == spell([token_id]) and bytes(token.bytes).decode() == token.token
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token  # the likeliest, as the temperature is 0
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)
        assert sum(2.718281828**top.logprob for top in token.top_logprobs) <= 1 + 1e-6


def test_streamed_completions_tell_the_same_log_probabilities_as_whole_ones(client):
    fields = {
        "model": "E=1",
        "prompt": ["Once upon a", "The weather"],
        "seed": 4,
        "n": 2,
        "max_tokens": 7,
        "logprobs": 2,
    }
    answer = client.completions.create(**fields)
    told = {index: {} for index in range(4)}
    for chunk in client.completions.create(stream=True, **fields):
        [choice] = chunk.choices
        for name, values in choice.logprobs.model_dump().items() if choice.logprobs else ():
            told[choice.index].setdefault(name, []).extend(values)
    assert told == {choice.index: choice.logprobs.model_dump() for choice in answer.choices}


def test_completions_take_text_token_ids_and_lists_of_them(served, client):
    prompts = ["Once upon a", "The weather"]
    ids = [served.model.tokenizer(prompt)["input_ids"] for prompt in prompts]
    how = {"weights": "E=1", "max_new_tokens": 7}
    for given in (prompts, ids):
        answer = client.completions.create(model="E=1", prompt=given, seed=4, n=2, max_tokens=7)
        wanted = [
            served.model.generate(prompt, raw=True, seed=4 + 2 * index + copy, **how).text
            for index, prompt in enumerate(given)
            for copy in range(2)
        ]
        assert [choice.text for choice in answer.choices] == wanted
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    one = client.completions.create(model="E=1", prompt=ids[0], seed=4, max_tokens=7, echo=True)
    assert one.choices[0].text == served.model.tokenizer.decode(ids[0]) + wanted[0]
    chunks = list(
        client.completions.create(model="E=1", prompt=prompts[0], seed=4, max_tokens=7, stream=True, echo=True)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == prompts[0] + wanted[0]


@pytest.mark.parametrize("own", [{"weights": {"E": 1, "J": -0.5}}, {"weights": {"E": 1}, "target": "arithmetic"}])
def test_echoed_prompts_have_the_log_probabilities_of_the_law_that_new_tokens_have(served, client, own):
    """What is generated and scored anew as a prompt has the log-probabilities that it had."""
    prompt = served.model.tokenizer("The weather is")["input_ids"]
    fields = {"model": "demo", "seed": 2, "logprobs": 2}
    first = client.completions.create(prompt=prompt, max_tokens=50, extra_body={**own, "trace": True}, **fields)
    new = first.choices[0].mpg["tokens"]
    whole = [*prompt, *new]
    for max_tokens in (0, 1):
        extra = {"prompt": [whole, whole[:5], whole[:1]], "max_tokens": max_tokens, "echo": True}
        again = client.completions.create(extra_body=own, **extra, **fields)
        for choice, ids in zip(again.choices, extra["prompt"], strict=True):
            logprobs = choice.logprobs
            assert len(logprobs.tokens) == len(logprobs.text_offset) == len(ids) + max_tokens
            assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
        scored = again.choices[0].logprobs
        told = scored.token_logprobs[len(prompt) : len(whole)]
        assert told == pytest.approx(first.choices[0].logprobs.token_logprobs, abs=1e-6)
        assert scored.tokens[len(prompt) : len(whole)] == first.choices[0].logprobs.tokens
        for top, value in zip(scored.top_logprobs[1:], scored.token_logprobs[1:], strict=True):
            assert value in top.values() and 2 <= len(top) <= 3


@pytest.mark.parametrize("is_text", [True, False])
def test_offsets_of_tokens_are_where_they_are_in_the_text(served, client, is_text):
    """Behind characters of several tokens too."""
    text = "Héllo 😀 there"
    prompt = text if is_text else served.model.tokenizer(text)["input_ids"]
    answer = client.completions.create(model="E=1", prompt=prompt, max_tokens=5, seed=1, echo=True, logprobs=0)
    (choice,) = answer.choices
    told = list(zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True))
    assert choice.text.startswith(text) and sum("\ufffd" in token for token, _ in told) > 4
    for token, offset in told:
        assert "\ufffd" in token or choice.text.startswith(token, offset), (token, offset)
    assert {choice.text[offset] for token, offset in told if "\ufffd" in token} <= {"é", "😀"}


def test_the_playground_is_one_page_that_names_no_other_place(served):
    answer = served.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert "mpg playground" in answer.text and '"geometric"' in answer.text
    assert not re.search(r"{{|https?://|\b(src|href)=(?!.data:)|@import|url\(", answer.text)
