"""What a context may be, and the tokens that it makes of a prompt."""

from __future__ import annotations

import copy

import pytest
from transformers import AutoTokenizer

from mpg.context import Context
from mpg.demo import MODELS
from mpg.frontend.contexts import read_context
from mpg.frontend.prompts import encode

VOCABULARY = 2000
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
USER, SYSTEM = {"role": "user", "content": "Hello?"}, {"role": "system", "content": "Be kind."}


@pytest.fixture
def tokenizer():
    """One whose template writes every role."""
    tokenizer = copy.deepcopy(AutoTokenizer.from_pretrained(MODELS))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def read(context, prompt, tokenizer, **how):
    token_ids = prompt if isinstance(prompt[0], int) else encode(prompt, tokenizer, VOCABULARY, **how)
    return read_context(context, "contexts['calm']", prompt, token_ids, tokenizer, VOCABULARY, **how)


def test_a_conversation_of_a_system_message_alone_has_the_contexts_instead(tokenizer):
    calm = [{"role": "system", "content": "Be calm."}]
    assert read(Context(system="Be calm."), [SYSTEM], tokenizer) == encode(calm, tokenizer, VOCABULARY)


@pytest.mark.parametrize("prompt", ["Hello?", [USER], [SYSTEM, USER]])
def test_a_system_message_takes_the_place_of_the_prompts_own(prompt, tokenizer):
    calm = [{"role": "system", "content": "Be calm."}, USER]
    assert read(Context(system="Be calm."), prompt, tokenizer) == encode(calm, tokenizer, VOCABULARY)


def test_a_prefix_comes_before_the_prompt_and_behind_its_bos(tokenizer):
    own, text = encode("Hello?", tokenizer, VOCABULARY), "Calmly now."
    before = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert read(Context(prefix=text), "Hello?", tokenizer) == [*before, *own]
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(own[0])
    assert read(Context(prefix=text), own, tokenizer) == [own[0], *before, *own[1:]]


@pytest.mark.parametrize("other", ["Good bye!", [5, 6, 7], [SYSTEM, USER]])
def test_another_prompt_is_read_as_any_prompt(other, tokenizer):
    assert read(Context(prompt=other), "Hello?", tokenizer) == encode(other, tokenizer, VOCABULARY)


@pytest.mark.parametrize(
    ("given", "context"),
    [
        ("Be calm.", Context(system="Be calm.")),
        ({"prefix": "Calmly: ", "source": "adapters/E"}, Context(prefix="Calmly: ", source="adapters/E")),
        (Context(prompt=[1, 2]), Context(prompt=[1, 2])),
    ],
)
def test_a_context_may_be_given_as_text_or_as_a_mapping(given, context):
    assert Context.of("contexts['calm']", given) == context


def test_where_a_system_message_has_no_place_the_refusal_names_the_way_out(tokenizer):
    context, way_out = Context(system="Be calm."), "expected prefix=, which any model reads"
    for prompt, how in (([5, 6], {}), ("Hello?", {"raw": True})):
        with pytest.raises(ValueError, match=rf"^contexts\['calm'\]: this call has prompts as they are.*; {way_out}$"):
            read(context, prompt, tokenizer, **how)
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system') }}{% endif %}x"
    with pytest.raises(ValueError, match=f"{way_out}, as the chat template refuses a system message: .*No system"):
        read(context, "Hello?", tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] if m['role'] == 'user' }}{% endfor %}"
    with pytest.raises(ValueError, match=f"{way_out}, as the chat template drops the system message"):
        read(context, "Hello?", tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=f"no chat template and no place for a system message; {way_out}"):
        read(context, "Hello?", tokenizer)


def test_text_needs_a_tokenizer():
    for context in (Context(system="a"), Context(prefix="b")):
        with pytest.raises(ValueError, match=r"^contexts\['calm'\]: this model has no tokenizer, expected prompt="):
            read_context(context, "contexts['calm']", [1, 2], [1, 2], None, VOCABULARY)
    assert read_context(Context(prompt=[3]), "contexts['calm']", [1, 2], [1, 2], None, VOCABULARY) == [3]
