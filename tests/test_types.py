"""What a type checker tells a caller, who has the package as it is installed here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from longer import long

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


@long  # reads all of mpg anew
def test_result_of_a_call_has_a_type_and_the_package_is_found(tmp_path):
    (tmp_path / "stubs/torch").mkdir(parents=True)
    for name, text in {"mypy.ini": CONFIG, "stubs/torch/__init__.pyi": TORCH}.items():
        (tmp_path / name).write_text(text)
    shutil.copy(Path(__file__).with_name("typed_caller.py"), tmp_path)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "typed_caller.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr  # "missing library stubs or py.typed marker" among others
