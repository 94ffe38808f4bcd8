"""One choice of an answer: its text without what ended it, and its tokens as the API tells them.

Knows tokens and their text; nothing of requests or of how answers are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mpg.results import Token
from mpg.serve.messages import End, New

LARGEST = 9999.0  # of log-probabilities and log-ratios, as JSON has no infinity for a token that a row excludes
PARTIAL = "\ufffd"  # in what a tokenizer makes of a token that is a part of a character


@dataclass
class Text:
    """New text as it comes, held back where it may yet turn out to begin a stop string."""

    stops: Sequence[str]
    held: str = ""
    is_cut: bool = False

    def add(self, text: str, *, is_last: bool) -> str:
        """What may be shown now that some more text has come."""
        if self.is_cut:
            return ""
        self.held += text
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        keep = 0
        if found:
            self.held, self.is_cut = self.held[: min(found)], True
        elif not is_last:
            keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """How many of the text's last characters are the stop string's first."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass
class Choice:
    """What has come of one choice.

    stops    before which it is cut
    spelled  token ids as text, as far as log-probabilities are asked for
    tokens   where more of them than their text is asked for
    offset   characters of text before its next token, the echoed prompt among them
    """

    stops: Sequence[str]
    spelled: dict[int, str] = field(default_factory=dict)
    num_tokens: int = 0
    tokens: list[Token] = field(default_factory=list)
    end: End | None = None
    shown: str = ""
    offset: int = 0

    def __post_init__(self) -> None:
        self._text = Text(self.stops)

    def take(self, event: New | End) -> tuple[str, Sequence[Token], str | None]:
        """What an event adds: text to be shown, its tokens, and why the answer has ended, if it has."""
        if isinstance(event, End):
            self.end = event
            return self._show("", is_last=True), (), event.finish_reason
        self.num_tokens += event.num_tokens
        self.tokens += event.tokens
        self.spelled |= event.spelled
        return self._show(event.text, is_last=False), event.tokens, None

    def _show(self, text: str, *, is_last: bool) -> str:
        shown = self._text.add(text, is_last=is_last)
        self.shown += shown
        return shown

    def own(self, tokens: Sequence[Token], is_traced: bool) -> dict[str, Any]:
        """What mpg says beside the API: log-ratios of tokens, and at the end seed and statistics."""
        said: dict[str, Any] = {}
        if is_traced:
            said["tokens"] = [token.id for token in tokens]
            said["log_ratios"] = [
                {name: finite(ratio) for name, ratio in (token.log_ratios or {}).items()} for token in tokens
            ]
            said["texts"] = [token.text for token in tokens]
            said["marks"] = [token.mark for token in tokens]
            said["rejected"] = [token.rejected for token in tokens]
        if self.end is not None:
            said |= {"seed": self.end.seed, "weights": self.end.weights, "stats": self.end.stats}
        return said

    def chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        def tell(token_id: int, logprob: float) -> dict[str, Any]:
            text = self.spelled[token_id]
            return {
                "token": text,
                "logprob": finite(logprob),
                "bytes": None if PARTIAL in text else list(text.encode()),
            }

        content = [
            {**tell(token.id, token.logprob or 0.0), "top_logprobs": [tell(*top) for top in token.top_logprobs]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def completion_logprobs(
        self, scored: Sequence[tuple[int, float | None, Sequence[tuple[int, float]], int]]
    ) -> dict[str, Any]:
        """A completion's `logprobs`, of tokens by id, with their log-probabilities, the likeliest of their rows, and
        the number of characters that they complete: what one spells by itself may be a part of one."""
        texts = [self.spelled[token_id] for token_id, _, _, _ in scored]
        offsets = []
        for _, _, _, num_characters in scored:
            offsets.append(self.offset)
            self.offset += num_characters
        tops: list[dict[str, float] | None] = []
        for text, (_, logprob, top, _) in zip(texts, scored, strict=True):
            by_text: dict[str, float] = {}
            for token_id, value in top:  # of those that are spelled alike the likeliest
                by_text.setdefault(self.spelled[token_id], finite(value))
            tops.append(None if logprob is None else by_text | ({} if text in by_text else {text: finite(logprob)}))
        logprobs = [None if logprob is None else finite(logprob) for _, logprob, _, _ in scored]
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def scored(tokens: Sequence[Token]) -> list[tuple[int, float | None, Sequence[tuple[int, float]], int]]:
    """New tokens as `Choice.completion_logprobs` takes them."""
    return [(token.id, token.logprob, token.top_logprobs, len(token.text)) for token in tokens]


def finite(value: float) -> float:
    """The value as JSON can have it; 0 for a ratio of two rows that both exclude a token."""
    return 0.0 if value != value else min(max(value, -LARGEST), LARGEST)
