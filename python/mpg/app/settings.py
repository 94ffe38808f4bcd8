"""Options as a user writes them, NAME=VALUE: those of `Options`, and transformers' that mpg honours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpg.frontend.hf_generate import Conventions
from mpg.options import Options
from mpg.recipe import parse_value

_NEED_TOKENIZER = ("stop_strings", "continue_final_message", "chat_template_kwargs")


def parse_setting(text: str) -> tuple[str, Any]:
    """Name and value of an option from "NAME=VALUE", the value as a recipe would have it."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not name or not equals or not value:
        raise ValueError(f"set: expected NAME=VALUE, got {text!r}")
    return name, parse_value(value)


def check_settings(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> Options:
    """The options of a call with these keywords and a recipe's defaults, before there is a model.

    Raises ValueError as `Model.generate` does, but for what needs a tokenizer.
    """
    known = {name: value for name, value in options.items() if name not in _NEED_TOKENIZER}
    chosen, conventions = Conventions.of(None, known)
    checked = Options.of(chosen, conventions.before(defaults))
    conventions.check_sampler(checked)
    return checked
