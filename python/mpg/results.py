"""What a call returns, and one request's transcript while it grows. Knows no model and no batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from mpg import pages


@dataclass(frozen=True)
class Token:
    """One committed token, as `on_token` gets it.

    request     index of its result in the list that the call returns
    id          token id
    text        the text that it completes; "" while a character is incomplete, and for special tokens
    log_ratios  by attribute that the request weighs, log pi_i(token) - log anchor(token) where the call traces, else
                None; against the target's row where the target runs no anchor (arithmetic)
    mark        how the token came, where the call traces and its sampler drafts: "accepted" as drafted, "residual"
                drawn in place of a rejected one (under scr by its fallback), "drawn" where none was rejected; else None
    rejected    drafted tokens that its round threw away, told with the round's last token
    logprob     in the combined row, before processors and warp, where a server's request asks for it, else None
    top_logprobs  of the same row the largest, by token id
    """

    request: int
    id: int
    text: str
    log_ratios: dict[str, float] | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    mark: str | None = None
    rejected: int = 0


@dataclass(frozen=True)
class Trace:
    """What a text was made from, for whoever looks at it: of the tokens `texts`, `marks` and `rejected` as `Token` has
    them.

    prompt   what the models read, special tokens included; "" without a tokenizer
    options  of `mpg.Options`, those that the sampler has
    """

    prompt: str
    texts: tuple[str, ...]
    marks: tuple[str | None, ...]
    rejected: tuple[int, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What one request returned.

    text           the new text, without special tokens; a stop string that ended it included; "" without a tokenizer
    tokens         ids of the new tokens, a final end-of-sequence token included
    finish_reason  "stop" (end-of-sequence token, stop string or stopping criterion) or "length"
    prompt_tokens  length of the prompt, in tokens
    seed           reproduces the result; in another batch as far as the models' forwards do not depend on the batch
                   (in 16 bits they do, on a CPU in float32 they do not where a model attends without a mask and its
                   layers are packed at any number of rows)
    weights        alpha by attribute, as asked for
    stats          see `mpg.STATISTICS`; those of exact, scr and the rejection samplers only where it was one
    log_ratios     per token, by attribute, as in `Token`
    plan           under sampler "auto": what it picked, rather than what, at which expected cost
    trace          what `to_html` shows beside these, where the call traces
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    seed: int
    weights: dict[str, float]
    stats: dict[str, float]
    log_ratios: tuple[dict[str, float], ...] | None
    plan: str | None = None
    trace: Trace | None = None

    def summary(self) -> str:
        """One line: how it ended, its length, its seed and its statistics."""
        stats = "  ".join(f"{name} {value:.3g}" for name, value in self.stats.items())
        plan = f"\nauto: {self.plan}" if self.plan else ""
        return f"{self.finish_reason}, {len(self.tokens)} tokens, seed {self.seed}  {stats}{plan}"

    def to_html(self) -> str:
        """A page that shows which attribute pushed which token, in one file that asks for no other.

        Raises ValueError where the call did not trace.
        """
        return to_html([self])


def to_html(results: Sequence[Result]) -> str:
    """One page of several results, as `Result.to_html` has it."""
    if any(result.trace is None for result in results):
        raise ValueError("trace: expected results of calls with trace=True, got one without")
    return pages.fill("trace.html", [asdict(result) for result in results])


@dataclass
class Transcript:
    """The tokens of one request as the host has seen them, and their text piece by piece.

    tokenizer      decodes ids, or None
    attributes     names of those that the request weighs, which log-ratios come by
    request        index of its result in the list that the call returns
    prompt_length  in tokens
    ends           whether the last of the new tokens ends the text, where something beside its end-of-sequence tokens
                   and its limit can
    """

    tokenizer: Any
    attributes: tuple[str, ...]
    request: int
    prompt_length: int
    ends: Callable[[Sequence[int]], bool] | None = None
    tokens: list[int] = field(default_factory=list)
    log_ratios: list[dict[str, float]] = field(default_factory=list)
    traced: list[Token] = field(default_factory=list)
    is_stopped: bool = False  # by `ends`
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    _printed: int = 0  # tokens whose text has been handed out
    _context: int = 0  # where decoding starts: far enough back for the tokenizer to join words as in the whole text

    @property
    def length(self) -> int:
        """Prompt and new tokens."""
        return self.prompt_length + len(self.tokens)

    def where(self) -> str:
        return f"prompt {self.request}, new token {len(self.tokens)}"

    def extend(
        self,
        tokens: list[int],
        log_ratios: list[list[float]] | None,
        logprobs: Sequence[tuple[float, tuple[tuple[int, float], ...]]] | None = None,
        drafts: tuple[int, int] | None = None,
        *,
        is_last: bool,
    ) -> Iterator[Token]:
        """Append a round's tokens, with their log-ratios (one list a token) where traced, up to one that ends the text.

        logprobs: of every token, as `Token` has logprob and top_logprobs
        drafts:   how many drafted tokens the round accepted, and of how many, where traced and the sampler drafts
        is_last:  the request ends with this round

        out: the same as `Token`s
        """
        if tokens:  # seq-rs has rounds without any
            self.last_token_at = time.perf_counter()
            self.first_token_at = self.first_token_at or self.last_token_at
        for i, token in enumerate(tokens):
            self.tokens.append(token)
            by_name = None
            if log_ratios is not None:
                by_name = dict(zip(self.attributes, log_ratios[i], strict=True))
                self.log_ratios.append(by_name)
            self.is_stopped = self.ends is not None and self.ends(self.tokens)
            text = self._next_text(is_last=self.is_stopped or (is_last and i == len(tokens) - 1))
            logprob, top_logprobs = (None, ()) if logprobs is None else logprobs[i]
            mark, rejected = (None, 0) if drafts is None else _judged(*drafts, place=i, is_last=i == len(tokens) - 1)
            new = Token(self.request, token, text, by_name, logprob, top_logprobs, mark, rejected)
            if log_ratios is not None:
                self.traced.append(new)
            yield new
            if self.is_stopped:
                return

    def trace(self, token_ids: Sequence[int], options: Mapping[str, Any]) -> Trace:
        """What the text was made from. token_ids: of the prompt"""
        return Trace(
            prompt="" if self.tokenizer is None else self.tokenizer.decode(token_ids),
            texts=tuple(token.text for token in self.traced),
            marks=tuple(token.mark for token in self.traced),
            rejected=tuple(token.rejected for token in self.traced),
            options=dict(options),
        )

    def text(self) -> str:
        """All of the new text, special tokens left out."""
        return self._text(0, len(self.tokens))

    def _next_text(self, *, is_last: bool) -> str:
        before = self._text(self._context, self._printed)
        now = self._text(self._context, len(self.tokens))
        if now.endswith("\ufffd") and not is_last:  # part of a character
            return ""
        self._context, self._printed = self._printed, len(self.tokens)
        return now[len(before) :]

    def _text(self, start: int, end: int) -> str:
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(self.tokens[start:end], skip_special_tokens=True)


def _judged(accepted: int, offered: int, *, place: int, is_last: bool) -> tuple[str, int]:
    """Mark and rejected tokens of the token at a place of a round that accepted so many of the drafted ones."""
    mark = "accepted" if place < accepted else "residual" if accepted < offered else "drawn"
    return mark, offered - accepted if is_last else 0


OnToken: TypeAlias = Callable[[Token], None] | None
OnResult: TypeAlias = Callable[[int, Result], None] | None
