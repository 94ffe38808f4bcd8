"""The models of a combination alone, as `mpg.load` loads them."""

from __future__ import annotations

from typing import Any

import mpg
from mpg.models.ensemble import Ensemble


def load(*arguments: Any, **settings: Any) -> Ensemble:
    return mpg.load(*arguments, **settings).models
