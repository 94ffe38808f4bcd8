"""What a caller says twice, or says with nothing, is refused, not decided upon in silence."""

from __future__ import annotations

import json

import pytest
import torch

import mpg
from mpg.demo import MODELS
from mpg.files import parse_json
from mpg.train.pairs import read_pairs

GENERATE = ("generate", "--prompt", "Hi", "--weights", "E=1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*GENERATE, "--set", "tau=1", "--set", "tau=2"), "tau: expected once, got 1 and --set tau=2"),
        ((*GENERATE, "--seed", "8", "--set", "seed=7"), "seed: expected once, got 8 and --set seed=7"),
        ((*GENERATE, "--sampler", "scr", "--set", "sampler=exact"), "sampler: expected once, got 'scr' and --set"),
        (("chat", "--set", "top_k=1", "--set", "top_k=1"), "top_k: expected once, got 1 and --set top_k=1"),
        (("serve", "--port", "0", "--set", "top_k=1", "--set", "top_k=2"), "top_k: expected once, got 1 and --set"),
        (
            ("batch", "in", "out", "--local", "--max-new-tokens", "3", "--set", "max_new_tokens=4"),
            "max_new_tokens: expected once, got 3 and --set max_new_tokens=4",
        ),
    ],
)
def test_an_option_that_is_given_twice_is_refused(arguments, message, run):
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"mpg: {message}")


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '[{"b": 1}, {"c": {"a": 1, "b": 2, "a": 3}}]'])
def test_a_name_that_comes_twice_in_json_is_refused(text):
    with pytest.raises(json.JSONDecodeError, match=r"^The name 'a' comes twice"):
        parse_json(text)
    assert parse_json('[{"a": 1, "b": {"a": 2}}, {"a": 3}]') == [{"a": 1, "b": {"a": 2}}, {"a": 3}]


def test_prompts_and_pairs_whose_names_come_twice_are_refused_with_their_line(run, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}\n')
    done = run("generate", "--prompts", file, "--weights", "E=1")
    assert done.exit_code == 2
    assert done.stderr == f"mpg: prompts: {file}, line 2: expected JSON; The name 'prompt' comes twice at column 2\n"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1: expected JSON; The name 'chosen' comes twice"):
        read_pairs(file)


def test_a_field_that_comes_twice_in_a_request_is_refused():
    pytest.importorskip("fastapi")
    from mpg.serve.errors import ApiError
    from mpg.serve.protocol import CompletionRequest, parse

    body = b'{"model": "E", "prompt": "a", "model": "T"}'
    with pytest.raises(ApiError, match=r"^body: expected JSON, got .*: The name 'model' comes twice"):
        parse(CompletionRequest, "application/json", body)
    for encoding in ("utf-8-sig", "utf-16"):
        asked = parse(CompletionRequest, "application/json", '{"model": "E", "prompt": "ä"}'.encode(encoding))
        assert asked.prompt == "ä"


def test_a_source_without_a_name_is_not_the_working_directory(run, monkeypatch):
    monkeypatch.chdir(MODELS)
    done = run("generate", "--models", "", "--prompt", "a")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("mpg: models: expected 'demo', 'smollm2', a folder or a recipe, got ''")
    for sources in (("", {}), (MODELS, {"E": ""}), (MODELS, {"E": " "})):
        with pytest.raises(
            ValueError, match=r"(base|attributes\['E'\]): expected a folder, a hub name or a loaded model"
        ):
            mpg.load(*sources)
    monkeypatch.chdir(MODELS.parent / "traits")
    with pytest.raises(ValueError, match=r"^data: expected a file, a folder or a dataset of the hub, got ''"):
        read_pairs("", "E")


def test_the_demo_shows_the_sets_that_ship_and_no_others(run, tmp_path):
    done = run("demo", "--models", MODELS)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("mpg: models: expected one of demo, smollm2, got ")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", torch.float8_e5m2, "float4_e2m1fn_x2"])
def test_types_in_which_nothing_is_computed_are_refused_by_name(dtype):
    with pytest.raises(ValueError, match=r"^dtype: expected a floating-point torch dtype such as 'bfloat16', got"):
        mpg.load(MODELS, dtype=dtype, device="cpu")


@pytest.mark.parametrize(
    "words", [{"tokenize": False}, {"add_generation_prompt": False}, {"truncation": True, "max_length": 2}]
)
def test_what_mpg_tells_the_chat_template_no_caller_tells_it(words, model):
    with pytest.raises(ValueError, match=r"^chat_template_kwargs: expected none of what mpg itself tells .*, got '"):
        model.generate("Hi", target="base", chat_template_kwargs=words)


def test_scores_that_are_no_floating_point_are_refused(model):
    with pytest.raises(ValueError, match=r"^logits_processor: expected floating-point scores .*, got torch.int64$"):
        model.generate(
            "Hi", weights={"E": 1}, sampler="direct", max_new_tokens=2, logits_processor=[lambda ids, row: row.long()]
        )
