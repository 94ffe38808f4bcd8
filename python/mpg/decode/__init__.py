"""The samplers: one file an algorithm, each a class whose `round` reads as it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mpg.decode import exact, rejection, scr
from mpg.decode.batch import Batch
from mpg.decode.direct import Direct
from mpg.decode.exact import Exact
from mpg.decode.rejection import SeqRS, TokenRS
from mpg.decode.rng import Decisions
from mpg.decode.scr import SCR
from mpg.models.ensemble import Ensemble, Pass
from mpg.models.session import Role, Session
from mpg.options import Options


class Sampler(Protocol):
    """What the engine asks of a sampler. A new one is a class like this and a line in `SAMPLERS`.

    roles  the models to open a session for
    """

    roles: tuple[Role, ...]

    def __init__(self, models: Ensemble, attributes: tuple[Role, ...], options: Options):
        """attributes: the roles of the attributes, in the order of the batch's weights: names, or each text's own by
        their numbers. Of numbers only those that some row has are fed; their logits and weights are in use then."""

    def start(self, session: Session, batch: Batch, decide: Decisions) -> None:
        """Take a freshly opened session and batch. Before every round, each opened model has read all committed tokens
        of every row but the last."""

    def reset(self, rows: Tensor) -> None:
        """Forget the requests that were in these rows (int64): others have begun there."""

    def round(self) -> None:
        """Commit at least one token to every active row, or mark it as failed; only seq-rs, which commits whole texts,
        may take a bounded number of rounds for it. Never waits for the device, and keeps what it remembers in tensors
        that it changes in place."""

    def reach(self) -> int:
        """Positions that the next round feeds at most, from the last committed token on."""

    def passes(self, num_drafts: int) -> list[Pass]:
        """The forwards of a round in which a request drafts so many tokens: the roles fed, and how many tokens to each.
        Those of the round itself may be more and longer, where others draft more."""

    def statistics(self) -> dict[str, Tensor]:
        """What the sampler counted: the entries of its file's `STATISTICS`, each (B,)."""


SAMPLERS: dict[str, type[Sampler]] = {
    "exact": Exact,
    "direct": Direct,
    "scr": SCR,
    "token-rs": TokenRS,
    "seq-rs": SeqRS,
}

# Every entry of `Result.stats` with its unit or denominator; but for the times those of the request alone, whatever ran
# beside it. The three costs are counted apart, never mixed; reading the prompt is in none of them.
STATISTICS = {
    "rounds": "propose, score, verify, commit (a count)",
    "model_calls_per_token": "forwards, every model that takes part counted / tokens",
    "depth_per_token": "forwards that wait for one another / tokens",
    "positions_per_token": "positions that a model read / tokens",
    "tokens_per_second": "tokens / seconds to the last one from the call, or from when a row was free",
    "time_to_first_token": "seconds from the call to the request's first token",
    **exact.STATISTICS,
    **rejection.STATISTICS,
    **scr.STATISTICS,
    "reject_rate": f"{scr.STATISTICS['reject_rate']}; token-rs, seq-rs: {rejection.STATISTICS['reject_rate']}",
}
