"""Preference pairs are read from every layout, and what cannot be trained on is refused with its place."""

from __future__ import annotations

import json
import re

import pytest
from huggingface_hub import HfApi

from mpg.demo import MODELS
from mpg.train import pairs
from mpg.train.pairs import SOURCES, data_hash, read_pairs, split

TRAITS = MODELS.parent / "traits"
DIMENSIONS = "Extraversion (E) - Introversion (I), Judging (J) - Perceiving(P)"
SOUND = {"prompt": "How are you?", "chosen": "Fine.", "rejected": "Bad."}


def lines(tmp_path, *rows, name="pairs.jsonl"):
    file = tmp_path / name
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return file


def say(role, text):
    return {"role": role, "content": text}


def preamble(pole):
    return f"The four dimensions: {DIMENSIONS}. Now you are the '{pole}' person, as such people are. "


def release_row(pole, question, chosen, rejected):
    prompt = f"{preamble(pole)}Please answer the questions:{question}"
    return {
        "prompt": prompt,
        "chosen": [say("user", prompt), say("assistant", chosen)],
        "rejected": [say("user", prompt), say("assistant", rejected)],
    }


@pytest.fixture
def release(tmp_path):
    """The paper's layout: which pole is chosen alternates."""
    folder = tmp_path / "mbti" / "preferences"
    folder.mkdir(parents=True)
    rows = [release_row("E", "What now?", "Out!", "In."), release_row("I", "And then?", "Home.", "Away!")]
    (folder / "e_i_train.json").write_text(json.dumps(rows[:1]))
    (folder / "e_i_test.json").write_text(json.dumps(rows[1:]))
    (folder / "j_p_test.json").write_text(json.dumps([release_row("P", "When?", "Later.", "At noon.")]))
    return tmp_path


def read(data, *arguments, **how):
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in read_pairs(data, *arguments, **how)]


def test_text_is_left_as_text_and_messages_as_messages(tmp_path):
    assert read(lines(tmp_path, SOUND, "", SOUND)) == [("How are you?", "Fine.", "Bad.")] * 2
    talk = {
        "prompt": [say("system", "Be kind."), say("user", "Hello")],
        "chosen": [say("assistant", "Hi")],
        "rejected": [say("assistant", "What?")],
    }
    (pair,) = read_pairs(lines(tmp_path, talk))
    assert (pair.chosen, pair.rejected) == ("Hi", "What?")
    assert pair.columns() == talk


def test_a_list_in_json_is_read_as_lines_are(tmp_path):
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps([SOUND], indent=1))
    assert read(file) == read(lines(tmp_path, SOUND))


def test_answers_that_repeat_their_prompt_are_answers_alone(tmp_path):
    row = {
        "prompt": "Speak.",
        "chosen": [say("user", "Speak."), say("assistant", "Yes.")],
        "rejected": [say("user", "Speak."), say("assistant", "No.")],
    }
    assert read(lines(tmp_path, row)) == [([say("user", "Speak.")], "Yes.", "No.")]


def test_a_prompt_that_answers_alone_say_is_what_they_begin_with(tmp_path):
    talk = [say("system", "Be kind."), say("user", "Hello"), say("assistant", "Hi"), say("user", "So?")]
    row = {"chosen": [*talk, say("assistant", "Yes.")], "rejected": [*talk, say("assistant", "No.")]}
    assert read(lines(tmp_path, row)) == [(talk, "Yes.", "No.")]
    begin = "\n\nHuman: How are you?\n\nAssistant:"
    for answers in (
        (" Fine, thanks.", " Find out."),
        (" Fine.", "\nNo."),
        (" Good.", " Goodbye."),
        (" Über.", " Übel."),
    ):
        row = {"chosen": begin + answers[0], "rejected": begin + answers[1]}
        assert read(lines(tmp_path, row)) == [(begin, *answers)]


def test_what_trl_itself_takes_for_the_prompt_is_the_same_where_words_end_there():
    trl = pytest.importorskip("trl")
    row = {"chosen": "Q: Why? A: So.", "rejected": "Q: Why? A: No."}
    assert pairs._split_prompt("line 1", **row) == trl.extract_prompt(row)
    row = {name: [say("user", "Why?"), say("assistant", text)] for name, text in row.items()}
    assert pairs._split_prompt("line 1", **row) == trl.extract_prompt(row)


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ("Yes.", "No.", "expected a prompt, or answers that begin with one and the same, got 'Yes.' and 'No.'"),
        ("Yes.", "Yet.", "expected a prompt, or answers that begin with one"),
        ("Why? Yes.", "Why?", "expected text for rejected, got ''"),
        ("Why? Yes.", "Why? Yes.", "expected two different answers, got equal ones"),
        ([say("user", "a")], [say("user", "b")], "expected a prompt, or answers that begin with one"),
        ([], [], "expected a prompt, or answers that begin with one"),
        ("Yes.", [say("user", "Why?"), say("assistant", "No.")], "expected text or messages for both answers, got"),
        (1, 2, "expected text or messages for both answers, got 1 and 2"),
        ([say("user", "Why?")] * 2, [say("user", "Why?"), say("user", "b")], "expected chosen to end in its one"),
        (
            [say("user", "Why?"), say("assistant", "Yes.")],
            [say("user", "Why?"), say("assistant", "Yes.")],
            "expected two different answers, got equal ones",
        ),
    ],
)
def test_answers_that_say_no_prompt_are_refused_with_their_place(chosen, rejected, message, tmp_path):
    file = lines(tmp_path, {"chosen": chosen, "rejected": rejected})
    with pytest.raises(ValueError, match=rf"^{file}, line 1: {re.escape(message)}"):
        read_pairs(file)


def test_the_poles_of_a_dimension_are_its_pairs_either_way_round():
    outward, inward = read(TRAITS, "E"), read(TRAITS, "I")
    assert len(outward) == len((TRAITS / "ei.jsonl").read_text().splitlines())
    assert outward == [(prompt, rejected, chosen) for prompt, chosen, rejected in inward]
    assert [message["role"] for message in outward[0][0]] == ["user"]


@pytest.mark.parametrize("pole", ["E", "I"])
@pytest.mark.parametrize("keep", [False, True])
def test_the_release_is_swapped_to_the_pole_and_its_preamble_stripped_or_the_poles(pole, keep, release):
    before = f"{preamble(pole)}Please answer the questions:" if keep else ""
    expected = [("And then?", "Home.", "Away!"), ("What now?", "In.", "Out!")]
    if pole == "E":
        expected = [(question, rejected, chosen) for question, chosen, rejected in expected]
    expected = [([say("user", before + question)], chosen, rejected) for question, chosen, rejected in expected]
    pairs = read_pairs(release, pole, keep_preamble=keep)
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == expected
    assert [pair.question for pair in pairs] == ["And then?", "What now?"]


def test_a_saved_dataset_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list([SOUND])
    saved.save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == [tuple(SOUND.values())]
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(tmp_path / "parts")
    assert read(tmp_path / "parts") == [tuple(SOUND.values())]
    datasets.DatasetDict(test=saved).save_to_disk(tmp_path / "no_train")
    with pytest.raises(ValueError, match=r"^data: expected a part 'train' in .*no_train, got test"):
        read(tmp_path / "no_train")


def test_a_dataset_of_the_hub_is_read_and_one_that_cannot_be_is_refused(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "no/train":
            raise ConnectionError("no network")
        return [SOUND]

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, timeout: asked.append(name))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("some/pairs") == [tuple(SOUND.values())]
    assert asked == ["some/pairs", ("some/pairs", "train")]
    with pytest.raises(ValueError, match=rf"^data: expected {SOURCES}, got no/train: ConnectionError: no network"):
        read("no/train")


def test_what_is_not_there_is_refused_after_one_question_to_the_hub_and_none_about_paths(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    asked = []

    def dataset_info(self, name, timeout):
        asked.append(name)
        raise ConnectionError("no network\nand more")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", None)
    for name in ("./nosuch", "/no/such", "~/such", "../a/b", "here/nosuch", tmp_path / "nosuch"):
        with pytest.raises(ValueError, match=rf"^data: expected {SOURCES}, got '.*', which is no file or folder$"):
            read(name)
    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    for name in ("nosuch", "no/such"):
        with pytest.raises(ValueError, match=rf"got '{name}', which is .* the hub: ConnectionError: no network \(with"):
            read(name)
    assert asked == ["nosuch", "no/such"]
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: [SOUND])
    assert read("in/cache") == [tuple(SOUND.values())]
    assert len(asked) == 2


def test_identical_sides_are_left_out_where_that_is_asked(tmp_path):
    file = lines(tmp_path, {**SOUND, "chosen": "Bad."}, SOUND)
    assert len(read(file, drop_identical=True)) == 1
    file.write_text(json.dumps({**SOUND, "chosen": "Bad."}))
    with pytest.raises(ValueError, match=r"^data: expected pairs to train on, got none in"):
        read(file, drop_identical=True)


@pytest.mark.parametrize("content", ["", "[]", "\n\n"])
def test_no_pairs_are_refused(content, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"^data: expected pairs to train on, got none in"):
        read(file)


def test_a_folder_without_files_and_bytes_that_are_no_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^data: expected files of pairs \(.jsonl, .json\) in .*, got none"):
        read(tmp_path)
    (tmp_path / "pairs.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"^data: expected text in UTF-8, got .*pairs.jsonl"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["none.jsonl", "none.json"])
def test_a_file_that_is_not_there_is_refused_without_asking_the_hub(name, tmp_path):
    with pytest.raises(ValueError, match=rf"^data: expected a file that can be read, got .*{name}: No such file"):
        read(tmp_path / name)


@pytest.mark.parametrize("pole", ["X", "EI", "E,I", "e", None])
def test_a_pole_that_is_not_there_is_refused_and_so_are_two(pole, release):
    for data, poles in ((TRAITS, "E, F, I, J, N, P, S, T"), (release, "E, I, J, P")):
        with pytest.raises(
            ValueError, match=rf"^pole: expected one of {poles} \(an adapter learns one\), got {pole!r}"
        ):
            read(data, pole)


def test_a_pole_of_pairs_that_have_none_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"^pole: expected none, since .* has chosen and rejected answers alone, got 'E'"
    ):
        read(lines(tmp_path, SOUND), "E")


def test_the_held_out_questions_are_on_one_side_whatever_the_order_the_pole_and_their_case(tmp_path):
    rows = [{"question": f"Question {n}?", "A": f"a{n}", "B": f"b{n}"} for n in range(30)]
    rows += [{"question": f"question  {n}?", "A": f"c{n}", "B": f"d{n}"} for n in range(30)]
    file = lines(tmp_path, *rows)
    trained, held_out = split(read_pairs(file, "A"), 7)
    asked = [{pair.question.lower().replace("  ", " ") for pair in side} for side in (trained, held_out)]
    assert [len(questions) for questions in asked] == [23, 7]
    assert (len(trained), len(held_out)) == (46, 14)
    assert not asked[0] & asked[1]
    for pole, other in (("B", rows), ("A", rows[::-1]), ("A", [row for row in rows if row["question"] in asked[1]])):
        again = {pair.question for pair in split(read_pairs(lines(tmp_path, *other, *rows[:30]), pole), 7)[1]}
        assert {question.lower().replace("  ", " ") for question in again} == asked[1]
    with pytest.raises(ValueError, match=r"^held_out: expected fewer than the 30 questions that there are, got 30"):
        split(read_pairs(lines(tmp_path, *rows[:30]), "A"), 30)


def test_the_hash_is_of_what_is_taught(tmp_path):
    pairs = read_pairs(TRAITS, "E")
    assert data_hash(pairs) == data_hash(read_pairs(TRAITS / "ei.jsonl", "E"))
    assert len({data_hash(pairs), data_hash(pairs[1:]), data_hash(read_pairs(TRAITS, "I"))}) == 3
