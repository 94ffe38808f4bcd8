"""Draw each token from the target's row: exact, one pass of every model in the target a token."""

from __future__ import annotations

from torch import Tensor

from mpg.decode.batch import Batch
from mpg.decode.rng import Decisions, Purpose
from mpg.decode.rows import TargetRows
from mpg.models.ensemble import Ensemble, Pass
from mpg.models.session import Role, Session
from mpg.options import Options


class Direct:
    """Exact up to the floating point of the models' own forwards. See `Sampler` for the interface."""

    def __init__(self, models: Ensemble, attributes: tuple[Role, ...], options: Options):
        self.options, self.target = options, TargetRows(models, attributes, options)
        self.roles = self.target.roles

    def start(self, session: Session, batch: Batch, decide: Decisions) -> None:
        self.session, self.batch, self.decide = session, batch, decide
        self.target.start(batch)

    def reset(self, rows: Tensor) -> None:
        self.target.reset(rows)

    def round(self) -> None:
        batch = self.batch

        # One pass of every model over the last token
        input_tokens = batch.last_tokens[:, None]  # (B, 1)
        logits = self.session.forward(self.roles, input_tokens, batch.lengths - 1, kv_length=batch.kv_length(1))

        # Combine, process, warp, draw
        none, chunk = batch.none, input_tokens[:, :0]
        rows, log_totals = self.target.of(logits, chunk, none)
        token = self.decide.categorical(rows[:, 0], Purpose.LAST, 0, lambda: batch.active & log_totals[:, 0].isfinite())
        self.target.commit(logits, none, token)
        committed = batch.commit(chunk, none, token, log_totals)
        if batch.is_traced:
            batch.trace(self.target.log_ratios(logits, committed))
        if batch.num_top is not None:
            batch.tell(self.target.logprobs(logits, committed, batch.num_top))

    def reach(self) -> int:
        return 1

    def passes(self, num_drafts: int) -> list[Pass]:
        return [(self.roles, 1)]

    def statistics(self) -> dict[str, Tensor]:
        return {}
