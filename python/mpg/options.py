"""The options of one generation call and the weights of one request, checked once.

Knows no model: what depends on one (vocabulary, positions, prompt length) is checked where the model is.
"""

from __future__ import annotations

import difflib
import math
import numbers
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Generic, Optional, TypeVar

ROW_SAMPLERS = ("exact", "direct", "auto")  # draw from the target's row
SCORE_SAMPLERS = ("scr", "token-rs", "seq-rs")  # weigh what the base drafts
SAMPLERS = ROW_SAMPLERS + SCORE_SAMPLERS
TARGETS = ("arithmetic", "anchored", "geometric", "base")
DRAFTS = ("model", "reference", "lookup", "merged")
MAX_WINDOW = 65_536
MAX_COUNT = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_CHUNK = 32  # the prefix scores of one sequence fill one warp
DEFAULT_NEW_TOKENS = 128
MIN_WEIGHT, MAX_WEIGHT = 1e-6, 1e4  # what float32 rows still tell from 0 and from infinity
MIN_BOUND, MAX_BOUND = 1e-30, 1e30  # likewise

Check = Callable[[str, Any], None]
T = TypeVar("T")
if TYPE_CHECKING:

    class Own(Generic[T]):
        """The type of an option that may be given as None, for its default, and is read as T."""

        def __get__(self, options: Any, owner: Any) -> T: ...

        def __set__(self, options: Any, value: T | None) -> None: ...
else:
    Own = Optional


def _option(meaning: str, check: Check, *, off: Any = None, **defaults: Any) -> Any:
    """A field of `Options`, and all that is written of it anywhere.

    defaults  by sampler, or of all, rows or scores (samplers of theirs); a sampler without one refuses the option
    off       a value that asks for nothing, which it takes too
    """
    groups = {"all": SAMPLERS, "rows": ROW_SAMPLERS, "scores": SCORE_SAMPLERS}
    own = {
        sampler: value for name, value in defaults.items() for sampler in groups.get(name, (name.replace("_", "-"),))
    }
    return field(default=None, metadata={"meaning": meaning, "check": check, "defaults": own, "off": off})


def one_of(*allowed: str) -> Check:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")

    return check


def an_integer(low: int, high: int | None = None, *, otherwise: str = "") -> Check:
    def check(name: str, value: Any) -> None:
        wanted = f"{low}..{high}" if high is not None else f">= {low}"
        is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not is_integer or value < low or (high is not None and value > high):
            raise ValueError(f"{name}: expected {otherwise}an integer {wanted}, got {value!r}")

    return check


def a_number(low: float, high: float = math.inf, *, open_low: bool = False) -> Check:
    def check(name: str, value: Any) -> None:
        wanted = f"in {'(' if open_low else '['}{low:g}, {high:g}{']' if high < math.inf else ')'}"
        if not is_finite(value) or value < low or value > high or (open_low and value == low):
            raise ValueError(f"{name}: expected a number {wanted}, got {value!r}")

    return check


def is_finite(value: Any) -> bool:
    """Whether a value is a number that a float can be, and no truth."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and -sys.float_info.max <= value <= sys.float_info.max


def check_truth(name: str, value: Any) -> None:
    """Raises ValueError unless an argument is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")


def _span(name: str, value: Any) -> None:
    if not isinstance(value, str) or value not in ("token", "sequence"):
        an_integer(1, MAX_COUNT, otherwise="'token', 'sequence' or ")(name, value)


def _seeds(name: str, value: Any) -> None:
    for seed in value if isinstance(value, (list, tuple)) else [value]:
        an_integer(0, MAX_SEED)(name, seed)


@dataclass(frozen=True, kw_only=True)
class Options:
    sampler: Own[str] = _option(
        "'exact' (speculative, lossless), 'direct' (one draw a token), or 'auto': one of the two, with the draft and "
        "chunk_size that a short trial found to be the fastest (so its choice, and the text of a seed, may differ from "
        "call to call, their law does not); or, approximate, 'scr' (Algorithm 1) and the rejection baselines "
        "'token-rs' and 'seq-rs' (section 4.5)", one_of(*SAMPLERS), all="exact",
    )  # fmt: skip
    target: Own[str] = _option(
        "'arithmetic' (Eq. 10-13), 'anchored' (arithmetic around the base), 'geometric' (Eq. 7 for the reverse KL), or "
        "'base' (no attribute). Of scr, token-rs and seq-rs the score (arithmetic as published, or geometric as Eq. 7 "
        "has it), whose weights they divide by their sum where that is positive",
        one_of(*TARGETS), rows="geometric", scores="arithmetic",
    )  # fmt: skip
    max_new_tokens: int | None = _option(
        f"tokens to add at most; None: {DEFAULT_NEW_TOKENS} or what the model's positions leave",
        an_integer(1),
        all=None,
    )
    temperature: Own[float] = _option(
        "of the target's row (0 is its argmax) or, under scr, token-rs and seq-rs, of the draft (> 0)", a_number(0),
        rows=1.0, scores=0.7,
    )  # fmt: skip
    top_p: Own[float] = _option(
        "nucleus mass in (0, 1], of the same row", a_number(0, 1, open_low=True), rows=1.0, scores=0.9
    )
    seed: int | Sequence[int] | None = _option(
        "of the first prompt, prompt i of a list takes seed + i; or a list of one per prompt; None: drawn anew, and "
        "reported", _seeds, all=None,
    )  # fmt: skip
    trace: Own[bool] = _option("also return every token's log-ratio under every attribute", check_truth, all=False)
    batch_size: Own[int] = _option(
        "requests decoded at once, at most; the others wait until one has ended", an_integer(1), all=32
    )
    top_k: Own[int] = _option(
        "tokens that a row keeps at most, 0 for all; of equal ones those of lower id, not all as transformers",
        an_integer(0, MAX_COUNT), rows=0, off=0,
    )  # fmt: skip
    min_p: Own[float] = _option(
        "share of the row's largest probability that a token needs, in [0, 1]", a_number(0, 1), rows=0.0, off=0
    )
    mixture_span: Own[int | str] = _option(
        "arithmetic: how far one draw of the mixture reaches: 'token', a number of tokens, or 'sequence'", _span,
        rows="token",
    )  # fmt: skip
    chunk_size: Own[int] = _option(
        f"k, tokens drafted a round, 1..{MAX_CHUNK}", an_integer(1, MAX_CHUNK), exact=4, scr=4
    )
    draft: Own[str] = _option(
        "'model' (the draft given to `mpg.load`, else the base), 'reference' (the base), 'lookup' (what followed the "
        "last words before) or 'merged' (the adapters' weighted average)", one_of(*DRAFTS), exact="model",
    )  # fmt: skip
    verify: Own[str] = _option("'block', or 'token' by token", one_of("block", "token"), exact="block")
    adaptive: Own[bool] = _option(
        "let every request's k grow by 2 after a round that accepted all, up to 16 or the k that it began with, and "
        "else shrink by 1", check_truth, exact=False,
    )  # fmt: skip
    window: Own[int] = _option("W, scores the bound looks back on", an_integer(1, MAX_WINDOW), scores=20)
    gamma: Own[float] = _option("safety margin of the bound, >= 1", a_number(1), scores=1.2)
    tau: Own[float] = _option("variance of the window below which the bound freezes", a_number(0), scores=0.01)
    initial_bound: Own[float] = _option(
        "M_0, the bound of the warm-up, which the paper leaves open", a_number(MIN_BOUND, MAX_BOUND), scores=2.0
    )
    tries: Own[int] = _option(
        "candidates that one token or text may take; the last is taken whatever its score", an_integer(1, MAX_COUNT),
        token_rs=64, seq_rs=64,
    )  # fmt: skip
    empty: Own[str] = _option(
        "when no token at all can be accepted: 'raise', or draw from the 'base'", one_of("raise", "base"), scr="raise"
    )
    observed: Own[bool] = _option(
        "push every tested score into the window, not only the accepted one", check_truth, scr=False
    )

    @property
    def span(self) -> int | None:
        """`mixture_span` in tokens, None for the whole sequence."""
        return {"token": 1, "sequence": None}.get(self.mixture_span, self.mixture_span)  # type: ignore[arg-type]

    def warp(self) -> dict[str, Any]:
        """The keywords of `warp_rows`: what is done to a row before it is drawn from."""
        return dict(temperature=self.temperature, top_k=self.top_k or 0, top_p=self.top_p, min_p=self.min_p or 0.0)

    def told(self) -> dict[str, Any]:
        """What a request is decoded with, by name: the options that its sampler has, but for the seed."""
        told = {name: getattr(self, name) for name in OPTIONS if name not in ("seed", "trace")}
        return {name: value for name, value in told.items() if value is not None}

    @property
    def is_uncut(self) -> bool:
        """Whether rows keep all of their tokens, at a temperature that `combine_rows` takes."""
        has_cut = self.top_k or self.top_p < 1 or self.min_p
        return not has_cut and 2.0**-126 <= self.temperature <= 2.0**126

    @property
    def is_plain(self) -> bool:
        """Whether rows stay as they are."""
        return self.is_uncut and self.temperature == 1

    @classmethod
    def of(cls, options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Options:
        """Options from keywords, None being none; an unknown one raises ValueError with the nearest known name.

        defaults: what goes for options that are not given, where their sampler has it
        """
        for name in options:
            if name not in OPTIONS:
                raise ValueError(f"{name}: unknown option; {hint(name, OPTIONS)}")
        given = {name: value for name, value in options.items() if value is not None}
        merged = {**(defaults or {}), **given}
        sampler = merged.get("sampler", "exact")
        one_of(*SAMPLERS)("sampler", sampler)
        return cls(**{name: value for name, value in merged.items() if name in given or has_option(sampler, name)})

    def __post_init__(self) -> None:
        sampler = "exact" if self.sampler is None else self.sampler
        for name, option in OPTIONS.items():  # the sampler first
            value, defaults = getattr(self, name), option.metadata["defaults"]
            if value is None:
                object.__setattr__(self, name, defaults.get(sampler))
            elif name == "sampler" or sampler in defaults:
                option.metadata["check"](name, value)
            elif not isinstance(value, numbers.Real) or value != option.metadata["off"]:
                raise ValueError(f"{name}: not an option of sampler {sampler!r}, got {value!r}")
        if sampler in SCORE_SAMPLERS:
            one_of("arithmetic", "geometric")("target", self.target)
            if self.temperature == 0:
                wanted = f"{sampler} needs a draft that can vary, expected > 0"
                raise ValueError(f"temperature: {wanted}, got 0; use sampler 'direct'")
        elif self.target != "arithmetic" and self.span != 1:
            raise ValueError(
                f"mixture_span: expected 'token' unless the target is 'arithmetic', got {self.mixture_span!r}"
            )


OPTIONS: dict[str, Field[Any]] = {option.name: option for option in fields(Options)}


def describe(name: str) -> str:
    """What an option means and its defaults, on one line."""
    defaults = OPTIONS[name].metadata["defaults"]
    owners: dict[str, list[str]] = {}
    for sampler, value in defaults.items():
        owners.setdefault(repr(value), []).append(sampler)
    texts = [value if len(of) == len(SAMPLERS) else f"{value} ({', '.join(of)})" for value, of in owners.items()]
    return f"{OPTIONS[name].metadata['meaning']}. Default: {', '.join(texts)}"


Options.__doc__ = """Options of one generation call. What is None takes its default; a sampler without one refuses it.
Those of scr, token-rs and seq-rs are from section 4.1.

""" + "\n".join(
    textwrap.fill(describe(name), 120, initial_indent=f"{name:<16}", subsequent_indent=" " * 16) for name in OPTIONS
)


def hint(name: str, known: Collection[str]) -> str:
    """What to say of a name that is not among the known ones: the nearest of them, or all."""
    near = nearest(name, known)
    return f"did you mean {near!r}?" if near else f"expected one of {', '.join(dict.fromkeys(known))}"


def suggest(name: str, known: Collection[str]) -> str:
    """What to add where the known names are said already: the nearest of them, or nothing."""
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that was meant, if one is near, be it in small letters or in large ones."""
    longer = [other for other in known if other.startswith(f"{name}_")]
    by_letters = {other.lower(): other for other in reversed(list(known))}
    near = longer or [by_letters[found] for found in difflib.get_close_matches(name.lower(), by_letters, 1)]
    return near[0] if near else None


def has_option(sampler: str, name: str) -> bool:
    """Whether an option is one of this sampler; of a sampler that there is not, whether it is one of all."""
    defaults = OPTIONS[name].metadata["defaults"]
    return sampler in tuple(defaults) or len(defaults) == len(SAMPLERS)


def parse_pair(argument: str, form: str, text: str) -> tuple[str, str]:
    """Name and value of a text of a form like NAME=VALUE. Raises ValueError where it has another."""
    name, _, value = (part.strip() for part in text.partition("="))
    if not name or not value:
        raise ValueError(f"{argument}: expected {form}, got {text!r}")
    return name, value


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

    Raises ValueError if a name is unknown, one is no number or beyond MIN_WEIGHT and MAX_WEIGHT, none is given or all
    are 0 (which target "base" alone takes, and nothing else), or their sum is <= 0 under the arithmetic target, whose
    support may then be empty (Eq. 18-20).
    """
    wanted = f"some of {', '.join(attributes)}"
    if target == "base" and weights is None:
        weights = {}
    if weights is not None and not isinstance(weights, Mapping):
        example = f", such as {{{attributes[0]!r}: 1}}" if attributes else ""
        raise ValueError(f"weights: expected a mapping of numbers by name{example}, got {weights!r}")
    if weights is None or not (weights or target == "base"):
        example = f"such as {attributes[0]}=1" if attributes else "but these models have no attribute"
        hint = "" if target == "base" else "; target='base' is the base alone"
        raise ValueError(f"weights: expected a number for {wanted} ({example}), got {weights!r}{hint}")
    for name, value in weights.items():
        if name not in attributes:
            raise ValueError(f"weights: expected {wanted}, got {name!r}{suggest(name, attributes)}")
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not is_number or not (value == 0 or MIN_WEIGHT <= abs(value) <= MAX_WEIGHT):
            wanted = f"0, or a number of size {MIN_WEIGHT:g} to {MAX_WEIGHT:g}"
            raise ValueError(f"weights: expected {wanted} for {name!r}, got {value!r}")
    ordered = tuple(float(weights.get(name, 0)) for name in attributes)
    if target == "base" and any(ordered):
        wanted = "none, or 0 for each, as target 'base' is the base alone"
        raise ValueError(f"weights: expected {wanted}, got {dict(weights)!r}")
    if target != "base" and not any(ordered):
        got = f"{dict(weights)!r}; target='base' is the base alone"
        raise ValueError(f"weights: expected at least one that is not 0, got {got}")
    if target == "arithmetic" and sum(ordered) <= 0:
        raise ValueError(
            f"weights: the arithmetic target needs a positive sum, got {sum(ordered):g} from {dict(weights)!r}; "
            "use target 'geometric' (or 'anchored' under exact and direct), which takes any sign"
        )
    return ordered
