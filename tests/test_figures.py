"""Figures of pages are those of the runs that they name."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import tabulate_demo  # noqa: E402

ESTIMATE = {"value": -0.125, "low": -0.5, "high": 0.04}


def test_tables_say_differences_and_intervals_and_the_base_its_scores():
    column = {"scores": {"E": ESTIMATE}, "gains": {"E": ESTIMATE}, "perplexity": {"value": 3.94, "low": 3, "high": 10}}
    column |= {"tokens_per_second": 26.7, "answers": {"How?": "a\n\nb"}}
    options = {"sampler": "exact", "target": "geometric", "draft": "merged"}
    columns = [
        {**column, "weights": None, "options": {"sampler": "direct", "target": "base"}},
        {**column, "weights": {"E": 2.0}, "options": {"sampler": "direct"}},
        {**column, "weights": {"E": 2.0, "T": 0.5}, "options": options},
    ]
    scores, texts = tabulate_demo.tables({"held_out": 64, "columns": columns}).values()
    assert scores[2:4] == [
        "| base | -.12 [-.50, .04] | 3.9 [3.0, 10.0] | 27 |",
        "| E=2 | -.12 [-.50, +.04] | 3.9 [3.0, 10.0] | 27 |",
    ]
    assert scores[4].startswith("| E=2,T=0.5, `exact` geometric, `merged` draft | ")
    assert scores[5:] == ["", 'How? base: *"a b"* E=2: *"a b"* E=2,T=0.5, `exact` geometric, `merged` draft: *"a b"*']
    assert tabulate_demo._begin("One two. Three.") == "One two."
    assert tabulate_demo._begin("word " * 10) == "word " * 9 + "..."
    assert texts[-1] == "| E=2,T=0.5, `exact` geometric, `merged` draft | a b ... |"


@pytest.mark.skipif(not tabulate_demo.SAVED.exists(), reason="mpg demo --save has not been run")
def test_the_figures_are_those_of_the_saved_run():
    page, saved = tabulate_demo.README.read_text(), json.loads(tabulate_demo.SAVED.read_text())
    assert tabulate_demo.write(saved, page) == page
    assert (saved["models"], saved["held_out"], saved["machine"]["threads"]) == ("smollm2", 64, 1)
    judged = re.search(r"right about (\d+) and (\d+) % of held-out answers", page)
    assert re.findall(r"(\d+)% \(", saved["judge"]) == list(judged.groups())


def test_the_page_of_contexts_says_how_often_its_judge_is_right():
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    import tabulate_contexts

    assert f"\n{tabulate_contexts.judge_line()}\n" in tabulate_contexts.PAGE.read_text()
