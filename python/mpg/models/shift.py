"""Rows that read another text than the base: where they start, and the token that they are fed first.

Knows lengths and last tokens; nothing of caches or of what the texts are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class OwnText(NamedTuple):
    """How a text differs from the prompt that the base reads.

    shift    tokens that it has more
    last_at  the base's position of its last token, where that is another token than the base's, else -1
    last     that token
    """

    shift: int = 0
    last_at: int = -1
    last: int = 0

    @classmethod
    def of(cls, text: Sequence[int], prompt: Sequence[int]) -> OwnText:
        shift = len(text) - len(prompt)
        return cls(shift) if text[-1] == prompt[-1] else cls(shift, len(prompt) - 1, text[-1])


PROMPT = OwnText()


class Shift(NamedTuple):
    """Where the rows of a forward do not read what the base reads, each (R,) int64.

    by:       tokens that a row's text is longer than the base's
    last_at, last: position of the base's last prompt token, and the token that a row has there, where that is another

    longest:  the most of `by`
    """

    by: Tensor
    last_at: Tensor
    last: Tensor
    longest: int

    @classmethod
    def of(cls, texts: Sequence[OwnText], put: Callable[[Tensor], Tensor]) -> Shift | None:
        """None where none is another text than the base's. `put` brings numbers to the device."""
        if all(text == PROMPT for text in texts):
            return None
        by, last_at, last = put(torch.tensor(texts)).T
        return cls(by, last_at, last, max(text.shift for text in texts))

    def apply(self, tokens: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens (R, q) that the rows are fed, and where they start, from what the base would be."""
        is_last = (start == self.last_at)[:, None] & (torch.arange(tokens.shape[1], device=tokens.device) == 0)
        return torch.where(is_last, self.last[:, None], tokens), start + self.by
