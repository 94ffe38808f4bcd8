"""Trait against naturalness: what every judge says of the methods, as plain objects that JSON holds, and as a picture.

Knows the sections of a table; nothing of models, and nothing of how the sections came.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpg.evaluate.tables import PERPLEXITY, Column, Section, tabulate_section
from mpg.paper.report import save_plot

NATURALNESS = ("naturalness", "humanlikeness")  # what rubrics call it


def panels(sections: Sequence[Section], measured: Section, scoring: str, reference: str) -> list[dict[str, Any]]:
    """What a picture shows: for every judge that scored traits, a point for each method.

    sections  of judges. A trait is the mean of all of a judge's criteria but naturalness, each the mean over tasks
    measured  that of perplexity, which takes the place of naturalness where no judge scored any
    scoring   whose perplexity that is

    out: of a judge its name, what `trait` and `against` are, the scale of the latter (linear or log), and points:
    method, and of both value, low and high
    """
    axes = {str(section.judge): _axes(section, reference) for section in sections}
    others = [natural for _, natural in axes.values() if natural.points]
    label = f"perplexity under {scoring} (naturalness: not run)"
    others.append(_Axis(label, _points(measured, PERPLEXITY, reference), "log"))
    found = []
    for judge, (trait, own) in axes.items():
        against = own if own.points else others[0]
        both = [method for method in trait.points if method in against.points]
        points = [{"method": name, "trait": trait.points[name], "against": against.points[name]} for name in both]
        if points:
            about = {"judge": judge, "trait": trait.label, "against": against.label, "scale": against.scale}
            found.append({**about, "points": points})
    return found


def plot(tables: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Draw trait against naturalness of some tables, by the names that these are to have: a panel for each judge, a
    point with 95 % intervals for each method.

    Raises ValueError where no judge scored anything, and where the file cannot be written.
    """
    from matplotlib.figure import Figure

    shown = [(name, panel) for name, table in tables.items() for panel in table["tradeoff"]]
    if not shown:
        raise ValueError("plot: expected scores of a judge, got tables that nobody judged")
    methods = dict.fromkeys(point["method"] for _, panel in shown for point in panel["points"])
    looks = {method: {"color": f"C{i % 7}", "fmt": "os^"[i // 7 % 3]} for i, method in enumerate(methods)}
    figure = Figure(figsize=(4.2 * len(shown) + 1.8, 3.8), layout="constrained")
    axes_of = figure.subplots(1, len(shown), squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axes, (name, panel) in zip(axes_of, shown, strict=True):
        for point in panel["points"]:
            x, y = point["against"], point["trait"]
            spread = {f"{side}err": [[e["value"] - e["low"]], [e["high"] - e["value"]]]
                      for side, e in (("x", x), ("y", y))}  # fmt: skip
            handles[point["method"]] = axes.errorbar(
                x["value"], y["value"], capsize=2, ms=4, lw=1, **spread, **looks[point["method"]]
            )
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel(panel["against"], fontsize="small")
        axes.set_ylabel(panel["trait"], fontsize="small")
        axes.set_xscale(panel["scale"])
    figure.legend([handles[method] for method in methods], [*methods], loc="outside right upper", fontsize="small")
    save_plot(figure, path, dpi=110)


@dataclass(frozen=True)
class _Axis:
    label: str
    points: Mapping[str, Mapping[str, float]]
    scale: str = "linear"


def _axes(section: Section, reference: str) -> tuple[_Axis, _Axis]:
    """Trait and naturalness as one judge scored them; without points where it did not."""
    criteria = dict.fromkeys(name for column in section.columns for _, names in column.parts for name in names)
    tasks = dict.fromkeys(task for column in section.columns for task, _ in column.parts)

    def axis(label: str, names: Sequence[str]) -> _Axis:
        column = Column("", tuple((task, tuple(names)) for task in tasks))
        return _Axis(f"{label} by {section.judge}", _points(section, column, reference) if names else {})

    trait = [name for name in criteria if name not in NATURALNESS]
    natural = [name for name in criteria if name in NATURALNESS]
    return axis(f"mean of {', '.join(trait)}".replace("_", " "), trait), axis("".join(natural), natural)


def _points(section: Section, column: Column, reference: str) -> dict[str, dict[str, float]]:
    """A number of every method that has one."""
    rows = tabulate_section(replace(section, columns=[column]), reference)["rows"]
    own = {row["method"]: row["cells"][column.label] for row in rows if row["cells"]}
    return {method: {name: cell[name] for name in ("value", "low", "high")} for method, cell in own.items()}
