"""The paper's tasks as items: open questions, two-way choices, the 60 of 16Personalities, role-play.

Knows the layout of the paper's data release; nothing of models and judges. The texts are read from the folder that the
caller names, none is shipped.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mpg.files import parse_json, refuse_unreadable_text

DIMENSIONS = ("EI", "SN", "TF", "JP")
OPPOSITE = {poles[side]: poles[1 - side] for poles in DIMENSIONS for side in (0, 1)}
TYPES = ("ESTP", "INFJ", "ENTJ")  # those that the paper reports
MBTI_TASKS = ("qa", "mcqa", "16p")
TASKS = (*MBTI_TASKS, "roleplay")
QUESTIONS = Path("mbti", "questions")
ROLEPLAY = Path("roleplay")
CHOICE = re.compile(r"(?P<stem>.*?)\s*\nA\.(?P<A>.*)\nB\.(?P<B>.*)", re.DOTALL)
# What headers of files say of `deal_options`: files of another order are another job's
OPTION_ORDER = "by pole from A to Z, turned where the first byte of sha256('SEED ID') is odd"
# What role-play asks, of every method alike, and what adapters of role-play are to be trained on
ROLEPLAY_PROMPT = "You are this person: {profile}\nYour personality: {personality}\nSend one message to a friend."


@dataclass(frozen=True)
class Item:
    """One prompt of a task, and what its judges need.

    id         task and hash of the question: the same whatever the order of the file and whatever else is in it
    task       of `TASKS`
    prompt     what the user says; of mcqa with the options in the order of `options`
    question   decides on the side of `split`
    reference  an answer to compare with (qa, roleplay), or None
    options    of mcqa the text of each option by its pole: that of A, that of B
    about      qa: type; 16p: dimension, and the pole that agrees; mcqa: dimension, and stem, the question without its
               options; roleplay: profile, personality
    """

    id: str
    task: str
    prompt: str
    question: str
    reference: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)


def read_items(
    data: str | Path, tasks: Sequence[str], type: str | None = None, *, on_problem: Callable[[str], None]
) -> list[Item]:
    """The items of some tasks, in the order of `tasks` and of the files, each question once.

    data        the folder of the release, which holds mbti/questions and roleplay
    tasks       of `TASKS`
    type        of qa: whose questions and references, one of those in the folder
    on_problem  is called with file, entry or line, and reason, of whatever is no item; the others are kept

    Raises ValueError, naming the argument, for an unknown task, a file that is missing or no JSON at all, and for tasks
    without any item.
    """
    folder, items = Path(data), dict[str, Item]()
    if not folder.is_dir():
        raise ValueError(f"data: expected the folder of the paper's data release, got {str(data)!r}")
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"tasks: expected some of {', '.join(TASKS)}, got {task!r}")
        file, read = _file_of(folder, task, type), _READERS[task]
        count = len(items)
        for place, row in _rows(file, on_problem):
            try:
                if not isinstance(row, dict):
                    raise ValueError(f"expected a JSON object, got {row!r:.60}")
                item = read(row, type)
            except ValueError as error:
                on_problem(f"{place}: {error}")
                continue
            if item.id in items:
                on_problem(f"{place}: expected a question of its own, got that of an entry before it")
            items.setdefault(item.id, item)
        if len(items) == count:
            raise ValueError(f"data: expected items of {task} in {file}, got none")
    return list(items.values())


def split(items: Sequence[Item], tune_share: float = 0.5) -> tuple[list[Item], list[Item]]:
    """Items to tune on, and items to report. The hash of a question decides: it is on one side in every task and type,
    when the order changes or others come."""
    sides: tuple[list[Item], list[Item]] = ([], [])
    for item in items:
        sides[int(hash_of(item.question)[:8], 16) >= tune_share * 2**32].append(item)
    return sides


def deal_options(item: Item, seed: int) -> Item:
    """The item as a seed asks it, under every method alike: its options, if any, in `OPTION_ORDER`. Small models choose
    an option by its place."""
    if not item.options:
        return item
    is_turned = hashlib.sha256(f"{seed} {item.id}".encode()).digest()[0] % 2 == 1
    options = {pole: item.options[pole] for pole in sorted(item.options, reverse=is_turned)}
    lines = [f"{letter}.{text}" for letter, text in zip("AB", options.values(), strict=True)]
    return replace(item, prompt="\n".join([item.about["stem"], *lines]), options=options)


def items_hash(items: Sequence[Item]) -> str:
    """The hash of all that the items hold, in their order."""
    return hashlib.sha256(json.dumps([asdict(item) for item in items], sort_keys=True).encode()).hexdigest()


def question_of(item_id: str) -> str:
    """An item's id without the type that it is asked for. Types ask the same questions: one in several is one prompt,
    which a bootstrap draws or leaves out as a whole."""
    task, _, question = item_id.partition(":")
    return f"{task.split('-')[0]}:{question}"


def hash_of(question: str) -> str:
    """The hash of a question, whatever its spaces and capitals: the one that `mpg.train` splits pairs by."""
    return hashlib.sha256(" ".join(question.split()).casefold().encode()).hexdigest()


def _file_of(folder: Path, task: str, type: str | None) -> Path:
    if task == "qa":
        types = sorted(file.stem.removeprefix("qa_") for file in (folder / QUESTIONS).glob("qa_*.json*"))
        if type not in types:
            if not types:
                raise ValueError(f"data: expected questions of a type (qa_ESTP.json) in {folder / QUESTIONS}, got none")
            wanted = f"one of {', '.join(types)} (those with questions in {folder}; --tasks mcqa,16p has all)"
            raise ValueError(f"type: expected {wanted}, got {type}")
    names = {"qa": f"qa_{type}", "mcqa": "mcqa", "16p": "16personalities", "roleplay": "test"}
    place = folder / (ROLEPLAY if task == "roleplay" else QUESTIONS) / names[task]
    found = [file for suffix in (".json", ".jsonl") if (file := place.with_name(place.name + suffix)).is_file()]
    if not found:
        raise ValueError(f"data: expected {place}.json or .jsonl, got neither")
    return found[0]


def _rows(file: Path, on_problem: Callable[[str], None]) -> Iterator[tuple[str, Any]]:
    """What a file holds, and the place of each: objects a line, a list of them, or an object of them by name."""
    with refuse_unreadable_text("data", file):
        text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield f"{file}, line {number}", parse_json(line)
                except json.JSONDecodeError as error:
                    on_problem(f"{file}, line {number}: expected JSON; {error.msg} at column {error.colno}")
        return
    try:
        document = parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"data: {file}, line {error.lineno}: expected JSON; {error.msg} at column {error.colno}"
        ) from None
    if not isinstance(document, (list, dict)):
        raise ValueError(f"data: expected a list or an object in {file}, got {document!r:.60}")
    entries = enumerate(document, 1) if isinstance(document, list) else document.items()
    yield from ((f"{file}, entry {name}", row) for name, row in entries)


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name}: expected text, got {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: expected text that UTF-8 can hold, got {value!r:.60}") from None
    return value.replace("\\n", "\n").strip()  # the release writes some line ends as two characters


def _pole(row: dict[str, Any], name: str) -> str:
    pole = row.get(name)
    if not isinstance(pole, str) or pole not in OPPOSITE:
        raise ValueError(f"{name}: expected a pole among {', '.join(OPPOSITE)}, got {pole!r:.60}")
    return pole


def dimension_of(pole: str) -> str:
    """The dimension of a pole: "EI" of "E" and of "I"."""
    return next(dimension for dimension in DIMENSIONS if pole in dimension)


def _read_qa(row: dict[str, Any], type: str | None) -> Item:
    question = _text(row, "instruction")
    more = row.get("input")
    prompt = f"{question}\n{more.strip()}" if isinstance(more, str) and more.strip() else question
    return Item(
        f"qa-{type}:{hash_of(prompt)[:12]}", "qa", prompt, question, _text(row, "output"), about={"type": str(type)}
    )


def _read_mcqa(row: dict[str, Any], type: str | None) -> Item:
    prompt = _text(row, "question")
    match = CHOICE.fullmatch(prompt)
    if match is None or not all(match[name].strip() for name in ("stem", "A", "B")):
        raise ValueError(f"question: expected a question with lines A. and B., got {prompt!r:.60}")
    poles = _pole(row, "A"), _pole(row, "B")
    if OPPOSITE[poles[0]] != poles[1]:
        raise ValueError(f"A, B: expected the two poles of one dimension, got {poles[0]} and {poles[1]}")
    options = dict(zip(poles, (match["A"].strip(), match["B"].strip()), strict=True))
    about = {"dimension": dimension_of(poles[0]), "stem": match["stem"]}
    question = " ".join([match["stem"], *sorted(options.values())])  # half of the stems are one
    return Item(f"mcqa:{hash_of(question)[:12]}", "mcqa", prompt, question, options=options, about=about)


def _read_16p(row: dict[str, Any], type: str | None) -> Item:
    question, pole = _text(row, "rewritten_en"), _pole(row, "category")
    about = {"dimension": dimension_of(pole), "agrees": pole}
    return Item(f"16p:{hash_of(question)[:12]}", "16p", question, question, about=about)


def _read_roleplay(row: dict[str, Any], type: str | None) -> Item:
    about = {name: _text(row, name) for name in ("profile", "personality")}
    question = f"{about['profile']}\n{about['personality']}"
    prompt = ROLEPLAY_PROMPT.format(**about)
    return Item(
        f"roleplay:{hash_of(question)[:12]}", "roleplay", prompt, question, _text(row, "reference_answer"), about=about
    )


_READERS = {"qa": _read_qa, "mcqa": _read_mcqa, "16p": _read_16p, "roleplay": _read_roleplay}
