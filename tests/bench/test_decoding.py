"""The benchmark measures what it says, on models of no size."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import decoding as bench
import peers
from longer import long
from mpg.model import load
from mpg.models.graphs import CAPTURES
from mpg.paper.methods import METHODS, PROMPTED_METHODS
from tape import Tape

TINY = peers.Shape("tiny", 64, 128, 2, 4, 2, 500)
PLAN = bench.Plan(
    runs=1, prompts=1, new_tokens=6, peer_tokens=6, growth_tokens=4, num_models=(1, 4), chunk_sizes=(1, 3),
    batch_sizes=(1, 2), contexts=(8, 16),
)  # fmt: skip


@pytest.fixture
def traced(monkeypatch):
    """Code is traced and not made, which takes seconds."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, *, dynamic, options: compile(f, dynamic=dynamic, backend="eager"))


@pytest.fixture(scope="module")
def adapted():
    torch.manual_seed(0)
    return peers.add_adapters(peers.random_llama(TINY, "cpu", torch.float32), 4, bench.KL, "all-linear")


def _load(adapted):
    return load(adapted, {name: name for name in adapted.peft_config})


@long
def test_a_run_has_every_row_with_its_goal_and_every_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peers, "SMALL", TINY)
    monkeypatch.setattr(bench, "Plan", lambda: PLAN)
    threads = torch.get_num_threads()
    bench.main(out=tmp_path / "new")
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert all(set(row) == {"name", "value", "goal", "pass", "why"} for row in rows.values())
    goals = {"sequential_b1": 3.0, "sequential_b8": 2.3, "adapter_names_b1": 1.25, "adapter_names_b8": 1.25}
    for name, goal in goals.items():
        row = rows[f"direct_vs_{name}"]
        assert row["goal"] == goal
        assert row["pass"] is (row["value"] >= goal)
    assert rows["loop_overhead"]["pass"] is (rows["loop_overhead"]["value"] <= 0.1)
    not_measured = {"value": None, "goal": 0.75, "pass": None, "why": None}
    assert rows["gpu_base_vs_bandwidth"] == {"name": "gpu_base_vs_bandwidth", **not_measured}
    report = json.loads((tmp_path / "new/bench-cpu.json").read_text())
    assert {entry["method"] for entry in report["methods"] if entry["models"] == "tiny, N = 4"} == set(METHODS)
    assert {entry["method"] for entry in report["methods"] if entry["why"]} == set(PROMPTED_METHODS)
    assert {quantity: len(points) for quantity, points in report["growth"].items()} == dict(
        N=2, batch=2, context=2, K=2
    )
    assert (tmp_path / "new/bench-cpu.png").stat().st_size > 0
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("row", "passed"),
    [
        (bench.Row("ratio", 1.3, 1.25), True),
        (bench.Row("ratio", 1.2, 1.25), False),
        (bench.Row("share", 0.2, 0.1, is_limit=True), False),
        (bench.Row("share", None, 0.1, is_limit=True), None),
        (bench.Row("figure", 1.0), None),
    ],
)
def test_a_row_passes_where_its_value_meets_its_goal(row, passed):
    assert row.as_json()["pass"] is passed


def test_adapters_lie_as_far_from_the_base_as_asked(adapted):
    assert peers.mean_kl(adapted, "a0") == pytest.approx(bench.KL, rel=0.02)


def test_loops_that_give_another_text_are_not_compared(adapted):
    model, prompts = _load(adapted), bench.random_prompts(2, 8, TINY.vocab)
    weights = {"a0": 0.5, "a1": 0.5}
    bench.check_peers(model, adapted, prompts, weights)
    other = copy.deepcopy(adapted)
    other.get_submodule("base_model.model.model.layers.0.mlp.down_proj.lora_B.a0").weight.data.mul_(3)
    with pytest.raises(ValueError, match="run_adapters_in_turn: expected the text of sampler 'direct'"):
        bench.check_peers(model, other, prompts, weights)


@pytest.mark.parametrize("options", [{"sampler": "direct"}, {"sampler": "scr", "chunk_size": 3}, {"chunk_size": 2}])
def test_a_watch_sees_every_round_but_the_first(options, adapted):
    watch = bench.Watch("cpu")
    tokens = []
    model = _load(adapted)
    with watch.watching(model):
        result = model.generate(
            [1, 2, 3],
            weights={"a0": 1},
            max_new_tokens=11,
            seed=0,
            on_token=lambda token: (tokens.append(token), watch.see(token)),
            **options,
        )
    assert len(watch.gaps) == result.stats["rounds"] - 1
    assert len(tokens) == 11
    assert 0 < bench.loop_overhead(watch.gaps) < 1
    assert sum(seconds for seconds, _ in watch.gaps) > sum(forward for _, forward in watch.gaps) > 0


def test_rows_are_measured_beside_the_fewer_attributes_and_the_request_alone():
    rows = {row.name: row for row in bench.measure_rows(TINY, PLAN, "cpu")}
    assert {name: row.goal for name, row in rows.items() if row.goal} == bench.ROW_GOALS
    assert all(row.value > 0 for row in rows.values())
    assert all(row.is_limit for row in rows.values() if row.goal)
    assert rows["own_attributes_cache"].value == 1


def test_one_part_is_run_by_itself_and_own_base_is_measured_beside_generate(traced, monkeypatch, capsys):
    monkeypatch.setattr(peers, "SMOLLM2_135M", TINY)
    monkeypatch.setattr(bench, "Plan", lambda: PLAN)
    bench.main(only=[bench.Part.BASE])
    printed = capsys.readouterr()
    rows = {row["name"]: row for row in json.loads(printed.out)["rows"]}
    assert not any("sequential" in name for name in rows)
    assert "tiny/base_vs_eager_b1" in printed.err and "tokens/s of the peers" not in printed.err
    of_tiny = {name.removeprefix("tiny/"): row["goal"] for name, row in rows.items() if name.startswith("tiny/")}
    assert {name: goal for name, goal in of_tiny.items() if goal} == {
        **bench.BASE_GOALS, "base_alone_vs_eager_b1": 1.0, "base_alone_vs_eager_b8": 1.5,
        "base_compiled_vs_eager_b1": 1.0, "base_compiled_vs_eager_b8": 1.5,
        **dict.fromkeys(
            ("direct_n2_of_one_vs_base_b1", "direct_n2_compiled_vs_base_compiled_b1",
             "direct_n2_of_one_compiled_vs_base_compiled_b1"), 0.85
        ),
    }  # fmt: skip
    assert all(row["value"] > 0 for row in rows.values())


@pytest.fixture
def quick(traced, monkeypatch):
    """A GPU's bandwidth, its graphs as tapes, and code that is traced and not made."""
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setitem(CAPTURES, "cpu", Tape)


def _measure_gpu():
    plan, draft = replace(PLAN, graphs=True), replace(TINY, hidden=32)
    return list(bench.measure_gpu(TINY, draft, plan, "cpu", lambda stage: None, batches=(1, 2), contexts=(8,)))


@long  # warms up and captures every goal's rounds
def test_the_goals_of_a_gpu_are_measured_of_whole_captured_rounds_and_folders(quick, monkeypatch):
    sources, captured, own_speed = [], [], bench._speed

    def speed(model, *args, **options):
        value = own_speed(model, *args, **options)
        captured.append(sum(len(idle.rounds.graphs) for idle in model.models.idle))
        return value

    monkeypatch.setattr(bench, "_speed", speed)
    monkeypatch.setattr(
        bench, "load", lambda base, *args, **kwargs: sources.append(base) or load(base, *args, **kwargs)
    )
    rows = _measure_gpu()
    assert {row.name: row.goal for row in rows if row.goal is not None} == bench.GPU_GOALS
    assert len(rows) == len(bench.GPU_GOALS) + 2 * len(bench.GPU_CALLS)
    assert all(row.value > 0 for row in rows)
    missed = [row for row in rows if row.as_json()["pass"] is False]
    assert "gpu_base_vs_bandwidth" in {row.name for row in missed if row.why and "aten::" in row.why}
    assert captured and all(captured)
    assert len(sources) == 3 and all(isinstance(source, Path) for source in sources)


@long
def test_what_does_not_fit_into_a_gpu_has_no_number(quick, monkeypatch):
    def speed(model, plan, batch=1, **options):
        if batch == 2:
            raise MemoryError
        return 1.0

    monkeypatch.setattr(bench, "_speed", speed)
    values = {row.name: row.value for row in _measure_gpu()}
    assert values["gpu_base_b1_c8_tokens_per_second"] == 1
    assert values["gpu_base_b2_c8_tokens_per_second"] is None
