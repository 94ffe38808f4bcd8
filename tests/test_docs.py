"""What the documents tabulate is what the code does now."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
sys.path.insert(0, str(DOCS))

import tabulate_architectures as architectures  # noqa: E402
import tabulate_laws as page  # noqa: E402

from fakes import enumerate_sampler, total_variation  # noqa: E402


@pytest.mark.parametrize(
    "name", ["base", "direct", "exact, lookup, token", "exact, merged, block", "scr, M = 2", "token-rs, M = 2"]
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
