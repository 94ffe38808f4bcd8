"""Preference pairs: read from what they are kept in, checked one by one, split by question.

Knows the layouts of data; nothing of models and tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

from mpg.files import parse_json, refuse_unreadable_text

SUFFIXES = (".jsonl", ".json")
RELEASE = Path("mbti", "preferences")  # where the paper's data release keeps its pairs
PREAMBLE = re.compile(
    r"(?P<preamble>.*?you are the '(?P<pole>\w)' .*?Please answer the questions: *)(?P<question>.*)", re.DOTALL
)
POLES = re.compile(r"\((\w)\) - \w+ ?\((\w)\)")  # as the preamble names them: Extraversion (E) - Introversion (I)
SAVED = ("dataset_info.json", "dataset_dict.json")  # what `datasets` saves beside its files
COLUMNS = ("prompt", "chosen", "rejected")
SOURCES = "a file, a folder or a dataset of the hub"
HUB_SECONDS = 5.0  # that it may take to answer

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Pair:
    """A prompt and two answers.

    prompt    text that is taken verbatim, or the messages of a conversation
    question  what decides on which side of the split a pair is
    place     where it was read, for messages
    """

    prompt: Prompt
    chosen: str
    rejected: str
    question: str
    place: str

    def columns(self) -> dict[str, Any]:
        """The pair as trl takes it."""
        answers = {"chosen": self.chosen, "rejected": self.rejected}
        if isinstance(self.prompt, str):
            return {"prompt": self.prompt, **answers}
        said = {name: [{"role": "assistant", "content": answer}] for name, answer in answers.items()}
        return {"prompt": self.prompt, **said}


def read_pairs(
    data: str | Path, pole: str | None = None, *, keep_preamble: bool = False, drop_identical: bool = False
) -> list[Pair]:
    """The pairs that teach one attribute.

    data            a file of JSON Lines or a JSON list, a folder of such files, the paper's data release, a dataset
                    that `datasets` saved, or the name of one on the hub, of which the part `train` is taken. A row has
                    prompt, chosen and rejected, text or messages, as trl has them, of which the prompt may be left out
                    where both answers begin with it; or question and an answer per pole
    pole            which answers are chosen, where the data has poles
    keep_preamble   of the release: leave the persona before the question, that of the pole. Else the question is alone
    drop_identical  leave out pairs of equal answers, which else are refused

    Raises ValueError that names the argument, or the place of the first pair that cannot be trained on.
    """
    rows = list(_rows(data))
    personas = [match for _, row in rows if (match := _persona(row))]
    preambles = {match["pole"]: match["preamble"] for match in personas}
    if keep_preamble and rows and not preambles:
        raise ValueError(
            f"keep_preamble: expected False but of the paper's release, as {data} has no preamble, got True"
        )
    pairs: list[Pair] = []
    poles: set[str] = set()
    for place, row in rows:
        question, prompt, answers = _sides(place, row)
        poles |= answers.keys() - set(COLUMNS)
        if keep_preamble and _persona(row) and pole in answers:
            prompt = [{"role": "user", "content": preambles[pole] + question}]
        side = "chosen" if "chosen" in answers else pole
        if side not in answers:
            continue
        other = next(text for name, text in answers.items() if name != side)
        pair = Pair(prompt, answers[side], other, question, place)
        is_sound = _is_sound(pair, drop_identical)
        if pairs and isinstance(pair.prompt, str) != isinstance(pairs[0].prompt, str):
            raise ValueError(f"{place}: expected text or messages as in {pairs[0].place}, got the other")
        if is_sound:
            pairs.append(pair)
    if poles and pole not in poles:
        raise ValueError(f"pole: expected one of {', '.join(sorted(poles))} (an adapter learns one), got {pole!r}")
    if pole is not None and not poles and rows:
        raise ValueError(f"pole: expected none, since {data} has chosen and rejected answers alone, got {pole!r}")
    if not pairs:
        raise ValueError(f"data: expected pairs to train on, got none in {data}")
    return pairs


def split(pairs: Sequence[Pair], held_out: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and those of `held_out` questions, which the questions' hashes choose: a question stays on its
    side when the order changes or others come, for every pole of its dimension."""
    hashes = {pair.question: _hash(" ".join(pair.question.split()).casefold()) for pair in pairs}
    chosen = sorted(set(hashes.values()))[:held_out]
    if held_out >= len(set(hashes.values())):
        raise ValueError(f"held_out: expected fewer than the {len(hashes)} questions that there are, got {held_out}")
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in pairs:
        sides[hashes[pair.question] in chosen].append(pair)
    return sides


def data_hash(pairs: Iterable[Pair]) -> str:
    """The hash of what pairs teach, in their order."""
    return _hash(json.dumps([pair.columns() for pair in pairs], sort_keys=True))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _rows(data: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows, and the place of each. Of all files: a line that does not parse is found before any training."""
    path = Path(data)
    if data == "":  # which a path would take for the working directory
        raise ValueError(f"data: expected {SOURCES}, got ''")
    if path.is_dir() and not any((path / name).is_file() for name in SAVED):
        folder = path / RELEASE if (path / RELEASE).is_dir() else path
        files = sorted(file for suffix in SUFFIXES for file in folder.glob(f"*{suffix}"))
        if not files:
            raise ValueError(f"data: expected files of pairs ({', '.join(SUFFIXES)}) in {folder}, got none")
    elif path.is_file() or path.suffix in SUFFIXES:  # no dataset of the hub is called so
        files = [path]
    else:
        yield from _dataset_rows(str(data))
        return
    for file in files:
        for place, row in _file_rows(file):
            if not isinstance(row, dict):
                raise ValueError(f"{place}: expected a JSON object, got {row!r:.60}")
            yield place, row


def _file_rows(file: Path) -> Iterator[tuple[str, Any]]:
    with refuse_unreadable_text("data", file):
        text = file.read_text(encoding="utf-8-sig")
    try:
        if text.lstrip().startswith("["):
            yield from ((f"{file}, entry {number}", row) for number, row in enumerate(parse_json(text), 1))
            return
        number = 0
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{file}, line {number}", parse_json(line)
    except json.JSONDecodeError as error:
        line_number = error.lineno if text.lstrip().startswith("[") else number
        raise ValueError(f"{file}, line {line_number}: expected JSON; {error.msg} at column {error.colno}") from None


def _dataset_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    is_saved = Path(source).is_dir()
    if not is_saved and not datasets.config.HF_HUB_OFFLINE:  # offline its cache is searched at once
        _check_on_hub(source)
    try:
        found = datasets.load_from_disk(source) if is_saved else datasets.load_dataset(source, split="train")
    except Exception as error:  # its types are those of a file system and of an HTTP client
        raise ValueError(f"data: expected {SOURCES}, got {source}: {type(error).__name__}: {error}") from error
    if isinstance(found, dict):
        if "train" not in found:
            raise ValueError(f"data: expected a part 'train' in {source}, got {', '.join(found)}")
        found = found["train"]
    yield from ((f"{source}, row {number}", row) for number, row in enumerate(found))


def _check_on_hub(name: str) -> None:
    """Refuse what the hub, asked once, does not have. A download would be tried again for half a minute."""
    owner, slash, _ = name.partition("/")
    why = "no file or folder"
    try:
        if not (slash and Path(owner or "/").is_dir()):
            HfApi().dataset_info(name, timeout=HUB_SECONDS)
            return
    except HFValidationError:  # nor can a dataset be called so
        pass
    except Exception as error:  # its types are those of an HTTP client, another in every version of the hub's package
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        why += f", nor found on the hub: {reason} (with HF_HUB_OFFLINE=1 its cache is searched instead)"
    raise ValueError(f"data: expected {SOURCES}, got {name!r}, which is {why}")


def _persona(row: dict[str, Any]) -> re.Match[str] | None:
    """The parts of a prompt of the paper's release, which opens with a persona."""
    return PREAMBLE.fullmatch(row["prompt"]) if isinstance(row.get("prompt"), str) else None


def _sides(place: str, row: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """A row's question, its prompt and its two answers by pole, or by `chosen` and `rejected` where it has no poles."""
    if "question" in row and not row.keys() & set(COLUMNS):
        if len(row) != 3:
            raise ValueError(f"{place}: expected question and an answer for each of two poles, got {_keys(row)}")
        answers = {name: text for name, text in row.items() if name != "question"}
        return row["question"], [{"role": "user", "content": row["question"]}], answers
    if "prompt" not in row and row.keys() >= set(COLUMNS[1:]):
        row = {**row, **_split_prompt(place, row["chosen"], row["rejected"])}
    if missing := [name for name in COLUMNS if name not in row]:
        wanted = "prompt, chosen and rejected (or question and an answer per pole)"
        raise ValueError(f"{place}: expected {wanted}, got no {missing[0]} among {_keys(row)}")
    prompt = row["prompt"]
    question = prompt if isinstance(prompt, str) else json.dumps(prompt)
    if isinstance(row["chosen"], list) and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    answers = {name: _last_answer(place, name, row[name]) for name in COLUMNS[1:]}
    if match := _persona(row):
        question, own = match["question"], match["pole"]
        prompt = [{"role": "user", "content": question}]
        one, other = next((poles for poles in POLES.findall(match["preamble"]) if own in poles), (own, f"not {own}"))
        answers = {own: answers["chosen"], other if own == one else one: answers["rejected"]}
    return question, prompt, answers


def _split_prompt(place: str, chosen: Any, rejected: Any) -> dict[str, Any]:
    """The columns of a pair whose prompt is what its answers begin with alike, as trl takes it: messages, or words."""
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
        raise ValueError(
            f"{place}: expected text or messages for both answers, got {chosen!r:.60} and {rejected!r:.60}"
        )
    if chosen == rejected and isinstance(chosen, str):  # whatever of it is the prompt
        return {"prompt": chosen, "chosen": chosen, "rejected": rejected}
    most = min(len(chosen), len(rejected)) - isinstance(chosen, list)  # of messages the last is an answer
    same = next((at for at in range(most) if chosen[at] != rejected[at]), max(most, 0))
    if isinstance(chosen, str):
        if re.match(r"\w", chosen[same:]) or re.match(r"\w", rejected[same:]):  # a word goes on
            same = len(re.sub(r"\w*$", "", chosen[:same]))
        same -= chosen[:same].endswith(" ")  # which is the answers', as tokenizers have it
    if not same:
        wanted = "a prompt, or answers that begin with one and the same"
        raise ValueError(f"{place}: expected {wanted}, got {chosen!r:.60} and {rejected!r:.60}")
    return {"prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}


def _last_answer(place: str, name: str, answer: Any) -> Any:
    """The text of an answer; of messages that of the last, after the prompt, which may be repeated before it."""
    if not isinstance(answer, list):
        return answer
    roles = [message.get("role") if isinstance(message, dict) else None for message in answer]
    if roles.count("assistant") != 1 or roles[-1] != "assistant":
        raise ValueError(f"{place}: expected {name} to end in its one message of the assistant, got {roles}")
    return answer[-1].get("content")


def _is_sound(pair: Pair, drop_identical: bool) -> bool:
    """Whether a pair is to be trained on. Raises ValueError with its place where it cannot be."""
    for name, text in (("prompt", pair.question), ("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{pair.place}: expected text for {name}, got {text!r}")
    if not isinstance(pair.prompt, str):
        is_list = isinstance(pair.prompt, list) and bool(pair.prompt)
        if not is_list or not all(isinstance(message, dict) for message in pair.prompt):
            raise ValueError(f"{pair.place}: expected text or messages for prompt, got {pair.prompt!r:.60}")
    try:
        json.dumps(pair.columns(), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{pair.place}: expected text that UTF-8 can hold, got {pair.columns()!r:.200}") from None
    is_identical = pair.chosen.strip() == pair.rejected.strip()
    if is_identical and not drop_identical:
        raise ValueError(f"{pair.place}: expected two different answers, got equal ones; drop_identical drops them")
    return not is_identical


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(map(str, row)) or "nothing"
