"""Links of the pages to what lies outside of docs/: a hook of the site, called by mkdocs.

README, CONTRIBUTING, CHANGELOG and SECURITY are pages of the site too; any other file of the repository that a page
links to is copied below files/.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[#)])")  # relative, without its anchor


def place(path: Path) -> str:
    """Where a file of the repository is in the site."""
    name = path.relative_to(ROOT).as_posix()
    return name.removeprefix("docs/") if name.startswith("docs/") else PAGES.get(name, f"files/{name}")


def linked(page: Path) -> Iterator[Path]:
    """The files that a page links to."""
    for link in LINK.findall(page.read_text()):
        if (target := (page.parent / link).resolve()).is_file() and target.is_relative_to(ROOT):
            yield target


def on_files(files: Files, config: Any) -> Files:
    roots = [ROOT / name for name in PAGES]
    sources = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    beyond = {target for page in (*roots, *sources) for target in linked(page)} - {*roots, *sources}
    for path in (*roots, *sorted(beyond)):
        if files.get_file_from_path(place(path)) is None:
            in_nav = InclusionLevel.UNDEFINED if path in roots else InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, place(path), abs_src_path=str(path), inclusion=in_nav))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    source = Path(page.file.abs_src_path)

    def moved(link: re.Match[str]) -> str:
        target = (source.parent / link[0]).resolve()
        if not target.is_file() or not target.is_relative_to(ROOT):
            return link[0]  # mkdocs warns of it, and the site is not built
        return posixpath.relpath(place(target), posixpath.dirname(page.file.src_uri))

    return LINK.sub(moved, markdown)
