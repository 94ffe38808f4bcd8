"""The `mpg` command as a user types it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import mpg
from mpg.app.cli import app
from mpg.demo import MODELS
from mpg.demo.show import COLUMNS
from mpg.paper.methods import METHODS

SCR_STATS = {"reject_rate", "salvage_rate", "fallback_rate", "clip_rate", "warmup_share"}
COST_STATS = {"model_calls_per_token", "depth_per_token", "positions_per_token", "tokens_per_second"}
PROMPT = "What do you do about the weekend?"


def run(command: str, *arguments: object):
    """`mpg command ...` on the device of the suite, unless the arguments name one."""
    device = ["--device", os.environ.get("MPG_DEVICE", "cpu")]
    return CliRunner().invoke(app, [command, *device, *map(str, arguments)])


def model_sets():
    trained = Path(os.environ.get("MPG_MODELS", "")) / "mbti-tiny"
    missing = pytest.mark.skipif(not os.environ.get("MPG_MODELS"), reason="MPG_MODELS is not set")
    return ["demo", pytest.param(str(trained), marks=missing, id="mbti-tiny")]


@pytest.mark.parametrize("models", model_sets())
@pytest.mark.parametrize(
    ("target", "sampler"), [("geometric", "exact"), ("geometric", "direct"), ("arithmetic", "scr")]
)
def test_generate_prints_one_json_object(models, target, sampler):
    arguments = ["generate", "--models", models, "--weights", "E=1,T=1", "--target", target, "--sampler", sampler]
    done = run(*arguments, "--prompt", PROMPT, "--seed", 0, "--json")
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    assert isinstance(printed["text"], str)
    assert printed["text"]
    assert printed["seed"] == 0
    assert set(printed["stats"]) >= COST_STATS | (SCR_STATS if sampler == "scr" else set())
    again = json.loads(run(*arguments, "--prompt", PROMPT, "--seed", 0, "--json").stdout)
    assert again["tokens"] == printed["tokens"]


def test_generate_streams_the_text_to_stdout_and_the_statistics_to_stderr(model):
    done = run("generate", "--weights", "E=1", "--prompt", PROMPT, "--seed", 4)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip() == model.generate(PROMPT, weights={"E": 1}, seed=4).text.strip()
    assert "accept_rate" in done.stderr


def test_generate_answers_a_batch_in_order():
    done = run("generate", "--weights", "E=1,J=-0.5", "--target", "geometric", "--prompt", PROMPT, "--prompt", "Hello?",
               "--seed", 7, "--max-new-tokens", 5, "--json")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert [result["seed"] for result in json.loads(done.stdout)["results"]] == [7, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "X=1"], "weights: expected some of"),
        (["--weights", "E"], "weights: expected NAME=NUMBER,... or a preset among ESTJ, INFP, got 'E'"),
        (["--weights", "E=1,E=2"], "weights: 'E' is given twice"),
        ([], "weights: expected a number for some of"),
        (["--weights", "E=1,T=-1", "--target", "arithmetic"], "weights: the arithmetic target needs a positive sum"),
        (["--weights", "E=1", "--chunk-size", "40"], "chunk_size: expected an integer 1..32, got 40"),
        (["--weights", "E=1", "--temperature", "0", "--sampler", "scr"], "temperature: scr"),
        (["--weights", "E=1", "--draft", "no/such"], "draft: expected a model's folder, got 'no/such'"),
        (["--weights", "E=1", "--models", "no/such"], "models: expected 'demo', a folder or a recipe, got 'no/such'"),
        (["--weights", "E=1", "--models", str(MODELS.parent)], f"got none of it in {MODELS.parent}"),
        (["--weights", "E=1", "--anchor", str(MODELS.parent)], f"got none of it in {MODELS.parent}"),
        (["--weights", "E=1", "--draft", str(MODELS.parent)], f"got none of it in {MODELS.parent}"),
        (["--weights", "E=1", "--device", "cuda:99"], "device"),
        (["--weights", "E=1", "--stop", ""], "stop: expected strings that are not empty, got ['']"),
        (["--weights", "E=1", "--batch-size", "0"], "batch_size: expected an integer >= 1, got 0"),
        (["--weights", "E=1", "--device-map", "cuda:0"], "device_map: expected NAME=DEVICE, got 'cuda:0'"),
        (["--weights", "E=1", "--device-map", "F=cpu"], "device_map: expected some of ['E', "),
        (
            ["--weights", "E=1", "--device", "cpu", "--graphs"],
            "graphs: expected a model on one device of cuda, got cpu",
        ),
    ],
)
def test_bad_input_is_one_line_on_stderr(arguments, message):
    done = run("generate", "--prompt", PROMPT, "--json", *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_generate_takes_stop_strings_a_batch_size_and_a_device_map(model, monkeypatch):
    how = {"weights": {"E": 1}, "seed": 4, "stop_strings": ["!", "ing"]}
    arguments = ["--weights", "E=1", "--prompt", PROMPT, "--seed", 4, "--stop", "!", "--stop", "ing", "--json"]
    place = os.environ.get("MPG_DEVICE", "cpu")
    done = run("generate", *arguments, "--batch-size", 1, "--device-map", f"base={place}")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == list(model.generate(PROMPT, **how).tokens)
    seen = {}
    monkeypatch.setattr(mpg, "load", lambda base, **load: seen.update(load) or model)
    monkeypatch.setattr(mpg.Model, "generate", lambda self, prompts, **call: seen.update(call) or [])
    run("generate", *arguments, "--batch-size", 3, "--device-map", "base=cuda:0,E=cuda:1")
    assert seen["device_map"] == {"base": "cuda:0", "E": "cuda:1"}
    assert (seen["batch_size"], seen["stop_strings"]) == (3, ["!", "ing"])


def test_unknown_option_is_refused():
    assert run("generate", "--prompt", PROMPT, "--weight", "E=1").exit_code == 2


def test_info_names_the_build_and_describes_models():
    done = run("info", "--models", "demo", "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["mpg"] == mpg.__version__
    assert facts["build"]["torch"].split("+")[0] == facts["torch"].split("+")[0]
    assert set(facts["models"]) == {"base", "anchor", "draft", "E", "J", "S", "T"}
    assert set(facts["statistics"]) == set(mpg.STATISTICS)


def test_demo_prints_the_table():
    done = run("demo", "--questions", 1, "--held-out", 4)
    assert done.exit_code == 0, done.stderr
    header = next(line for line in done.stdout.splitlines() if "E+T direct geometric" in line)
    positions = [header.index(column.title) for column in COLUMNS]
    assert positions == sorted(positions)
    assert "tokens/s" in done.stdout
    assert "Mean trait scores over 4 held-out questions" in done.stdout


def test_generate_answers_by_a_method_of_the_paper():
    done = run("generate", "--method", "mod", "--weights", "E=1,T=1", "--prompt", PROMPT, "--seed", 0, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["text"]
    arguments = ["generate", "--method", "dpo-single", "--weights", "E=1,T=1", "--seed", 0, "--max-new-tokens", 5]
    done = run(*arguments, "--prompt", PROMPT, "--json")
    assert done.exit_code == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert {name: bool(result["text"]) for name, result in results.items()} == {"E": True, "T": True}
    shown = run(*arguments, "--prompt", PROMPT).stdout
    assert f"> [E] {PROMPT}\n{results['E']['text']}" in shown
    several = json.loads(run(*arguments, "--prompt", PROMPT, "--prompt", "Hello?", "--json").stdout)["results"]
    assert [result["seed"] for result in several["T"]] == [0, 1]


def test_generate_tells_preference_prompting_what_an_attribute_is():
    arguments = ["generate", "--method", "pp", "--prompt", "Hello?", "--seed", 0, "--max-new-tokens", 3, "--json"]
    lengths = [
        json.loads(run(*arguments, "--weights", "E=1,T=1", *described).stdout)["prompt_tokens"]
        for described in ([], ["--describe", "E=loud"], ["--describe", "E=loud", "--describe", "T=cool"])
    ]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) == 3


def test_an_anchor_makes_the_models_a_specialised_base(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(MODELS)
    PeftModel.from_pretrained(base, MODELS / "adapters/J").merge_and_unload().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODELS).save_pretrained(tmp_path)
    arguments = ["--models", tmp_path, "--weights", "E=1", "--prompt", PROMPT, "--max-new-tokens", 4, "--json"]
    done = run("generate", "--method", "scr-specialized", *arguments, "--anchor", MODELS)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["text"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--method", "mod", "--sampler", "exact"],
            "method: expected no sampler and no target beside 'mod', got sampler",
        ),
        (
            ["--method", "scr", "--target", "geometric"],
            "method: expected no sampler and no target beside 'scr', got target",
        ),
        (["--method", "moe"], "method: expected one of base,"),
        (["--method", "scr-specialized"], "method: 'scr-specialized' needs a specialised base"),
        (
            ["--method", "mod", "--describe", "E=loud"],
            "describe: expected a method among pp, pp-single, pp-specialized",
        ),
        (["--method", "pp", "--describe", "E"], "describe: expected NAME=TEXT, got 'E'"),
        (["--method", "mod", "--top-p", "2"], "top_p: expected a number in (0, 1], got 2.0"),
        (["--method", "mod", "--chunk-size", "2"], "chunk_size: not an option of sampler 'direct', got 2"),
        (["--method", "token-rs", "--top-k", "2"], "top_k: not an option of sampler 'token-rs', got 2"),
        (["--method", "scr", "--temperature", "0"], "temperature: scr"),
    ],
)
def test_bad_method_call_is_one_line_on_stderr_before_models_load(arguments, message, monkeypatch):
    if "scr-specialized" not in arguments:  # whether the base is the anchor is seen when they are loaded
        monkeypatch.setattr(mpg, "load", None)
    done = run("generate", "--prompt", PROMPT, "--weights", "E=1", "--json", *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_info_lists_the_methods_with_what_they_need():
    listed = json.loads(run("info", "--methods", "--json").stdout)["methods"]
    assert list(listed) == list(METHODS)
    assert "specialised base" in listed["pp-specialized"]["needs"]
    shown = run("info", "--methods").stdout
    assert all(name in shown for name in METHODS)
