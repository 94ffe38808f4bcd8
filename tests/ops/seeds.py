"""Where the random inputs of the op tests come from: other ones for each seed.

MPG_SEED names one (0); with MPG_NUM_SEEDS each test runs for so many from there on.
"""

from __future__ import annotations

import os

import torch

SEED = int(os.environ.get("MPG_SEED", "0"))
NUM_SEEDS = int(os.environ.get("MPG_NUM_SEEDS", "1"))


def seeded(number: int) -> torch.Generator:
    """A generator for each number below 2**20 and each seed below 2**12: torch's hold 32 bits of what seeds them."""
    return torch.Generator().manual_seed((SEED << 20) + number)
