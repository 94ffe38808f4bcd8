"""A personality as a sentence: an attribute that is a model under another text than the prompt.

Knows what a caller may say; `frontend.contexts` makes tokens of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

TEXTS = ("system", "prefix", "prompt")  # one of which makes a context


@dataclass(frozen=True, kw_only=True)
class Context:
    """What an attribute reads where the base reads the prompt; one of the first three.

    system  a system message, through the chat template, where the prompt has its own or none
    prefix  text that comes verbatim before the prompt, behind its BOS if it begins with one
    prompt  another prompt in its place, as `Model.generate` takes it; with a negative weight a negative prompt
    source  the adapter or model that reads it, as an attribute of `mpg.load` is given; default the base, and of an
            attribute that is a model already, that one

    Raises ValueError where none or several are given, and for what is empty or no text.
    """

    system: str | None = None
    prefix: str | None = None
    prompt: Any = None
    source: Any = None

    def __post_init__(self) -> None:
        given = [name for name in TEXTS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of {', '.join(TEXTS)}, got {' and '.join(given) or 'none'}")
        text = getattr(self, given[0])
        kinds: Any = str | list | tuple if given[0] == "prompt" else str
        wanted = "text, messages or a list of token ids" if given[0] == "prompt" else "text"
        if not isinstance(text, kinds):
            raise ValueError(f"{given[0]}: expected {wanted}, got {text!r}")
        if not text or (isinstance(text, str) and not text.strip()):
            raise ValueError(f"{given[0]}: expected some text, got {text!r}")
        if isinstance(text, str) and any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"{given[0]}: expected text that UTF-8 can hold, got {text!r}")

    @classmethod
    def of(cls, name: str, given: Any) -> Context:
        """What a caller means: a context, text for a system message, or a mapping as recipes have it.

        name  what it is called, for messages

        Raises ValueError that begins with `name`.
        """
        try:
            if isinstance(given, Context):
                return given
            if isinstance(given, str):
                return cls(system=given)
            if isinstance(given, Mapping):
                known = [field.name for field in fields(cls)]
                if unknown := [key for key in given if key not in known]:
                    raise ValueError(f"expected some of {', '.join(known)}, got {unknown[0]!r}")
                return cls(**given)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        raise ValueError(f"{name}: expected text, a Context or a mapping, got {given!r}")
