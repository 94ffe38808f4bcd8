"""What hypothesis makes up, as recipe, options, adapter or request: the outcome is a result or one clear refusal.

A refusal is a ValueError that names an argument that was made up, in a server an error of a status from 400 to 499;
never another exception, a hang, or a model that is another one afterwards.
"""

from __future__ import annotations

import functools
import json
import shutil
import struct
import warnings

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM

import mpg
from in_process import client_of
from mpg.demo import MODELS
from mpg.models.lora import UnstackableError
from mpg.options import OPTIONS
from mpg.recipe import Recipe
from mpg.serve.protocol import ChatRequest, CompletionRequest

WORDS = [
    "", " ", "E", "T", "base", "anchor", "E=1", "E=1,T=-0.5", "ESTJ", "exact", "direct", "scr", "token-rs", "seq-rs",
    "merged", "lookup", "geometric", "arithmetic", "anchored", "token", "sequence", "user", "assistant", "system",
    "text", "content", "role", "source", "prompt", "cpu", "none", "int4", "1", "\ud800", "\0",
]  # fmt: skip
NUMBERS = [0, 1, 2, -1, 3, 0.5, 1.5, -0.0, 1e-9, 1e40, 2**31, 2**63, 2**70, 10**400]
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=4), st.sampled_from(WORDS + NUMBERS)
)
keys = st.text(max_size=3) | st.sampled_from(WORDS)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
objects = trees | st.sampled_from(
    [
        b"E",
        {"E"},
        (1, 2),
        object(),
        len,
        1j,
        np.float32(1),
        np.array([1, 2]),
        np.array(2),
        torch.ones(2),
        torch.tensor(1),
    ]
)
SHORT = {"weights": {"E": 1}, "seed": 0, "max_new_tokens": 2}


@pytest.fixture(scope="module")
def is_sound(model):
    """Whether a model's texts are still those that they were."""
    expected = model.generate("Hello?", **SHORT).tokens
    return lambda: model.generate("Hello?", **SHORT).tokens == expected


def outcome(names, call, *arguments, **keywords):
    """What a call returned, or None where it was refused by one of these names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call(*arguments, **keywords)
        except ValueError as error:
            if type(error) not in (ValueError, UnstackableError) or not str(error).startswith(tuple(names)):
                raise
            return None


ARGUMENTS = [
    *OPTIONS, "weights", "contexts", "raw", "continue_final_message", "chat_template_kwargs", "prompt", "do_sample",
    "max_length", "min_length", "stop_strings", "eos_token_id", "pad_token_id", "repetition_penalty",
    "bad_words_ids", "suppress_tokens", "num_return_sequences", "guidance_scale", "negative_prompt", "max_time",
    "no_repeat_ngram_size", "logits_processor", "stopping_criteria", "generation_config", "streamer", "tokenizer",
]  # fmt: skip


@given(wild=st.dictionaries(st.sampled_from(ARGUMENTS), objects, min_size=1, max_size=3))
def test_calls(wild, model, is_sound):
    names = [*wild, "weights", "target", "temperature", "max_new_tokens", "draft 'merged'", "contexts", "input_ids"]
    outcome(names, model.generate, **{"prompt": "Hello?", **SHORT, **wild})
    assert is_sound()


RECIPE = {
    "base": str(MODELS), "attributes": {"E": str(MODELS / "adapters/E"), "calm": {"system": "Be calm."}}, "anchor": "E",
    "draft": "E", "device_map": {"base": "cpu"}, "weights": {"E": 1}, "presets": {"A": {"E": 1}}, "quantize": "none",
    "options": {"sampler": "scr", "window": 3}, "allow_other_base": True, "merge_adapters": False, "tokenizer": "x",
}  # fmt: skip


@given(
    document=trees
    | st.dictionaries(st.sampled_from([*RECIPE, "files", "E"]), trees, max_size=4).map(lambda d: RECIPE | d),
    cut=st.integers(0, 400),
    junk=st.text(max_size=5)
    | st.sampled_from(["? ", "&a *a", "!!set", "<<: ", "- ", "2026-13-01", "%YAML 9", "\t", "{["]),
)
def test_recipes(document, cut, junk, tmp_path_factory):
    """Also texts that are a recipe's up to some place."""
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    text = yaml.safe_dump(document, allow_unicode=True)
    for written in (text, text[:cut] + junk + text[cut:]):
        file.write_bytes(written.encode(errors="surrogatepass"))
        outcome([f"{file}: ", "recipe: "], Recipe.of, file)


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(MODELS, dtype=torch.float32)


CONFIG = json.loads((MODELS / "adapters/E/adapter_config.json").read_text())
WEIGHTS = load_file(MODELS / "adapters/E/adapter_model.safetensors")
SOME = sorted(WEIGHTS)[:2] + sorted(WEIGHTS)[-2:]
CHANGES = {
    "dtype": lambda weight: weight.to(torch.int32),
    "half": lambda weight: weight.half(),
    "complex": lambda weight: weight.to(torch.complex64),
    "shape": lambda weight: weight[:-1].contiguous(),
    "transposed": lambda weight: weight.T.contiguous(),
    "flat": lambda weight: weight.flatten(),
    "empty": lambda weight: weight[:0],
    "nan": lambda weight: weight * torch.nan,
    "huge": lambda weight: weight + 1e38,
}


def damaged(draw):
    """The two files of an adapter, one of them damaged in some way."""
    config, weights = dict(CONFIG), dict(WEIGHTS)
    kind = draw(st.sampled_from(["config", "text", "tensor", "keys", "bytes", "header"]))
    if kind == "config":
        config |= draw(st.dictionaries(st.sampled_from([*CONFIG, "x"]), trees, min_size=1, max_size=2))
    text = json.dumps(config).encode()
    if kind == "text":
        text = draw(
            st.binary(max_size=20) | st.integers(0, len(text)).map(lambda cut: text[:cut]) | trees.map(json.dumps)
        )
        text = text if isinstance(text, bytes) else text.encode()
    if kind == "tensor":
        name = draw(st.sampled_from(SOME))
        weights[name] = CHANGES[draw(st.sampled_from(sorted(CHANGES)))](weights[name])
    if kind == "keys":
        old = draw(st.sampled_from(SOME))
        new = draw(
            st.sampled_from(["x", "lora_A", old.replace("lora_A", "lora_B"), old.replace("0", "9"), old + ".x", ""])
        )
        weight = weights.pop(old)
        weights |= {new: weight} if new else {}
    data = save(weights)
    if kind == "bytes":
        place, new = draw(st.integers(0, len(data) - 1)), draw(st.binary(max_size=9))
        data = data[:place] + new + (data[place + len(new) :] if draw(st.booleans()) else b"")
    if kind == "header":
        size = draw(st.sampled_from([0, 1, 2**20, 2**40, 2**63, 2**64 - 1]))
        data = struct.pack("<Q", size) + data[8:]
    return text, data


@settings(max_examples=settings.default.max_examples // 2)  # each loads a model
@given(data=st.data())
def test_adapters(data, base, model, is_sound, tmp_path_factory):
    """What is loaded generates, or says that its model returns NaN."""
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    written = damaged(data.draw)  # drawn piece by piece, as a report shows them
    for name, content in zip(("adapter_config.json", "adapter_model.safetensors"), written, strict=True):
        (folder / name).write_bytes(content)
    loaded = outcome(
        ["attributes['E']: "], mpg.load, base, {"E": folder}, tokenizer=model.tokenizer, allow_other_base=True
    )
    if loaded is not None:
        outcome(["prompt 0, new token 0: the 'E' model returned "], loaded.generate, "Hello?", **SHORT)
    assert is_sound()


@pytest.fixture(scope="module")
def client(model):
    with client_of(model) as client:
        yield client


def ask(client, path):
    [choice] = client.post(path, json={**SOUND, **REQUESTS[path][1]}).json()["choices"]
    return choice.get("message"), choice.get("text")


sound_answer = functools.cache(ask)
SOUND = {"model": "E", "max_tokens": 2, "seed": 1}
REQUESTS = {
    "/v1/chat/completions": (ChatRequest, {"messages": [{"role": "user", "content": "Hello?"}]}),
    "/v1/completions": (CompletionRequest, {"prompt": "Hello?"}),
}


@given(path=st.sampled_from(sorted(REQUESTS)), data=st.data())
def test_requests(path, data, client):
    kind, whole = REQUESTS[path]
    names = st.sampled_from([*kind.model_fields, "tools", "user", "logit_bias"]) | keys
    wild = data.draw(trees | st.dictionaries(names, trees, min_size=1, max_size=3))
    body = json.dumps({**SOUND, **whole, **wild} if isinstance(wild, dict) else wild).encode()
    answer = client.post(path, content=body, headers={"content-type": "application/json"})
    if answer.status_code != 200:
        assert 400 <= answer.status_code < 500, answer.text
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error" and 10 < len(error["message"]) < 2000, error
        assert error["message"].startswith(error["param"] or "")
    assert ask(client, path) == sound_answer(client, path)
