"""From models to a table: answers by every method, scores by every judge, sections of a table; in files that resume.

Knows the order of things and the layout of the folder:

    OUT/TARGET/answers/METHOD.jsonl         texts (`answers`)
    OUT/TARGET/scores/JUDGE/METHOD.jsonl    scores (`judging`), those of measures too
    OUT/TARGET/choices/LAW.jsonl            log-probabilities of options (`choices`)
    OUT/replies/JUDGE.jsonl                 raw replies of endpoints
    OUT/table.json, OUT/table.md
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpg.evaluate.answers import write_answers
from mpg.evaluate.choices import choice_of, write_choices
from mpg.evaluate.judges.classifier import ClassifierJudge
from mpg.evaluate.judges.endpoint import CRITERIA, EndpointJudge
from mpg.evaluate.judging import Judge, parse_rate, write_scores
from mpg.evaluate.metrics import Metrics
from mpg.evaluate.records import RecordsError, read_records
from mpg.evaluate.tables import (
    CHOICE_COLUMNS,
    METRIC_COLUMNS,
    Score,
    Section,
    agreement,
    judge_columns,
    not_run,
    render,
    tabulate,
)
from mpg.evaluate.tasks import TASKS, Item, question_of
from mpg.files import whole_file
from mpg.model import Model
from mpg.options import has_option
from mpg.paper.methods import sampler_of

LAWS = ("base", "geometric", "arithmetic")  # of choices

OnRow = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Target:
    """What is to be shown: a type, or a combination of weights.

    name   of its folder: the type, or the task
    poles  that judges of traits look for
    """

    name: str
    items: Sequence[Item]
    weights: Mapping[str, float]
    poles: tuple[str, ...] = ()


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

        out: the errors of judges that failed

        Raises ValueError for a file of another job, or that cannot be written, and for prompts that leave too few
        positions, with which no method could answer.
        """
        for target in self.targets:
            self.model.read(
                [item.prompt for item in target.items], sampler="direct", target="base", mixture_span="token",
                max_new_tokens=self.options.get("max_new_tokens"),
            )  # fmt: skip
        reasons: dict[str, str] = {}
        for target in self.targets:
            for method in self.methods:
                try:
                    self._answer(target, method)
                except RecordsError:
                    raise
                except ValueError as error:
                    reasons[method] = str(error)
                    self.on_note(f"{method}: {error}")
        sections: list[Section] = []
        failures: list[ValueError] = []
        found: dict[str, dict[Any, Mapping[str, float | None]]] = {}
        for judges in zip(*self.judges, strict=True):
            try:
                sections.append(self._judge(judges, reasons, found))
            except RecordsError:
                raise
            except ValueError as error:
                failures.append(error)
                sections.append(self._judged(judges, reasons, found))
        if not any(isinstance(judge, EndpointJudge) for judge in self.judges[0]):
            sections.append(not_run(self.rubric, self._tasks(), self.methods))
        sections.append(self._judge([self.metrics] * len(self.targets), reasons, {}))
        if "mcqa" in self._tasks():
            sections.append(self._choose())
        self.out.mkdir(parents=True, exist_ok=True)  # where no method could answer there is none yet
        table = tabulate(title, sections, reference, agreement(found))
        for name, text in (("table.json", json.dumps(table, indent=1) + "\n"), ("table.md", render(table))):
            with whole_file("out", self.out / name) as file:
                file.write_text(text, encoding="utf-8")
        return failures

    def _tasks(self) -> list[str]:
        present = {item.task for target in self.targets for item in target.items}
        return [task for task in TASKS if task in present]

    def _answer(self, target: Target, method: str) -> None:
        sampler = sampler_of(method, {})
        options = {name: value for name, value in self.options.items() if has_option(sampler, name)}
        write_answers(
            self._answers(target, method), self.model, target.items, method, target.weights, seeds=self.seeds,
            batch_size=self.batch_size, on_row=lambda *counts: self.on_row(f"{target.name} {method}", *counts),
            **options,
        )  # fmt: skip

    def _answers(self, target: Target, method: str) -> Path:
        return self.out / target.name / "answers" / f"{method}.jsonl"

    def _scores(self, target: Target, judge: Judge, method: str) -> Path:
        return self.out / target.name / "scores" / judge.name.replace("/", "-") / f"{method}.jsonl"

    def _judge(self, judges: Sequence[Judge], reasons: Mapping[str, str], found: Any) -> Section:
        """Have the judges of every target score all answers."""
        for target, judge in zip(self.targets, judges, strict=True):
            for method in self.methods:
                if method not in reasons and (file := self._answers(target, method)).exists():
                    header, answers = read_records(file)
                    what = f"{target.name} {method}, {judge.name}"
                    num_failed = write_scores(
                        self._scores(target, judge, method), judge, target.items, header,
                        [answer for answer in answers if answer["seed"] in self.seeds],
                        on_row=lambda *counts, what=what: self.on_row(what, *counts),
                    )[1]  # fmt: skip
                    if num_failed:
                        self.on_note(f"{what}: {num_failed} answers got no reply; the same command asks again")
        return self._judged(judges, reasons, found)

    def _judged(self, judges: Sequence[Judge], reasons: Mapping[str, str], found: Any) -> Section:
        """The section of what is scored. Puts the scores by text into `found`, by judge."""
        methods: dict[str, list[Score] | str] = {}
        own = found.setdefault(judges[0].name, {})
        for method in self.methods:
            scores: list[Score] = []
            for target, judge in zip(self.targets, judges, strict=True):
                tasks = {item.id: item.task for item in target.items}
                file = self._scores(target, judge, method)
                written = read_records(file)[1] if file.exists() else []
                latest = {(row["item"], row["seed"], row["attribute"]): row["scores"] for row in written}
                for (item, seed, attribute), values in latest.items():
                    if item in tasks and seed in self.seeds:
                        scores.append(Score(question_of(item), tasks[item], seed, values))
                        own[method, target.name, item, seed, attribute] = values
            methods[method] = reasons.get(method, scores)
        judge = judges[0]
        if isinstance(judge, Metrics):
            notes = [f"{name}: {signature}" for name, signature in judge.signatures.items()]
            return Section("Measured", METRIC_COLUMNS, methods, notes, () if judge.has_bertscore else ("BERTScore",))
        columns = judge_columns(self._tasks(), judge.criteria)
        if isinstance(judge, ClassifierJudge):
            told = ", ".join(f"{of} {share:.2f}" for of, share in judge.accuracy.items())
            notes = ["probability of the target's pole", f"share of held-out answers whose pole it tells: {told}"]
        else:
            rate = parse_rate(list(own.values()))
            notes = ["from 1 to 5", "no reply" if rate is None else f"replies with every score: {100 * rate:.1f} %"]
        return Section(f"Evaluated by {judge.name}", columns, methods, notes)

    def _choose(self) -> Section:
        """The section of multiple choice by log-probability."""
        methods: dict[str, list[Score] | str] = {}
        for law in LAWS:
            scores: list[Score] = []
            for target in self.targets:
                items = [item for item in target.items if item.task == "mcqa"]
                file = self.out / target.name / "choices" / f"{law}.jsonl"
                weights = None if law == "base" else target.weights
                try:
                    rows = write_choices(
                        file, self.model, items, weights, target=law, way=self.way, seeds=self.seeds,
                        batch_size=self.batch_size,
                        on_row=lambda *counts, what=f"{target.name} choices, {law}": self.on_row(what, *counts),
                    )  # fmt: skip
                except RecordsError:
                    raise
                except ValueError as error:
                    methods[law] = str(error)
                    break
                for row in rows:
                    choice = choice_of(row)
                    if {*choice.dimension} & {*target.poles}:
                        values = dict.fromkeys((choice.dimension, "all"), float(choice.chosen in target.poles))
                        scores.append(Score(question_of(choice.item), "mcqa", row["seed"], values))
            methods.setdefault(law, scores)
        notes = [f"share of options of the target's poles, by log-probability of {self.way} under each law"]
        return Section("Multiple choice", CHOICE_COLUMNS, methods, notes)


def endpoint_of(text: str, rubric: str, poles: Sequence[str], **how: Any) -> EndpointJudge:
    """The judge that URL#MODEL names. Raises ValueError for text of another form."""
    url, _, name = text.partition("#")
    if not url.startswith(("http://", "https://")) or not name:
        wanted = "classifier, classifier:FOLDER or an endpoint's URL#MODEL"
        raise ValueError(f"judge: expected {wanted} (http://localhost:8000/v1#NAME), got {text!r}")
    assert rubric in CRITERIA
    return EndpointJudge(url, name, rubric, poles, **how)
