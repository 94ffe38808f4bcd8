"""The options of one generation call and the weights of one request, checked once.

Knows no model: what depends on one (vocabulary, positions, prompt length) is checked where the model is.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

SAMPLERS = ("exact", "direct", "auto", "scr", "token-rs", "seq-rs")
TARGETS = ("arithmetic", "anchored", "geometric", "base")
DRAFTS = ("model", "reference", "lookup", "merged")
MAX_WINDOW = 65_536
MAX_COUNT = 2**31 - 1
MAX_CHUNK = 32  # the prefix scores of one sequence fill one warp
DEFAULT_NEW_TOKENS = 128
MIN_WEIGHT, MAX_WEIGHT = 1e-6, 1e4  # what float32 rows still tell from 0 and from infinity
MIN_BOUND, MAX_BOUND = 1e-30, 1e30  # likewise
_SAMPLERS_OWN: Any = None  # an option left at this takes its value from _DEFAULTS

# What a sampler takes when the caller is silent; an option that a sampler does not list here is refused with it.
# SCR: section 4.1 of the paper, but for log M_0, which it does not give.
_ROW: dict[str, Any] = {
    "target": "geometric", "mixture_span": "token", "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
}  # fmt: skip
_SCORE: dict[str, Any] = {
    "target": "arithmetic", "temperature": 0.7, "top_p": 0.9, "window": 20, "gamma": 1.2, "tau": 0.01,
    "initial_bound": 2.0,
}  # fmt: skip
_DEFAULTS: dict[str, dict[str, Any]] = {
    "exact": {**_ROW, "chunk_size": 4, "draft": "model", "verify": "block", "adaptive": False},
    "direct": _ROW,
    "auto": _ROW,
    "scr": {**_SCORE, "chunk_size": 4, "empty": "raise", "observed": False},
    "token-rs": {**_SCORE, "tries": 64},
    "seq-rs": {**_SCORE, "tries": 64},
}

_OFF = {"top_k": 0, "min_p": 0.0}  # values that ask for nothing, of a sampler that lacks the option too


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of one generation call. An option that is not given takes its sampler's own default:

    exact, direct, auto  target "geometric", temperature 1, top_p 1, top_k 0, min_p 0, mixture_span "token"
    exact           chunk_size 4, draft "model", verify "block", adaptive False
    scr             target "arithmetic", temperature 0.7, top_p 0.9, chunk_size 4, window 20, gamma 1.2, tau 0.01,
                    initial_bound 2, empty "raise", observed False (section 4.1; the paper leaves M_0 open)
    token-rs        as scr where it has the option, and tries 64; seq-rs alike

    sampler         "exact" (speculative, lossless), "direct" (one draw a token), or "auto": one of the two, with the
                    draft and chunk_size that a short trial found to be the fastest (`mpg.decode.plan`; so its choice,
                    and the text of a seed, may differ from call to call, their law does not); or, approximate, "scr"
                    (Algorithm 1) and the rejection baselines "token-rs" and "seq-rs" (section 4.5)
    target          "arithmetic" (Eq. 10-13), "anchored" (arithmetic around the base), "geometric" (Eq. 7 for the
                    reverse KL), or "base" (no attribute). Under scr it names the score (arithmetic as published, or
                    geometric as Eq. 7 has it), whose weights scr divides by their sum where that is positive
    max_new_tokens  tokens to add at most; default 128 or what the model's positions leave
    temperature     of the target row (0 is its argmax) or, under scr, of the draft (> 0)
    top_p           nucleus mass in (0, 1], of the same row
    seed            of the first prompt; prompt i of a list takes seed + i. Default: drawn anew, and reported
    trace           also return every token's log-ratio under every attribute
    batch_size      requests decoded at once, at most; the others wait until one has ended

    exact, direct and auto:
    top_k           tokens that a row keeps at most, 0 for all; of equal ones those of lower id, not all as transformers
    min_p           share of the row's largest probability that a token needs, in [0, 1]
    mixture_span    arithmetic: how far one draw of the mixture reaches: "token", a number of tokens, or "sequence"

    exact and scr:
    chunk_size      k, tokens drafted a round, 1..32

    exact alone:
    draft           "model" (the draft given to `mpg.load`, else the base), "reference" (the base), "lookup" (what
                    followed the last words before) or "merged" (the adapters' weighted average)
    verify          "block", or "token" by token
    adaptive        let every request's k grow by 2 after a round that accepted all, up to 16 or the k that it began
                    with, and else shrink by 1

    scr, token-rs and seq-rs (sections 3.3 and 4.1), whose target, temperature and top_p are as said of scr:
    window          W, scores the bound looks back on
    gamma           safety margin of the bound, >= 1
    tau             variance of the window below which the bound freezes
    initial_bound   M_0, the bound of the warm-up

    token-rs and seq-rs:
    tries           candidates that one token or text may take; the last is taken whatever its score

    scr alone:
    empty           when no token at all can be accepted: "raise", or draw from the "base"
    observed        push every tested score into the window, not only the accepted one
    """

    sampler: str = "exact"
    target: str = _SAMPLERS_OWN
    max_new_tokens: int | None = None
    temperature: float = _SAMPLERS_OWN
    top_p: float = _SAMPLERS_OWN
    seed: int | None = None
    trace: bool = False
    batch_size: int = 32
    top_k: int = _SAMPLERS_OWN
    min_p: float = _SAMPLERS_OWN
    mixture_span: int | str = _SAMPLERS_OWN
    chunk_size: int = _SAMPLERS_OWN
    draft: str = _SAMPLERS_OWN
    verify: str = _SAMPLERS_OWN
    adaptive: bool = _SAMPLERS_OWN
    window: int = _SAMPLERS_OWN
    gamma: float = _SAMPLERS_OWN
    tau: float = _SAMPLERS_OWN
    initial_bound: float = _SAMPLERS_OWN
    tries: int = _SAMPLERS_OWN
    empty: str = _SAMPLERS_OWN
    observed: bool = _SAMPLERS_OWN

    @property
    def span(self) -> int | None:
        """`mixture_span` in tokens, None for the whole sequence."""
        return {"token": 1, "sequence": None}.get(self.mixture_span, self.mixture_span)  # type: ignore[arg-type]

    def warp(self) -> dict[str, Any]:
        """The keywords of `warp_rows`: what is done to a row before it is drawn from."""
        return {
            "temperature": self.temperature,
            "top_k": self.top_k or 0,
            "top_p": self.top_p,
            "min_p": self.min_p or 0.0,
        }

    @classmethod
    def of(cls, options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Options:
        """Options from keywords, None being none; an unknown one raises ValueError with the nearest known name.

        defaults: what goes for options that are not given, where their sampler has it
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                refuse_unknown(name, known)
        given = {name: value for name, value in options.items() if value is not None}
        merged = {**(defaults or {}), **given}
        sampler = merged.get("sampler", cls.sampler)
        return cls(**{name: value for name, value in merged.items() if name in given or has_option(sampler, name)})

    def __post_init__(self) -> None:
        _one_of("sampler", self.sampler, SAMPLERS)
        defaults = _DEFAULTS[self.sampler]
        for name in dict.fromkeys(name for options in _DEFAULTS.values() for name in options):
            if getattr(self, name) is None:
                object.__setattr__(self, name, defaults.get(name))
            elif name not in defaults and getattr(self, name) != _OFF.get(name):
                raise ValueError(f"{name}: not an option of sampler {self.sampler!r}, got {getattr(self, name)!r}")
        has_score = "initial_bound" in defaults
        if has_score:
            _one_of("target", self.target, ("arithmetic", "geometric"))
        _one_of("target", self.target, TARGETS)
        _number("temperature", self.temperature, low=0)
        if has_score and self.temperature == 0:
            wanted = f"{self.sampler} needs a draft that can vary, expected > 0"
            raise ValueError(f"temperature: {wanted}, got 0; use sampler 'direct'")
        _number("top_p", self.top_p, low=0, high=1, open_low=True)
        if self.max_new_tokens is not None:
            _integer("max_new_tokens", self.max_new_tokens, low=1)
        _integer("batch_size", self.batch_size, low=1)
        if self.seed is not None:
            _integer("seed", self.seed, low=0, high=2**63 - 1)
        if "top_k" in defaults:
            _integer("top_k", self.top_k, low=0, high=MAX_COUNT)
            _number("min_p", self.min_p, low=0, high=1)
            if self.mixture_span not in ("token", "sequence"):
                _integer("mixture_span", self.mixture_span, low=1, high=MAX_COUNT, otherwise="'token', 'sequence' or ")
            if self.target != "arithmetic" and self.span != 1:
                raise ValueError(
                    f"mixture_span: expected 'token' unless the target is 'arithmetic', got {self.mixture_span!r}"
                )
        if "chunk_size" in defaults:
            _integer("chunk_size", self.chunk_size, low=1, high=MAX_CHUNK)
        for name in ("trace", "adaptive", "observed"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.sampler == "exact":
            _one_of("draft", self.draft, DRAFTS)
            _one_of("verify", self.verify, ("block", "token"))
        if has_score:
            _integer("window", self.window, low=1, high=MAX_WINDOW)
            _number("gamma", self.gamma, low=1)
            _number("tau", self.tau, low=0)
            _number("initial_bound", self.initial_bound, low=MIN_BOUND, high=MAX_BOUND)
        if "tries" in defaults:
            _integer("tries", self.tries, low=1, high=MAX_COUNT)
        if self.sampler == "scr":
            _one_of("empty", self.empty, ("raise", "base"))


def refuse_unknown(name: str, known: Sequence[str]) -> NoReturn:
    """Raises ValueError for a keyword that is not among the known ones, with the nearest of them."""
    near = [other for other in known if other.startswith(f"{name}_")] or difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
    raise ValueError(f"{name}: unknown option; {hint}")


def has_option(sampler: str, name: str) -> bool:
    """Whether an option is one of all samplers or of this one."""
    owners = [owner for owner, options in _DEFAULTS.items() if name in options]
    return not owners or sampler in owners


def parse_weights(text: str) -> dict[str, float]:
    """Weights from "E=1,T=-0.5". Raises ValueError naming what is missing, doubled or no number."""
    weights: dict[str, float] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (part.strip() for part in item.rpartition("="))
        if not name or not equals or not value:
            raise ValueError(f"weights: expected NAME=NUMBER, got {item!r}")
        if name in weights:
            raise ValueError(f"weights: {name!r} is given twice, expected once, got {text!r}")
        try:
            weights[name] = float(value)
        except ValueError:
            raise ValueError(f"weights: expected a number for {name!r}, got {value!r}") from None
    return weights


def check_weights(weights: Mapping[str, float] | None, attributes: Sequence[str], target: str) -> tuple[float, ...]:
    """The weights of one request in the order of `attributes`; attributes not named weigh 0.

    Raises ValueError if a name is unknown, none is given, all are 0, one is no number or beyond MIN_WEIGHT and
    MAX_WEIGHT, or their sum is <= 0 under the arithmetic target, whose support may then be empty (Eq. 18-20).
    """
    if target == "base":
        if weights:
            raise ValueError(f"weights: target 'base' takes none, got {dict(weights)!r}")
        return (0.0,) * len(attributes)
    wanted = f"some of {', '.join(attributes)}"
    if weights is None or not isinstance(weights, Mapping) or not weights:
        example = f"such as {attributes[0]}=1" if attributes else "but these models have no attribute"
        raise ValueError(f"weights: expected a number for {wanted} ({example}), got {weights!r}")
    for name, value in weights.items():
        if name not in attributes:
            raise ValueError(f"weights: expected {wanted}, got {name!r}")
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not is_number or not (value == 0 or MIN_WEIGHT <= abs(value) <= MAX_WEIGHT):
            wanted = f"0, or a number of size {MIN_WEIGHT:g} to {MAX_WEIGHT:g}"
            raise ValueError(f"weights: expected {wanted} for {name!r}, got {value!r}")
    ordered = tuple(float(weights.get(name, 0)) for name in attributes)
    if not any(ordered):
        raise ValueError(f"weights: expected at least one that is not 0, got {dict(weights)!r}")
    if target == "arithmetic" and sum(ordered) <= 0:
        raise ValueError(
            f"weights: the arithmetic target needs a positive sum, got {sum(ordered):g} from {dict(weights)!r}; "
            "use target 'geometric' (or 'anchored' under exact and direct), which takes any sign"
        )
    return ordered


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def _integer(name: str, value: Any, *, low: int, high: int | None = None, otherwise: str = "") -> None:
    wanted = f"{low}..{high}" if high is not None else f">= {low}"
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        raise ValueError(f"{name}: expected {otherwise}an integer {wanted}, got {value!r}")


def _number(name: str, value: Any, *, low: float, high: float = math.inf, open_low: bool = False) -> None:
    wanted = f"in {'(' if open_low else '['}{low:g}, {high:g}{']' if high < math.inf else ')'}"
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < low or value > high or (open_low and value == low):
        raise ValueError(f"{name}: expected a number {wanted}, got {value!r}")
