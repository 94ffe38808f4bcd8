"""What a type checker tells a caller, who has the package as it is installed here."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

CALLER = """\
from typing import Any
import mpg
import torch

model = mpg.load("base")
talk = [{"role": "user", "content": "hi"}]

def one(text: str, ids: list[int], messages: list[dict[str, Any]]) -> None:
    reveal_type(model.generate("hi", weights={"E": 1}))  # Result
    reveal_type(model.generate(text, max_new_tokens=3))  # Result
    reveal_type(model.generate(ids))  # Result
    reveal_type(model.generate(talk))  # Result
    reveal_type(model.generate(messages))  # Result

def several(texts: list[str], ids: list[list[int]]) -> None:
    reveal_type(model.generate(["hi", "ho"]))  # list[Result]
    reveal_type(model.generate(("hi", "ho")))  # list[Result]
    reveal_type(model.generate(texts, temperature=0.5))  # list[Result]
    reveal_type(model.generate(ids))  # list[Result]
    reveal_type(model.generate([talk, talk]))  # list[Result]

def either(count: int, prompt: Any, tensor: torch.Tensor) -> None:
    reveal_type(model.generate(tensor))  # Any
    reveal_type(model.generate(input_ids=tensor))  # Any
    reveal_type(model.generate("hi", num_return_sequences=count))  # Any
    reveal_type(model.generate(prompt))  # Any
"""
# The rest of what mpg imports takes most of a minute to read, and of it these calls know one class.
TORCH = """\
from typing import Any
class Tensor: ...
def __getattr__(name: str) -> Any: ...
"""
CONFIG = """\
[mypy]
mypy_path = stubs
[mypy-transformers.*,peft.*,numpy.*,yaml.*,jinja2.*,mpg.decode.*,mpg.demo.*,mpg.models.*,mpg.paper.*,mpg_ext.*]
follow_imports = skip
"""


def test_result_of_a_call_has_a_type_and_the_package_is_found(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "stubs/torch").mkdir(parents=True)
    for name, text in {"caller.py": CALLER, "mypy.ini": CONFIG, "stubs/torch/__init__.pyi": TORCH}.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "caller.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr  # "missing library stubs or py.typed marker" among others
    revealed = {int(line): kind for line, kind in re.findall(r":(\d+): note: Revealed type is \"(.*)\"", done.stdout)}
    wanted = {n: line.split("# ")[1] for n, line in enumerate(CALLER.splitlines(), 1) if "# " in line}
    assert {line: kind.replace("mpg.results.", "") for line, kind in revealed.items()} == wanted
