"""The extras of the package: what to say where one is missing. Knows no extra, and imports none."""

from __future__ import annotations


def install(extra: str, *more: str) -> str:
    """The command that installs an extra, and more packages with it. mpg is on no index, where its name is another
    package's: it comes from a checkout."""
    packages = "".join(f"{package} " for package in more)
    return f"pip install --no-build-isolation {packages}-e '.[{extra}]', in a checkout of mpg"
