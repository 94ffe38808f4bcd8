"""Answers and the file they are in: resumed, torn, of another job, on a full disk."""

from __future__ import annotations

import json

import pytest

from full_disk import small_files
from mpg.evaluate.answers import write_answers
from mpg.evaluate.judging import write_scores
from mpg.evaluate.records import RecordsError, open_records, read_records
from mpg.evaluate.tasks import Item
from mpg.paper.methods import METHODS, PAPERS_DRAW, SINGLE_METHODS

ITEMS = [Item(f"qa:{index}", "qa", f"How do you spend day {index}?", str(index)) for index in range(3)]
CHOICES = [
    Item(f"mcqa:{index}", "mcqa", "", stem, options={"I": "stay in", "E": "go out"},
         about={"dimension": "EI", "stem": stem})
    for index, stem in enumerate(["On a free day you", "In the evening you"])
]  # fmt: skip
SHORT = {"seeds": (0, 1), "max_new_tokens": 6}


@pytest.mark.parametrize("method", [method for method in METHODS if not method.endswith("-specialized")])
def test_every_method_writes_a_row_for_every_item_seed_and_attribute_once(method, model, tmp_path):
    few = {"tries": 2} if method == "seq-rs" else {}
    file, seen = tmp_path / "answers.jsonl", []
    rows = write_answers(
        file, model, ITEMS, method, "E=1,T=1", **SHORT, **few, on_row=lambda *counts: seen.append(counts)
    )
    attributes = ["E", "T"] if method in SINGLE_METHODS else [""]
    assert [(row["item"], row["seed"], row["attribute"]) for row in rows] == [
        (item.id, seed, name) for item in ITEMS for seed in (0, 1) for name in attributes
    ]
    assert seen == [(done, len(rows)) for done in range(len(rows) + 1)]
    before = file.read_bytes()
    assert write_answers(file, model, ITEMS, method, "E=1,T=1", **SHORT, **few) == rows
    assert file.read_bytes() == before
    header, written = read_records(file)
    assert sorted(written, key=json.dumps) == sorted(rows, key=json.dumps)
    assert (header["method"], header["weights"]) == (method, {} if method == "base" else {"E": 1, "T": 1})
    assert method == "base" or header["models"]["E"]["lora_dropout"] == 0


def test_a_torn_file_goes_on_to_the_texts_of_one_that_was_not(model, tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    rows = write_answers(whole, model, ITEMS, "dpo-single", "E=1,T=1", **SHORT)
    lines = whole.read_bytes().splitlines(keepends=True)
    for cut in (b"".join(lines[:4]) + lines[4][:30], lines[0][:20], b""):
        torn.write_bytes(cut)
        again = write_answers(torn, model, ITEMS, "dpo-single", "E=1,T=1", **SHORT)
        assert [row["text"] for row in again] == [row["text"] for row in rows]
        assert sorted(json.loads(line)["text"] for line in torn.read_text().splitlines()[1:]) == sorted(
            row["text"] for row in rows
        )


def test_options_are_asked_and_judged_in_the_order_that_their_row_tells(model, tmp_path):
    how = {"seeds": (0, 1, 2), "max_new_tokens": 6}
    rows = write_answers(tmp_path / "base", model, CHOICES, "base", **how)
    prompts = []
    for row in rows:
        item = CHOICES[int(row["item"][-1])]
        a, b = (item.options[pole] for pole in row["option_order"])
        prompts.append(f"{item.about['stem']}\nA.{a}\nB.{b}")
        told = model.generate(
            prompts[-1], target="base", sampler="direct", seed=row["drawn_with"], max_new_tokens=6, **PAPERS_DRAW
        )
        assert told.text == row["text"]
    assert {tuple(row["option_order"]) for row in rows} == {("E", "I"), ("I", "E")}
    others = write_answers(tmp_path / "scr", model, CHOICES, "scr", "E=1,T=1", **how)
    assert [row["option_order"] for row in others] == [row["option_order"] for row in rows]
    lines = (tmp_path / "base").read_text().splitlines(keepends=True)
    (tmp_path / "base").write_text("".join(lines[:3]) + lines[3][:20])
    assert [row["option_order"] for row in write_answers(tmp_path / "base", model, CHOICES, "base", **how)] == [
        row["option_order"] for row in rows
    ]

    class Reader:
        def __init__(self):
            self.identity = {"judge": "reader"}

        def score(self, asked, on_score):
            assert [item.prompt for item, _ in asked] == prompts
            return []

    write_scores(tmp_path / "scores", Reader(), CHOICES, read_records(tmp_path / "base")[0], rows)
    header = json.loads(lines[0])
    assert header.pop("option_order")
    (tmp_path / "base").write_text(json.dumps(header) + "\n" + "".join(lines[1:]))
    with pytest.raises(RecordsError, match="holds another job: option_order is None"):
        write_answers(tmp_path / "base", model, CHOICES, "base", **how)


def test_a_text_depends_upon_neither_the_other_items_nor_the_other_seeds(model, tmp_path):
    rows = write_answers(tmp_path / "all", model, ITEMS, "scr", "E=1,T=1", **SHORT)
    [alone] = write_answers(tmp_path / "one", model, ITEMS[2:], "scr", "E=1,T=1", seeds=(1,), max_new_tokens=6)
    assert alone["text"] == rows[-1]["text"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "E=1"}, r"weights is \{'E': 1.0, 'T': 1.0\}, asked is \{'E': 1.0\}"),
        ({"method": "mod"}, "method is 'scr', asked is 'mod'"),
        ({"max_new_tokens": 7}, r"options is \{'max_new_tokens': 6\}, asked is \{'max_new_tokens': 7\}"),
        ({"items": ITEMS[:2]}, "its items are others$"),
        ({"items": ITEMS[:2], "chosen_by": {"limit": 2, "held_out": False}}, r"others \(limit is None, asked is 2\)$"),
    ],
)
def test_the_file_of_another_job_is_refused_and_what_differs_is_named(change, message, model, tmp_path):
    asked = {"items": ITEMS, "method": "scr", "weights": "E=1,T=1", "chosen_by": {"limit": None}, **SHORT}
    write_answers(tmp_path / "file", model, **asked)
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(ValueError, match=f"out: expected a file of its own, but .* holds another job: .*{message}"):
        write_answers(tmp_path / "file", model, **{**asked, **change})
    assert (tmp_path / "file").read_bytes() == before


@pytest.mark.parametrize("chosen_by", [None, 4, ["limit"], {"limit": 9}])
def test_other_items_are_told_whatever_a_header_says_that_they_were_chosen_by(chosen_by, tmp_path):
    file = tmp_path / "file"
    file.write_text(json.dumps({"items": "a", "chosen_by": chosen_by}) + "\n")
    told = r" \(limit is 9, asked is 4\)" if isinstance(chosen_by, dict) else ""
    with (
        pytest.raises(RecordsError, match=f"holds another job: its items are others{told}$"),
        open_records(file, {"items": "b", "chosen_by": {"limit": 4, "held_out": False}}),
    ):
        pass


def test_other_weights_of_a_model_are_another_job(tmp_path):
    from mpg.evaluate.answers import _describe

    for name, value in (("one", b"a"), ("other", b"b")):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "model.safetensors").write_bytes(bytes(3 << 20) + value)
    one, other = (_describe(tmp_path / name / "model") for name in ("one", "other"))
    assert one["name"] == other["name"] == "model" and one["sha256"] != other["sha256"]


def test_of_a_method_that_lacks_what_it_needs_no_file_stays(model, tmp_path):
    with pytest.raises(ValueError, match="method: 'scr-specialized' needs a specialised base"):
        write_answers(tmp_path / "file", model, ITEMS, "scr-specialized", "E=1", **SHORT)
    with pytest.raises(ValueError, match="weights: "):
        write_answers(tmp_path / "file", model, ITEMS, "dpo-single", **SHORT)
    assert not (tmp_path / "file").exists()


def test_a_line_that_does_not_parse_is_named(tmp_path):
    file = tmp_path / "file"
    for line, message in (('{"a"', "expected JSON; Expecting ':' delimiter at column 5"), ("3", "expected a JSON obj")):
        file.write_text(f'{{"what": 1}}\n{line}\n{{"b": 1}}\n')
        with pytest.raises(ValueError, match=f"^out: {file}, line 2: {message}"), open_records(file, {"what": 1}):
            pass
        with pytest.raises(ValueError, match=f"^out: {file}, line 2: {message}"):
            read_records(file)
    file.write_text("")
    with pytest.raises(ValueError, match=r"^out: expected a header and rows, got the empty file "):
        read_records(file)
    with pytest.raises(ValueError, match="out: expected a file that can be read, got "):
        read_records(tmp_path / "none")


def test_two_processes_do_not_write_one_file(tmp_path):
    with open_records(tmp_path / "file", {"what": 1}) as records:
        records.append({"row": 1})
        with pytest.raises(ValueError, match="is being written now"), open_records(tmp_path / "file", {"what": 1}):
            pass


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("", "expected a file that can be written, got .*: Is a directory"),
        ("file/below", "expected a file that can be written, got .*: File exists"),
        ("/dev/full", "expected a file of its own, got /dev/full, which is none"),
    ],
)
def test_what_cannot_be_written_is_refused(place, message, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"out: {message}"), open_records(tmp_path / place, {}):
        pass


def test_a_disk_that_fills_leaves_whole_rows_from_which_the_job_goes_on(tmp_path):
    file = tmp_path / "file"
    refused = pytest.raises(RecordsError, match=r"^out: expected a file that can be written")
    with refused, small_files(100), open_records(file, {"what": 1}) as records:
        for number in range(100):
            records.append({"row": number})
    header, rows = read_records(file)
    assert header == {"what": 1} and rows == [{"row": number} for number in range(len(rows))]
    assert file.read_bytes().endswith(b"}\n") and 80 < file.stat().st_size <= 100
    with open_records(file, {"what": 1}) as records:
        records.append({"row": "next"})
    assert read_records(file)[1] == [*rows, {"row": "next"}]
