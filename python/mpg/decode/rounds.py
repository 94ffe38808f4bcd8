"""Rounds that are captured whole, once all that one depends on has been met several times.

Knows what a round reads on the host; nothing of how it draws, nor of how a capture is made.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Hashable
from typing import TYPE_CHECKING, NamedTuple

from mpg.decode.batch import Batch, Outputs
from mpg.models.ensemble import Ensemble
from mpg.models.graphs import CaptureError
from mpg.models.session import Session

if TYPE_CHECKING:
    from mpg.decode import Sampler

MEETINGS = 8  # rounds of a key before one is captured, which takes as long as three: mixed batches have many keys
MAX_MET = 1024  # keys that are counted


class _Key(NamedTuple):
    """What shapes and Python's branches in a round depend on."""

    forwards: Hashable
    kv_length: int
    num_rows: int
    longest_draft: int
    warp: Hashable
    is_traced: bool
    num_top: int | None


class Rounds:
    """The rounds of a sampler on its session and batch. Those that processors, which are Python, or texts beside the
    prompt take part in are not captured; the forwards of rounds that are not are, one by one.

    graphs  None where no round is captured
    """

    def __init__(self, models: Ensemble, sampler: Sampler, session: Session, batch: Batch) -> None:
        self.models, self.sampler, self.session, self.batch = models, sampler, session, batch
        self.graphs, self._met = models.new_graphs(), Counter[_Key]()

    def run(self) -> None:
        """A round, as the sampler's own."""
        key = None if self.graphs is None else self._key()
        if key is None or not self._run_captured(key):
            self.sampler.round()

    def begin_call(self) -> None:
        """What an earlier call has met is captured when a later one meets it."""
        self._met = Counter(dict.fromkeys(self._met, MEETINGS))

    def _run_captured(self, key: _Key) -> bool:
        """Run a round from its graph, if it has one or is to have it; whether it has been run."""
        assert self.graphs is not None
        if key not in self.graphs:
            self._met = self._met if len(self._met) < MAX_MET else Counter()
            self._met[key] += 1
            if self._met[key] < MEETINGS:
                return False
            del self._met[key]  # one that is given up for others has to be met again
        self.session.recorded = key.kv_length
        try:
            self.batch.outputs = self.graphs.run(key, self._record, held=self.batch.state.wholes())
        except CaptureError as error:
            self.graphs = None
            self.models.give_up_rounds()
            warnings.warn(f"rounds cannot be captured, their forwards alone are: {error}", stacklevel=2)
            return False
        finally:
            self.session.recorded = None
        self.session.note_fed(key.kv_length)
        return True

    def _record(self) -> Outputs | None:
        self.sampler.round()
        return self.batch.outputs

    def _key(self) -> _Key | None:
        """None where the next round is not captured."""
        batch = self.batch
        of_session = self.session.round_key(batch.kv_length(self.sampler.reach()))
        if of_session is None or batch.processors is not None:
            return None
        warp = None if batch.warps is None else batch.warps.key
        return _Key(*of_session, len(batch), batch.longest_draft, warp, batch.is_traced, batch.num_top)
