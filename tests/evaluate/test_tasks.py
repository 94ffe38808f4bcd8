"""Items of the paper's tasks: read, told apart from what is none, and split."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from mpg.evaluate.tasks import MBTI_TASKS, TASKS, TYPES, deal_options, items_hash, read_items, split
from mpg.train.pairs import Pair
from mpg.train.pairs import split as split_pairs


def refuse(problem):
    raise AssertionError(problem)


def test_every_task_has_its_items(data):
    items = read_items(data, TASKS, "ESTJ", on_problem=refuse)
    by_task = {task: [item for item in items if item.task == task] for task in TASKS}
    assert [len(by_task[task]) for task in TASKS] == [3, 4, 1, 2]
    qa, choice, agree, play = (by_task[task][0] for task in TASKS)
    assert (qa.prompt, qa.reference) == ("How do you spend a free evening?", f"{qa.prompt} I go out.")
    assert choice.prompt == "On a free day you:\nA.plan every hour\nB.see what comes"
    assert choice.options == {"J": "plan every hour", "P": "see what comes"}
    assert choice.about == {"dimension": "JP", "stem": "On a free day you:"}
    assert agree.about == {"dimension": "EI", "agrees": "E"}
    assert play.about == {"profile": "He bakes bread.", "personality": "He is calm."}
    assert play.prompt.startswith("You are this person: He bakes bread.\nYour personality: He is calm.\n")
    assert len({item.id for item in items}) == len(items)
    assert items_hash(items) != items_hash([replace(items[0], reference="other"), *items[1:]])


def test_options_are_dealt_by_seed_and_question_and_by_nothing_else(data):
    items = read_items(data, TASKS, "ESTJ", on_problem=refuse)
    choices = [item for item in items if item.options]
    drawn = []
    for item in choices:
        turned = replace(item, options=dict(reversed(item.options.items())), prompt="")
        orders = []
        for seed in range(40):
            dealt = deal_options(item, seed)
            assert dealt == deal_options(dealt, seed) == deal_options(turned, seed)
            assert dealt.options == item.options  # each text under its pole
            one, other = dealt.options.values()
            assert dealt.prompt == f"{item.about['stem']}\nA.{one}\nB.{other}"
            orders.append([*dealt.options])
        assert 8 <= orders.count([*item.options]) <= 32  # of these ids; chance: 1e-4 an item
        drawn.append(tuple(order == sorted(order) for order in orders))
    assert len(set(drawn)) == len(choices)
    assert all(deal_options(item, 1) == item for item in items if not item.options)


@pytest.mark.parametrize(
    ("task", "row", "reason"),
    [
        ("qa", {"instruction": " ", "output": "a"}, "instruction: expected text, got ' '"),
        ("qa", {"instruction": "a", "output": "\ud800"}, "output: expected text that UTF-8 can hold"),
        ("qa", 3, "expected a JSON object, got 3"),
        ("qa", {"instruction": "what makes  a good PLAN?", "output": "b"}, "expected a question of its own"),
        ("mcqa", {"question": "Why?", "A": "E", "B": "I"}, "question: expected a question with lines A. and B."),
        ("mcqa", {"question": "a\nA. \nB.c", "A": "E", "B": "I"}, "question: expected a question with lines A. and B."),
        ("mcqa", {"question": "a\nA.b\nB.c", "A": "E"}, "B: expected a pole among E, I, S, N"),
        ("mcqa", {"question": "a\nA.b\nB.c", "A": "T", "B": "N"}, "expected the two poles of one dimension, got T"),
        ("16p", {"rewritten_en": "a", "category": ["E"]}, "category: expected a pole among"),
        ("roleplay", {"profile": "a", "reference_answer": "b"}, "personality: expected text, got None"),
    ],
)
def test_what_is_no_item_is_told_with_its_place_and_the_others_are_kept(task, row, reason, data):
    [file] = [*data.rglob({"qa": "qa*", "mcqa": "mcqa*", "16p": "16p*", "roleplay": "test*"}[task])]
    if task == "roleplay":
        rows = file.read_text()
        file.write_text(f'{rows}{json.dumps(row)}\n{{"profile"\n')
        place = f"{file}, line 3"
    else:
        rows = json.loads(file.read_text())
        entries = [*(rows if isinstance(rows, list) else rows.values()), row]
        file.write_text(json.dumps(entries))
        place = f"{file}, entry {len(entries)}"
    problems = []
    assert read_items(data, [task], "ESTJ", on_problem=problems.append)
    assert problems[0].startswith(f"{place}: ") and reason in problems[0]
    if task == "roleplay":
        assert problems[1] == f"{file}, line 4: expected JSON; Expecting ':' delimiter at column 11"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.unlink(), "data: expected .*mcqa.json or .jsonl, got neither"),
        (
            lambda file: file.write_text('{"1":\n {"question"'),
            "data: .*mcqa.json, line 2: expected JSON; Expecting ':'",
        ),
        (lambda file: file.write_text("{}"), "data: expected items of mcqa in .*mcqa.json, got none"),
        (lambda file: file.write_text("3"), "data: expected a list or an object in .*mcqa.json, got 3"),
        (lambda file: file.write_bytes(b"\xff"), "data: expected text in UTF-8, got "),
    ],
)
def test_a_file_that_holds_no_items_is_refused(change, message, data):
    change(data / "mbti/questions/mcqa.json")
    with pytest.raises(ValueError, match=message):
        read_items(data, ["mcqa"], on_problem=refuse)


def test_what_is_asked_for_and_is_not_there_is_named(data, tmp_path):
    with pytest.raises(ValueError, match=r"type: expected one of ESTJ \(those with questions in .*mcqa.*\), got INFJ"):
        read_items(data, ["qa"], "INFJ", on_problem=refuse)
    with pytest.raises(ValueError, match="tasks: expected some of qa, mcqa, 16p, roleplay, got 'mc'"):
        read_items(data, ["mc"], on_problem=refuse)
    with pytest.raises(ValueError, match="data: expected the folder of the paper's data release"):
        read_items(tmp_path / "none", ["qa"], on_problem=refuse)


def test_a_question_stays_on_its_side_whatever_the_order_task_and_type(data):
    items = read_items(data, TASKS, "ESTJ", on_problem=refuse)
    tune, report = split(items)
    assert tune and report and len(tune) + len(report) == len(items)
    assert split(items[::-1])[0] == tune[::-1]
    assert split(items, 0) == ([], items) and split(items, 1) == (items, [])
    other = replace(items[0], id="qa-INFJ:1", question=f" {items[0].question.upper()} ")
    assert (other in split([other])[0]) == (items[0] in tune)
    # as pairs are split: the questions that `mpg train` keeps are those of the lowest hashes
    pairs = [Pair(item.question, "a", "b", item.question, "") for item in items]
    kept = split_pairs(pairs, len(tune))[1]
    assert [pair.question for pair in kept] == [item.question for item in tune]


@pytest.mark.skipif("MPG_DATA" not in os.environ, reason="needs the paper's data")
def test_of_the_release_all_but_two_entries_are_items():
    problems = []
    counts = [len(read_items(os.environ["MPG_DATA"], MBTI_TASKS, type, on_problem=problems.append)) for type in TYPES]
    assert counts == [31 + 91 + 60, 27 + 91 + 60, 30 + 91 + 60]
    assert [problem.rpartition("/")[2] for problem in problems] == [
        "mcqa.json, entry 75: A, B: expected the two poles of one dimension, got T and N",
        "mcqa.json, entry 90: expected a question of its own, got that of an entry before it",
    ] * len(TYPES)
    assert len(read_items(os.environ["MPG_DATA"], ["roleplay"], on_problem=refuse)) == 60
