"""Builds the compiled part of mpg by driving CMake; everything else about the package is in pyproject.toml.

Holds no list of sources: that is CMakeLists.txt. MPG_CUDA=AUTO|ON|OFF, MPG_CUDA_ARCHS (as CMake names
architectures, "90-real") and MAX_JOBS are read from the environment.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def fail(wrong: str, remedy: str) -> None:
    sys.exit(f"mpg: {wrong}\n     {remedy}")


def find_tool(*names: str, beside: str = os.path.dirname(sys.executable)) -> str | None:
    """The first of these programs in this folder (pip puts cmake and ninja beside the interpreter) or on the PATH."""
    path = beside + os.pathsep + os.environ.get("PATH", os.defpath)
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which(os.environ.get("CUDACXX", "")) or find_tool("nvcc", beside=os.path.join(home, "bin"))


def check_tools(cuda: str) -> None:
    if cuda not in ("AUTO", "ON", "OFF"):
        fail(f"MPG_CUDA must be AUTO, ON or OFF, got {cuda!r}.", "Set one of these, or nothing for AUTO.")
    if importlib.util.find_spec("torch") is None:
        fail(
            f"torch is not visible to {sys.executable}, and mpg compiles against the torch that it will run with.",
            "Install it first: pip install torch && pip install --no-build-isolation .",
        )
    if not (shutil.which(os.environ.get("CXX", "").split(" ")[0]) or find_tool("c++", "g++", "clang++")):
        fail("no C++ compiler was found.", "Install g++ or clang++ (C++20), or set CXX to one.")
    if cuda == "ON" and find_nvcc() is None:
        fail("MPG_CUDA=ON, but nvcc was not found.", "Put nvcc on the PATH or set CUDACXX to it, or use MPG_CUDA=OFF.")
    for tool in ("cmake", "ninja"):
        if find_tool(tool) is None:
            fail(f"{tool} was not found.", f"Install it: pip install {tool}")


class CMakeBuild(build_ext):
    """Builds the one extension in a folder that stays, so that a second build compiles only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        cuda = os.environ.get("MPG_CUDA", "AUTO").upper()
        check_tools(cuda)
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        assert cmake
        assert ninja
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-{cuda.lower()}"
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DMPG_CUDA={cuda}"]
        if archs := os.environ.get("MPG_CUDA_ARCHS"):
            configure.append(f"-DMPG_CUDA_ARCHS={archs}")
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        environment = os.environ | {"CUDACXX": find_nvcc() or ""}  # where CMake would look for it only on the PATH
        build.mkdir(parents=True, exist_ok=True)
        with open(build / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two builds at once the second finds all done
            for command in (configure, [cmake, "--build", str(build), "-j", jobs]):
                if subprocess.call(command, env=environment) != 0:
                    fail(f"the native build failed in {build}.", "The first error above says why.")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(build / target.name, target)


setup(
    license="Apache-2.0",
    packages=find_packages("python"),
    # One folder, which links to mpg_ext: an editable install is then a path, and type checkers follow it.
    package_dir={"": "python"},
    ext_modules=[Extension("mpg_ext._C", [])],
    cmdclass={"build_ext": CMakeBuild},
)
