"""Which type and which devices a caller means, by name. Knows what this machine and this build have; no models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import mpg_ext
from mpg.models.sources import Place, Source

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # that models compute in
SPLITTING_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and resolved not in DTYPES:
        raise ValueError(f"dtype: expected a floating-point torch dtype such as 'bfloat16', got {dtype!r}")
    return resolved


def resolve_places(device_map: Mapping[str, Any] | None, arguments: Mapping[str, str]) -> dict[str, Place]:
    """The device map by the arguments of load(), which messages name; `arguments` has them by its keys."""
    if device_map is not None and not isinstance(device_map, Mapping):
        raise ValueError(f"device_map: expected a mapping from {list(arguments)} to devices, got {device_map!r}")
    places: dict[str, Place] = {}
    for name, place in (device_map or {}).items():
        if name not in arguments:
            raise ValueError(f"device_map: expected some of {list(arguments)}, got {name!r}")
        splits = isinstance(place, dict) or place in SPLITTING_DEVICE_MAPS
        places[arguments[name]] = place if splits else resolve_device(place, argument=f"device_map[{name!r}]")
    return places


def resolve_device(device: Any, base: Source | None = None, argument: str = "device") -> torch.device:
    with_cuda = mpg_ext.build_info()["cuda"]
    if device is None:
        can_use_cuda = with_cuda and torch.cuda.is_available()
        device = base.device if isinstance(base, nn.Module) else "cuda" if can_use_cuda else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{argument}: expected 'cpu' or 'cuda[:i]', got {str(device)!r}")
    if resolved.type != "cuda":
        return torch.device(resolved.type)
    if not with_cuda or not torch.cuda.is_available():
        without = "mpg" if not with_cuda else None if torch.version.cuda else f"torch {torch.__version__}"
        why = f"{without} was built without CUDA" if without else "no CUDA device is visible"
        raise ValueError(f"{argument}: expected 'cpu', as {why}, got {str(device)!r}")
    index = torch.cuda.current_device() if resolved.index is None else resolved.index  # as parameters report it
    if index >= torch.cuda.device_count():
        raise ValueError(f"{argument}: expected one of {torch.cuda.device_count()} CUDA devices, got {str(device)!r}")
    return torch.device("cuda", index)
