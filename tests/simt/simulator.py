"""Builds the module that runs the CUDA sources on the CPU, and the commands that run tests with it.

Knows no kernel and no test. The build is of a copy of the sources, so that mutants.py can plant faults in it.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = "-g;-fsanitize=address,undefined;-fno-sanitize-recover=undefined;-fno-omit-frame-pointer"
SANITIZE_VARIABLE = "MPG_SIMT_SANITIZE"  # set where the sanitizers' runtime has been loaded before Python


def build(sanitize: bool, edits: Mapping[str, tuple[str, str]] | None = None) -> Path:
    """The module, compiled after replacing in each file named by `edits` its one occurrence of a text by another.

    Incremental: what earlier builds compiled from the same text stays. Raises subprocess.CalledProcessError where the
    sources do not compile.
    """
    folder = build_folder(sanitize)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_sources(folder / "source", edits or {})
        tools = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
        cmake, ninja = (shutil.which(name, path=tools) for name in ("cmake", "ninja"))
        flags = SANITIZERS if sanitize else ""
        configure = [str(cmake), "-S", str(folder / "source"), "-B", str(folder), "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}", "-DMPG_CUDA=OFF"]
        configure += ["-DMPG_SIMT=ON", f"-DMPG_SIMT_FLAGS={flags}"]
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        for command in (configure, [str(cmake), "--build", str(folder), "-j", jobs]):
            subprocess.run(command, check=True, capture_output=True, text=True)
    return module_path(sanitize)


def build_folder(sanitize: bool) -> Path:
    return ROOT / "build" / f"simt-{sys.implementation.cache_tag}{'-sanitized' if sanitize else ''}"


def module_path(sanitize: bool) -> Path:
    return build_folder(sanitize) / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def write_sources(to: Path, edits: Mapping[str, tuple[str, str]]) -> None:
    """Writes only the files that differ, so that the build compiles only what they enter."""
    patterns = ("CMakeLists.txt", "cmake/*.py", "csrc/**/*.*", "tests/simt/*.[ch]*", "tests/simt/shared.ld")
    for file in (file for pattern in patterns for file in ROOT.glob(pattern)):
        name = file.relative_to(ROOT)
        text = file.read_text()
        if str(name) in edits:
            old, new = edits[str(name)]
            assert text.count(old) == 1, f"{name} must hold {old!r} once"
            text = text.replace(old, new)
        copy = to / name
        if not copy.exists() or copy.read_text() != text:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_C", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_sanitized(*pytest_arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Tests on the sanitized module, as it was last built, in a process of their own."""
    compiler = os.environ.get("CXX", "g++")
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    settings = {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        SANITIZE_VARIABLE: "1",
        "MPG_MAX_ELEMENTS": str(2**18),  # the largest vocabulary still has a case
        "MPG_SIMT_SOURCE": str(build_folder(sanitize=True) / "source"),
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    command += ["--confcutdir=tests/ops", *pytest_arguments]  # without the models, which load slowly under sanitizers
    return subprocess.run(command, cwd=ROOT, env=os.environ | settings | environment, capture_output=True, text=True)


if __name__ == "__main__" and platform.machine() == "x86_64":  # beside the linters, what the suite would begin with
    build(sanitize=False)
