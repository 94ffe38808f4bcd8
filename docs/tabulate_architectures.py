"""Which models mpg runs and which it refuses: writes the two tables in architectures.md.

Knows how to print the list of tests/models/architectures.py, which the tests run.

    python docs/tabulate_architectures.py
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "models"))

from architectures import ARCHITECTURES, REFUSED, Architecture  # noqa: E402

PAGE = HERE / "architectures.md"
BEGIN, END = "<!-- written by docs/tabulate_architectures.py -->", "<!-- end -->"


def table() -> str:
    lines = [
        "| runs | `model_type` | set in the tested configuration | adapters tested on | notes |",
        "|---|---|---|---|---|",
    ]
    for architecture in ARCHITECTURES:
        cells = [_spell(architecture), ", ".join(f"`{name}`" for name in architecture.targets), architecture.note]
        lines.append(f"| {architecture.name} | `{architecture.model_type}` | {' | '.join(cells)} |")
    lines += ["", "| refused | `model_type` | set in the tested configuration | because |", "|---|---|---|---|"]
    for refused in REFUSED:
        lines.append(f"| {refused.name} | `{refused.model_type}` | {_spell(refused)} | {refused.reason} |")
    return "\n".join(lines)


def _spell(architecture: Architecture) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in architecture.special.items())


def main() -> None:
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
