"""Who scores answers: models behind an endpoint, by a rubric, and local classifiers of traits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from mpg.evaluate.judges.classifier import ClassifierJudge
from mpg.evaluate.judges.endpoint import EndpointJudge

TraitJudge: TypeAlias = ClassifierJudge | EndpointJudge


def judge_of(text: str, rubric: str, poles: Sequence[str], **how: Any) -> TraitJudge:
    """The judge that --judge names: classifier, classifier:FOLDER or an endpoint's URL#MODEL.

    rubric, poles, how  as `EndpointJudge` has them

    Raises ValueError for text of another form, and for a folder that holds no judge.
    """
    kind, _, folder = text.partition(":")
    if kind == "classifier":
        return ClassifierJudge(folder or None, poles)
    url, _, model = text.partition("#")
    if not url.startswith(("http://", "https://")) or not model:
        wanted = "classifier, classifier:FOLDER or an endpoint's URL#MODEL"
        raise ValueError(f"judge: expected {wanted} (http://localhost:8000/v1#NAME), got {text!r}")
    return EndpointJudge(url, model, rubric, poles, **how)
