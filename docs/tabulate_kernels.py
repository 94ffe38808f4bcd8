"""What the CUDA compiler makes of every kernel: writes the table in kernels.md. Needs nvcc, not a GPU.

Knows how to read what ptxas says of a kernel.

    python docs/tabulate_kernels.py
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = sorted((HERE.parent / "csrc" / "kernels").glob("*.cu"))
PAGE = HERE / "kernels.md"
ARCH = "sm_90"
BEGIN, END = "<!-- written by docs/tabulate_kernels.py -->", "<!-- end -->"


@dataclass(frozen=True)
class Kernel:
    """One kernel as it is compiled for one architecture.

    of       the type of its elements and how many it takes at a time, where there are several
    spilled  bytes stored to and loaded from memory for want of registers
    loads    16-byte loads of the device's memory in its PTX
    """

    name: str
    of: str
    registers: int
    shared_bytes: int
    spilled: int
    loads: int


def kernels(source: Path, arch: str = ARCH) -> list[Kernel]:
    """Every kernel of a file. Raises subprocess.CalledProcessError where it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", f"-arch={arch}", "-Xptxas", "-v", "--keep", "--keep-dir", folder]
        command += ["-c", str(source), "-o", f"{folder}/object"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        (ptx,) = Path(folder).glob("*.ptx")
        code = {part.split("(")[0]: part for part in ptx.read_text().split(".entry ")[1:]}
    found = []
    for part in said.split("Compiling entry function '")[1:]:
        symbol = part.split("'")[0]
        name = re.search(r"\d([a-z][a-z_]*_kernel)", symbol)
        assert name
        types = {"Half": "half", "BFloat16": "bfloat16", "kernelIf": "float"}
        of = [spelled for key, spelled in types.items() if key in symbol]
        of += [f"{count} at a time" for count in re.findall(r"Li(\d+)E", symbol)]
        numbers = [
            sum(int(number) for number in re.findall(pattern, part))
            for pattern in (r"Used (\d+) registers", r"(\d+) bytes smem", r"(\d+) bytes spill")
        ]
        loads = len(re.findall(r"ld\.global(?:\.\w+)*\.v4\.\w32", code[symbol]))
        found.append(Kernel(name[1].removesuffix("_kernel"), ", ".join(of), *numbers, loads))
    return sorted(found, key=lambda kernel: (kernel.name, kernel.of))


def compiler() -> str:
    """The release of nvcc."""
    said = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", said)
    assert release
    return release[1]


def table() -> str:
    lines = [
        f"nvcc {compiler()}, {ARCH}:",
        "",
        "| kernel | of | registers | shared memory, bytes | spilled, bytes | 16-byte loads |",
        "|---|---|---|---|---|---|",
    ]
    for source in SOURCES:
        for kernel in kernels(source):
            numbers = (kernel.registers, kernel.shared_bytes, kernel.spilled, kernel.loads)
            lines.append(f"| `{kernel.name}` | {kernel.of} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines)


def main() -> None:
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
