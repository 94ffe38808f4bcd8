"""How long products take on this machine, kept so that all its processes choose, and so round, alike."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock

import mpg_ext
from mpg.models.gguf import cache_folder

# Sizes out and in, type and threads, which the time of a layer depends on, and what packed is compared with.
Kind = tuple[int, int, torch.dtype, int, str]
Times = dict[Kind, list[list[float]]]  # at each of some numbers of rows the seconds so and packed


def processor() -> str:
    """As Linux names it; elsewhere what Python knows."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def file() -> Path:
    """Where they lie: one file for each processor, set of instructions, torch and build of mpg."""
    instructions = torch.backends.cpu.get_cpu_capability(), mpg_ext.build_info()["cpu_capability"]
    build = hashlib.sha256(Path(mpg_ext._C.__file__).read_bytes()).hexdigest()
    kind = hashlib.sha256(repr((processor(), instructions, torch.__version__, build)).encode()).hexdigest()
    return cache_folder() / f"products-{kind[:16]}.json"


def read() -> Times:
    """What is kept; nothing where it cannot be read."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        kept = json.loads(file().read_text(encoding="utf-8"))
        return {(out, size, getattr(torch, dtype), *others): times for (out, size, dtype, *others), times in kept}
    return {}


def keep(found: Times) -> Times:
    """Add what was found to what is kept, where the cache can be written; of a kind that another process has kept
    meanwhile its times, not those found."""
    path = file()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            found = found | read()
            kinds = [(out, size, str(dtype).removeprefix("torch."), *others) for out, size, dtype, *others in found]
            beside = path.with_suffix(".new")
            beside.write_text(json.dumps(list(zip(kinds, found.values(), strict=True))), encoding="utf-8")
            beside.replace(path)
    return found
