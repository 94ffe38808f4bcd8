"""Prints pip constraints: the oldest version of every package that pyproject.toml allows. `make check` runs the suite
on them.

torch is left out: which build is taken is the machine's business (TORCH of the Makefile).
"""

from __future__ import annotations

from pathlib import Path

import tomllib
from packaging.requirements import Requirement

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def requirements() -> list[Requirement]:
    """What mpg and its extras ask for; a name may come more than once."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(text) for texts in (project["dependencies"], *extras) for text in texts]


def oldest(requirement: Requirement) -> str | None:
    """The least version that a requirement allows, such as "5.17", or None where it names none or is pinned."""
    return next((bound.version for bound in requirement.specifier if bound.operator == ">="), None)


def constraints() -> list[str]:
    """What pip is to take: "peft==0.19", ...; of a name that comes more than once, what came last."""
    bounds = {one.name: version for one in requirements() if (version := oldest(one)) and one.name != "torch"}
    return [f"{name}=={version}" for name, version in sorted(bounds.items())]


if __name__ == "__main__":
    print("\n".join(constraints()))
