"""Every bad input of this table is refused by a message that begins with the argument at fault.

A row is what is wrong and the message, in which ... stands for anything. Rows of a list are asked in one way, and what
they do not say is sound. A new row goes into the list of its way; a new way is one more function below.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer
from typer.testing import CliRunner

import mpg
from in_process import client_of
from mpg.app.chat import Chat
from mpg.app.cli.command import app
from mpg.context import Context
from mpg.demo import MODELS
from mpg.frontend.prompts import encode
from mpg.options import OPTIONS as OPTIONS_BY_NAME
from mpg.options import Options, check_weights, parse_weights
from mpg.paper.check import check
from mpg.paper.methods import answer
from mpg.recipe import Recipe, parse_setting
from mpg.serve.protocol import IGNORED, REFUSED, ChatRequest, CompletionRequest
from mpg.serve.settings import Settings
from mpg.train import settings as training
from mpg.train.pairs import read_pairs

PAGE = Path(__file__).parent.parent / "docs" / "troubleshooting.md"
E, BOTH = {"E": 1}, {"E": 1, "T": 1}
CALM = "Be calm."
USER = [{"role": "user", "content": "Hello?"}]
PAIR = {"prompt": "How are you?", "chosen": "Fine.", "rejected": "Bad."}
CONFIG = json.loads((MODELS / "config.json").read_text())
THREE = "".join(json.dumps({**PAIR, "prompt": f"How was day {day}?"}) + "\n" for day in range(3))
RECIPE = f"""\
base: {MODELS}
draft: E
attributes: {{E: {MODELS}/adapters/E, T: {MODELS}/adapters/T}}
weights: ET
presets:
  ET: {{E: 1, T: 0.5}}
  F: {{T: -1}}
options:
  sampler: scr
  window: 30
"""
CHAT, TEXT, JSON = "/v1/chat/completions", "/v1/completions", "application/json"
GENERATE = ["generate", "--prompt", "Hello?", "--weights", "E=1", "--json"]
TRAIN = ["train", "--base", "demo", "--data", "traits", "--out", "out"]
RWKV = b"GGUF" + struct.pack("<IQQQ20sIQ5s", 3, 0, 1, 20, b"general.architecture", 8, 5, b"rwkv6")
TRAIN_HERE = ["train", "--base", "base", "--data", "pairs.jsonl", "--out", "out", "--held-out", "1"]
BATCH = ["batch", "rows.jsonl", "out", "--local", "--weights", "E=1"]
MBTI = ["evaluate mbti", "--data", "data", "--out", "out"]
ESTJ = [*MBTI, "--type", "ESTJ", "--methods", "base"]
ROLEPLAY = ["evaluate roleplay", "--data", "data", "--out", "out"]
TUNE = ["tune", "--models", "demo", "--data", "data", "--out", "history", "--type", "ESTJ"]
ROW = {"id": 1, "prompt": "Hello?"}
MCQA = "data/mbti/questions/mcqa.json"
CHOICES = {str(n): {"question": f"You {n}:\nA.plan\nB.see", "A": "J", "B": "P"} for n in range(4)}
RELEASE = {
    MCQA: json.dumps(CHOICES),
    "data/mbti/questions/qa_ESTJ.json": json.dumps([{"instruction": "Who?", "input": "", "output": "I."}]),
    "data/mbti/questions/16personalities.json": json.dumps({"1": {"rewritten_en": "Crowds?", "category": "E"}}),
    "data/roleplay/test.jsonl": json.dumps({"profile": "a", "personality": "b", "reference_answer": "c"}),
}


def refusal(call, *arguments, **keywords):
    with pytest.raises(ValueError, match=r": |, ") as refused:
        call(*arguments, **keywords)
    return str(refused.value)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def client(model):
    with client_of(model) as client:
        yield client


def generate(request, wrong):
    """Model.generate"""
    has_ids = {"input_ids", "attention_mask"} & wrong.keys()
    whole = {"weights": BOTH, "seed": 0, "max_new_tokens": 16} | ({} if has_ids else {"prompt": "Hello?"})
    return refusal(request.getfixturevalue("model").generate, **whole | wrong)


def options(request, wrong):
    """mpg.Options.of"""
    return refusal(Options.of, wrong)


def weights(request, wrong):
    """The weights of a request, by its target."""
    return refusal(check_weights, wrong[0], ("E", "S", "T", "J"), wrong[1])


def weight_text(request, wrong):
    """NAME=NUMBER,..."""
    return refusal(parse_weights, wrong)


def setting(request, wrong):
    """NAME=VALUE"""
    return refusal(parse_setting, wrong)


def content(request, wrong):
    """The content of the second message of a conversation."""
    talk = [*USER, {"role": "user", "content": wrong}]
    return refusal(encode, talk, request.getfixturevalue("model").tokenizer, 2000)


def context(request, wrong):
    """A context by itself."""
    return refusal(Context.of, "contexts['calm']", wrong)


def load(request, wrong):
    """mpg.load beside the base of the demo"""
    whole = {"base": MODELS, "attributes": {"E": MODELS / "adapters/E"}, "device": "cpu"} | wrong
    return refusal(mpg.load, **whole)


def recipe(request, wrong):
    """A recipe with one of its lines changed, or another text altogether."""
    file = request.getfixturevalue("place") / "mine.yaml"
    text = wrong if isinstance(wrong, str) else RECIPE.replace(*wrong)
    assert text != RECIPE
    file.write_text(text)
    return refusal(Recipe.of, file).removeprefix(f"{file}: ")


def check_models(request, wrong):
    """mpg.paper.check"""
    return refusal(check, request.getfixturevalue("model"), **{"weights": BOTH, "prompts": ["Hello?", "Who?"], **wrong})


def method(request, wrong):
    """A method of the paper."""
    name, *others = wrong
    whole = {"prompts": ["Hello?"], "weights": BOTH, "max_new_tokens": 2} | (others[0] if others else {})
    return refusal(answer, request.getfixturevalue("model"), name, whole.pop("prompts"), whole.pop("weights"), **whole)


def chat(request, wrong):
    """A line of a conversation."""
    chat = Chat(request.getfixturevalue("model"), "E=1", {})
    before = json.dumps([chat.weights, chat.options, chat.system, chat.history])
    told = refusal(chat.command, wrong)
    assert json.dumps([chat.weights, chat.options, chat.system, chat.history]) == before
    return told


@functools.cache
def load_once(base, how, load=mpg.load):
    return load(base, **json.loads(how))


def command(request, wrong, load=lambda base, **how: load_once(base, json.dumps(how))):
    """A command: one line on standard error, nothing on standard output nor in the folder, status 2."""
    request.getfixturevalue("monkeypatch").setattr(mpg, "load", load)
    before = sorted(request.getfixturevalue("place").iterdir())
    name, *others = wrong
    device = [] if name == "evaluate overall" else ["--device", os.environ.get("MPG_DEVICE", "cpu")]
    done = CliRunner().invoke(app, [*name.split(), *device, *others])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("mpg: ") and len(done.stderr.splitlines()) == 1
    assert sorted(request.getfixturevalue("place").iterdir()) == before
    return done.stderr.removeprefix("mpg: ")


def early(request, wrong):
    """A command that is refused before models are loaded."""
    return command(request, wrong, load=None)


def write(request, files):
    for name, content in files.items():
        file = request.getfixturevalue("place") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())


def batch(request, wrong):
    """A job of one row, with more words or other files."""
    pytest.importorskip("pyarrow", reason="needs mpg[ray]")
    words, files = wrong if isinstance(wrong, tuple) else (wrong, {})
    write(request, {"rows.jsonl": json.dumps(ROW), **files})
    return command(request, [*BATCH, *words])


def job_rows(request, wrong):
    """The rows of a job: a file's bytes, or what follows a sound row."""
    content = wrong if isinstance(wrong, bytes) else "\n".join(map(json.dumps, [ROW, *wrong]))
    told = batch(request, ([], {"rows.jsonl": content}))
    return told.removeprefix(f"input: {request.getfixturevalue('place') / 'rows.jsonl'}, ")


def study(request, wrong):
    """A command that reads the paper's release, with other files beside it or in it."""
    for package in ("openai", "sacrebleu", "rouge_score", "sklearn", "matplotlib"):
        pytest.importorskip(package, reason="needs mpg[evaluate]")
    words, files = wrong if isinstance(wrong, tuple) else (wrong, {})
    write(request, {**RELEASE, **files})
    return command(request, words)


def prompts(request, wrong):
    """The file of --prompts."""
    (request.getfixturevalue("place") / "file").write_bytes(wrong if isinstance(wrong, bytes) else wrong.encode())
    return command(request, ["generate", "--prompts", "file", "--weights", "E=1"])


def check_prompts(request, wrong):
    """The file of mpg check --prompts."""
    (request.getfixturevalue("place") / "file").write_text(wrong)
    return command(request, ["check", "--prompts", "file", "--weights", "E=1"])


def pairs(request, wrong):
    """The second of three lines to train on."""
    rows = [PAIR, wrong, PAIR]
    file = request.getfixturevalue("place") / "pairs.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return refusal(read_pairs, "pairs.jsonl")


def train(request, wrong):
    """A training of three pairs on a copy of the demo's base, with more words or other files; None is no file."""
    pytest.importorskip("trl", reason="needs mpg[train]")
    pytest.importorskip("gguf", reason="needs the package gguf")
    words, files = wrong if isinstance(wrong, tuple) else (wrong, {})
    place = request.getfixturevalue("place")
    shutil.copytree(MODELS, place / "base", ignore=shutil.ignore_patterns("adapters"))
    request.getfixturevalue("monkeypatch").setenv("MPG_CACHE", "cache")
    own = {"pairs.jsonl": THREE, **({} if "cache" in files else {"cache/some": "file"}), **files}
    write(request, {name: content for name, content in own.items() if content is not None})
    for name in own.keys() - {name for name, content in own.items() if content is not None}:
        (place / name).unlink()
    return command(request, [*TRAIN_HERE, *words])


def training_settings(request, wrong):
    """The settings of a training."""
    return refusal(training.Settings.of, "paper", wrong)


def server(request, wrong):
    """A request of the server: the status before the message."""
    path, own = wrong
    whole = {"model": "demo", "weights": E, "max_tokens": 3}
    whole |= {"messages": USER} if path == CHAT else {"prompt": "Hello?"}
    if own.get("model", "demo") != "demo":
        del whole["weights"]
    body = json.dumps({name: value for name, value in {**whole, **own}.items() if value is not None})
    done = request.getfixturevalue("client").post(path, content=body, headers={"content-type": "application/json"})
    error = done.json()["error"]
    assert error["type"] == "invalid_request_error" and done.headers["x-request-id"]
    assert re.split(r"[ .:\[]", error["message"])[0] == error["param"]
    return f"{done.status_code} {error['message']}"


def body(request, wrong):
    """The bytes of a request, of which no object comes."""
    content, kind = wrong
    done = request.getfixturevalue("client").post(CHAT, content=content, headers={"content-type": kind})
    assert len(done.text) < 500
    return f"{done.status_code} {done.json()['error']['message']}"


def server_settings(request, wrong):
    """What a server is started with."""
    return refusal(Settings, **wrong)


# fmt: off
CALLS = [
    ({"num_return_sequences": 2**31}, "num_return_sequences: expected an integer 1..65536, got 2147483648"),
    ({"eos_token_id": 2**63}, "eos_token_id: expected a token id or a list of them, got 9223372036854775808"),
    ({"chat_template_kwargs": {1: 2}}, "chat_template_kwargs: expected text as names, got 1"),
    *(({name: np.ones(2)}, f"{name}: expected ")
      for name in ("target", "min_length", "guidance_scale", "mixture_span")),
    ({"guidance_scale": 10**400}, "guidance_scale: expected a number, got 1000"),
    ({"prompt": ""}, "prompt: expected text, messages or token ids, not empty, got ''"),
    ({"prompt": []}, "prompt: expected text, ..., got []"),
    ({"prompt": ["fine", ""]}, "prompt[1]: expected text, messages or token ids, not empty, got ''"),
    ({"prompt": [[]]}, "prompt[0]: expected text, messages or token ids, not empty, got []"),
    ({"prompt": [[5], [5, 100000]]}, "prompt[1]: expected token ids in 0..., got 100000"),
    ({"prompt": [{"role": "user", "content": ""}]}, "prompt: message 0: expected some text, got ''"),
    *(({"prompt": [{"role": role, "content": "hi"}]}, f"prompt: message 0: expected a role, got {role!r}")
      for role in (None, "", 3)),
    ({"prompt": 3}, "prompt: expected text, ..., got 3"),
    ({"prompt": [5, "hi"]}, "prompt: expected text, ..., got [5, 'hi']"),
    ({"prompt": [["a", "b"]]}, "prompt: expected text, ..., got [['a', 'b']]"),
    ({"prompt": [5, 100000]}, "prompt: expected token ids in 0..., got 100000"),
    ({"prompt": [5, -1]}, "prompt: expected token ids in 0..., got -1"),
    ({"prompt": "hi", "max_new_tokens": 300},
     "max_new_tokens: the model has 256 positions ... expected at most ..., got 300"),
    ({"prompt": [7] * 256}, "prompt: the model has 256 positions and prompt 0 takes 256, expected at least one left"),
    ({"prompt": "hi", "weights": {"X": 1}}, "weights: expected some of E, S, T, J, got 'X'"),
    ({"prompt": "hi", "weights": None}, "weights: expected a number for some of E, S, T, J ..., got None"),
    ({"prompt": ["hi", "ho"], "weights": [{"E": 1}]}, "weights: expected one mapping, or one per prompt (2), got 1"),
    ({"prompt": 'a\udcff'}, "prompt: expected text that UTF-8 can hold"),
    ({"prompt": [{"role": "user", "content": 'a\udcff'}]},
     "prompt: expected messages that the chat template takes, got"),
    ({"prompt": [True, False]}, "prompt: expected text, ..., got"),
    ({"prompt": "hi", "on_token": 3}, "on_token: expected a callable, got 3"),
    ({"prompt": "hi", "wieghts": 1}, "wieghts: unknown option"),
    ({"prompt": "hi", "sampler": "scr", "temperature": 0}, "temperature: scr"),
    ({"repetition_penaltyy": 2}, "repetition_penaltyy: unknown option; did you mean 'repetition_penalty'"),
    ({"wieghts": 1}, "wieghts: unknown option; did you mean 'weights'"),
    ({"zzz": 1}, "zzz: unknown option; expected one of sampler, target"),
    ({"stop": ["."]}, "stop: unknown option; did you mean 'stop_strings'"),
    ({"generation_config": {"top_k": 3}}, "generation_config: expected a GenerationConfig, got dict"),
    ({"do_sample": 1}, "do_sample: expected True or False, got 1"),
    ({"do_sample": False, "sampler": "scr"}, "temperature: scr ... got 0; use sampler 'direct'"),
    ({"stop_strings": ["a", ""]}, "stop_strings: expected a string or a list of them, none empty"),
    ({"stop_strings": 3}, "stop_strings: expected a string or a list of them, none empty, got 3"),
    ({"tokenizer": 3}, "tokenizer: expected a tokenizer of transformers, got int"),
    ({"raw": "x"}, "raw: expected True or False, got 'x'"),
    ({"trace": "x"}, "trace: expected True or False, got 'x'"),
    ({"max_time": "long"}, "max_time: expected seconds, got 'long'"),
    ({"max_time": math.nan}, "max_time: expected seconds, got nan"),
    ({"max_time": -1}, "max_time: expected seconds, got -1"),
    ({"max_length": "long"}, "max_length: expected an integer, got 'long'"),
    ({"pad_token_id": [0]}, "pad_token_id: expected an integer, got [0]"),
    ({"no_repeat_ngram_size": True}, "no_repeat_ngram_size: expected an integer, got True"),
    ({"suppress_tokens": {3: 1}}, "suppress_tokens: expected a token id or a list of them, got {3: 1}"),
    ({"forced_eos_token_id": True}, "forced_eos_token_id: expected a token id or a list of them, got True"),
    ({"prefix_allowed_tokens_fn": [3]}, "prefix_allowed_tokens_fn: expected a callable, got [3]"),
    ({"exponential_decay_length_penalty": [1]}, "exponential_decay_length_penalty: ...; got [1]"),
    ({"sequence_bias": [[]]}, "sequence_bias: ...; got [[]]"),
    ({"tokenizer": ""}, "tokenizer: expected a tokenizer of transformers, got str"),
    ({"num_return_sequences": 0}, "num_return_sequences: expected an integer 1..65536, got 0"),
    ({"num_return_sequences": 2, "do_sample": False},
     "num_return_sequences: expected 1 where nothing is drawn (temperature 0), got 2"),
    ({"eos_token_id": "x"}, "eos_token_id: expected a token id or a list of them, got 'x'"),
    ({"repetition_penalty": -1.0}, "repetition_penalty: ...positive...; got -1.0"),
    ({"bad_words_ids": [3]}, "bad_words_ids: ...; got [3]"),
    ({"logits_processor": 3}, "logits_processor: expected a list of callables, got 3"),
    ({"logits_processor": {}}, "logits_processor: expected a list of callables, got {}"),
    ({"stopping_criteria": [3]}, "stopping_criteria: expected a list of callables, got [3]"),
    ({"streamer": object()}, "streamer: expected one of transformers, with put and end, got <object"),
    ({"streamer": BaseStreamer(), "num_return_sequences": 2}, "streamer: expected one prompt and one sequence"),
    ({"prompt": "Hello?", "input_ids": [[1]]}, "prompt: expected a prompt or input_ids, got both"),
    ({"sampler": "scr", "repetition_penalty": 1.2}, "repetition_penalty: acts on ...'scr' never"),
    ({"sampler": "token-rs", "logits_processor": [print]}, "logits_processor: acts on the combined row"),
    ({"input_ids": torch.ones(1, 2)}, "input_ids: expected integers (B, L) ... got (1, 2) of torch.float32"),
    ({"input_ids": torch.ones(1, 1, 2, dtype=torch.int64)}, "input_ids: expected integers ... got (1, 1, 2)"),
    ({"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.tensor([[1, 0, 1]])},
     "attention_mask: expected padding before or behind ... got some between: [1, 0, 1]"),
    ({"input_ids": torch.tensor([[5, 0, 7]])}, "attention_mask: expected padding before or behind"),
    ({"input_ids": "hi"}, "input_ids: expected a tensor or lists of token ids, got 'hi'"),
    ({"attention_mask": [[1]]}, "input_ids: expected a tensor or lists of token ids, got None"),
    ({"input_ids": [[5, 6]], "attention_mask": [[1]]}, "attention_mask: expected 2 entries ... got [1]"),
    ({"input_ids": [[5, 6]], "attention_mask": [1, 1]}, "attention_mask: expected 1 rows as in input_ids"),
    ({"input_ids": torch.tensor([[5], [0]])}, "prompt[1]: expected text, messages or token ids, not empty, got []"),
    ({"prompt": None}, "prompt: expected text, ..., got None"),
    ({"contexts": {"calm": ""}}, "contexts['calm']: system: expected some text, got ''"),
    ({"contexts": ["Be calm."]}, "contexts: expected a mapping from names to contexts, got 'Be calm.'"),
    ({"contexts": [{}], "weights": {"calm": 1}}, "weights: expected some of E, S, T, J, got 'calm'"),
    ({"contexts": [{}, {}]}, "contexts: expected one mapping, or one per prompt (1), got 2"),
    ({"contexts": {"E": CALM}}, "contexts['E']: 'E' is an adapter or a model already; ...source='E'"),
    *(({"contexts": {name: CALM}}, f"contexts[{name!r}]: expected text as a name, and none of base, anchor, ")
      for name in ("base", "merged", "", " ", 3, None)),
    ({"contexts": {"calm": [CALM]}}, "contexts['calm']: expected one text ...a mapping per prompt, got ["),
    ({"contexts": {"calm": Context(system=CALM, source="Q")}},
     "contexts['calm']: source: expected base or E or S ...given to mpg.load, got 'Q'"),
    ({"contexts": {"calm": "word " * 300}, "weights": {"calm": 1}},
     "contexts['calm']: the model has 256 ... the context 'calm' takes ..."),
    ({"contexts": {"calm": CALM}, "weights": {"calm": 1}, "raw": True},
     "contexts['calm']: this call has prompts as they are ...prefix="),
    ({"weights": {"calm": 1}}, "weights: expected some of E, S, T, J, got 'calm'"),
    ({"contexts": {"calm": CALM}, "weights": {"calm": -1}, "target": "arithmetic"}, "weights: "),
    ({"contexts": {"calm": CALM}, "weights": {"calm": 1}, "draft": "merged"},
     "draft 'merged', ...: expected LoRA adapters ... to merge, got none"),
    ({"guidance_scale": "much"}, "guidance_scale: expected a number, got 'much'"),
    ({"guidance_scale": 2, "target": "arithmetic"}, "guidance_scale: expected target 'geometric'"),
    ({"guidance_scale": 2, "negative_prompt": ""}, "negative_prompt: prompt: expected some text, got ''"),
    ({"guidance_scale": 2, "negative_prompt": 3}, "negative_prompt: ..., got 3"),
    ({"guidance_scale": 2, "negative_prompt_ids": torch.zeros(1, 2)}, "negative_prompt_ids: ...: expected integers"),
    ({"guidance_scale": 2, "contexts": {"negative prompt": CALM}, "weights": {"negative prompt": 1}},
     "contexts: expected another name than 'negative prompt', which guidance_scale has"),
    ({"guidance_scale": 2, "weights": {"negative prompt": 1}}, "weights: expected another name"),
    ({"guidance_scale": 1000000.0}, "guidance_scale: expected 1, or 1e-06 to 10000 from it, got 1000000.0"),
    ({"guidance_scale": 2, "negative_prompt_attention_mask": torch.ones(1, 2)},
     "negative_prompt_attention_mask: expected negative_prompt_ids beside it"),
    ({"negative_prompt": "Rude."}, "negative_prompt: expected guidance_scale beside it"),
    ({"guidance_scale": 2, "negative_prompt": ["a", "b"]}, "negative_prompt: expected one, or one per prompt (1)"),
]

OPTIONS = [
    *(({"sampler": wrong}, "sampler: expected one of exact, ") for wrong in (torch.ones(2), np.ones(2), ["scr"])),
    *(({"sampler": "scr", "top_k": wrong}, "top_k: not an option of sampler 'scr', got ")
      for wrong in (np.ones(2), [0])),
    *(({name: 10**400, "sampler": "scr"}, f"{name}: expected a number ")
      for name in ("temperature", "gamma", "tau")),
    ({"samplr": "scr"}, "samplr: unknown option; did you mean 'sampler'"),
    ({"zzz": 1}, "zzz: unknown option; expected one of sampler, target"),
    ({"sampler": "beam"}, "sampler: expected one of exact, direct, auto, scr..., got 'beam'"),
    ({"target": "harmonic"}, "target: expected one of ..., got 'harmonic'"),
    ({"target": "base", "sampler": "scr"}, "target: expected one of arithmetic, geometric, got 'base'"),
    ({"top_k": 2**70}, "top_k: expected an integer 0"),
    ({"top_k": -1}, "top_k: expected an integer 0..2147483647, got -1"),
    ({"min_p": 1.1}, "min_p: expected a number in [0, 1], got 1.1"),
    ({"min_p": 0.1, "sampler": "scr"}, "min_p: not an option of sampler 'scr', got 0.1"),
    ({"mixture_span": 0, "target": "arithmetic"},
     "mixture_span: expected 'token', 'sequence' or an integer 1..., got 0"),
    ({"mixture_span": 2}, "mixture_span: expected 'token' unless the target is 'arithmetic', got 2"),
    ({"draft": "beam"}, "draft: expected one of ..., got 'beam'"),
    ({"adaptive": "no"}, "adaptive: expected True or False, got 'no'"),
    ({"verify": "none"}, "verify: expected one of block, token, got 'none'"),
    ({"chunk_size": 0}, "chunk_size: expected an integer 1..32, got 0"),
    ({"chunk_size": 33}, "chunk_size: expected an integer 1..32, got 33"),
    ({"chunk_size": 2.5}, "chunk_size: expected an integer ..., got 2.5"),
    ({"chunk_size": 4, "sampler": "direct"}, "chunk_size: not an option of sampler 'direct', got 4"),
    ({"temperature": -0.1}, "temperature: expected a number ..., got -0.1"),
    ({"temperature": 0, "sampler": "scr"}, "temperature: scr ... expected > 0, got 0; use sampler 'direct'"),
    ({"temperature": math.nan}, "temperature: ...got nan"),
    ({"top_p": 0}, "top_p: expected a number in (0, 1], got 0"),
    ({"top_p": 1.01}, "top_p: expected a number in (0, 1], got 1.01"),
    ({"gamma": 0.99, "sampler": "scr"}, "gamma: expected a number ..., got 0.99"),
    ({"gamma": 1.5}, "gamma: not an option of sampler 'exact', got 1.5"),
    ({"tau": -1, "sampler": "scr"}, "tau: ...got -1"),
    ({"window": 0, "sampler": "scr"}, "window: expected an integer 1..65536, got 0"),
    ({"initial_bound": 0, "sampler": "scr"}, "initial_bound: ...got 0"),
    ({"initial_bound": 1e+40, "sampler": "scr"}, "initial_bound: ...got 1e+40"),
    ({"empty": "retry", "sampler": "scr"}, "empty: expected one of raise, base, got 'retry'"),
    ({"max_new_tokens": 0}, "max_new_tokens: expected an integer >= 1, got 0"),
    ({"seed": -1}, "seed: expected an integer ..., got -1"),
    ({"seed": True}, "seed: expected an integer ..., got True"),
]

WEIGHTS = [
    (({"X": 1}, "geometric"), "weights: expected some of E, S, T, J, got 'X'"),
    (({}, "geometric"), "weights: expected a number for some of E, S, T, J (such as E=1), got {}"),
    ((None, "arithmetic"), "weights: expected ..., got None"),
    (([1, 2], "arithmetic"), "weights: expected a mapping of numbers by name, such as {'E': 1}, got [1, 2]"),
    ((1.0, "geometric"), "weights: expected a mapping of numbers by name, such as {'E': 1}, got 1.0"),
    (({"t": 1}, "geometric"), "weights: expected some of E, S, T, J, got 't'; did you mean 'T'?"),
    (({"E": 0, "T": 0.0}, "geometric"), "weights: expected at least one that is not 0"),
    (({"E": math.nan}, "geometric"), "weights: expected 0, or a number ... for 'E', got nan"),
    (({"E": math.inf}, "geometric"), "weights: expected 0, or a number ... for 'E', got inf"),
    (({"E": 1e+30}, "geometric"), "weights: expected 0, or a number of size 1e-06 to 10000 for 'E', got 1e+30"),
    (({"E": -1e-30}, "geometric"), "weights: expected 0, or a number ... for 'E', got -1e-30"),
    (({"E": "1"}, "geometric"), "weights: expected 0, or a number ... for 'E', got '1'"),
    (({"E": True}, "geometric"), "weights: expected 0, or a number ... for 'E', got True"),
    (({"E": 1, "T": -1}, "arithmetic"), "weights: ... positive sum, got 0 ... 'geometric' (or 'anchored'"),
    (({"E": 1, "T": -2}, "arithmetic"), "weights: ... positive sum, got -1"),
    (({"E": 1}, "base"), "weights: expected none, or 0 for each, as target 'base' is the base alone, got {'E': 1}"),
    (({"X": 0}, "base"), "weights: expected some of E, S, T, J, got 'X'"),
    (({}, "geometric"), "weights: ...got {}; target='base' is the base alone"),
    (({"E": 0}, "geometric"), "weights: ...got {'E': 0}; target='base' is the base alone"),
]

WEIGHT_TEXTS = [
    ("E", "weights: expected NAME=NUMBER, got 'E'"),
    ("E=", "weights: expected NAME=NUMBER, got 'E='"),
    ("=1", "weights: expected NAME=NUMBER, got '=1'"),
    ("E=much", "weights: expected a number for 'E', got 'much'"),
    ("E=1,T=1,E=2", "weights: 'E' is given twice"),
]

VALUES = [
    *((f"tau={value}", f"tau: expected a number, true, false or a word, got {value!r}")
      for value in ("{", "2026-13-01", "[" * 1000)),
    *((text, f"set: expected NAME=VALUE, got {text!r}") for text in ("tau", "=1", "tau=")),
]

CONTENTS = [
    (3, "prompt: message 1: expected text or a list of text parts as content, got 3"),
    (True, "prompt: message 1: expected text or a list of text parts as content, got True"),
    (b"hi", "prompt: message 1: expected text or a list of text parts as content, got b'hi'"),
    ({"type": "text", "text": "hi"},
     "prompt: message 1: expected text or a list of text parts as content, got {'type'"),
    ([{"type": "image", "url": "x"}], "prompt: message 1: expected parts of type 'text', got one of type 'image'"),
    (["hi"], "prompt: message 1: expected parts of type 'text', got 'hi'"),
    ([{"type": "text", "text": 3}], "prompt: message 1: expected parts of type 'text', got one without text"),
    ([{"text": "hi"}], "prompt: message 1: expected parts of type 'text', got {'text': 'hi'}"),
    ([], "prompt: message 1: expected some text, got []"),
    ("", "prompt: message 1: expected some text, got ''"),
    (None, "prompt: message 1: expected some text, got None"),
]

CONTEXTS = [
    ("", "contexts['calm']: system: expected some text, got ''"),
    (' \n', "contexts['calm']: system: expected some text, got ' "),
    ({"prefix": ""}, "contexts['calm']: prefix: expected some text, got ''"),
    ({"prefix": 'a\udcff'}, "contexts['calm']: prefix: expected text that UTF-8 can hold, got 'a"),
    ({"prompt": []}, "contexts['calm']: prompt: expected some text, got []"),
    ({"system": 3}, "contexts['calm']: system: expected text, got 3"),
    ({"prompt": 3}, "contexts['calm']: prompt: expected text, messages or a list of token ids, got 3"),
    ({}, "contexts['calm']: expected one of system, prefix, prompt, got none"),
    ({"source": "adapters/E"}, "contexts['calm']: expected one of system, prefix, prompt, got none"),
    ({"system": "a", "prefix": "b"}, "contexts['calm']: expected one of system, prefix, prompt, got system and prefix"),
    ({"sytem": "a"}, "contexts['calm']: expected some of system, prefix, prompt, source, got 'sytem'"),
    (3, "contexts['calm']: expected text, a Context or a mapping, got 3"),
]

LOADS = [
    *(({"base": wrong}, "base: expected a folder, a hub name or a loaded model, got ") for wrong in (None, 3, ["a"])),
    ({"base": "no/such/folder"}, "base: expected a model (config.json), got no/such/folder, which is no folder"),
    ({"base": MODELS / "adapters/E"}, "base: expected a model, got the adapter "),
    ({"base": MODELS.parent}, "base: expected a model (config.json), got none of it in "),
    *(({"attributes": {"E": wrong}}, "attributes['E']: expected a folder, a hub name or a loaded model, got ")
      for wrong in (None, 3, ["a"], torch.nn.Linear(2, 2))),
    ({"attributes": ["E"]}, "attributes: expected a mapping from names to sources, got list"),
    ({"attributes": {"E": MODELS.parent}},
     "attributes['E']: expected a model (config.json) or an adapter (adapter_config.json), "),
    *(({"attributes": {name: MODELS}}, f"attributes: expected names other than ..., got {name!r}")
      for name in ("base", "anchor", "draft", "merged", "", " ", 3)),
    ({"anchor": "no/such/folder"}, "anchor: expected a model (config.json) or an adapter (adapter_config.json), got "),
    ({"draft": "no/such/folder"}, "draft: expected a model (config.json) or an adapter (adapter_config.json), got "),
    ({"draft": 3}, "draft: expected a folder, a hub name or a loaded model, got int"),
    ({"tokenizer": 3}, "tokenizer: expected a folder, a hub name or a loaded tokenizer, got int"),
    ({"tokenizer": MODELS.parent}, "tokenizer: expected a tokenizer (tokenizer_config.json or "),
    *(({"dtype": wrong}, f"dtype: expected a floating-point torch dtype such as 'bfloat16', got {wrong!r}")
      for wrong in ("int64", "bf16", 16)),
    *(({"device": wrong}, f"device: expected 'cpu' or 'cuda[:i]', got '{wrong}'")
      for wrong in ("gpu", "mps", "xpu:0", "cuda:-1", 1.5)),
    ({"device_map": "auto"},
     "device_map: expected a mapping from ['E', 'base', 'anchor', 'draft'] to devices, got 'auto'"),
    ({"device_map": {"T": "cpu"}}, "device_map: expected some of ['E', 'base', 'anchor', 'draft'], got 'T'"),
    ({"device_map": {"base": "gpu"}}, "device_map['base']: expected 'cpu' or 'cuda[:i]', got 'gpu'"),
    ({"device_map": {"E": "cpu"}}, "device_map: expected names that bring a model of their own, got attributes['E']"),
    ({"quantize": "int8"}, "quantize: expected 'none' or 'int4' or 'int4-draft', got 'int8'"),
    ({"quantize": "int4", "dtype": "float32"},
     "dtype: expected bfloat16 beside quantize='int4', which computes in it, "),
    ({"quantize": "int4-draft", "draft": MODELS / "adapters/E"},
     "draft: expected a model beside quantize='int4-draft', "),
    *(({name: 1}, f"{name}: expected True or False, got 1")
      for name in ("allow_other_base", "merge_adapters", "graphs", "compile")),
    ({"graphs": True}, "graphs: expected a model on one device of cuda, got cpu"),
    ({"attributes": {"calm": Context(system=CALM, source="nosuch")}}, "attributes['calm']: expected a model"),
    ({"attributes": {"calm": {"system": CALM}, "more": {"system": CALM, "source": "calm"}}},
     "attributes['more']: source: ...context"),
    ({"attributes": {"calm": {"sytem": CALM}}},
     "attributes['calm']: expected some of system, prefix, prompt, source, got 'sytem'"),
    ({"attributes": {"draft": {"system": CALM}}}, "attributes: expected names other than"),
    ({"attributes": {" ": {"system": CALM}}}, "attributes: expected names other than"),
    ({"attributes": {"calm": "Be calm and brief."}},
     "attributes['calm']: expected a model ...; a text is a context: mpg.Context(system=...)"),
]

RECIPES = [
    (("weights: ET", "weigths: ET"), "recipe: unknown key 'weigths'; did you mean 'weights'?"),
    (("weights: ET", "zzz: ET"), "recipe: unknown key 'zzz'; expected one of base, attributes"),
    (('draft: E\n', 'base: .\n'), "expected YAML: 'base' comes twice in line 2"),
    (("  F:", "  ET:"), "expected YAML: 'ET' comes twice in line 7"),
    (("{T: -1}", "{X: -1}"), "presets['F']: unknown attribute 'X'; expected one of E, T"),
    (("{T: -1}", "{T: hot}"), "presets['F']: expected 0, or a number of size 1e-06 to 10000 for 'T', got 'hot'"),
    (("{T: -1}", "{T: .inf}"), "presets['F']: expected 0, or a number of size"),
    (("{T: -1}", "{T: true}"), "presets['F']: expected 0, or a number of size 1e-06 to 10000 for 'T', got True"),
    (("{T: -1}", "{T: 0}"), "presets['F']: expected at least one that is not 0"),
    (("{T: -1}", "T"), "presets['F']: expected a mapping, got 'T'"),
    (("  F:", "  'F=1':"), "presets: expected a name without '=', got 'F=1'"),
    (("weights: ET", "weights: EF"), "weights: expected a mapping or a preset among ET, F, got 'EF'"),
    (("weights: ET", "weights: [E]"), "weights: expected a mapping, got ['E']"),
    (("weights: ET", "weights: {e: 1}"), "weights: unknown attribute 'e'; did you mean 'E'?"),
    ((f"base: {MODELS}", "base: 3"), "base: expected a folder or a hub name, got 3"),
    ((f"base: {MODELS}", "base:"), "base: expected a folder or a hub name, got None"),
    ((f"base: {MODELS}", "base: ./none"), "base: expected a folder that exists or a hub name, got './none' ("),
    ((f"base: {MODELS}", "base: ~no-such-user/m"), "base: expected a folder...got '~no-such-user/m' ("),
    (("draft: E", f"draft: {MODELS}/none"), "draft: expected a folder that exists or a hub name, got"),
    (("draft: E", '? [E]\n: E'), "expected YAML: while constructing a mapping"),
    ((f"{MODELS}/adapters/E", "a b"), "attributes['E']: expected a folder that exists or a hub name, got 'a b' ("),
    ((f"{MODELS}/adapters/E", "/a b c"),
     "attributes['E']: expected a folder that exists or a hub name, got '/a b c'; a text is a context"),
    ((f"E: {MODELS}/adapters/E", "E: {}"), "attributes['E']: expected one of system, prefix, prompt, got none"),
    (("window: 30", "windo: 30"), "options: windo: unknown option; did you mean 'window'?"),
    (("window: 30", "window: 0"), "options: window: expected an integer 1..65536, got 0"),
    (("window: 30", "top_k: 5"), "options: top_k: not an option of sampler 'scr', got 5"),
    (("sampler: scr", "sampler: srr"), "options: sampler: expected one of exact"),
    (("draft: E", "draft: 2026-13-01"), "expected YAML: "),
    (("  F:", "  No:"), "presets: expected text as names, got False; put it in quotes"),
    (("presets:", "presets: ["), "expected YAML: "),
    (("options:", "options: !!python/name:os.system x"), "expected YAML: "),
    ("", "expected the keys base and attributes, got an empty file"),
    ("- base", "recipe: expected a mapping, got ['base']"),
    ("base: gpt2", "attributes: expected in every recipe, got base"),
    ('base: gpt2\nattributes: {}', "attributes: expected at least one, got none"),
    ('base: \x00', "expected YAML: "),
    ("[" * 1000, "expected YAML: "),
]

CHECKS = [
    ({"prompts": ["Hello?"]}, "prompts: expected a list of at least 2"),
    ({"prompts": "Hello?"}, "prompts: expected a list of at least 2"),
    ({"target": "base"}, "target: expected one of arithmetic, anchored, geometric"),
    ({"num_seeds": 0}, "num_seeds: expected an integer >= 1"),
    ({"batch_size": 0}, "batch_size: expected an integer >= 1"),
    ({"weights": {"X": 1}}, "weights: expected some of"),
]

METHODS = [
    (("moe",), "method: expected one of base, ...scr-specialized, got 'moe'"),
    (("mod", {"sampler": "exact"}), "sampler: expected none beside method 'mod', ... got 'exact'"),
    (("scr", {"target": "geometric"}), "target: expected none beside method 'scr', which"),
    (("base-specialized",), "method: 'base-specialized' needs a specialised base...got a base that is the"),
    (("pp-specialized",), "method: 'pp-specialized' needs a specialised base"),
    (("scr-specialized",), "method: 'scr-specialized' needs a specialised base"),
    (("soups", {"weights": {"E": 1, "T": -1}}), "weights: method 'soups' averages, expected a positive sum, got 0"),
    (("mod", {"weights": {"E": -1}}), "weights: method 'mod' averages, expected a positive sum, got -1"),
    (("token-rs", {"weights": {"E": -1}}), "weights: ...positive sum, got -1"),
    (("dpo-single", {"weights": None}), "weights: expected a number for some of E, S, T, J ..., got None"),
    (("pp", {"weights": {"X": 1}}), "weights: expected some of E, S, T, J, got 'X'"),
    (("pp", {"prompts": [[5, 6]]}), "prompts: preference prompting expected text or a conversation ... got [5, 6]"),
    (("pp", {"prompts": [""]}), "prompt[0]: expected text, messages or token ids, not empty, got ''"),
    (("base", {"prompts": "hello"}), "prompts: expected a list of prompts, got 'hello'"),
    (("base", {"prompts": USER}), "prompts: expected a list of prompts"),
    (("scr", {"tries": 3}), "tries: not an option of sampler 'scr', got 3"),
    (("seq-rs", {"tries": 0}), "tries: expected an integer 1..2147483647, got 0"),
    (("token-rs", {"temperature": 0}), "temperature: token-rs needs a draft that can vary, ...got 0"),
]

CHATS = [
    ("/wieghts E=1", "/wieghts: unknown command; did you mean '/weights'?"),
    ("/", "/: unknown command; expected one of /weights, /sampler"),
    ("/weights X=1", "weights: expected some of E, S, T, J, got 'X'"),
    ("/weights ESTP", "weights: expected NAME=NUMBER,... or a preset among ESTJ, INFP, got 'ESTP'"),
    ("/weights E=0", "weights: expected at least one that is not 0"),
    ("/sampler beam", "sampler: expected one of exact, direct"),
    ("/set sampler=[exact]", "sampler: expected one of exact, direct"),
    ("/set temperature", "set: expected NAME=VALUE, got 'temperature'"),
    ("/set temperature=", "set: expected NAME=VALUE, got 'temperature='"),
    ("/set temperature=hot", "temperature: expected a number in"),
    ("/set temperature={", "temperature: expected a number, true, false or a word, got '{'"),
    ("/set temprature=1", "temprature: unknown option; did you mean 'temperature'?"),
    ("/set window=3", "window: not an option of sampler 'exact', got 3"),
    ("/set num_beams=2", "num_beams: expected"),
    ("/set num_return_sequences=2", "num_return_sequences: expected 1 in a chat, got 2"),
    ('/system \udcff', "prompt: expected messages that the chat template takes"),
    ("/undo", "/undo: expected a turn to take back, got an empty history"),
    ("/save", "/save: expected the name of a file, got none"),
    ("/save /no/such/folder/file", "/save: expected a file that can be written, got"),
]

COMMANDS = [
    ([*GENERATE, "--weights", "X=1"], "weights: expected some of"),
    ([*GENERATE, "--weights", "E"], "weights: expected NAME=NUMBER,... or a preset among ESTJ, INFP, got 'E'"),
    ([*GENERATE, "--weights", "E=1,E=2"], "weights: 'E' is given twice"),
    (["generate", "--prompt", "Hello?"], "weights: expected a number for some of ...; --target base is the base alone"),
    ([*GENERATE, "--weights", "estp"],
     "weights: expected NAME=NUMBER,... or a preset among ESTJ, INFP, got 'estp'; did you mean 'ESTJ'?"),
    ([*GENERATE, "--models", "smolm2"], "models: expected ...got 'smolm2'; did you mean 'smollm2'?"),
    ([*GENERATE, "--weights", "E=1,T=-1", "--target", "arithmetic"],
     "weights: the arithmetic target needs a positive sum"),
    ([*GENERATE, "--weights", "E=1", "--set", "chunk_size=40"], "chunk_size: expected an integer 1..32, got 40"),
    ([*GENERATE, "--weights", "E=1", "--set", "temprature=1"],
     "temprature: unknown option; did you mean 'temperature'"),
    ([*GENERATE, "--weights", "E=1", "--set", "temperature"], "set: expected NAME=VALUE, got 'temperature'"),
    ([*GENERATE, "--weights", "E=1", "--set", "seed=[1, 2]"], "seed: expected one number, got [1, 2]"),
    ([*GENERATE, "--weights", "E=1", "--set", "num_beams=4"], "num_beams: expected"),
    ([*GENERATE, "--weights", "E=1", "--temperature", "0", "--sampler", "scr"], "temperature: scr"),
    ([*GENERATE, "--weights", "E=1", "--draft", "no/such"], "draft: expected a model's folder, got 'no/such'"),
    ([*GENERATE, "--weights", "E=1", "--models", "no/such"],
     "models: expected 'demo', 'smollm2', a folder or a recipe, got 'no/such'"),
    ([*GENERATE, "--weights", "E=1", "--models", str(MODELS.parent)], f"base: ...got none of it in {MODELS.parent}"),
    ([*GENERATE, "--weights", "E=1", "--anchor", str(MODELS.parent)], f"anchor: ...got none of it in {MODELS.parent}"),
    ([*GENERATE, "--weights", "E=1", "--draft", str(MODELS.parent)], f"draft: ...got none of it in {MODELS.parent}"),
    ([*GENERATE, "--weights", "E=1", "--device", "cuda:99"], "device"),
    ([*GENERATE, "--weights", "E=1", "--stop", ""], "stop: expected strings that are not empty, got ['']"),
    ([*GENERATE, "--weights", "E=1", "--batch-size", "0"], "batch_size: expected an integer >= 1, got 0"),
    ([*GENERATE, "--weights", "E=1", "--device-map", "cuda:0"], "device_map: expected NAME=DEVICE, got 'cuda:0'"),
    ([*GENERATE, "--weights", "E=1", "--device-map", "F=cpu"], "device_map: expected some of ['E', "),
    ([*GENERATE, "--weights", "E=1", "--device", "cpu", "--graphs"],
     "graphs: expected a model on one device of cuda, got cpu"),
    ([*GENERATE, "--method", "scr-specialized"], "method: 'scr-specialized' needs a specialised base"),
    ([*GENERATE, "--context", "calm"], "context: expected NAME=TEXT, got 'calm'"),
    ([*GENERATE, "--context", "E=Be calm."], "contexts['E']: 'E' is an adapter or a model already"),
    ([*GENERATE, "--context", "calm=Be calm.", "--context", "calm=Be."],
     "context: 'calm' is given twice, expected once"),
]

EARLY = [
    ([*GENERATE, "--method", "mod", "--sampler", "exact"],
     "sampler: expected none beside method 'mod', which sets it, got 'exact'"),
    ([*GENERATE, "--method", "scr", "--target", "geometric"],
     "target: expected none beside method 'scr', which sets it, got 'geometric'"),
    ([*GENERATE, "--method", "moe"], "method: expected one of base,"),
    *(([*BATCH, f"--{name.replace('_', '-')}", "1"], f"{name}: expected none beside --local, got 1")
      for name in ("workers", "min_workers", "cpus_per_worker", "gpus_per_worker")),
    *((["batch", "rows.jsonl", "out", "--workers", str(most), "--min-workers", str(most + 1)],
       f"min_workers: expected at most the {most} workers, got {most + 1}") for most in (1, 2)),
    *((["serve", f"--{name.replace('_', '-')}", "1"], f"{name}: expected none without --replicas, got 1.0")
      for name in ("cpus_per_replica", "gpus_per_replica")),
    (["serve", "--replicas", "1", "--image", "a/b"], "image: expected none without --print-config kuberay, got 'a/b'"),
    ([*TRAIN, "--pole", "E", "--keep-preamble"], "keep_preamble: expected False but of the paper's release"),
    ([*GENERATE, "--method", "mod", "--describe", "E=loud"],
     "describe: expected a method among pp, pp-single, pp-specialized"),
    ([*GENERATE, "--method", "pp", "--describe", "E"], "describe: expected NAME=TEXT, got 'E'"),
    ([*GENERATE, "--method", "mod", "--set", "top_p=2"], "top_p: expected a number in (0, 1], got 2"),
    ([*GENERATE, "--method", "mod", "--set", "chunk_size=2"], "chunk_size: not an option of sampler 'direct', got 2"),
    ([*GENERATE, "--method", "token-rs", "--set", "top_k=2"], "top_k: not an option of sampler 'token-rs', got 2"),
    ([*GENERATE, "--method", "scr", "--temperature", "0"], "temperature: scr"),
    (["generate", "--weights", "E=1"], "prompt: expected --prompt TEXT or --prompts FILE, got neither"),
    ([*GENERATE[:1], *GENERATE[3:], "--prompts", "nosuch.txt"],
     "prompts: expected a file that can be read, got nosuch.txt: No such file or directory"),
    (["check", "--weights", "E=1", "--prompts", "nosuch.txt"],
     "prompts: expected a file that can be read, got nosuch.txt: No such file or directory"),
    ([*GENERATE, "--trace", "trace.json"], "trace: expected a file whose name ends in .html, got 'trace.json'"),
    ([*GENERATE, "--trace", "no/t.html"], "trace: expected a file that can be written, got 'no/t.html': No such file"),
    (["serve", "--host", "0.0.0.0"], "host: expected a loopback address without api_key, got '0.0.0.0'; --allow-open"),
    (["serve", "--max-rows", "0"], "max_rows: expected a number above 0, got 0"),
    *((["serve", f"--{name}", wrong], f"{name.replace('-', '_')}: expected a number{wanted}, got {float(wrong)}")
      for name, wanted in (("max-memory", " in (0, inf)"), ("max-kept", " in [0, inf)"), ("grace", ", 0 at least"))
      for wrong in ("-1", "nan", "inf")),
    *((["serve", "--print-config", "kuberay", f"--{name}-per-replica", "inf"], f"{name}: expected a number in [0, inf)")
      for name in ("cpus", "gpus")),
    (["serve", "--attribute-folder", "no/such"], "attribute_folder: expected a folder, got 'no/such'"),
    (["serve", "--set", "temprature=1"], "temprature: unknown option; did you mean 'temperature'"),
    (["serve", "--models", "no/such"], "models: expected 'demo', 'smollm2', a folder or a recipe, got 'no/such'"),
    ([*TRAIN, "--pole", "T", "--schedule", "step"], "schedule: expected one of "),
    ([*TRAIN[:4], "no/such.jsonl", *TRAIN[5:]],
     "data: expected a file that can be read, got no/such.jsonl: No such file"),
    ([*TRAIN, "--pole", "X"], "pole: expected one of E, F, I, J, N, P, S, T (an adapter learns one), got 'X'"),
    ([*TRAIN, "--pole", "T", "--pole", "F"], "pole: expected one, got 'T', 'F'"),
    ([*TRAIN, "--pole", "T", "--rank", "0"], "rank: expected an integer >= 1, got 0"),
    ([*TRAIN, "--pole", "T", "--preset", "huge"], "preset: expected one of paper, small, got 'huge'"),
]

BATCHES = [
    (["--format", "csv"], "format: expected one of jsonl, parquet, got 'csv'"),
    (["--weights", "Q=1"], "weights: expected some of E, S, T, J, got 'Q'"),
    (["--weights", "E=0"], "weights: expected at least one that is not 0, ...; --set target=base is the base alone"),
    (["--weights", "nobody"], "weights: expected NAME=NUMBER,... or a preset among ESTJ, INFP, got 'nobody'"),
    (["--set", "temprature=1"], "temprature: unknown option; did you mean 'temperature'?"),
    (["--set", "seed=3"], "seed: expected --seed, which the seeds of rows follow from, got --set seed=3"),
    (["--set", "num_return_sequences=2"], "num_return_sequences: expected one text a row"),
    (["--set", "sampler=auto"], "sampler: expected exact, direct, scr, token-rs or seq-rs"),
    (["--set", "trace=true"], "trace: expected no trace in a job"),
    (["--set", "window=3"], "window: not an option of sampler 'exact', got 3"),
    (["--set", "chunk_size=40"], "chunk_size: expected an integer 1..32, got 40"),
    (["--context", "calm"], "context: expected NAME=TEXT, got 'calm'"),
    (["--context", "E=Be calm."], "contexts['E']: 'E' is an adapter or a model already"),
    (["--models", "no/such"], "models: expected 'demo', 'smollm2', a folder or a recipe, got 'no/such'"),
    (["--max-new-tokens", "0"], "max_new_tokens: expected an integer >= 1, got 0"),
    *((["--max-memory", value], f"max_memory: expected a number in (0, inf), got {value}") for value in ("0.0", "nan")),
    (["--seed", str(2**63)], "seed: expected an integer 0..9223372036854775807, got 9223372036854775808"),
    (["--dtype", "int8"], "dtype: expected a floating-point torch dtype such as 'bfloat16', got 'int8'"),
    (["--quantize", "int3"], "quantize: expected 'none' or 'int4' or 'int4-draft', got 'int3'"),
    (["--graphs"], "graphs: expected a model on one device of cuda, got cpu"),
    (([], {"out": "a"}), "output: expected a folder, got the file 'out'"),
    (([], {"out/mine": "a"}), "output: expected a new or empty folder, or this job's, got 'out', which holds 'mine'"),
    (([], {"out/job.json": "{}"}), "output: 'out' holds another job: input: None there"),
    *((([], {"out/job.json": text}), "output: expected a job in job.json of 'out', got b")
      for text in ("{", "[1]", b"\xff")),
]

ROW_FILES = [
    (b"", "input: expected rows, got none"),
    (b" \n\n", "input: expected rows, got none"),
    (b"{", "line 1: expected JSON; Expecting property name"),
    (b"[" * 10**5, "line 1: expected JSON; Nested too deeply at column 1"),
    (b'{"prompt": "caf\xe9"}', "line 1: expected text in UTF-8: "),
    (b'{"id": 1, "answer": "x"}', "input: expected prompt or messages in its rows, got the columns id, answer"),
    ([[1]], "line 2: expected a JSON object, got [1]"),
    ([ROW], "line 2: id: expected another one in every row, got 1 again"),
    ([{"prompt": "a"}], "line 2: expected an id in every row or in none, got None"),
    ([{"id": "b", "prompt": "a"}], "line 2: id: expected int as before it, got 'b'"),
    *(([{"id": wrong, "prompt": "a"}], f"line 2: id: expected text or an integer of 64 bits, got {wrong!r}")
      for wrong in ("", 1.5, True, 2**70, [1])),
    *(([{"id": 2, "prompt": "a", name: 1}], f"input: column {name!r}: expected another name, as the output has one")
      for name in ("text", "finish_reason", "tokens", "stats", "error")),
]

JOBS = [
    (["batch", "no.jsonl", "out", "--local"], "input: expected files that can be read, got no.jsonl: No such file"),
    (["batch", ".", "out", "--local"],
     "input: expected a file, or a folder of files, whose name ends in .jsonl or .ndjson or .parquet, got ."),
    (["batch", "no://x", "out", "--local"], "input: expected files that can be read, got no://x: Unrecognized file"),
]

STUDIES = [
    ([*MBTI[:2], "no/such", *MBTI[3:], "--type", "ESTJ"],
     "data: expected the folder of the paper's data release, got 'no/such'"),
    ([*MBTI[:2], "data/mbti", *MBTI[3:], "--type", "ESTJ"],
     "data: expected questions of a type (qa_ESTP.json) in data/mbti/mbti/questions, got none"),
    ([*MBTI, "--type", "INFP"], "type: expected an attribute for each pole of INFP; ...got E, S, T, J, and no I"),
    *(([*MBTI, "--type", wrong], f"type: expected four poles such as ESTP, got {wrong!r}")
      for wrong in ("EST", "XXXX", "TSEJ", "estj")),
    (MBTI, "type: expected --type, or --weights of poles, to know what is judged"),
    ([*MBTI, "--weights", "E=0"], "weights: expected at least one that is not 0, got {'E': 0.0}"),
    ([*MBTI, "--weights", "Q=1"], "weights: expected some of E, S, T, J, got 'Q'"),
    ([*ESTJ, "--type", "ESTJ", "--weights", "E=1"], "weights: expected none beside several types"),
    *(([*ESTJ, "--tasks", wrong], f"tasks: expected some of qa, mcqa, 16p, got {wrong!r}")
      for wrong in ("quiz", "", "roleplay")),
    ([*ESTJ, "--choices", "words"], "choices: expected one of texts, letters, got 'words'"),
    ([*ESTJ, "--methods", "moe"], "methods: expected some of base, ...got 'moe'"),
    ([*ESTJ, "--methods", "base,,scr"], "methods: expected some of base, ...got ''"),
    ([*ESTJ, "--reference", "moe"], "reference: expected one of base, ...got 'moe'"),
    ([*ESTJ, "--methods", "mod,scr", "--reference", "base"], "reference: expected one of mod, scr, got 'base'"),
    *(([*ESTJ, "--judge", wrong], f"judge: expected classifier, classifier:FOLDER or an endpoint's ...got {wrong!r}")
      for wrong in ("nobody", "http://x", "#m", "ftp://x#m")),
    ([*ESTJ, "--judge", "classifier:no/such"], "judge: expected a file that can be read, got no/such/judge.json: No "),
    ([*ESTJ, "--judge", "classifier", "--judge", "classifier"], "judge: expected judges of different names"),
    ([*ESTJ, "--set", "sampler=exact"], "sampler: expected an option that methods leave open; expected one of "),
    ([*ESTJ, "--set", "temprature=1"],
     "temprature: expected an option that methods leave open; did you mean 'temperature'?"),
    *(([*ESTJ, "--set", f"{typo}=2"], f"{typo}: expected an option that methods leave open; {hint}")
      for typo, hint in (("max_new_token", "expected one of temp"), ("batch_siz", "did you mean 'chunk_size'?"))),
    ([*ESTJ, "--set", "tries=8"], "tries: expected an option of one of base, got 8"),
    ([*ESTJ, "--methods", "mod,scr", "--set", "draft=lookup"], "draft: expected an option of one of mod, scr, got "),
    ([*ESTJ, "--set", "trace=true"], "trace: expected an option that methods leave open"),
    ([*ESTJ, "--set", "batch_size=2"], "batch_size: expected --batch-size, got --set batch_size=2"),
    ([*ESTJ, "--set", "max_new_tokens=2"], "max_new_tokens: expected --max-new-tokens, got --set max_new_tokens=2"),
    ([*ESTJ, "--tasks", "qa", "--choices", "texts"], "choices: expected none without mcqa among the tasks, got 'te"),
    *(([*how, f"--{name.replace('_', '-')}", "120"], f"{name}: expected none without an endpoint's --judge, got ")
      for how in (ESTJ, [*ROLEPLAY, "--weights", "E=1"], TUNE, [*TUNE, "--judge", "classifier"])
      for name in ("key_env", "concurrency", "timeout")),
    ([*ESTJ, "--set", "temperature"], "set: expected NAME=VALUE, got 'temperature'"),
    ([*ESTJ, "--set", "temperature=-1"], "temperature: expected a number in [0, inf), got -1"),
    ([*ESTJ, "--models", "no/such"], "models: expected 'demo', 'smollm2', a folder or a recipe, got 'no/such'"),
    ([*ESTJ, "--scoring-model", "no/such"], "scoring_model: expected the folder of a model, got 'no/such'"),
    ([*ESTJ, "--bertscore", "no/such"], "bertscore: expected the folder of a model, got 'no/such'"),
    ([*ESTJ, "--anchor", "no/such"], "anchor: expected a model's folder, got 'no/such'"),
    ([*ESTJ, "--dtype", "int8"], "dtype: expected a floating-point torch dtype such as 'bfloat16', got 'int8'"),
    ([*ESTJ, "--quantize", "int3"], "quantize: expected 'none' or 'int4' or 'int4-draft', got 'int3'"),
    (([*ESTJ, "--tasks", "mcqa"], {MCQA: "{"}), f"data: {MCQA}, line 1: expected JSON; Expecting property name"),
    (([*ESTJ, "--tasks", "mcqa"], {MCQA: "[" * 10**5}), f"data: {MCQA}, line 1: expected JSON; Nested too deeply"),
    (([*ESTJ, "--tasks", "mcqa"], {MCQA: "3"}), f"data: expected a list or an object in {MCQA}, got 3"),
    (([*ESTJ, "--tasks", "mcqa"], {MCQA: "[]"}), f"data: expected items of mcqa in {MCQA}, got none"),
    (([*ESTJ, "--tasks", "mcqa"], {MCQA: b"\xff"}), f"data: expected text in UTF-8, got {MCQA}: "),
    ((ESTJ, {"out": "a"}), "out: expected a file that can be written, got out/ESTJ/answers/base.jsonl: Not a direct"),
    (ROLEPLAY, "models: expected attributes profile and personality; ...got E, S, T, J, and no profile"),
    ([*ROLEPLAY, "--weights", "Q=1"], "weights: expected some of E, S, T, J, got 'Q'"),
    ([*ROLEPLAY, "--weights", "E=1", "--judge", "classifier"], "judge: expected an endpoint's URL#MODEL, as class"),
    (["evaluate overall", "mine"], "tables: expected NAME=FOLDER, got 'mine'"),
    (["evaluate overall", "a=data"], "tables: expected a file that can be read, got data/table.json: No such file"),
    ((["evaluate overall", "a=t"], {"t/table.json": "{"}), "tables: t/table.json, line 1: expected JSON; Expecting"),
    *(((["evaluate overall", "a=t"], {"t/table.json": wrong}), f"tables: expected a table with a section, got {wrong}")
      for wrong in ("{}", "[1]", '{"sections": []}')),
    *(((["evaluate overall", "a=t"], {"t/table.json": f'{{"sections": [{wrong}]}}'}), "tables: expected tables as this")
      for wrong in ("{}", "1")),
    (["evaluate overall", "a=data", "--methods", "moe"], "methods: expected some of base, ...got 'moe'"),
    *(([*TUNE, "--type", wrong], f"type: expected poles of different dimensions such as ESTP, got {wrong!r}")
      for wrong in ("", "EEJJ", "EISN")),
    ([*TUNE, "--type", "INFP"], "type: expected an attribute for each of I, N, F, P, got none for 'I'"),
    ([*TUNE, "--type", "ES"], "data: expected items of ES on both sides, got 0 to tune on, 0 held out"),
    ([*TUNE, "--search", "random"], "search: expected one of iterative, optuna, got 'random'"),
    *(([*TUNE, "--target", wrong], f"target: expected one of geometric, anchored, arithmetic, got {wrong!r}")
      for wrong in ("harmonic", "base")),
    ([*TUNE, "--low", "3", "--high", "1"], "high: expected a number in [3, inf), got 1.0"),
    ([*TUNE, "--low", "2"], "start: expected a number in [2, 4], got 1"),
    ([*TUNE, "--start", "9"], "start: expected a number in [-2, 4], got 9"),
    ([*TUNE, "--high", "0"], "start: expected a number in [-2, 0], got 1"),
    *(([*TUNE, f"--{name}", wrong], f"{name}: expected a number in [")
      for name, wrong in (("low", "nan"), ("start", "nan"), ("high", "inf"))),
    ([*TUNE, "--max-new-tokens", "40"], "max_new_tokens: expected none without a --judge, got 40"),
    ([*TUNE, "--seed", "0"], "seed: expected none without --search optuna or a --judge, got 0"),
    ([*TUNE, "--judge", "nobody"], "judge: expected classifier, classifier:FOLDER or an endpoint's ...got 'nobody'"),
    ([*TUNE, "--judge", "classifier:no"], "judge: expected a file that can be read, got no/judge.json: No such file"),
    ([*TUNE, "--judge", "classifier", "--type", "XY"], "type: expected poles of different dimensions"),
    ([*TUNE, "--plot", "x.txt"], "plot: expected a file that ends in one of "),
    ([*TUNE, "--plot", "no/x.png"], "plot: expected a file that can be written, got 'no/x.png': No such file"),
    ([*TUNE, "--out", "data"], "out: expected a file that can be written, got data: Is a directory"),
    ((TUNE, {"history": "mine"}), "out: expected a file of its own, but history holds something else"),
    ((TUNE, {"history": "mine\n"}), "out: history, line 1: expected JSON; Expecting value at column 1"),
    ((TUNE, {"history": "[1]\n"}), "out: history, line 1: expected a JSON object, got [1]"),
    ((TUNE, {"history": '{"a": 1}\n{"b": 2}'}), "out: expected a file of its own, but history holds another job"),
    ((TUNE, {MCQA: "{"}), f"data: {MCQA}, line 1: expected JSON; Expecting property name"),
]

PROMPTS = [
    ('{"a"', "prompts: ...line 1: expected JSON; Expecting ':' delimiter at column 5"),
    ('\n{"prompt": "a"}\nb', "prompts: ...line 3: expected JSON; Expecting value at column 1"),
    ('["a", ', "prompts: ...line 1: expected a JSON list; Expecting value"),
    ("[" * 10**5, "prompts: ...line 1: expected a JSON list; Nested too deeply"),
    ('{"a":' * 10**5, "prompts: ...line 1: expected JSON; Nested too deeply at column 1"),
    ('["a", 2]', "prompts: ...entry 2: expected a JSON object or string, got 2"),
    ('{"prompt": "a"}\n3', "prompts: ...line 2: expected a JSON object or string, got 3"),
    ('{"text": "a"}', "prompts: ...line 1: expected one of prompt and messages, got text"),
    ('{"prompt": "a", "messages": []}',
     "prompts: ...line 1: expected one of prompt and messages, got prompt, messages"),
    ('{"prompt": 3}', "prompts: ...line 1: prompt: expected text or a list, not empty, got 3"),
    ('{"messages": []}', "prompts: ...line 1: messages: expected text or a list, not empty, got []"),
    ('[{"prompt": "a"}, {"prompt": ""}]', "prompts: ...entry 2: prompt: expected text or a list, not empty, got ''"),
    ('{"prompt": "a"}\n\n{"messages": [{"content": "b"}]}',
     "prompts: ...line 3: prompt[1]: message 0: expected a role, got None"),
    ('{"prompt": "a", "raw": true}', "prompts: ...line 1: raw: expected an option, got an argument of Model.generate"),
    ('{"prompt": "a"}\n{"prompt": "b", "temprature": 1}',
     "prompts: ...line 2: temprature: unknown option; did you mean"),
    ('{"prompt": "a", "window": 3}', "prompts: ...line 1: window: not an option of sampler 'exact', got 3"),
    ('{"prompt": "a", "seed": [1]}', "prompts: ...line 1: seed: expected one number, got [1]"),
    ('{"prompt": "a"}\n{"prompt": "b", "weights": {"Q": 1}}',
     "prompts: ...line 2: weights: expected some of E, S, T, J, got 'Q'"),
    ('{"prompt": "a", "weights": "nobody"}', "prompts: ...line 1: weights: expected NAME=NUMBER,... or a preset"),
    (' \n', "prompts: ...expected text, got nothing in"),
    (b'caf\xe9', "prompts: ...expected text in UTF-8, got"),
]

CHECK_PROMPTS = [
    ('{"a"', "prompts: ...line 1: expected JSON; Expecting ':' delimiter at column 5"),
    ("One?", "prompts: ...expected at least 2, to tell a shift from chance, got 1 in"),
    ('{"prompt": "a"}\n{"prompt": "b", "seed": 3}',
     "prompts: ...line 2: seed: expected none of a single prompt under mpg check"),
    ('{"prompt": "a", "weights": {"E": 1}}\n{"prompt": "b"}',
     "prompts: ...line 1: weights: expected none of a single prompt"),
    ('{"prompt": "a", "contexts": {"calm": "b"}}\n{"prompt": "b"}',
     "prompts: ...line 1: contexts: expected none of a single"),
    ]

PAIRS = [
    ('{"prompt": "a", ', "pairs.jsonl, line 2: expected JSON; ... at column 17"),
    ("[" * 10**5, "pairs.jsonl, line 2: expected JSON; Nested too deeply at col"),
    ({**PAIR, "rejected": "\ud800"}, "pairs.jsonl, line 2: expected text that UTF-8 can hold, got ...ud800"),
    ({**PAIR, "prompt": "\ud800"}, "pairs.jsonl, line 2: expected text that UTF-8 can hold, got ...ud800"),
    ("[1]", "pairs.jsonl, line 2: expected a JSON object, got [1]"),
    ({"prompt": "a", "chosen": "b"},
     "pairs.jsonl, line 2: expected prompt, chosen and rejected ..., got no rejected among prom"),
    ({}, "pairs.jsonl, line 2: expected prompt, chosen and rejected ..., got no prompt among nothing"),
    ({"question": "a", "E": "b"},
     "pairs.jsonl, line 2: expected question and an answer for each of two poles, got question, E"),
    ({**PAIR, "rejected": " "}, "pairs.jsonl, line 2: expected text for rejected, got ' '"),
    ({**PAIR, "chosen": None}, "pairs.jsonl, line 2: expected text for chosen, got None"),
    ({**PAIR, "prompt": ""}, "pairs.jsonl, line 2: expected text for prompt, got ''"),
    ({**PAIR, "prompt": []}, "pairs.jsonl, line 2: expected text or messages for prompt, got []"),
    ({**PAIR, "prompt": ["a"]}, "pairs.jsonl, line 2: expected text or messages for prompt, got ['a']"),
    ({**PAIR, "prompt": {"a": 1}}, "pairs.jsonl, line 2: expected text or messages for prompt, got {'a': 1}"),
    ({**PAIR, "rejected": "Fine. "},
     "pairs.jsonl, line 2: expected two different answers, got equal ones; drop_identical"),
    ({**PAIR, "prompt": USER}, "pairs.jsonl, line 2: expected text or messages as in ...line 1, got the other"),
    ({**PAIR, "chosen": [{"role": "assistant", "content": "a"}, *USER]},
     "pairs.jsonl, line 2: expected chosen to end in its one message of the assistant, got ['assistant', 'user']"),
]

TRAINED = [
    (([], {"pairs.jsonl": THREE + '{"prompt": "a", '}), "pairs.jsonl, line 4: expected JSON; ... at column 17"),
    (([], {"pairs.jsonl": THREE + '{"prompt": "a", "chosen": "b"}'}),
     "pairs.jsonl, line 4: expected prompt, chosen and rejected ..., got no rejected among prompt, chosen"),
    (([], {"pairs.jsonl": THREE + json.dumps({**PAIR, "chosen": ""})}),
     "pairs.jsonl, line 4: expected text for chosen, got ''"),
    (([], {"pairs.jsonl": THREE + json.dumps({**PAIR, "chosen": "Bad."})}),
     "pairs.jsonl, line 4: expected two different answers, got equal ones; drop_identical drops them"),
    (([], {"pairs.jsonl": " "}), "data: expected pairs to train on, got none in pairs.jsonl"),
    (([], {"pairs.jsonl": b"\xff\xfe"}), "data: expected text in UTF-8, got pairs.jsonl"),
    (["--data", ""], "data: expected a file, a folder or a dataset of the hub, got ''"),
    (["--data", "no/such.json"], "data: expected a file that can be read, got no/such.json: No such file or directory"),
    ((["--data", "more"], {"more/pairs.txt": "Hello"}),
     "data: expected files of pairs (.jsonl, .json) in more, got none"),
    (["--pole", "E"], "pole: expected none, since pairs.jsonl has chosen and rejected answers alone, got 'E'"),
    (["--data", "traits"], "pole: expected one of E, F, I, J, N, P, S, T (an adapter learns one), got None"),
    (["--held-out", "3"], "held_out: expected fewer than the 3 questions that there are, got 3"),
    ((["--max-answer", "1"], {"pairs.jsonl": THREE.replace("Bad.", "Fine?")}),
     "pairs.jsonl, line ...: expected two different answers, got equal ones in their first 1 tokens (max_answer)"),
    (([], {"pairs.jsonl": THREE + json.dumps({**PAIR, "rejected": "Fine, " * 300})}),
     "pairs.jsonl, line 4: expected at most the 256 tokens of the model's positions, got ...; max_answer cuts answers"),
    (([], {"pairs.jsonl": re.sub(r'"(How was day .\?)"', r'[{"role": "bot", "content": "\1"}]', THREE)}),
     "pairs.jsonl, line ...: prompt: message 0: expected a role that the chat template names"),
    (["--base", "./nowhere"], "base: expected a model (config.json), got ./nowhere, which is no folder"),
    (["--base", str(MODELS / "adapters" / "E")], "base: expected a model, got the adapter ...adapters/E"),
    (([], {"base/config.json": None}), "base: expected a model (config.json), got none of it in base"),
    (([], {"base/config.json": "{"}), "base: expected a file that can be read, got base/config.json: JSONDecodeError"),
    (([], {"base/model.safetensors": b"\x08"}),
     "base: expected a file that can be read, got base/model.safetensors: SafetensorError"),
    (([], {"base/model.safetensors": None, "base/pytorch_model.bin": b"x"}),
     "base: expected model.safetensors, got pytorch_model.bin in base, a pickle; save it with safetensors"),
    (([], {"base/tokenizer.json": None, "base/tokenizer_config.json": None}),
     "base: expected a tokenizer (tokenizer_config.json or tokenizer.json or vocab.json) in base, got none"),
    (([], {"base/tokenizer.json": "{"}), "base: expected a file that can be read, got base/tokenizer.json: "),
    (([], {"base/config.json": json.dumps({**CONFIG, "quantization_config": {"quant_method": "gptq", "bits": 4}})}),
     "base: expected files that can be read in base, got ...GPTQ"),
    ((["--data", "traits", "--pole", "E"], {"base/chat_template.jinja": None}),
     "base: expected a chat template in base, since the pairs are messages, got none"),
    (["--base", "none.gguf"], "base: expected a GGUF file that can be read, got 'none.gguf': No such file"),
    ((["--base", "cut.gguf"], {"cut.gguf": b"GGUF"}),
     "base: expected a whole GGUF file of an architecture that transformers reads, got 'cut.gguf'"),
    ((["--base", "other.gguf"], {"other.gguf": RWKV}),
     "base: expected a whole GGUF file of an architecture that transformers reads, got 'other.gguf': ...rwkv6"),
    ((["--base", "some.gguf"], {"some.gguf": b"GGUF", "cache": "a file"}),
     "base: expected a cache directory that can be written (MPG_CACHE names another), got 'cache/gguf"),
    (["--modules", "q_proj,w_proj"], "modules: expected some of down_proj, ..., got 'w_proj'"),
    (["--device", "tpu"], "device: expected cpu...got 'tpu'"),
    (["--dtype", "int8"], "dtype: expected one of bfloat16, float16, float32, got 'int8'"),
    (([], {"out/letter.txt": "Dear all"}), "out: expected a folder that is not there yet, or empty, got ...out"),
    (([], {"out": "a file"}), "out: expected a folder that is not there yet, or empty, got ...out"),
    ((["--out", "file/out"], {"file": "a file"}),
     "out: expected a folder that can be written, got ...file/out.partial: Not a directory"),
]

TRAININGS = [
    ({"learning_rat": 1}, "learning_rat: unknown setting; did you mean 'learning_rate'?"),
    ({"rank": 0}, "rank: expected an integer >= 1, got 0"),
    ({"alpha": 0}, "alpha: expected an integer >= 1, got 0"),
    ({"dropout": 1}, "dropout: expected a number in [0, 0.99], got 1"),
    ({"modules": "q_proj,,v_proj"},
     "modules: expected 'all-linear' or names such as q_proj,v_proj, got 'q_proj,,v_proj'"),
    ({"learning_rate": 0}, "learning_rate: expected a number in (0, inf), got 0"),
    ({"learning_rate": math.nan}, "learning_rate: expected a number in (0, inf), got nan"),
    ({"weight_decay": -1}, "weight_decay: expected a number in [0, inf), got -1"),
    ({"schedule": "step"}, "schedule: expected one of cosine, linear, constant_with_warmup, got 'step'"),
    ({"warmup_steps": -1}, "warmup_steps: expected an integer >= 0, got -1"),
    ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
    ({"accumulation": 0}, "accumulation: expected an integer >= 1, got 0"),
    ({"epochs": 1.5}, "epochs: expected an integer >= 1, got 1.5"),
    ({"beta": 0}, "beta: expected a number in (0, inf), got 0"),
    ({"likelihood": -1}, "likelihood: expected a number in [0, inf), got -1"),
    ({"max_answer": 0}, "max_answer: expected an integer >= 1, got 0"),
    ({"held_out": 0}, "held_out: expected an integer >= 1, got 0"),
    ({"checkpoint_steps": 0}, "checkpoint_steps: expected an integer >= 1, got 0"),
    ({"gradient_checkpointing": "yes"}, "gradient_checkpointing: expected True or False, got 'yes'"),
    ({"adapter_dtype": "int8"}, "adapter_dtype: expected one of bfloat16, float16, float32, got 'int8'"),
    ({"seed": -1}, "seed: expected an integer 0..4294967295, got -1"),
]

REQUESTS = [
    ((CHAT, {"messages": None}), "400 messages: expected it, got none"),
    ((CHAT, {"messages": []}), "400 messages: expected at least 1, got []"),
    ((CHAT, {"messages": "Hello?"}), "400 messages: expected a valid list, got 'Hello?'"),
    ((CHAT, {"messages": [{"role": "robot", "content": "x"}]}),
     "400 messages.0.role: expected 'system', 'developer', 'user' or 'assistant', got 'robot'"),
    ((CHAT, {"messages": [{"role": "user"}]}), "400 messages.0.content: expected it, got none"),
    ((CHAT, {"messages": [{"role": "user", "content": ""}]}), "400 messages: message 0: expected some text, got ''"),
    ((CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}),
     "400 messages.0.content.0.image_url: there is no such field, got 'x'"),
    ((CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}),
     "400 messages: expected messages that the chat template takes, got [{'role': 'user', "),
    ((CHAT, {"messages": [*USER, {"role": "assistant", "content": "I"}]}),
     "400 messages: the last message is the assistant's, expected continue_final_message=True "),
    ((CHAT, {"messages": [{"role": "user", "content": "word " * 3000}]}),
     "400 messages: the model has 256 positions and prompt 0 takes 3005, expected at least "),
    ((CHAT, {"model": None}), "400 model: expected it, got none"),
    ((CHAT, {"model": "gpt-4"}),
     "404 model: expected demo, base, E, S, T, J, ESTJ, INFP or weights such as 'E=1,T=0.5', "),
    ((CHAT, {"model": "bsae"}), "404 model: expected demo, ..., got 'bsae'; did you mean 'base'?"),
    ((CHAT, {"model": "E=x"}), "400 model: expected a number for 'E', got 'x'"),
    ((CHAT, {"model": "E=1,Q=1"}), "400 model: expected some of E, S, T, J, got 'Q'"),
    ((CHAT, {"model": "E", "weights": {"T": 1}}),
     "400 weights: expected none beside model 'E', which says them; model 'demo' takes them"),
    ((CHAT, {"model": "gpt-4", "weights": {"T": 1}}),
     "404 model: expected demo, base, E, S, T, J, ESTJ, INFP or weights such as 'E=1,T=0.5', "),
    ((CHAT, {"weights": None}), "400 weights: expected some beside model 'demo', whose recipe has none, got none; "
     "model 'base' is the base alone"),
    ((CHAT, {"weights": {"Q": 1}}), "400 weights: expected some of E, S, T, J, got 'Q'"),
    ((CHAT, {"weights": {"E": "much"}}), "400 weights.E: expected a valid number, got 'much'"),
    ((CHAT, {"weights": {"E": 1000000000.0}}),
     "400 weights: expected 0, or a number of size 1e-06 to 10000 for 'E', got 1000000000.0"),
    ((CHAT, {"weights": {"E": 0}}),
     "400 weights: expected at least one that is not 0, got {'E': 0.0}; target='base' is the "),
    ((CHAT, {"weights": {f"E{index}": 1 for index in range(65)}}), "400 weights: expected at most 64 names, got 65"),
    ((CHAT, {"contexts": {f"a{index}": "Be calm." for index in range(65)}}),
     "400 contexts: expected at most 64 names, got 65"),
    ((CHAT, {"weights": {"E": -1}, "target": "arithmetic"}),
     "400 weights: the arithmetic target needs a positive sum, got -1 from {'E': -1.0}; use "),
    ((CHAT, {"target": "harmonic"}),
     "400 target: expected one of arithmetic, anchored, geometric, base, got 'harmonic'"),
    ((CHAT, {"model": "base", "target": "geometric"}),
     "400 target: expected none beside model 'base', got 'geometric'"),
    ((CHAT, {"sampler": "beam"}),
     "400 sampler: expected one of exact, direct, auto, scr, token-rs, seq-rs, got 'beam'"),
    ((CHAT, {"sampler": "auto"}),
     "400 sampler: expected one of exact, direct, scr, token-rs, seq-rs, as a server has no time "),
    ((CHAT, {"draft": "a friend"}), "400 draft: expected one of model, reference, lookup, merged, got 'a friend'"),
    ((CHAT, {"sampler": "direct", "draft": "model"}), "400 draft: not an option of sampler 'direct', got 'model'"),
    ((CHAT, {"weights": {"a": 1}, "contexts": {"a": {"system": "x", "prefix": "y"}}}),
     "400 contexts['a']: expected one of system, prefix, prompt, got system and prefix"),
    ((CHAT, {"weights": {"a": 1}, "contexts": {"a": {"system": "x", "source": "/etc"}}}),
     "400 contexts['a']: source: expected base or E or S or T or J; others are given to "),
    ((CHAT, {"contexts": {"a": {"file": "/etc/passwd"}}}),
     "400 contexts.a.file: there is no such field, got '/etc/passwd'"),
    ((CHAT, {"temperature": -1}), "400 temperature: expected a number in [0, inf), got -1"),
    ((CHAT, {"temperature": "hot"}), "400 temperature: expected a valid number, got 'hot'"),
    ((CHAT, {"top_p": 0}), "400 top_p: expected a number in (0, 1], got 0"),
    ((CHAT, {"top_k": -2}), "400 top_k: expected an integer 0..2147483647, got -2"),
    ((CHAT, {"min_p": 2}), "400 min_p: expected a number in [0, 1], got 2.0"),
    ((CHAT, {"repetition_penalty": -1}),
     "400 repetition_penalty: `penalty` has to be a strictly positive float, but is -1.0; got "),
    *(((CHAT, {name: math.inf}), f"400 {name}: expected a finite number, got inf")
      for name in ("temperature", "top_p", "min_p", "repetition_penalty")),
    ((CHAT, {"repetition_penalty": 1.2, "sampler": "scr"}),
     "400 repetition_penalty: acts on the combined row, which sampler 'scr' never builds (it "),
    ((CHAT, {"n": 0}), "400 n: expected greater than or equal to 1, got 0"),
    ((CHAT, {"n": 99}), "400 n: expected at most 16, got 99"),
    ((CHAT, {"seed": -1}), "400 seed: expected greater than or equal to 0, got -1"),
    ((CHAT, {"seed": 2**63}), "400 seed: expected less than or equal to 9223372036854775807, got 9223372036854775808"),
    ((CHAT, {"max_tokens": -1}), "400 max_tokens: expected greater than or equal to 0, got -1"),
    ((CHAT, {"max_tokens": 0}), "400 max_tokens: expected 1 at least, got 0"),
    ((CHAT, {"max_tokens": 10**6}),
     "400 max_tokens: the model has 256 positions and prompt 0 takes 6, expected at most 250, "),
    ((CHAT, {"max_tokens": 3, "max_completion_tokens": 4}),
     "400 max_completion_tokens: expected one of it and max_tokens, got both"),
    ((CHAT, {"stop": ["x"] * 17}), "400 stop: expected at most 16 of at most 256 characters, got 17"),
    ((CHAT, {"stop": ["x" * 1000]}), "400 stop: expected at most 16 of at most 256 characters, got 1"),
    ((CHAT, {"stop": [""]}), "400 stop: expected a string or a list of them, none empty, got ['']"),
    ((CHAT, {"stop": ["\ud800"]}), "400 stop: expected text that UTF-8 can hold, got '\\ud800'"),
    ((CHAT, {"top_logprobs": 2}), "400 top_logprobs: expected logprobs to be true beside it"),
    ((CHAT, {"logprobs": True, "top_logprobs": 21}), "400 top_logprobs: expected less than or equal to 20, got 21"),
    ((CHAT, {"logprobs": True, "sampler": "scr"}),
     "400 logprobs: expected sampler exact or direct, which have combined rows, got 'scr'"),
    ((CHAT, {"stream_options": {"other": 1}}), "400 stream_options.other: there is no such field, got 1"),
    ((CHAT, {"tools": [{"type": "function"}]}),
     "400 tools: this server does not support it, got [{'type': 'function'}]"),
    ((CHAT, {"response_format": {"type": "json_object"}}),
     "400 response_format: this server does not support it, got {'type': 'json_object'}"),
    ((CHAT, {"logit_bias": {"5": 1}}), "400 logit_bias: this server does not support it, got {'5': 1}"),
    ((CHAT, {"presence_penalty": 0.5}), "400 presence_penalty: this server does not support it, got 0.5"),
    ((CHAT, {"logits_processor": "os.system"}), "400 logits_processor: there is no such field, got 'os.system'"),
    ((CHAT, {"guidance": 3}), "400 guidance: there is no such field, got 3"),
    ((CHAT, {"\ud800": 3}), "400 \ud800: there is no such field, got 3"),
    ((CHAT, {"messages": [{"role": "user", "content": "x", "\ud800": 1}]}),
     "400 messages.0.\ud800: there is no such field, got 1"),
    ((CHAT, {"weights": {"a": 1}, "contexts": {"a": "Be calm."}, "draft": "merged"}),
     "400 draft 'merged', method 'soups': expected LoRA adapters with a weight to merge, got "),
    ((TEXT, {"prompt": ""}), "400 prompt: expected text or token ids, not empty, got ''"),
    ((TEXT, {"prompt": []}), "400 prompt: expected text or token ids, not empty, got []"),
    ((TEXT, {"prompt": [5, "x"]}), "400 prompt.0: expected a valid string or a valid integer or a valid list, got 5"),
    ((TEXT, {"prompt": [10**6]}), "400 prompt: expected token ids in 0..1497, got 1000000"),
    ((TEXT, {"prompt": [-1]}), "400 prompt: expected token ids in 0..1497, got -1"),
    ((TEXT, {"prompt": ["x"] * 65}), "400 prompt: expected at most 64 prompts, got 65"),
    ((TEXT, {"logprobs": 21}), "400 logprobs: expected less than or equal to 20, got 21"),
    ((TEXT, {"suffix": "end"}), "400 suffix: this server does not support it, got 'end'"),
    ((TEXT, {"best_of": 2}), "400 best_of: this server does not support it, got 2"),
    ((TEXT, {"max_tokens": 0}), "400 max_tokens: expected 1 at least where the prompt is not echoed, got 0"),
    ((TEXT, {"echo": True, "logprobs": 1, "stream": True}),
     "400 stream: expected false where the prompt is echoed with logprobs, got true"),
    ((TEXT, {"weights": {"a": 1}, "contexts": {"a": "Be calm."}}),
     "400 contexts['a']: this call has prompts as they are and no place for a system message; "),
    ((TEXT, {"weights": {"a": 1}, "contexts": {"a": {"prompt": "x"}}, "echo": True, "logprobs": 1}),
     "400 echo: the context 'a' does not end with the prompt, expected logprobs of new tokens "),
    ((TEXT, {"echo": True, "logprobs": 1, "target": "arithmetic", "mixture_span": 4}),
     "400 mixture_span: expected 'token' beside echo with logprobs, got 4"),
]

BODIES = [
    *(((body, JSON), "400 body: expected JSON, got ...")
      for body in (b"{", b"", b"\xff", b'{"seed": ' + b"9" * 5000, *(b"[" * depth for depth in (980, 100_000)))),
    *(((body, JSON), "400 body: expected an object, got ") for body in (b"[]", b'"x"', b"5")),
    *(((f'{{"weights": {"[" * depth}{"]" * depth}}}'.encode(), JSON), "400 ") for depth in (10, 900, 950, 980)),
    *(((b"{}", kind), "415 content-type: expected application/json, got ")
      for kind in ("text/plain", "", "application/x-www-form-urlencoded")),
]

SERVERS = [
    ({"max_rows": 0}, "max_rows: expected a number above 0, got 0"),
    ({"max_memory": -1}, "max_memory: expected a number above 0, got -1"),
    ({"grace": -1}, "grace: expected a number, 0 at least, got -1"),
    ({"max_kept": -1}, "max_kept: expected a number, 0 at least, got -1"),
    ({"api_keys": ("",)}, "api_key, admin_key: expected some text, got an empty key"),
]
# fmt: on

TABLE = [
    (ask, *row)
    for ask, rows in {
        generate: CALLS, options: OPTIONS, weights: WEIGHTS, weight_text: WEIGHT_TEXTS, setting: VALUES,
        content: CONTENTS, context: CONTEXTS, load: LOADS, recipe: RECIPES, check_models: CHECKS, method: METHODS,
        chat: CHATS, command: COMMANDS, early: EARLY + JOBS, batch: BATCHES, job_rows: ROW_FILES, study: STUDIES,
        prompts: PROMPTS, check_prompts: CHECK_PROMPTS, pairs: PAIRS, train: TRAINED,
        training_settings: TRAININGS,
        server: REQUESTS, body: BODIES, server_settings: SERVERS,
    }.items()
    for row in rows
]  # fmt: skip


@pytest.mark.parametrize(("ask", "wrong", "message"), TABLE, ids=[f"{row[0].__name__} {row[2]!a:.60}" for row in TABLE])
def test_a_bad_input_is_refused_by_name(ask, wrong, message, request):
    told = ask(request, wrong)
    assert re.match(".*".join(map(re.escape, message.split("..."))), told, re.DOTALL), told


def test_the_page_on_troubleshooting_has_every_word_that_a_message_begins_with():
    """But for those that nobody knows, and for files, which messages of other kinds begin with."""
    _, index = PAGE.read_text().split("## By the word that a message begins with")
    fields = {*ChatRequest.model_fields, *CompletionRequest.model_fields, *IGNORED, *REFUSED}
    named = {*re.findall(r"`([^`]+)`", index), *OPTIONS_BY_NAME, *vars(GenerationConfig()), *training.SETTINGS, *fields}
    of_places = (recipe, job_rows, pairs, chat)
    words = {
        re.split(r"[ .:,\[]", re.sub(r"^\d{3} ", "", message))[0]
        for ask, _, message in TABLE
        if ask not in of_places
        and not re.search(
            r": unknown|did you mean|open; expected one of|there is no such|, line \d|^[\w/]+\.jsonl\b", message
        )
    }
    assert len(words) > 100 and words - named == {""}  # of bodies that are no JSON
