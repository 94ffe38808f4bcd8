"""What a check found, as tables for a terminal and as a picture. Knows nothing of how it was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table

from mpg.extras import install
from mpg.files import check_writable, whole_file
from mpg.paper.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Row:
    """One sampler. Where it could not run, `skipped` says why and everything after it is None.

    shift                  nats per token by which its texts' combined log-ratio exceeds that of the base's texts
    delivered              shift / intended shift: base is 0 and the exact sampler with the reference draft 1 by
                           definition; None where the intended shift cannot be told from 0
    tokens_per_round and
    *_per_token            totals over all texts, as in `mpg.STATISTICS`
    tokens_per_second      tokens of all texts / seconds, in batches of `Report.batch_size`
    """

    sampler: str
    skipped: str | None = None
    shift: Estimate | None = None
    delivered: Estimate | None = None
    tokens_per_round: float | None = None
    model_calls_per_token: float | None = None
    depth_per_token: float | None = None
    positions_per_token: float | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Section:
    """The samplers of one target, beside the exact sampler of that same target.

    intended     nats per token between the base's texts and the exact sampler's
    is_resolved  whether the interval of `intended` excludes 0; only then can a share of it be delivered
    """

    target: str
    weights: dict[str, float]
    intended: Estimate
    is_resolved: bool
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Report:
    """What `check` found. The first section is the target asked for; SCR's own follow where they differ."""

    num_prompts: int
    texts_per_prompt: int
    batch_size: int
    seed: int
    device: str
    dtype: str
    sections: tuple[Section, ...]
    notes: tuple[str, ...]


def render(report: Report) -> Group:
    """The report for a terminal: one table a target, what could not run, and how to read it."""
    num_texts = report.num_prompts * report.texts_per_prompt
    lines = [
        "",
        *report.notes,
        "delivered: where the mean combined log-ratio per token of a sampler's texts lies between the base's texts (0)",
        "  and those of the exact sampler of the same target (1). direct and exact with any draft share one law and",
        "  differ by chance alone, that of the yardstick in common. scr divides its weights by their sum: its",
        "  yardstick is exact at those weights.",
        f"n = {num_texts} texts a sampler ({report.num_prompts} prompts x {report.texts_per_prompt}), temperature 1, "
        "top_p 1. Intervals: 95 %, bootstrap over prompts.",
        f"depth: forwards that wait for one another. tokens/s: in batches of {report.batch_size} on {report.device},",
        f"  {report.dtype}, beside whatever else ran there.",
    ]
    return Group(*(_table(section) for section in report.sections), "\n".join(lines))


def _table(section: Section) -> Table:
    intended = f"intended shift {_interval(section.intended, '+.3f')} nats per token"
    if not section.is_resolved:
        intended += ": not distinguishable from 0, so no share of it can be given; use more prompts or seeds"
    table = Table(title=f"{_target(section)}: {intended}", title_justify="left", title_style="bold")
    table.add_column("sampler", no_wrap=True)
    table.add_column("delivered", no_wrap=True)
    for header in ("tokens/\nround", "calls/\ntoken", "depth/\ntoken", "positions/\ntoken", "tokens/s"):
        table.add_column(header, justify="right")
    for row in section.rows:
        if row.skipped is not None:
            table.add_row(row.sampler, "did not run, see below", style="dim")
            continue
        costs = (row.tokens_per_round, row.model_calls_per_token, row.depth_per_token, row.positions_per_token)
        table.add_row(
            row.sampler, _bar(row.delivered), *(f"{cost:.2f}" for cost in costs), f"{row.tokens_per_second:.0f}"
        )
    skipped = [f"{row.sampler}: {row.skipped}" for row in section.rows if row.skipped is not None]
    table.caption, table.caption_justify = "\n".join(skipped) or None, "left"
    return table


def _target(section: Section) -> str:
    return " ".join([section.target, *(f"{name}={alpha:.3g}" for name, alpha in section.weights.items())])


def _bar(delivered: Estimate | None, width: int = 10) -> str:
    if delivered is None:
        return "-"
    length = round(width * min(max(delivered.value, 0), 1))
    by_definition = delivered.low == delivered.high
    return f"{'█' * length:░<{width}} {f'{delivered.value:.2f}' if by_definition else _interval(delivered, '.2f')}"


def _interval(estimate: Estimate, spec: str) -> str:
    return f"{estimate.value:{spec}} [{estimate.low:{spec}}, {estimate.high:{spec}}]"


def check_plot(path: str | Path) -> None:
    """Raise ValueError unless `plot` could draw into this file: without matplotlib, a known suffix, or its disk."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ValueError(f"plot: needs matplotlib, expected after {install('evaluate')}") from error
    suffixes = sorted(FigureCanvasBase.get_supported_filetypes())
    if Path(path).suffix.removeprefix(".").lower() not in suffixes:
        raise ValueError(f"plot: expected a file that ends in one of {', '.join(suffixes)}, got {str(path)!r}")
    check_writable("plot", path)


def save_plot(figure: Figure, path: str | Path, dpi: int) -> None:
    """Write a picture whole or not at all, by one matplotlib always the same bytes: without the time, version and
    random names that some formats hold. Raises ValueError where it cannot be written."""
    from matplotlib import rc_context

    dated = {".png": "Software", ".svg": "Date", ".pdf": "CreationDate"}.get(Path(path).suffix.lower())
    with whole_file("plot", path) as file, rc_context({"svg.hashsalt": "mpg"}):
        figure.savefig(file, dpi=dpi, metadata={dated: None} if dated else None)


def plot(report: Report, path: str | Path) -> None:
    """Draw delivered share against depth per token, one panel a target.

    Raises ValueError as `check_plot` does, or if no target's intended shift can be told from 0.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    sections = [section for section in report.sections if section.is_resolved]
    if not sections:
        raise ValueError("plot: no intended shift is distinguishable from 0, expected one to plot shares of")
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row.sampler for s in sections for row in s.rows))}
    figure = Figure(figsize=(3.4 * len(sections) + 1.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(sections), sharex=True, sharey=True, squeeze=False)[0]
    points = {}
    for axes, section in zip(panels, sections, strict=True):
        axes.axhline(0, color="0.8", zorder=0)
        axes.axhline(1, color="0.8", zorder=0)
        for row in section.rows:
            if row.delivered is not None:
                share, low, high = row.delivered.value, row.delivered.low, row.delivered.high
                points[row.sampler] = axes.errorbar(
                    row.depth_per_token, share, [[share - low], [high - share]], color=colours[row.sampler], fmt="o",
                    capsize=3,
                )  # fmt: skip
        axes.set(title=_target(section), xlabel="sequential forwards a token (depth)")
    panels[0].set(ylabel="share of the intended shift delivered", xlim=(0, None))
    figure.legend(points.values(), points.keys(), loc="outside right upper", fontsize="small")
    save_plot(figure, path, dpi=150)
