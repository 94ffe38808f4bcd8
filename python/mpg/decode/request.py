"""One text that is asked for, and what becomes of it. Knows no other text, no model and no device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mpg.decode.batch import Processor, Round
from mpg.decode.targets import base_cancels
from mpg.models.session import Attributes, Role
from mpg.options import Options
from mpg.results import Result, Transcript

if TYPE_CHECKING:
    from mpg.models.ensemble import Ensemble


@dataclass(frozen=True)
class Request:
    """One prompt of a call, checked. `alpha` by attribute of the models, in their order; `weights` as asked for.

    processor  as in `Batch.processors`
    ends       as in `Transcript`
    contexts   what attributes, and the anchor, read in place of the prompt, by name
    options    its own temperature, cuts and trace, where its scheduler's may be others; None for those
    num_top    tokens of the combined row whose log-probabilities are told beside that of each new one; None for none
               of them, not even its own
    """

    token_ids: list[int]
    alpha: tuple[float, ...]
    weights: dict[str, float]
    max_new_tokens: int
    seed: int
    processor: Processor | None = None
    ends: Callable[[Sequence[int]], bool] | None = None
    contexts: Mapping[str, list[int]] = field(default_factory=dict)
    options: Options | None = None
    num_top: int | None = None

    @cached_property
    def longest_prompt(self) -> int:
        """Tokens of the longest text that a model reads before new ones."""
        return max(map(len, [self.token_ids, *self.contexts.values()]))

    @property
    def num_positions(self) -> int:
        """That its longest text takes."""
        return self.longest_prompt + self.max_new_tokens

    def alpha_of(self, wanted: Sequence[str], names: Sequence[str]) -> list[float]:
        """Its weights of some of the models' attributes, all of whose names are `names`."""
        return [self.alpha[names.index(name)] for name in wanted]

    def weighed(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of the models' attributes that it weighs."""
        return tuple(name for name, alpha in zip(names, self.alpha, strict=True) if alpha)

    def attributes(self, models: Ensemble, options: Options, *, needs_base: bool = False) -> Attributes:
        """Those that it weighs, by number. Where the base cancels out of the target, and neither a draft nor a trace
        asks for it, the heaviest of them stands in its place, so that the base is not run.

        options: where it has none of its own
        """
        names = self.weighed(models.attribute_names)
        attributes: dict[Role, str] = dict(enumerate(names))
        needs_base = needs_base or (self.options or options).trace or not models.is_same("base", "anchor")
        if not needs_base and base_cancels(options.target, self.alpha):
            # of weight > 0: under geometric a token that it excludes has no probability either way
            attributes["base"] = models.attribute_names[self.alpha.index(max(self.alpha))]
        return attributes


@dataclass(eq=False)
class Entry:
    """A request that a scheduler has taken, and what becomes of it: in the end a result or an error.

    models      those that it is decoded with: the scheduler's, with the contexts that it brings
    attributes  of these, by role: see `Request.attributes`
    added_at    by `perf_counter`, as are all times
    entered_at  when it got its row, or when it was added to a row that was free
    row         where it is decoded
    num_drafts  tokens that it drafts in its next round, 0 where its sampler drafts none
    num_read    tokens that were there when its last round began, which every model has read but for the last
    num_rounds  its rounds so far, by the tokens that it could draft in them
    """

    request: Request
    transcript: Transcript
    added_at: float
    num_drafts: int
    models: Ensemble
    attributes: Attributes
    entered_at: float = 0.0
    row: int = 0
    num_read: int = 0
    num_rounds: Counter[int] = field(default_factory=Counter)
    result: Result | None = None
    error: Exception | None = None

    @property
    def is_over(self) -> bool:
        return self.result is not None or self.error is not None

    def names(self, roles: Sequence[Role]) -> tuple[str, ...]:
        """These roles but for numbers that it has no attribute of; an attribute's name for each that one is of."""
        own = self.attributes
        return tuple(own.get(role, str(role)) for role in roles if isinstance(role, str) or role in own)

    def told(self, done: Round, row: int, options: Options) -> tuple[Any, Any, Any]:
        """What a round says of the tokens that it committed to its row, as `Transcript.extend` takes it: log-ratios,
        log-probabilities and drafts, each None where the request does not ask. options: where it has none of its own"""
        count, log_ratios, logprobs, drafts = done.counts[row], None, None, None
        if done.log_ratios is not None and (self.request.options or options).trace:
            num_attributes = len(self.transcript.attributes)
            log_ratios = [of_token[:num_attributes] for of_token in done.log_ratios[row][:count]]
            drafts = None if done.drafts is None else tuple(of_rows[row] for of_rows in done.drafts)
        if done.logprobs is not None and (num_top := self.request.num_top) is not None:
            every_own, every_top, every_id = done.logprobs
            own, top, ids = every_own[row][:count], every_top[row][:count], every_id[row][:count]
            tops = [tuple(zip(i[:num_top], t[:num_top], strict=True)) for i, t in zip(ids, top, strict=True)]
            logprobs = list(zip(own, tops, strict=True))
        return log_ratios, logprobs, drafts

    @property
    def text(self) -> tuple[Any, ...]:
        """What models have to read, as `Session.asked` takes it."""
        return self.request.token_ids, self.attributes, self.request.contexts, self.models

    def idle(self) -> Entry:
        """One that asks for nothing and is over."""
        contexts = {name: [0] for name in self.request.contexts}
        request = replace(self.request, token_ids=[0], max_new_tokens=0, processor=None, contexts=contexts)
        return replace(self, request=request, num_rounds=Counter(), error=RuntimeError("nothing was asked for"))
