"""What a prompt may be: the forms that a chat template takes, each as transformers has it or refused by name."""

from __future__ import annotations

import copy

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from mpg.demo import MODELS
from mpg.frontend.prompts import encode

USER, BEGUN = {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "I went to"}
VOCABULARY = 2000


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODELS)


@pytest.fixture
def patched(tokenizer):
    """patched(template): a tokenizer with this chat template."""

    def make(template):
        other = copy.deepcopy(tokenizer)
        other.chat_template = template
        return other

    return make


def text(prompt, tokenizer, **how):
    return tokenizer.decode(encode(prompt, tokenizer, VOCABULARY, **how))


@pytest.mark.parametrize("make", [list, tuple])
def test_text_parts_are_joined(tokenizer, make):
    parts = make([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo?"}])
    joined = encode([{"role": "user", "content": parts}], tokenizer, VOCABULARY)
    assert joined == encode([USER], tokenizer, VOCABULARY) == encode("Hello?", tokenizer, VOCABULARY)


def test_other_keys_and_roles_are_the_templates_to_judge(patched):
    called = [
        USER,
        {"role": "assistant", "tool_calls": [{"name": "clock"}]},
        {"role": "tool", "content": "6", "id": "x"},
    ]
    template = "{% for m in messages %}{{ m['role'] }} {{ m.get('id') }} {{ 'content' in m }}.{% endfor %}"
    assert text(called, patched(template)) == "user None True.assistant None False.tool x True."
    refuses = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('no such role') }}{% endif %}"
    with pytest.raises(ValueError, match=r"^prompt: expected messages that the chat template takes.*: no such role"):
        encode([{"role": "tool", "content": "hi"}], patched(refuses), VOCABULARY)


def test_a_role_that_neither_the_template_nor_anyone_names_is_refused(patched):
    """A template that prints any role would tell the model of a misspelt one."""
    prints = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    judged = [USER, {"role": "judge", "content": "hi"}]
    with pytest.raises(ValueError, match=r"^prompt: message 1: expected a role that the chat .*assistant.*got 'judge'"):
        encode(judged, patched(prints), VOCABULARY)
    named = "{% for m in messages if m['role'] != 'judge' %}{{ m['content'] }}{% endfor %}"
    assert encode(judged, patched(named), VOCABULARY)


def test_final_message_is_continued_or_answered_as_the_caller_says(tokenizer):
    for messages in ([USER, BEGUN], [USER], [USER, BEGUN, {**USER}]):  # 5.17 would mark both where they are one
        for continues in (True, False):
            there = {"add_generation_prompt": not continues, "continue_final_message": continues, "return_dict": False}
            expected = tokenizer.apply_chat_template(messages, **there)
            assert encode(messages, tokenizer, VOCABULARY, continue_final_message=continues) == expected
    assert text([USER, BEGUN], tokenizer, continue_final_message=True).endswith("I went to")
    with pytest.raises(ValueError, match=r"^prompt: the last message is the assistant's, expected continue_final_mess"):
        encode([USER, BEGUN], tokenizer, VOCABULARY)


@pytest.mark.parametrize("prompt", ["hi", [5, 6]])
def test_only_a_conversation_has_a_final_message(tokenizer, prompt):
    with pytest.raises(ValueError, match=r"^continue_final_message: expected messages to go on with, got prompt "):
        encode(prompt, tokenizer, VOCABULARY, continue_final_message=True)
    with pytest.raises(ValueError, match=r"^continue_final_message: expected True or False, got 1"):
        encode(prompt, tokenizer, VOCABULARY, continue_final_message=1)


def test_keywords_of_the_chat_template_are_passed_on(patched):
    template = patched("{{ messages[0]['content'] }}{{ '!' if loud else '.' }}{{ tools }}")
    assert text("Hello", template, chat_template_kwargs={"loud": True}) == "Hello!None"
    assert text("Hello", template, chat_template_kwargs={"tools": [{"name": "x"}]}).startswith("Hello.[{")
    with pytest.raises(ValueError, match=r"^chat_template_kwargs: expected a mapping, got \['loud'\]"):
        encode("Hello", template, VOCABULARY, chat_template_kwargs=["loud"])
    with pytest.raises(ValueError, match=r"^chat_template_kwargs: expected none of what mpg itself .* 'tokenize'"):
        encode("Hello", template, VOCABULARY, chat_template_kwargs={"tokenize": False})


@pytest.mark.parametrize("raw", [False, True])
def test_templated_text_has_one_bos(tokenizer, raw):
    adds = copy.deepcopy(tokenizer)
    if not raw:
        adds.chat_template = None  # strings are verbatim then
    bos = (adds.bos_token, adds.bos_token_id)
    adds._tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    plain = encode("hi", adds, VOCABULARY, raw=raw)
    assert plain[0] == adds.bos_token_id
    assert encode(f"{adds.bos_token}hi", adds, VOCABULARY, raw=raw) == plain
    assert encode("hi", tokenizer, VOCABULARY, raw=True) == plain[1:]  # where none is added, none is
    assert encode(f"{adds.bos_token}hi", tokenizer, VOCABULARY, raw=True) == plain


def test_model_without_tokenizer_says_where_one_goes():
    with pytest.raises(
        ValueError, match=r"^prompt: this model has no tokenizer, .* loaded with tokenizer=..., got 'hi'"
    ):
        encode("hi", None, VOCABULARY)
