"""What the build needs to know about torch, printed as a CMake script; torch itself is never imported.

Importing it would take seconds and fails where its CUDA libraries are absent.
"""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

spec = importlib.util.find_spec("torch")
assert spec, "setup.py has checked that torch is there"
assert spec.origin
root = Path(spec.origin).parent
version = runpy.run_path(str(root / "version.py"))

print(f'set(TORCH_VERSION "{version["__version__"]}")')
print(f'set(TORCH_CUDA "{version["cuda"] or ""}")')
print(f'set(TORCH_ROOT "{root.as_posix()}")')
