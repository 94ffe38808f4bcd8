"""What drafts propose: prompt lookup by hand, and how a request's k adapts."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fakes import FakeModels, rounds_of
from mpg.decode.batch import Batch
from mpg.decode.drafts import LookupDraft
from mpg.decode.exact import MAX_ADAPTED_CHUNK, Exact
from mpg.decode.rng import Decisions
from mpg.options import Options


@pytest.mark.parametrize(
    ("text", "drafted"),
    [
        ([1, 2, 3, 9, 8, 1, 2, 3], [9, 8, 1]),  # what followed the last three tokens
        ([1, 2, 3, 4, 7, 2, 3, 5, 1, 2, 3], [4, 7, 2]),  # three that agree win over two that came later
        ([2, 3, 4, 0, 2, 3, 5, 0, 2, 3], [5, 0, 2]),  # of equals the latest
        ([5, 6, 5], [6, 5]),  # no more than there is
        ([4, 4], [4]),
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_lookup_drafts_what_followed_the_longest_latest_match(text, drafted):
    batch = Batch([text], [5], torch.ones(1, 1), torch.tensor([0]), [])
    draft = LookupDraft()
    draft.start(None, batch, None)
    proposal = draft.propose(3)
    assert proposal.rows is None
    assert proposal.chunk[0, : proposal.num_usable[0]].tolist() == drafted


@pytest.mark.parametrize(("deviation", "expected"), [(0.0, MAX_ADAPTED_CHUNK), (60.0, 1)])
def test_adapted_chunks_grow_by_two_where_all_is_accepted_and_else_shrink_by_one(deviation, expected):
    """A draft that is the target is accepted whole every round; one that knows nothing of it hardly ever."""
    models = FakeModels(12, same=("anchor", "E"), others={"draft": deviation} if deviation else None)
    options = Options(sampler="exact", target="arithmetic", adaptive=True, chunk_size=3)
    batch = Batch([[1, 0]], [200], torch.ones(1, 1, dtype=torch.float64), torch.tensor([0]), [])
    sampler = Exact(models, ("E",), options)
    sampler.start(models.open([[1, 0]], sampler.roles, batch.capacity), batch, Decisions(batch.seeds, batch.rounds))
    seen = [3]
    for done in rounds_of(sampler, batch):
        seen.append(done.draft_lengths[0] or seen[-1])
    steps = [after - before for before, after in pairwise(seen)]
    assert expected in seen
    assert set(steps) <= {2, -1, 0, MAX_ADAPTED_CHUNK - 15}
    assert steps[0] == (2 if expected > 1 else -1)
