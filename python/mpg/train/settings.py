"""The settings of one training, the paper's recipe where nothing else is said, checked once.

Knows neither pairs nor models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mpg.options import Check, a_number, an_integer, check_truth, hint, one_of

SCHEDULES = ("cosine", "linear", "constant_with_warmup")
DTYPES = ("bfloat16", "float16", "float32")


def _setting(default: Any, meaning: str, check: Check) -> Any:
    """A field of `Settings`, and all that is written of it anywhere; None as the default asks for nothing."""
    return field(default=default, metadata={"meaning": meaning, "check": check})


def _modules(name: str, value: Any) -> None:
    if not isinstance(value, str) or not all(part.strip() for part in value.split(",")):
        raise ValueError(f"{name}: expected 'all-linear' or names such as q_proj,v_proj, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one training; `describe` says what each means. Raises ValueError for one that is out of range."""

    rank: int = _setting(8, "rank of the adapter", an_integer(1))
    alpha: int = _setting(16, "the adapter is scaled by alpha / rank", an_integer(1))
    dropout: float = _setting(0.05, "dropout of the adapter's input", a_number(0, 0.99))
    modules: str = _setting("all-linear", "'all-linear', or the names of layers, with commas", _modules)
    learning_rate: float = _setting(5e-5, "the highest, of AdamW", a_number(0, open_low=True))
    weight_decay: float = _setting(0.01, "of AdamW", a_number(0))
    schedule: str = _setting(
        "cosine", f"of the learning rate after its warm-up: {' | '.join(SCHEDULES)}", one_of(*SCHEDULES)
    )
    warmup_steps: int = _setting(100, "steps until the learning rate is at its highest", an_integer(0))
    batch_size: int = _setting(16, "pairs in one forward", an_integer(1))
    accumulation: int = _setting(8, "forwards in one step", an_integer(1))
    epochs: int = _setting(3, "passes over the pairs; that of the lowest held-out loss is kept", an_integer(1))
    beta: float = _setting(0.1, "DPO's, how much a distance from the base costs", a_number(0, open_low=True))
    likelihood: float = _setting(
        0.0, "weight of the chosen answer's own likelihood beside DPO's loss, which keeps sentences whole", a_number(0)
    )
    max_answer: int | None = _setting(None, "tokens that are left of a longer answer", an_integer(1))
    held_out: int = _setting(40, "questions that are kept from training, to measure every pass on", an_integer(1))
    checkpoint_steps: int = _setting(20, "steps between two checkpoints; every epoch ends in one", an_integer(1))
    gradient_checkpointing: bool = _setting(False, "compute activations twice, for less memory", check_truth)
    adapter_dtype: str = _setting("bfloat16", f"of the finished adapter: {' | '.join(DTYPES)}", one_of(*DTYPES))
    seed: int = _setting(0, "of weights, order and dropout", an_integer(0, 2**32 - 1))

    def __post_init__(self) -> None:
        for name, setting in SETTINGS.items():
            value = getattr(self, name)
            if value is not None or setting.default is not None:
                setting.metadata["check"](name, value)

    @classmethod
    def of(cls, preset: str, given: Mapping[str, Any]) -> Settings:
        """Settings from a preset and what is given beside it, None being none. Raises ValueError for an unknown one."""
        one_of(*PRESETS)("preset", preset)
        for name in given:
            if name not in SETTINGS:
                raise ValueError(f"{name}: unknown setting; {hint(name, SETTINGS)}")
        return cls(**{**PRESETS[preset], **{name: value for name, value in given.items() if value is not None}})


SETTINGS = {setting.name: setting for setting in dataclasses.fields(Settings)}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": dict(learning_rate=3e-4, warmup_steps=5, batch_size=8, accumulation=1, epochs=2, max_answer=96),
}


def default_of(name: str) -> str:
    """The default of a setting, in words."""
    default = SETTINGS[name].default
    return "none" if default is None else str(default)


def describe(name: str) -> str:
    """What a setting means and its defaults, on one line."""
    small = f" (small: {PRESETS['small'][name]})" if name in PRESETS["small"] else ""
    return f"{SETTINGS[name].metadata['meaning']}. Default: {default_of(name)}{small}"
