"""The build as a user meets it: what it says when something is missing, and that the CUDA side compiles and links."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path

import pytest
import torch

from longer import long

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))
import tabulate_kernels

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc" / "kernels"
SOURCES = (
    "CMakeLists.txt", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "cmake", "csrc", "mpg_ext",
    "python",
)  # fmt: skip


def copy_checkout(to: Path) -> Path:
    """What the build needs, without anything that was built here."""
    to.mkdir(exist_ok=True, parents=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name,
                to / name,
                symlinks=True,
                ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"),
            )
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, to / name)
    return to


def build(root: Path, *prefix: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *prefix, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=root, env=os.environ | environment, capture_output=True, text=True)


def failure_of(result: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of the message, without what setuptools prints about its own steps."""
    assert result.returncode != 0
    lines = result.stderr.strip().splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("mpg: ")) :]


def folder_with(tmp_path: Path, *programs: str) -> str:
    """A PATH of these programs alone."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program in programs:
        found = shutil.which(program, path=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
        assert found is not None
        (folder / program).symlink_to(found)
    return str(folder)


def test_missing_torch_is_two_lines_with_the_remedy(tmp_path):
    root = copy_checkout(tmp_path)
    # -S hides the installed packages; setuptools alone is let back in.
    packages = root / "only-setuptools"
    packages.mkdir()
    for name in ("setuptools", "_distutils_hack"):
        (packages / name).symlink_to(Path(sysconfig.get_paths()["purelib"]) / name)
    wrong, remedy = failure_of(build(root, "-S", PYTHONPATH=str(packages)))
    assert "torch is not visible to" in wrong
    assert "pip install torch" in remedy
    assert "--no-build-isolation" in remedy


def test_missing_compiler_is_two_lines_with_the_remedy(tmp_path):
    path = folder_with(tmp_path, "cmake", "ninja")
    wrong, remedy = failure_of(build(copy_checkout(tmp_path), PATH=path, CXX=""))
    assert "no C++ compiler was found" in wrong
    assert "g++" in remedy


def test_forced_cuda_without_nvcc_is_two_lines_with_the_remedy(tmp_path):
    path = folder_with(tmp_path, "cmake", "ninja", "c++")
    result = build(copy_checkout(tmp_path), PATH=path, MPG_CUDA="ON", CUDACXX="", CUDA_HOME=str(tmp_path))
    wrong, remedy = failure_of(result)
    assert "MPG_CUDA=ON, but nvcc was not found" in wrong
    assert "MPG_CUDA=OFF" in remedy


def test_unknown_cuda_setting_is_named(tmp_path):
    wrong, _ = failure_of(build(copy_checkout(tmp_path), MPG_CUDA="maybe"))
    assert "MPG_CUDA must be AUTO, ON or OFF, got 'MAYBE'" in wrong


ARCHS = "80-real 90-real 100-real 120"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_every_kernel_compiles(tmp_path):
    """With a CPU torch too, so that a kernel that does not compile cannot land where there is no GPU. As far as PTX,
    for one generation and unoptimised: what the compiler of the host says of these files, the simulator's build says as
    well, and the long form compiles all of it."""
    sources = sorted(map(str, KERNELS.glob("*.cu")))
    command = ["nvcc", "-std=c++17", "-arch=compute_90", "-Xcicc", "-O0", "-ptx"]
    command += ["--output-directory", str(tmp_path), *sources]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert len(list(tmp_path.glob("*.ptx"))) == len(sources)


@long  # compiles all for four generations
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_forced_cuda_compiles_links_and_imports(tmp_path):
    """For every generation that is supported."""
    root = copy_checkout(tmp_path)
    result = build(root, MPG_CUDA="ON")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    code = "import mpg_ext, json; print(mpg_ext.__file__); print(json.dumps(mpg_ext.build_info()))"
    imported = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    file, info = imported.stdout.splitlines()
    assert Path(file).is_relative_to(root)
    assert '"cuda": true' in info
    assert f'"archs": "{ARCHS}"' in info
    if shutil.which("cuobjdump") is not None:
        (library,) = (root / "mpg_ext").glob("_C*.so")
        listing = subprocess.run(
            ["cuobjdump", "--list-elf", "--list-ptx", str(library)], capture_output=True, text=True, check=True
        ).stdout
        for arch in ARCHS.split():
            number, _, is_real = arch.partition("-")
            assert f"sm_{number}.cubin" in listing
            assert is_real or f"sm_{number}.ptx" in listing


@long  # builds twice and installs
def test_a_wheel_from_the_source_archive_generates_in_a_clean_environment(tmp_path):
    """Of what is not mpg, only the packages that lie beside this Python are lent to it. And a wheel that was built
    elsewhere, at another time, has the same bytes."""
    root = copy_checkout(tmp_path / "checkout")
    run = partial(subprocess.run, check=True, capture_output=True, text=True)
    code = "import setuptools.build_meta as backend; print(backend.build_sdist('dist'))"
    archive = run([sys.executable, "-c", code], cwd=root).stdout.split()[-1]
    pip = [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--no-build-isolation"]
    dated = os.environ | {"SOURCE_DATE_EPOCH": "1700000000", "MPG_CUDA": "OFF"}
    run([*pip, "--wheel-dir", str(tmp_path), str(root / "dist" / archive)], cwd=tmp_path, env=dated)
    elsewhere = copy_checkout(tmp_path / "another" / "checkout")
    run([*pip, "--wheel-dir", str(elsewhere), str(elsewhere)], cwd=elsewhere, env=dated)
    (again,) = elsewhere.glob("mpg-*.whl")
    assert again.read_bytes() == (tmp_path / again.name).read_bytes()
    (wheel,) = tmp_path.glob("mpg-*.whl")
    clean = tmp_path / "clean"
    run(
        [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--target", str(clean), str(wheel)],
        cwd=tmp_path,
    )
    code = """if True:
        import mpg, mpg_ext, sys
        assert mpg.__file__.startswith(sys.argv[1]) and mpg_ext.__file__.startswith(sys.argv[1])
        from mpg.demo import MODELS
        print(mpg.load(MODELS).generate("How was your day?", weights={"E": 1}, seed=0, max_new_tokens=8).stats)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(clean), sysconfig.get_paths()["purelib"]])}
    command = [sys.executable, "-S", "-c", code, str(clean)]
    assert "tokens_per_second" in run(command, cwd=tmp_path, env=environment).stdout


@long  # the next one has it of every kernel and architecture
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_logits_are_loaded_16_bytes_at_a_time():
    """Which no run of a kernel shows: loads of single elements compute the same."""
    kernels = [k for k in tabulate_kernels.kernels(KERNELS / "logsumexp.cu") if k.name == "reduce_slices"]
    assert [kernel.of for kernel in kernels] == ["bfloat16", "float", "half"]
    assert all(kernel.loads > 0 for kernel in kernels)


@long  # compiles all kernels
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_no_kernel_spills_and_packed_ones_load_16_bytes(arch):
    for kernel in [kernel for source in tabulate_kernels.SOURCES for kernel in tabulate_kernels.kernels(source, arch)]:
        assert kernel.spilled == 0, kernel
        if kernel.name in ("reduce_slices", "log_masses") or kernel.of.endswith(("4 at a time", "8 at a time")):
            assert kernel.loads > 0, kernel


@long  # compiles all kernels
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_table_of_kernels_is_what_the_compiler_says():
    page = tabulate_kernels.PAGE.read_text()
    if f"nvcc {tabulate_kernels.compiler()}," not in page:
        pytest.skip("the table is of another compiler")
    assert tabulate_kernels.table() in page


# Of folders before all others on the path and a version of torch, why mpg_ext cannot be imported.
IMPORTS = """
import json, sys
import torch
for folders, version in json.loads(sys.argv[1]):
    path, torch.__version__, sys.path[:0] = [*sys.path], version, folders
    try:
        import mpg_ext
    except ImportError as error:
        print(json.dumps(str(error)))
    sys.path[:] = path
"""


def test_compiled_part_that_does_not_load_says_why(tmp_path):
    """All in one process, which imports torch once: where it is missing, is no library, is missing in a checkout that
    hides the built one, and where it is there and was built for another torch."""
    for name in ("missing", "damaged"):
        shutil.copytree(ROOT / "mpg_ext", tmp_path / name / "mpg_ext", ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / f"damaged/mpg_ext/_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"no library")
    missing, damaged, built = map(str, (tmp_path / "missing", tmp_path / "damaged", ROOT))
    version = torch.__version__
    imports = [([missing], version), ([damaged], version), ([missing, built], version), ([built], "2.3.1")]
    # -S: an editable install would lend the module that it has built.
    environment = os.environ | {"PYTHONPATH": sysconfig.get_paths()["purelib"]}
    command = [sys.executable, "-S", "-c", IMPORTS, json.dumps(imports)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    of_missing, of_damaged, of_hiding, of_other = map(json.loads, done.stdout.splitlines())
    assert of_missing.startswith("mpg was not built, its compiled part is missing; rebuild it")
    wanted = "mpg does not load, most likely because it was built for another torch, this is torch"
    assert of_damaged.startswith(wanted)
    hidden = f"mpg was found in {missing}/mpg_ext, where it was not built, before {built}/mpg_ext; "
    assert of_hiding.startswith(hidden) and of_hiding.endswith(f"--editable {missing}")
    assert of_other.startswith(f"mpg was built for torch {version}, this is torch 2.3.1; rebuild it")
    assert "pip install --no-build-isolation" in of_other
