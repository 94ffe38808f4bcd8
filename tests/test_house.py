"""Where things are: imports between the parts of the package go one way, and no file grows long."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mpg

HOUSE = Path(mpg.__file__).parent
FILES = {file.relative_to(HOUSE.parent).with_suffix(""): file for file in sorted(HOUSE.rglob("*.py"))}
MODULES = {".".join(path.parts).removesuffix(".__init__"): file for path, file in FILES.items()}
MAX_LINES = 400
# From the top down: a module imports from its own floor and those below. The longest name that fits counts.
FLOORS = [
    ["mpg.__main__"],
    ["mpg.app", "mpg.demo."],
    ["mpg.evaluate", "mpg.demo.trait_judge"],  # the judge that the demo and `evaluate` share
    [
        "mpg.paper",
        "mpg.train",
        "mpg.serve",
        "mpg.batch",
        "mpg.frontend.custom_generate",
    ],  # the last is handed a loaded model
    ["mpg.model"],
    ["mpg.frontend"],
    ["mpg.decode", "mpg.results"],
    ["mpg.models"],
    ["mpg.recipe"],
    # of the demo where its files are
    ["mpg.options", "mpg.files", "mpg.extras", "mpg.context", "mpg.pages", "mpg.demo"],
]


def floor(module: str) -> int:
    found = [(len(part), number) for number, parts in enumerate(FLOORS) for part in parts if is_of(module, part)]
    return max(found)[1]


def is_of(module: str, part: str) -> bool:
    return module == part or module.startswith(f"{part.rstrip('.')}.")


def imports(file: Path) -> Iterator[str]:
    """The package's modules that a file imports, in functions and for types too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES and alias.name != "mpg")
        if isinstance(node, ast.ImportFrom) and node.module:
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in named if node.module.startswith("mpg."))
            yield from (name for name in named if node.module == "mpg" and name in MODULES)


@pytest.mark.parametrize("module", [module for module in MODULES if module != "mpg"])
def test_imports_go_one_way(module):
    assert [name for name in imports(MODULES[module]) if floor(name) < floor(module)] == []


def test_no_file_is_long():
    assert {name: lines for name, file in MODULES.items() if (lines := file.read_text().count("\n")) > MAX_LINES} == {}


def test_no_two_test_files_have_one_name():
    """Which one worker cannot import, and another can."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)


def test_the_long_form_is_told_in_one_place():
    tests = Path(__file__).parent
    readers = [file for file in tests.rglob("*.py") if '"MPG_LONG"' in file.read_text()]
    assert [str(file.relative_to(tests)) for file in readers if file != Path(__file__)] == ["longer.py"]
