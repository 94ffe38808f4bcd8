"""The compiled ops of mpg on tensors: rows, scores, acceptance, the bound, draws, keyed uniforms, adapters of rows.

Knows no model, no tokenizer and no decode loop.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder

import torch  # first: the compiled module links against the libraries that this import loads

_REBUILD = "rebuild it: pip install --no-build-isolation --no-deps --force-reinstall <path of the mpg checkout>"
try:
    from ._C import build_info
except ModuleNotFoundError as error:
    here, places = os.path.dirname(__file__), [os.path.join(place, __name__) for place in sys.path]
    if (built := PathFinder.find_spec(f"{__name__}._C", places)) is not None:  # as in the checkout that it came from
        wrong = f"mpg was found in {here}, where it was not built, before {os.path.dirname(built.origin or '')}"
        remedy = "run Python in another folder, or install that one: pip install --no-build-isolation --editable"
        raise ImportError(f"{wrong}; {remedy} {os.path.dirname(here)}") from error
    raise ImportError(f"mpg was not built, its compiled part is missing; {_REBUILD}") from error
except ImportError as error:  # from the linker: a module for another torch seldom gets as far as saying for which
    wrong = "mpg does not load, most likely because it was built for another torch"
    raise ImportError(f"{wrong}, this is torch {torch.__version__}; {_REBUILD}") from error

if torch.__version__.split(".")[:2] != build_info()["torch"].split(".")[:2]:
    raise ImportError(f"mpg was built for torch {build_info()['torch']}, this is torch {torch.__version__}; {_REBUILD}")

from . import fakes  # noqa: E402, F401 - registers them
from .cpu_ops import attend_rows, linear_panels, rms_norm  # noqa: E402
from .ops import (  # noqa: E402
    accept_prefixes,
    combine_rows,
    commit_block_,
    count_usable_,
    draw_fallback,
    draw_residual,
    draw_tokens,
    draw_uniforms,
    gather_logprobs,
    lora_expand_,
    lora_shrink,
    score_prefixes,
    update_bound_,
    verify_block,
    verify_chunks,
    warp_rows,
)

__all__ = [
    "accept_prefixes",
    "attend_rows",
    "build_info",
    "combine_rows",
    "commit_block_",
    "count_usable_",
    "draw_fallback",
    "draw_residual",
    "draw_tokens",
    "draw_uniforms",
    "gather_logprobs",
    "linear_panels",
    "lora_expand_",
    "lora_shrink",
    "rms_norm",
    "score_prefixes",
    "update_bound_",
    "verify_block",
    "verify_chunks",
    "warp_rows",
]
