"""One text that is asked for, and what becomes of it. Knows no other text, no model and no device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mpg.decode.batch import Processor
from mpg.models.session import Role
from mpg.results import Result, Transcript


@dataclass(frozen=True)
class Request:
    """One prompt of a call, checked. `alpha` by attribute of the models, in their order; `weights` as asked for.

    processor  as in `Batch.processors`
    ends       as in `Transcript`
    contexts   what attributes, and the anchor, read in place of the prompt, by name
    """

    token_ids: list[int]
    alpha: tuple[float, ...]
    weights: dict[str, float]
    max_new_tokens: int
    seed: int
    processor: Processor | None = None
    ends: Callable[[Sequence[int]], bool] | None = None
    contexts: Mapping[str, list[int]] = field(default_factory=dict)

    @property
    def num_positions(self) -> int:
        """That its longest text takes."""
        return max(map(len, [self.token_ids, *self.contexts.values()])) + self.max_new_tokens

    def alpha_of(self, wanted: Sequence[str], names: Sequence[str]) -> list[float]:
        """Its weights of some of the models' attributes, all of whose names are `names`."""
        return [self.alpha[names.index(name)] for name in wanted]

    def weighed(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of the models' attributes that it weighs."""
        return tuple(name for name, alpha in zip(names, self.alpha, strict=True) if alpha)


@dataclass(eq=False)
class Entry:
    """A request that a scheduler has taken, and what becomes of it: in the end a result or an error.

    added_at    by `perf_counter`, as are all times
    entered_at  when it got its row, or when it was added to a row that was free
    row         where it is decoded
    num_drafts  tokens that it drafts in its next round, 0 where its sampler drafts none
    num_rounds  its rounds so far, by the tokens that it could draft in them
    """

    request: Request
    transcript: Transcript
    added_at: float
    num_drafts: int
    entered_at: float = 0.0
    row: int = 0
    num_rounds: Counter[int] = field(default_factory=Counter)
    result: Result | None = None
    error: Exception | None = None

    @property
    def is_over(self) -> bool:
        return self.result is not None or self.error is not None

    def names(self, roles: Sequence[Role]) -> tuple[str, ...]:
        """The roles that it has of these, its own attributes by their names."""
        own = dict(enumerate(self.transcript.attributes))
        return tuple(
            own[role] if isinstance(role, int) else role for role in roles if isinstance(role, str) or role in own
        )

    def idle(self) -> Entry:
        """One that asks for nothing and is over."""
        contexts = {name: [0] for name in self.request.contexts}
        request = replace(self.request, token_ids=[0], max_new_tokens=0, processor=None, contexts=contexts)
        return replace(self, request=request, num_rounds=Counter(), error=RuntimeError("nothing was asked for"))
