"""A table of models: answers by every method, scores by every judge, and the table's sections, in files that resume.

Knows the order of things and the layout of the folder:

    OUT/TARGET/answers/METHOD.jsonl         texts (`answers`)
    OUT/TARGET/scores/JUDGE/METHOD.jsonl    scores (`judging`), those of measures too
    OUT/TARGET/choices/LAW.jsonl            log-probabilities of options (`choices`)
    OUT/replies/JUDGE.jsonl                 raw replies of endpoints
    OUT/table.json, OUT/table.md
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from mpg.evaluate import tradeoff
from mpg.evaluate.answers import key_of, write_answers
from mpg.evaluate.choices import Choice, choice_of, write_choices
from mpg.evaluate.judges.classifier import ClassifierJudge
from mpg.evaluate.judges.endpoint import EndpointJudge
from mpg.evaluate.judging import Judge, hash_of_text, parse_rate, write_scores
from mpg.evaluate.metrics import Metrics
from mpg.evaluate.records import RecordsError, read_records
from mpg.evaluate.tables import (
    CHOICE_COLUMNS,
    COST_COLUMNS,
    METRIC_COLUMNS,
    Score,
    Section,
    agreement,
    cost_of,
    judged,
    not_run,
    render,
    tabulate,
)
from mpg.evaluate.tasks import TASKS, Item, deal_options, question_of
from mpg.files import whole_file
from mpg.model import Model
from mpg.options import has_option
from mpg.paper.methods import sampler_of

LAWS = ("base", "geometric", "arithmetic")  # of choices
COST_NOTES = (
    "s/sequence, tok/s: from when a text has a place in the batch to its last token",
    "forwards/token: of all models / tokens",
    "reject rate: rounds whose full chunk was rejected / rounds (scr), candidates rejected / tried (token-rs, seq-rs)",
)

OnRow = Callable[[str, int, int], None]
# Scores by method, target and `key_of` a text
Scored: TypeAlias = dict[tuple[str, str, tuple[str, int, str]], Mapping[str, "float | None"]]


@dataclass(frozen=True)
class Target:
    """What is to be shown: a type, or a combination of weights.

    name       of its folder: the type, or the task
    poles      that judges of traits look for
    chosen_by  the caller's arguments that chose the items
    """

    name: str
    items: Sequence[Item]
    weights: Mapping[str, float]
    poles: tuple[str, ...] = ()
    chosen_by: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Evaluation:
    """One run of everything, into a folder.

    rubric   of `endpoint.CRITERIA`
    judges   of every target, the same ones in one order
    metrics  scores what needs no judge
    way      of `choices.WAYS`, where the items have options
    options  of `mpg.paper.methods.answer`; a method gets those that its sampler has
    on_row   is called with what is being done, how many texts are done and of how many
    """

    model: Model
    targets: Sequence[Target]
    methods: Sequence[str]
    out: Path
    rubric: str
    judges: Sequence[Sequence[Judge]]
    metrics: Metrics
    seeds: Sequence[int] = (0,)
    way: str = "texts"
    batch_size: int = 16
    options: Mapping[str, Any] = field(default_factory=dict)
    on_row: OnRow = lambda what, done, total: None
    on_note: Callable[[str], None] = print

    def run(self, title: str, reference: str) -> list[ValueError]:
        """Do what is not done yet, and write the table of what there is.

        A method that lacks what it needs, or cannot go on, has its reason in the table, and the others run; so do the
        other judges where one fails.

        out: the errors of judges that failed, or left an answer without a reply

        Raises ValueError for a file of another job, or that cannot be written, and for prompts that leave too few
        positions, with which no method could answer.
        """
        for target in self.targets:
            asked = [deal_options(item, seed).prompt for item in target.items for seed in self.seeds]
            self.model.read(
                [*dict.fromkeys(asked)], sampler="direct", target="base", mixture_span="token",
                max_new_tokens=self.options.get("max_new_tokens"),
            )  # fmt: skip
        reasons: dict[str, str] = {}
        for target in self.targets:
            for method in self.methods:
                with _caught() as errors:
                    self._answer(target, method)
                for error in errors:
                    reasons[method] = str(error)
                    self.on_note(f"{method}: {error}")
        panels = [*zip(*self.judges, strict=True)]  # of every judge that of each target
        failures: list[ValueError] = []
        for judges in panels:
            with _caught() as errors:
                self._score(judges, reasons)
            failures += errors
        self._score([self.metrics] * len(self.targets), reasons)
        self._write_table(title, reference, panels, reasons)
        return failures

    def _write_table(
        self, title: str, reference: str, panels: Sequence[Sequence[Judge]], reasons: Mapping[str, str]
    ) -> None:
        scored = {judges[0].name: self._read_scores(judges) for judges in panels}
        sections = [self._judged(judges[0], scored[judges[0].name], reasons) for judges in panels]
        if not any(isinstance(judges[0], EndpointJudge) for judges in panels):
            sections.append(not_run(self.rubric, self._tasks(), self.methods))
        measured = self._measured(reasons)
        points = tradeoff.panels(sections, measured, self.metrics.scoring, reference)
        sections += [measured, self._costs(reasons), *self._choices()]
        table = {**tabulate(title, sections, reference, agreement(scored)), "tradeoff": points}
        self.out.mkdir(parents=True, exist_ok=True)  # where no method could answer there is none yet
        for name, text in (("table.json", json.dumps(table, indent=1) + "\n"), ("table.md", render(table))):
            with whole_file("out", self.out / name) as file:
                file.write_text(text, encoding="utf-8")

    def _tasks(self) -> list[str]:
        present = {item.task for target in self.targets for item in target.items}
        return [task for task in TASKS if task in present]

    def _answer(self, target: Target, method: str) -> None:
        sampler = sampler_of(method, {})
        options = {name: value for name, value in self.options.items() if has_option(sampler, name)}
        write_answers(
            self._answers(target, method), self.model, target.items, method, target.weights, seeds=self.seeds,
            batch_size=self.batch_size, chosen_by=target.chosen_by,
            on_row=lambda *counts: self.on_row(f"{target.name} {method}", *counts), **options,
        )  # fmt: skip

    def _answers(self, target: Target, method: str) -> Path:
        return self.out / target.name / "answers" / f"{method}.jsonl"

    def _scores(self, target: Target, judge: Judge, method: str) -> Path:
        return self.out / target.name / "scores" / judge.name.replace("/", "-") / f"{method}.jsonl"

    def _read_answers(self, target: Target, method: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Header and rows of a file of answers; nothing where there is none."""
        file = self._answers(target, method)
        header, rows = read_records(file) if file.exists() else ({}, [])
        return header, [row for row in rows if row["seed"] in self.seeds]

    def _score(self, judges: Sequence[Judge], reasons: Mapping[str, str]) -> None:
        """Have the judges of every target score all answers. Raises ValueError where some got no reply."""
        unanswered: list[str] = []
        for target, judge in zip(self.targets, judges, strict=True):
            for method in self.methods:
                if method not in reasons:
                    header, answers = self._read_answers(target, method)
                    what = f"{target.name} {method}, {judge.name}"
                    unanswered += write_scores(
                        self._scores(target, judge, method), judge, target.items, header, answers,
                        on_row=lambda *counts, what=what: self.on_row(what, *counts),
                    )[1]  # fmt: skip
        if unanswered:
            told = f"{len(unanswered)} answers got no reply of {judges[0].name}, at last: {unanswered[-1]}"
            raise ValueError(f"judge: {told}; the same command asks again")

    def _read_scores(self, judges: Sequence[Judge]) -> Scored:
        """What the judges of every target gave the texts that there are."""
        scored: Scored = {}
        for target, judge in zip(self.targets, judges, strict=True):
            for method in self.methods:
                texts = {key_of(row): hash_of_text(row["text"]) for row in self._read_answers(target, method)[1]}
                file = self._scores(target, judge, method)
                for row in read_records(file)[1] if file.exists() else ():
                    key = key_of(row)
                    if texts.get(key) == row["of_text"]:
                        scored[method, target.name, key] = row["scores"]
        return scored

    def _by_method(self, scored: Scored, reasons: Mapping[str, str]) -> dict[str, list[Score] | str]:
        """What a section has of every method."""
        methods: dict[str, list[Score]] = {method: [] for method in self.methods}
        for (method, _, (item, seed, _)), values in scored.items():
            methods[method].append(_score(item, seed, values))
        return {**methods, **reasons}

    def _judged(self, judge: Judge, scored: Scored, reasons: Mapping[str, str]) -> Section:
        if isinstance(judge, ClassifierJudge):
            told = ", ".join(f"{of} {share:.2f}" for of, share in judge.accuracy.items())
            notes = ["probability of the target's pole", f"share of held-out answers whose pole it tells: {told}"]
        else:
            rate = parse_rate(list(scored.values()))
            notes = ["from 1 to 5", "no reply" if rate is None else f"replies with every score: {100 * rate:.1f} %"]
        return judged(judge.name, self._tasks(), judge.criteria, self._by_method(scored, reasons), notes)

    def _measured(self, reasons: Mapping[str, str]) -> Section:
        """The section of what needs no judge."""
        scored = self._read_scores([self.metrics] * len(self.targets))
        notes = [f"{name}: {signature}" for name, signature in self.metrics.signatures.items()]
        without = () if self.metrics.has_bertscore else ("BERTScore",)
        return Section("Measured", METRIC_COLUMNS, self._by_method(scored, reasons), "PPL", notes, without)

    def _costs(self, reasons: Mapping[str, str]) -> Section:
        """The section of what the texts took, as the files of answers say."""
        spent: Scored = {}
        ran: dict[str, None] = {}
        for target in self.targets:
            for method in self.methods:
                for row in self._read_answers(target, method)[1]:
                    spent[method, target.name, key_of(row)] = cost_of(row)
                    ran[row["ran"]] = None
        notes = [*COST_NOTES, *(f"on {how}" for how in ran)]
        return Section("Efficiency", COST_COLUMNS, self._by_method(spent, reasons), "s/sequence", notes, absent="-")

    def _choices(self) -> list[Section]:
        """The section of multiple choice by log-probability, where any is asked."""
        if "mcqa" not in self._tasks():
            return []
        methods: dict[str, list[Score] | str] = {}
        for law in LAWS:
            scores: list[Score] = []
            with _caught() as errors:
                for target in self.targets:
                    for choice, seed in self._choose(target, law):
                        if {*choice.dimension} & {*target.poles}:
                            values = dict.fromkeys((choice.dimension, "all"), float(choice.chosen in target.poles))
                            scores.append(_score(choice.item, seed, values))
            methods[law] = str(errors[0]) if errors else scores
        notes = [f"share of options of the target's poles, by log-probability of {self.way} under each law"]
        return [Section("Multiple choice", CHOICE_COLUMNS, methods, "All", notes, reference="base")]

    def _choose(self, target: Target, law: str) -> list[tuple[Choice, int]]:
        rows = write_choices(
            self.out / target.name / "choices" / f"{law}.jsonl", self.model,
            [item for item in target.items if item.task == "mcqa"], None if law == "base" else target.weights,
            target=law, way=self.way, seeds=self.seeds, batch_size=self.batch_size, chosen_by=target.chosen_by,
            on_row=lambda *counts: self.on_row(f"{target.name} choices, {law}", *counts),
        )  # fmt: skip
        return [(choice_of(row), row["seed"]) for row in rows]


@contextmanager
def _caught() -> Iterator[list[ValueError]]:
    """Keeps an error that ends only what is within; not one of a file, which ends all."""
    errors: list[ValueError] = []
    try:
        yield errors
    except RecordsError:
        raise
    except ValueError as error:
        errors.append(error)


def _score(item: str, seed: int, values: Mapping[str, float | None]) -> Score:
    question = question_of(item)
    return Score(question, question.partition(":")[0], seed, values)
