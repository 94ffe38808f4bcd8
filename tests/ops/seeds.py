"""Where the random inputs of the op tests come from: other ones for each MPG_SEED."""

from __future__ import annotations

import os

import torch

SEED = int(os.environ.get("MPG_SEED", "0"))


def seeded(number: int) -> torch.Generator:
    """A generator for each number below 2**20 and each MPG_SEED below 2**12: torch's hold 32 bits of their seed."""
    return torch.Generator().manual_seed((SEED << 20) + number)
