"""The benchmark of the real model, on the tiny set that ships."""

from __future__ import annotations

import json

import pytest

import smollm2
from longer import long
from mpg.models.sources import CONVERTED

EXACT = {name: [draft for draft in smollm2.DRAFTS if (name, draft) != ("int4", "model")] for name in smollm2.TYPES}
CALLS = ["base", "direct_n1", "direct_n2", "direct_n4", "scr_n4"]


@long  # the bench alone
def test_every_type_is_measured_beside_the_others(monkeypatch):
    monkeypatch.setattr(smollm2, "NUM_TEXTS", 2)
    monkeypatch.setattr(smollm2, "NUM_DRAFTED", 2)
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    rows = {row.name: row for row in smollm2.measure(2, 1, lambda stage: None, "demo")}
    for name in smollm2.TYPES:
        assert all(rows[f"demo, {name}/{call}_b1_tokens_per_second"].value > 0 for call in CALLS)
        assert rows[f"demo, {name}/base_b8_tokens_per_second"].value > 0
        assert rows[f"demo, {name}/direct_n4_vs_base_b1"].value > 0
        assert all(rows[f"demo, {name}/exact_n4_{draft}_b1_tokens_per_second"].value > 0 for draft in EXACT[name])
        assert all(rows[f"demo, {name}/exact_n4_{draft}_tokens_per_round"].value >= 1 for draft in EXACT[name])
    assert "demo, int4/exact_n4_model_b1_tokens_per_second" not in rows
    wanted = {f"{own}_vs_{other}_b{batch}": goal for own, other, batch, goal in smollm2.GOALS}
    wanted["exact_n4_vs_direct_n4_b1"] = smollm2.EXACT_GOAL
    goals = {row.name: row.goal for row in rows.values() if row.goal is not None and not row.is_limit}
    other = goals.pop("demo, int4/base_vs_llama.cpp_b1")
    assert goals == {f"demo, float32/{name}": goal for name, goal in wanted.items()}
    assert other == smollm2.LLAMA_CPP_GOAL
    other_row = rows["demo, int4/base_vs_llama.cpp_b1"].as_json()
    assert (other_row["value"], other_row["why"]) == (None, "the wheel xllamacpp is not installed")
    limits = [row for row in rows.values() if row.is_limit]
    assert [row.name for row in limits] == ["demo, bfloat16/kl_per_token", "demo, int4/kl_per_token"]
    assert all(0 < row.value < smollm2.MAX_KL for row in limits)


@pytest.mark.parametrize("facts", [None, {"source": "/no/such.gguf"}])
def test_without_the_file_that_was_converted_there_is_nothing_to_compare_with(facts, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: name)
    if facts is not None:
        (tmp_path / CONVERTED).write_text(json.dumps(facts))
    assert smollm2._llama_cpp(tmp_path, [1], 1) == "the GGUF file that the base was converted from is not there"
