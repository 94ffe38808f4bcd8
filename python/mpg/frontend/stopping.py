"""When a text ends before its end-of-sequence token and its limit: at a stop string, or by a stopping criterion.

Decides on the host, token by token, from what is committed; knows nothing of rounds or of how tokens come about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

Criterion: TypeAlias = Callable[[torch.Tensor, None], Any]


@dataclass(frozen=True)
class Stops:
    """What ends one request's text beside its end-of-sequence tokens and its limit.

    prompt     token ids
    strings    end the text with the token that completes one of them within the new text, special tokens spelled out
    criteria   of transformers' protocol, criterion(input_ids (1, L), scores=None) -> bool or (1,) bool, called after
               every new token with prompt and new tokens; a truth ends the text
    tokenizer  decodes the new tokens; needed for strings alone
    device     of `input_ids`
    """

    prompt: Sequence[int]
    strings: tuple[str, ...]
    criteria: tuple[Criterion, ...]
    tokenizer: Any
    device: torch.device

    def end(self, tokens: Sequence[int]) -> bool:
        """Whether the last of the new tokens ends the text, given that none before it did."""
        if self.strings:
            # A token holds one byte at least; one more, as decoding may strip the space before the first.
            longest = max(len(string.encode()) for string in self.strings) + 1
            text = self.tokenizer.decode(tokens[-longest:], skip_special_tokens=False)
            if any(string in text for string in self.strings):
                return True
        if not self.criteria:
            return False
        input_ids = torch.tensor([[*self.prompt, *tokens]], device=self.device)
        answers = [criterion(input_ids, None) for criterion in self.criteria]  # every one is asked, as it may count
        return any(_is_true(answer) for answer in answers)


def _is_true(answer: Any) -> bool:
    try:
        return bool(torch.as_tensor(answer).item())
    except (RuntimeError, TypeError):
        wanted = "True, False or a tensor of one of them"
        raise ValueError(f"stopping_criteria: expected {wanted}, got {answer!r} from a criterion") from None
