"""What the documents tabulate is what the code does now, and what they tell one to run can be run."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from typer.main import get_command
from typer.testing import CliRunner

import mpg
import mpg_ext
from longer import long, thinned
from mpg.app.cli.command import app
from mpg.demo import MODELS
from mpg.train.pairs import read_pairs

DOCS = Path(__file__).parent.parent / "docs"
sys.path.insert(0, str(DOCS))

import tabulate_architectures as architectures  # noqa: E402
import tabulate_capacity as capacity  # noqa: E402
import tabulate_laws as page  # noqa: E402

from fakes import enumerate_sampler, total_variation  # noqa: E402

PAGES = {page.name: page for page in (*DOCS.parent.glob("*.md"), *sorted(DOCS.rglob("*.md")))}
COMMANDS = re.compile(r"^```sh\n(.*?)^```|(?<![`\w])`((?:mpg|make|python) [^`]+)`", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "name",
    thinned(["exact, lookup, token", "base", "direct", "token-rs, M = 2", "exact, merged, block", "scr, M = 2"], 3),
)
def test_table_of_laws_says_what_the_samplers_do(name):
    models, options = page.example(), dict(page.samplers())[name]
    row = page.table_row(name, [page.measure(models, target, options) for target in page.TARGETS])
    assert row in (DOCS / "laws.md").read_text().splitlines()


def test_table_of_other_targets_says_what_the_samplers_do():
    assert set(page.other_rows(page.example())) < set((DOCS / "laws.md").read_text().splitlines())


@pytest.mark.parametrize("name", ["exact, small model, block", "scr, M = 1.5"])
def test_chained_rounds_have_the_law_of_the_whole_loop(name, monkeypatch):
    monkeypatch.setattr(page, "NUM_TOKENS", 3)
    monkeypatch.setattr(page, "CHUNK_SIZE", 2)
    monkeypatch.setattr(page, "VOCAB_SIZE", 3)
    models, options = page.example(), {**dict(page.samplers())[name], "target": "arithmetic"}
    law, rounds = page.enumerate_law(models, **options)
    unwarped = {"temperature": 1.0, "top_p": 1.0, "chunk_size": 2}
    whole = enumerate_sampler(models, page.PROMPT, 3, page.WEIGHTS, **options, **unwarped)
    assert total_variation(law, whole) < 1e-12
    assert 1 < rounds < 3


def test_table_of_architectures_is_the_tested_list():
    assert architectures.table() in (DOCS / "architectures.md").read_text()


def test_table_of_capacity_is_the_arithmetic_of_measured_models():
    assert capacity.table() in (DOCS / "scale.md").read_text()
    demo = mpg.load(MODELS, device="cpu")
    grouped = LlamaConfig(
        num_hidden_layers=2, hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=8,
        intermediate_size=40, vocab_size=50,
    )  # fmt: skip
    for model in (demo, mpg.load(LlamaForCausalLM(grouped), {}, device="cpu")):
        loaded, names = model.models, model.models.attribute_names
        config = grouped if not names else AutoConfig.from_pretrained(MODELS)
        shape = capacity.Shape(
            layers=config.num_hidden_layers, width=config.hidden_size, heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads, head_size=config.head_dim, inner=config.intermediate_size,
            vocabulary=config.vocab_size, is_tied=config.tie_word_embeddings, bytes=4,
        )  # fmt: skip
        rows = [loaded.cache_bytes(["base", *names], 3, positions) for positions in (10, 11)]
        assert rows[1] - rows[0] == 3 * (1 + len(names)) * shape.position_bytes()
        assert loaded.describe()["base"]["parameters"] * shape.bytes == shape.weight_bytes()
        for name in names:
            saved = load_file(MODELS / "adapters" / name / "adapter_model.safetensors")
            assert sum(tensor.numel() for tensor in saved.values()) * shape.bytes == shape.adapter_bytes(rank=8)
    assert capacity.cost(3.6, 1000) == pytest.approx(1)


def blocks(page, language):
    """The blocks of a page that are in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page].read_text(), re.DOTALL | re.MULTILINE)


def commands(page):
    """The words of every command that a page shows, in a block or in a line, without what is piped into it or out."""
    found = []
    for block, inline in COMMANDS.findall(PAGES[page].read_text()):
        for line in re.sub(r"\\\n", "", block).splitlines() or [inline]:
            words = shlex.shlex(line, posix=True, punctuation_chars=True)
            words.whitespace_split = True
            for is_word, part in itertools.groupby(words, lambda word: word not in ("|", "&&", ">", ";")):
                found += [list(part)] if is_word else []
    return found


OWN = get_command(app)
SHOWN = [(page, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), SHOWN, ids=lambda value: value if isinstance(value, str) else value[0])
def test_commands_that_the_pages_show_are_there_and_take_the_options_that_are_shown(page, command):
    program, *arguments = command
    if program == "mpg":
        name, *arguments = arguments
        assert name in OWN.commands or any(name in option.opts for option in OWN.params)
        if name in OWN.commands and "--help" not in arguments:
            OWN.commands[name].make_context(name, arguments)
    elif program == "make":
        rules = (DOCS.parent / "Makefile").read_text()
        names = [word for word in arguments if "=" not in word]
        assert all(re.search(rf"^{name}:", rules, re.MULTILINE) for name in names)
    elif program == "python" and arguments[0] != "-m":
        assert (DOCS.parent / arguments[0]).is_file()


def test_the_page_of_commands_shows_every_command():
    names = {(name, part) for name, group in OWN.commands.items() for part in getattr(group, "commands", {"": None})}
    shown = {(command[1], command[2] if command[1] == "evaluate" else "") for command in commands("commands.md")[1:]
             if command[0] == "mpg"}  # fmt: skip
    assert names <= shown


def execute(command, **places):
    """Run a command of a page in this process, with places for its words in capitals. out: what it prints"""
    _, *arguments = command
    for name, place in places.items():
        arguments = [re.sub(rf"^{name}\b", place, word) for word in arguments]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    return done.stdout


def test_slow_expression_of_the_readme_is_the_geometric_target():
    [slow] = [block for block in blocks("README.md", "python") if "log_softmax" in block]
    torch.manual_seed(0)
    base, attributes = torch.randn(7), {"E": torch.randn(7), "T": torch.randn(7)}
    names = {
        "torch": torch, "base": base, "attribute": attributes, "w": {"E": 2.0, "T": -0.5},
        "log_softmax": lambda row: row.log_softmax(-1), "softmax": lambda row: row.softmax(-1),
    }  # fmt: skip
    exec(compile(slow, "README.md", "exec"), names)
    stacked, rows = torch.stack(list(attributes.values()))[:, None, None], base[None, None]
    weights = torch.tensor(list(names["w"].values()))[None, None]
    expected, _ = mpg_ext.combine_rows(stacked, weights, rows, rows, target="geometric")
    torch.testing.assert_close(names["row"].log_softmax(-1), expected[0, 0])
    assert 0 <= names["token"] < 7


def test_the_page_on_training_makes_an_attribute_that_answers(tmp_path, monkeypatch):
    """With its own example for a pair, of fewer questions than one would take."""
    pytest.importorskip("trl", reason="needs mpg[train]")
    shutil.copytree(MODELS, tmp_path / "base", ignore=shutil.ignore_patterns("adapters", "mpg.yaml"))
    monkeypatch.chdir(tmp_path)
    pair, poles = (json.loads(block) for block in blocks("training.md", "json"))
    Path("pairs.jsonl").write_text(json.dumps(pair))
    assert len(read_pairs("pairs.jsonl")) == 1
    asked = ({**poles, "question": f"{poles['question']} {number}"} for number in range(12))
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, asked)))
    train, *others = commands("training.md")
    generate = [command for command in others if command[:2] == ["mpg", "generate"]]
    assert "10 pairs, 2 held out" in execute([*train, "--held-out", "2", "--device", "cpu"], PATH="base")
    Path("both.yaml").write_text(blocks("training.md", "yaml")[0].replace("smollm2", "base", 1))
    shutil.copytree("base/adapters", "adapters")
    generate.append(["mpg", "generate", "--models", "both.yaml", "--prompt", "How was your day?"])
    for command in generate:
        assert execute([*command, "--max-new-tokens", "2", "--device", "cpu"], PATH="base").strip()


@long  # starts Ray
def test_the_page_on_scale_answers_its_own_row(tmp_path, monkeypatch, recwarn):
    pytest.importorskip("ray", reason="needs mpg[ray]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    [row] = blocks("scale.md", "json")
    Path("rows.jsonl").write_text(row)
    command = next(command for command in commands("scale.md") if command[:2] == ["mpg", "batch"])
    assert "1 of 1 rows" in execute(command)
    assert [str(told.message) for told in recwarn if "concurren" in str(told.message)] == []  # of workers without rows
    [part] = Path("answers").glob("part-*.jsonl")
    told = json.loads(part.read_text())
    assert told["text"] and told["error"] is None
    assert {name: told[name] for name in ("id", "source")} == {"id": "q-17", "source": "forum"}
