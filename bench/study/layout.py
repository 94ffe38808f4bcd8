"""A table as the page shows it and as a file of JSON holds it. Knows cells and columns; nothing of the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mpg.paper.statistics import Estimate

NOT_RUN = "not run"
Cell = Estimate | float | str | None  # None is what was not run


@dataclass(frozen=True)
class Column:
    """One column of the page.

    title  its header
    spec   of its numbers; "" leaves texts as they are
    parts  names of what it stands for, each with a value of its own in JSON; none of them was run
    brief  a value without its interval, which JSON keeps
    """

    title: str
    spec: str = ""
    parts: tuple[str, ...] = ()
    brief: bool = False


@dataclass(frozen=True)
class Table:
    """Rows by their labels, a cell for every column but the first: that has the labels, or their titles."""

    label: str
    columns: Sequence[Column]
    rows: Mapping[str, Sequence[Cell]]
    titles: Mapping[str, str] = field(default_factory=dict)

    def markdown(self) -> str:
        """The table, or that it was not run."""
        if not self.rows:
            return NOT_RUN
        lines = [f"| {' | '.join([self.label, *(column.title for column in self.columns)])} |"]
        lines.append("|---|" + "".join("---:|" if column.brief else "---|" for column in self.columns))
        for label, cells in self.rows.items():
            shown = [_show(column, cell) for column, cell in zip(self.columns, cells, strict=True)]
            lines.append(f"| {' | '.join([self.titles.get(label, label), *shown])} |")
        return "\n".join(lines)

    def as_json(self) -> list[dict[str, Any]]:
        """A row an object: what was not run is null, an estimate is value, low and high."""
        rows = []
        for label, cells in self.rows.items():
            row: dict[str, Any] = {self.label: label}
            for column, cell in zip(self.columns, cells, strict=True):
                if cell != "":
                    row |= {part: None for part in column.parts} if column.parts else {column.title: _plain(cell)}
            rows.append(row)
        return rows


def words(estimate: Estimate | None, spec: str = ".2f") -> str:
    """An estimate with its interval."""
    if estimate is None:
        return NOT_RUN
    return f"{estimate.value:{spec}} [{estimate.low:{spec}}, {estimate.high:{spec}}]"


def _show(column: Column, cell: Cell) -> str:
    if cell is None or isinstance(cell, str):
        return NOT_RUN if cell is None else cell
    if isinstance(cell, Estimate) and not column.brief:
        return words(cell, column.spec)
    return f"{cell.value if isinstance(cell, Estimate) else cell:{column.spec}}"


def _plain(cell: Cell) -> Any:
    if isinstance(cell, Estimate):
        return {name: round(number, 6) for name, number in asdict(cell).items()}
    return round(cell, 6) if isinstance(cell, float) else cell
