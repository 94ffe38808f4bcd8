"""The documentation site is built strictly, and asks nothing of another machine."""

from __future__ import annotations

import functools
import http.server
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from longer import long

pytest.importorskip("mkdocs", reason="needs mpg[site]")
pytestmark = long

ROOT = Path(__file__).parent.parent
LOADED = r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=[\"']?|<link\b[^>]*\bhref=[\"']?"
ELSEWHERE = re.compile(rf"(?:{LOADED}|url\([\"']?|@import [\"']?)((?:https?:)?//[^\"'\s)>]*)", re.IGNORECASE)


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


def build(root: Path, to: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(to)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_pages_and_styles_name_nothing_to_load_from_elsewhere(site):
    texts = [path for path in site.rglob("*") if path.suffix in (".html", ".css", ".svg")]
    assert len(texts) > 30
    assert {(path.name, found) for path in texts for found in ELSEWHERE.findall(path.read_text())} == set()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('<script src="https://cdn.example/x.js">', "https://cdn.example/x.js"),
        ("<link rel=stylesheet href=//fonts.example/a>", "//fonts.example/a"),
        ("@import 'https://x.example/a.css'", "https://x.example/a.css"),
        ("src: url(//x.example/f.woff)", "//x.example/f.woff"),
    ],
)
def test_what_would_be_loaded_from_elsewhere_is_found(text, found):
    assert ELSEWHERE.findall(text) == [found]


def test_a_browser_asks_nothing_of_another_machine_and_the_search_finds(site):
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or pytest.skip("needs chromium")
    handler = functools.partial(Silent, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_api.sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        origin = f"http://127.0.0.1:{server.server_port}/"
        page = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()
        asked: list[str] = []
        missing: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("response", lambda response: missing.append(response.url) if response.status >= 400 else None)
        for path in sorted(site.rglob("*.html")):
            page.goto(origin + path.relative_to(site).as_posix(), wait_until="load")
        page.fill("input.md-search__input", "mixture_span")
        page.wait_for_selector(".md-search-result__item")
        server.shutdown()
    assert [url for url in asked if not url.startswith((origin, "data:", "blob:"))] == []
    assert missing == []


def test_a_page_that_the_navigation_lacks_is_refused(tmp_path):
    ignored = shutil.ignore_patterns(".venv*", ".git", "build", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored, symlinks=True)
    (tmp_path / "copy" / "docs" / "stray.md").write_text("# Stray\n")
    done = build(tmp_path / "copy", tmp_path / "site")
    assert done.returncode != 0
    assert "stray.md" in done.stderr
