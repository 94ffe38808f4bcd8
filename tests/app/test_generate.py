"""`mpg generate`: what it prints and when, where prompts come from, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import re
from functools import partial
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import mpg
from mpg.demo import MODELS

SCR_STATS = {"reject_rate", "salvage_rate", "fallback_rate", "clip_rate", "warmup_share"}
COST_STATS = {"model_calls_per_token", "depth_per_token", "positions_per_token", "tokens_per_second"}
PROMPT = "What do you do about the weekend?"


def lines_of(done):
    assert done.exit_code == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def model_sets():
    trained = Path(os.environ.get("MPG_MODELS", "")) / "mbti-tiny"
    missing = pytest.mark.skipif(not os.environ.get("MPG_MODELS"), reason="MPG_MODELS is not set")
    return ["demo", pytest.param(str(trained), marks=missing, id="mbti-tiny")]


@pytest.mark.parametrize("models", model_sets())
@pytest.mark.parametrize(
    ("target", "sampler"), [("geometric", "exact"), ("geometric", "direct"), ("arithmetic", "scr")]
)
def test_generate_prints_one_json_object(models, target, sampler, run):
    arguments = ["generate", "--models", models, "--weights", "E=1,T=1", "--target", target, "--sampler", sampler]
    arguments += ["--max-new-tokens", 24]
    done = run(*arguments, "--prompt", PROMPT, "--seed", 0, "--json")
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    assert isinstance(printed["text"], str)
    assert printed["text"]
    assert printed["seed"] == 0
    assert set(printed["stats"]) >= COST_STATS | (SCR_STATS if sampler == "scr" else set())
    again = json.loads(run(*arguments, "--prompt", PROMPT, "--seed", 0, "--json").stdout)
    assert again["tokens"] == printed["tokens"]


def test_generate_streams_the_text_to_stdout_and_the_statistics_to_stderr(model, run):
    done = run("generate", "--weights", "E=1", "--prompt", PROMPT, "--seed", 4)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip() == model.generate(PROMPT, weights={"E": 1}, seed=4).text.strip()
    [line] = done.stderr.splitlines()
    assert re.search(r", seed 4  .*tokens_per_second \d.*accept_rate \d", line) and len(line) > 80


def test_generate_prints_a_json_line_a_text_in_the_order_of_the_prompts(model, run):
    arguments = ["--weights", "E=1,J=-0.5", "--prompt", PROMPT, "--prompt", "Hello?", "--seed", 7]
    done = lines_of(run("generate", *arguments, "--set", "num_return_sequences=2", "--max-new-tokens", 5, "--json"))
    how = {"weights": {"E": 1, "J": -0.5}, "seed": 7, "num_return_sequences": 2, "max_new_tokens": 5}
    expected = model.generate([PROMPT, "Hello?"], **how)
    assert [line["tokens"] for line in done] == [list(result.tokens) for result in expected]
    assert [(line["index"], line["seed"]) for line in done] == [(0, 7), (0, 8), (1, 9), (1, 10)]


def test_every_json_line_has_one_shape(run):
    calls = ([], ["--prompt", "Hello?"], ["--method", "dpo-single"], ["--method", "mod"], ["--sampler", "scr"])
    arguments = ["generate", "--prompt", PROMPT, "--weights", "E=1,T=1", "--max-new-tokens", 2, "--json"]
    shapes = {tuple(line) for call in calls for line in lines_of(run(*arguments, *call))}
    assert len(shapes) == 1
    assert shapes.pop()[:5] == ("index", "attribute", "text", "tokens", "finish_reason")


def test_texts_are_printed_when_they_are_done_and_never_out_of_order(model, monkeypatch, run):
    """The last of three is done first, then the first, at which that one is printed before the second is done."""
    printed, generate = [], mpg.Model.generate

    def shuffle(self, prompts, on_result, **call):
        results = generate(self, prompts, **call)
        for index in (2, 0, 1):
            on_result(index, results[index])
            printed.append(output.getvalue().count("> "))

    output = io.StringIO()
    monkeypatch.setattr(mpg.Model, "generate", shuffle)
    monkeypatch.setattr("builtins.print", partial(print, file=output))
    prompts = [word for prompt in ("a", "b", "c") for word in ("--prompt", prompt)]
    assert run("generate", *prompts, "--weights", "E=1", "--max-new-tokens", 2).exit_code == 0
    assert printed == [0, 1, 3]
    assert [line for line in output.getvalue().splitlines() if line.startswith("> ")] == ["> a", "> b", "> c"]


def test_an_interrupted_run_has_printed_what_was_done(model, monkeypatch, run):
    generate = mpg.Model.generate

    def stop_after_two(self, prompts, on_result, **call):
        results = generate(self, prompts, **call)
        on_result(0, results[0])
        on_result(2, results[2])
        raise KeyboardInterrupt

    monkeypatch.setattr(mpg.Model, "generate", stop_after_two)
    prompts = [word for prompt in ("a", "b", "c") for word in ("--prompt", prompt)]
    done = run("generate", *prompts, "--weights", "E=1", "--max-new-tokens", 2, "--json")
    assert done.exit_code == 130
    assert [json.loads(line)["index"] for line in done.stdout.splitlines()] == [0, 2]
    assert done.stderr == ""


def test_an_interrupted_text_is_printed_as_far_as_it_came(model, monkeypatch, run):
    generate, pieces = mpg.Model.generate, []

    def stop_at_three(self, prompts, on_token, **call):
        def listen(token):
            on_token(token)
            pieces.append(token.text)
            if len(pieces) == 3:
                raise KeyboardInterrupt

        return generate(self, prompts, on_token=listen, **call)

    monkeypatch.setattr(mpg.Model, "generate", stop_at_three)
    done = run("generate", "--prompt", PROMPT, "--weights", "E=1", "--seed", 4)
    assert (done.exit_code, done.stdout, done.stderr) == (130, "".join(pieces) + "\n", "")


def test_results_come_as_their_rows_end(model):
    seen = []
    results = model.generate(
        ["a", "b", "c"], weights={"E": 1}, seed=0, batch_size=1, max_new_tokens=3,
        on_token=lambda token: seen.append(token.request), on_result=lambda index, result: seen.append(result),
    )  # fmt: skip
    assert seen == [0, 0, 0, results[0], 1, 1, 1, results[1], 2, 2, 2, results[2]]


@pytest.mark.parametrize(
    "written", ["One?\n\nTwo? \r\n", '["One?", "Two? "]', '{"prompt": "One?"}\n\n{"prompt": "Two? "}']
)
@pytest.mark.parametrize("is_file", [True, False])
def test_prompts_come_from_a_file_or_from_standard_input(written, is_file, model, tmp_path, run):
    path = tmp_path / "prompts"
    path.write_text(written)
    arguments = ["generate", "--weights", "E=1", "--seed", 3, "--max-new-tokens", 4, "--json", "--prompts"]
    done = run(*arguments, path) if is_file else run(*arguments, "-", input=written)
    expected = model.generate(["One?", "Two? "], weights={"E": 1}, seed=3, max_new_tokens=4)
    assert [line["tokens"] for line in lines_of(done)] == [list(result.tokens) for result in expected]


def test_one_prompt_comes_from_standard_input_whole(model, run):
    text = "Two lines\n\nof one prompt"
    done = run("generate", "--prompt", "-", "--weights", "E=1", "--seed", 3, "--json", input=f"{text}\n")
    assert lines_of(done)[0]["tokens"] == list(model.generate(text, weights={"E": 1}, seed=3).tokens)


def test_a_line_of_a_file_has_weights_a_seed_and_options_of_its_own(model, tmp_path, run):
    messages = [{"role": "user", "content": "How was your weekend?"}]
    own = [
        {"weights": {"T": 2}, "seed": 50},
        {"weights": "INFP", "sampler": "direct", "temperature": 0.5},
        {},
        {"sampler": "direct", "repetition_penalty": 1.3, "max_new_tokens": 2},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"messages": messages, **line}) for line in own))
    arguments = ["--weights", "E=1", "--seed", 7, "--max-new-tokens", 6, "--temperature", 0.9, "--json"]
    done = lines_of(run("generate", "--prompts", path, *arguments))
    for index, (line, options) in enumerate(zip(done, own, strict=True)):
        defaults = {"weights": {"E": 1}, "seed": 7 + index, "max_new_tokens": 6, "temperature": 0.9}
        assert line["index"] == index
        assert line["tokens"] == list(model.generate(messages, **defaults | options).tokens)


@pytest.mark.parametrize("method", [[], ["--method", "mod"]])
def test_a_trace_is_a_page_beside_the_texts(method, tmp_path, run):
    file = tmp_path / "trace.html"
    arguments = ["--weights", "E=1,T=1", "--prompt", PROMPT, "--prompt", "</script>?", "--max-new-tokens", 4, "--json"]
    done = run("generate", *arguments, "--trace", file, *method)
    lines = lines_of(done)
    assert [line["trace"]["options"]["max_new_tokens"] for line in lines] == [4, 4]
    page = file.read_text()
    for line in lines:
        assert json.dumps(line["trace"]).replace("<", r"\u003c") in page
    assert run("generate", *arguments, "--trace", tmp_path / "trace.json").exit_code == 2
    assert "trace: expected a file" in run("generate", *arguments, "--trace", tmp_path / "no" / "t.html").stderr


def test_the_base_takes_weights_of_nothing(model, run):
    done = run("generate", "--target", "base", "--weights", "E=0,T=0", "--prompt", PROMPT, "--seed", 1, "--json")
    assert lines_of(done)[0]["tokens"] == list(model.generate(PROMPT, target="base", seed=1).tokens)


def test_set_takes_every_option_and_what_transformers_has(model, run):
    how = {"sampler": "direct", "min_p": 0.02, "repetition_penalty": 1.3, "stop_strings": ["ing"], "trace": True}
    settings = [word for name, value in how.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    done = run("generate", "--weights", "E=1", "--prompt", PROMPT, "--seed", 4, "--json", *settings)
    expected = model.generate(PROMPT, weights={"E": 1}, seed=4, **how)
    assert lines_of(done)[0]["tokens"] == list(expected.tokens)
    assert lines_of(done)[0]["log_ratios"]


@pytest.mark.parametrize("command", [("generate", "--prompt", PROMPT), ("check",), ("chat",)], ids=lambda c: c[0])
def test_a_preset_of_a_folder_that_has_none_is_told_its_attributes_before_it_is_loaded(command, run, tmp_path):
    (tmp_path / "adapters").symlink_to(MODELS / "adapters")  # beside no model
    done = run(*command, "--models", tmp_path, "--weights", "ESTJ")
    assert done.exit_code == 2
    wanted = "weights: expected NAME=NUMBER,... of E, J, S, T (there are no presets), got 'ESTJ'"
    assert wanted in " ".join(done.stderr.split())


def test_generate_takes_stop_strings_a_batch_size_and_a_device_map(model, monkeypatch, run):
    how = {"weights": {"E": 1}, "seed": 4, "stop_strings": ["!", "ing"]}
    arguments = ["--weights", "E=1", "--prompt", PROMPT, "--seed", 4, "--stop", "!", "--stop", "ing", "--json"]
    place = os.environ.get("MPG_DEVICE", "cpu")
    done = run("generate", *arguments, "--batch-size", 1, "--device-map", f"base={place}")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == list(model.generate(PROMPT, **how).tokens)
    seen = {}
    monkeypatch.setattr(mpg, "load", lambda base, **load: seen.update(load) or model)
    monkeypatch.setattr(mpg.Model, "generate", lambda self, prompts, **call: seen.update(call) or [])
    how = ["--device-map", "base=cuda:0,E=cuda:1", "--allow-other-base"]
    run("generate", *arguments, "--batch-size", 3, *how)
    assert seen["allow_other_base"]
    assert seen["device_map"] == {"base": "cuda:0", "E": "cuda:1"}
    assert (seen["batch_size"], seen["stop_strings"]) == (3, ["!", "ing"])


def test_unknown_option_is_refused(run):
    assert run("generate", "--prompt", PROMPT, "--weight", "E=1").exit_code == 2


def test_generate_answers_by_a_method_of_the_paper(run):
    done = run("generate", "--method", "mod", "--weights", "E=1,T=1", "--prompt", PROMPT, "--seed", 0, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["text"]
    arguments = ["generate", "--method", "dpo-single", "--weights", "E=1,T=1", "--seed", 0, "--max-new-tokens", 5]
    done = run(*arguments, "--prompt", PROMPT, "--json")
    assert done.exit_code == 0, done.stderr
    results = {line["attribute"]: line for line in lines_of(done)}
    assert {name: bool(result["text"]) for name, result in results.items()} == {"E": True, "T": True}
    shown = run(*arguments, "--prompt", PROMPT).stdout
    assert f"> [E] {PROMPT}\n{results['E']['text']}" in shown
    several = lines_of(run(*arguments, "--prompt", PROMPT, "--prompt", "Hello?", "--json"))
    assert [line["seed"] for line in several if line["attribute"] == "T"] == [0, 1]


def test_generate_tells_preference_prompting_what_an_attribute_is(run):
    arguments = ["generate", "--method", "pp", "--prompt", "Hello?", "--seed", 0, "--max-new-tokens", 3, "--json"]
    lengths = [
        json.loads(run(*arguments, "--weights", "E=1,T=1", *described).stdout)["prompt_tokens"]
        for described in ([], ["--describe", "E=loud"], ["--describe", "E=loud", "--describe", "T=cool"])
    ]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) == 3


def test_an_anchor_makes_the_models_a_specialised_base(tmp_path, run):
    base = AutoModelForCausalLM.from_pretrained(MODELS)
    PeftModel.from_pretrained(base, MODELS / "adapters/J").merge_and_unload().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODELS).save_pretrained(tmp_path)
    arguments = ["--models", tmp_path, "--weights", "E=1", "--prompt", PROMPT, "--max-new-tokens", 4, "--json"]
    done = run("generate", "--method", "scr-specialized", *arguments, "--anchor", MODELS)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["text"]


def test_contexts_are_attributes_of_the_call_and_of_single_lines(model, run, tmp_path):
    """Also of a base that has none of its own, to which a name then is enough."""
    told = [{"role": "system", "content": "Be calm."}, {"role": "user", "content": PROMPT}]
    expected = model.generate(told, target="base", temperature=0, max_new_tokens=5).tokens
    how = ["--weights", "calm=1", "--temperature", 0, "--max-new-tokens", 5, "--json"]
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"prompt": PROMPT, "contexts": {"calm": {"system": "Be calm."}}}))
    for arguments in (["--context", "calm=Be calm.", "--prompt", PROMPT], ["--prompts", lines]):
        assert lines_of(run("generate", *arguments, *how))[0]["tokens"] == list(expected)
    how += ["--prompt", PROMPT]
    done = run("generate", "--context", "calm=Be calm.", "--method", "dpo-single", *how)
    assert [(answer["attribute"], answer["tokens"]) for answer in lines_of(done)] == [("calm", list(expected))]
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in MODELS.iterdir():
        if file.is_file() and file.name != "mpg.yaml":
            (bare / file.name).symlink_to(file)
    done = run("generate", "--models", bare, "--context", "calm=Be calm.", *how)
    assert lines_of(done)[0]["tokens"] == list(expected)
    guided = model.generate(PROMPT, guidance_scale=1.5, temperature=0, max_new_tokens=5).tokens
    done = run("generate", "--set", "guidance_scale=1.5", *how[2:])
    assert lines_of(done)[0]["tokens"] == list(guided)
