"""What docs/serving.md shows of the server does what it says."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mpg.demo import MODELS
from serving import serving

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "serving.md").read_text()
ADDRESS = "http://127.0.0.1:8000"
QUESTION = "How do you like to spend a free weekend?"


def blocks(language):
    section = PAGE[PAGE.index("## Asking") : PAGE.index("## The playground")]
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


def test_the_curl_of_the_document_answers(served):
    command, _ = blocks("sh")  # the second is lm_eval's
    assert command.count(ADDRESS) == 1
    done = subprocess.run(command.replace(ADDRESS, served.url), shell=True, capture_output=True, text=True)
    if done.returncode == 127:
        pytest.skip("needs curl")
    text = json.loads(done.stdout)["choices"][0]["message"]["content"]
    wanted = served.model.generate(QUESTION, weights="E=2,T=0.5", seed=0, max_new_tokens=32)
    assert text == wanted.text


def test_the_client_of_the_document_answers(served):
    [code] = blocks("python")
    assert code.count(ADDRESS) == code.count('"smollm2"') == 1
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(code.replace(ADDRESS, served.url).replace('"smollm2"', '"demo"'), "serving.md", "exec"), {})
    assert shown.getvalue().strip()


def test_the_curls_of_the_document_add_an_attribute_and_remove_it(precise_model, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    shutil.copytree(MODELS / "adapters" / "T", tmp_path / "mine")
    [block] = re.findall(r"^```sh\nmpg serve [^\n]*--attribute-folder[^\n]*\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    with serving(precise_model, admin_key="KEY", attribute_folders=(tmp_path,)) as served:
        done = subprocess.run(block.replace(ADDRESS, served.url), shell=True, capture_output=True, text=True)
    added, removed = (json.loads("{" + answer) for answer in done.stdout.split("{")[1:])
    assert (added["id"], removed) == ("mine", {"id": "mine", "object": "model", "deleted": True})
