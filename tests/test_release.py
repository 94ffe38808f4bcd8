"""What has to agree before a release: the version, the changes, the lock and what pyproject.toml asks for."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mpg

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))


def test_the_version_stands_in_one_place():
    files = [ROOT / name for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "mkdocs.yml")]
    places = [
        path for path in (*files, *(ROOT / "python" / "mpg").rglob("*.py")) if mpg.__version__ in path.read_text()
    ]
    assert places == [ROOT / "python" / "mpg" / "__init__.py"]
    assert 'version = {attr = "mpg.__version__"}' in (ROOT / "pyproject.toml").read_text()


def test_the_changes_begin_with_this_version():
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first[1].rstrip(",") == mpg.__version__


def test_the_first_screen_of_the_readme_fits_one():
    first, _, _ = (ROOT / "README.md").read_text().partition("\n## ")
    assert first.count("\n") < 50
    assert max(map(len, first.splitlines())) <= 120


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tools/oldest.py reads TOML")
def test_every_dependency_has_an_oldest_version():
    import oldest

    lines = oldest.constraints()
    assert {line.partition("==")[0] for line in lines} >= {"transformers", "peft", "trl", "fastapi", "optuna", "ray"}
    for requirement in oldest.requirements():
        versions = [bound.operator for bound in requirement.specifier]
        assert {">=", "=="} & {*versions}, f"{requirement}: expected a lower bound"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tools/lock.py reads TOML")
@pytest.mark.skipif(not (ROOT / "requirements-dev.lock").exists(), reason="make lock has not been run")
def test_the_lock_has_what_the_project_asks_for_with_hashes():
    import lock

    lines = [line for line in lock.LOCK.read_text().splitlines() if not line.startswith("#")]
    pins = {}
    for line in lines:
        name, version = re.fullmatch(r"([a-z0-9-]+)==(\S+)(?: --hash=sha256:[0-9a-f]{64})+", line).groups()
        pins[name] = version
    for wanted in lock.wanted():
        assert isinstance(wanted, Requirement)
        assert wanted.specifier.contains(pins[lock.canonical(wanted.name)], prereleases=True), wanted
    [installed] = re.findall(r"^REAL_MODEL := .* --no-deps (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {*installed.split()} == {*lock.ALONE} <= pins.keys()
