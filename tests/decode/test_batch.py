"""What a batch commits and when a sequence ends."""

from __future__ import annotations

import torch

from mpg.decode.batch import Batch
from mpg.models.upload import Upload

EOS = 9


def make_batch(**kwargs):
    weights = torch.zeros(3, 2)
    return Batch([[1, 2], [3], [4, 5, 6]], [4, 3, 1], weights, torch.tensor([7, 8, 9]), [EOS, 8], **kwargs)


def test_usable_chunk_ends_with_the_first_end_of_sequence_or_the_tokens_left():
    batch = make_batch()
    chunk = torch.tensor([[1, EOS, 2, 8], [1, 1, 1, 1], [1, 1, 1, 1]])
    assert batch.count_usable(chunk).tolist() == [2, 3, 1]
    assert batch.count_usable(chunk[:, :1]).tolist() == [1, 1, 1]
    batch.fail(torch.tensor([True, False, False]))
    assert batch.count_usable(chunk).tolist() == [0, 3, 1]


def test_commit_appends_each_sequences_own_count():
    batch = make_batch()
    chunk = torch.tensor([[10, 11, 12, 13]] * 3)
    batch.commit(chunk, torch.tensor([3, 1, 1]))
    assert batch.lengths.tolist() == [5, 2, 4]
    assert batch.tokens[0, :5].tolist() == [1, 2, 10, 11, 12]
    assert batch.tokens[1, :2].tolist() == [3, 10]
    assert batch.tokens[2, :4].tolist() == [4, 5, 6, 10]
    assert batch.last_tokens.tolist() == [12, 10, 10]
    assert batch.active.tolist() == [True, True, False]  # the last has no token left
    assert batch.rounds.tolist() == [1, 1, 1]


def test_finished_sequence_commits_nothing_more():
    batch = make_batch()
    batch.commit(torch.tensor([[5, EOS], [6, 6], [7, 7]]), torch.tensor([2, 2, 1]))
    assert batch.active.tolist() == [False, True, False]
    before = batch.tokens.clone()
    batch.commit(torch.tensor([[5, 5], [6, 6], [7, 7]]), torch.tensor([2, 1, 2]))
    assert batch.lengths.tolist() == [4, 4, 4]
    assert batch.tokens[[0, 2], :4].equal(before[[0, 2], :4])
    assert batch.rounds.tolist() == [1, 2, 1]


def test_end_of_sequence_in_the_prompt_does_not_end_it():
    batch = Batch([[1, EOS]], [2], torch.zeros(1, 1), torch.tensor([0]), [EOS])
    assert batch.active.tolist() == [True]
    batch.commit(torch.tensor([[3]]), torch.tensor([1]))
    assert batch.active.tolist() == [True]


def test_snapshot_holds_what_the_round_committed_and_no_later_one():
    batch = make_batch()
    chunk = torch.arange(100, 112).view(3, 4)
    batch.commit(chunk, torch.tensor([2, 3, 1]))
    batch.trace(torch.arange(2 * 3 * 4, dtype=torch.float32).view(2, 3, 4))
    snapshot = batch.snapshot()
    batch.commit(chunk, torch.tensor([1, 0, 0]))
    done = snapshot.read()
    assert done.counts == [2, 3, 1]
    assert done.active == [1, 0, 0]
    assert [row[:count] for row, count in zip(done.tokens, done.counts, strict=True)] == [
        [100, 101],
        [104, 105, 106],
        [108],
    ]
    assert done.log_ratios[0][:2] == [[0, 12], [1, 13]]
    assert done.log_ratios[1][:3] == [[4, 16], [5, 17], [6, 18]]
    assert batch.snapshot().read().counts == [1, 0, 0]


def test_row_begins_again_with_another_request_while_the_others_go_on():
    batch = Batch([[1, 2], [3]], [4, 1], torch.zeros(2, 2), torch.tensor([7, 8]), [EOS], capacity=8)
    batch.commit(torch.tensor([[5, 5], [6, 6]]), torch.tensor([1, 1]))
    assert batch.active.tolist() == [True, False]
    batch.replace([1], [[4, 4, 4]], [2], torch.ones(1, 2), torch.tensor([9]))
    assert batch.active.tolist() == [True, True]
    assert batch.lengths.tolist() == [3, 3]
    assert batch.num_new_tokens().tolist() == [1, 0]
    assert batch.rounds.tolist() == [1, 0]
    assert batch.seeds.tolist() == [7, 9]
    assert batch.weights.tolist() == [[0, 0], [1, 1]]
    batch.commit(torch.tensor([[5, 5, 5], [6, 6, 6]]), torch.tensor([1, 2]))
    assert batch.tokens[1, :5].tolist() == [4, 4, 4, 6, 6]
    assert batch.active.tolist() == [True, False]


def test_failed_sequence_is_no_longer_active_and_says_why():
    batch = make_batch()
    batch.fail(torch.tensor([False, True, False]))
    batch.commit(torch.ones(3, 1, dtype=torch.int64), torch.ones(3, dtype=torch.int64))
    assert batch.unusable.tolist() == [False, True, False]
    assert batch.lengths.tolist() == [3, 1, 4]


def test_sequence_stopped_from_outside_commits_nothing_more():
    batch = make_batch()
    batch.commit(torch.ones(3, 2, dtype=torch.int64), torch.tensor([2, 2, 1]))
    batch.stop([0])
    assert batch.active.tolist() == [False, True, False]
    batch.commit(torch.ones(3, 1, dtype=torch.int64), torch.ones(3, dtype=torch.int64))
    assert batch.lengths.tolist() == [4, 4, 4]


def test_chunk_ends_a_sequence_by_a_token_or_by_the_limit_or_not_at_all():
    batch = make_batch()
    chunk = torch.tensor([[1, EOS], [1, 1], [1, 1]])
    assert batch.ends_at(chunk).tolist() == [2, 3, 1]
    assert batch.ends_at(chunk[:, :1]).tolist() == [2, 2, 1]
    assert batch.ends_at(chunk[:, :0]).tolist() == [1, 1, 1]


def test_what_a_chunk_has_behind_the_last_column_touches_no_committed_token():
    """A row that is full and a chunk that is longer than what is left both write beyond their own limits."""
    batch = Batch([[1, 2, 3], [4]], [1, 3], torch.zeros(2, 1), torch.tensor([0, 1]), [])
    batch.commit(torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]]), torch.tensor([1, 2]))
    assert batch.active.tolist() == [False, True]
    batch.commit(torch.tensor([[9, 9, 9, 9], [9, 8, 7, 6]]), torch.tensor([3, 1]))
    assert batch.tokens.tolist() == [[1, 2, 3, 5], [4, 5, 6, 9]]
    assert batch.last_tokens.tolist() == [5, 9]


def test_rows_in_use_are_the_first_and_go_on_where_they_move():
    batch = Batch([[1, 2], [3], [4, 5, 6]], [4, 3, 2], torch.ones(3, 2), torch.tensor([7, 8, 9]), [EOS], num_rows=5)
    own = batch.state.zeros() + torch.arange(5)
    batch.state.hold(batch, "own", own)
    batch.commit(torch.tensor([[5], [EOS], [7]]), torch.tensor([1, 1, 1]))
    batch.errors[2] = ValueError("mine")
    upload = Upload()
    batch.move([2], [1], upload)
    upload.send()
    batch.state.use(2, 2)
    assert len(batch) == 2
    assert batch.seeds.tolist() == [7, 9]
    assert batch.lengths.tolist() == [3, 4]
    assert batch.tokens[1, :4].tolist() == [4, 5, 6, 7]
    assert batch.active.tolist() == [True, True]
    assert batch.own.tolist() == [0, 2]
    assert list(batch.errors) == [1]
    batch.commit(torch.tensor([[5], [7]]), torch.tensor([1, 1]))
    assert batch.active.tolist() == [True, False]
    batch.state.use(4, 2)
    batch.replace([2, 3], [[1], [2]], [2, 2], torch.ones(2, 2), torch.tensor([1, 2]))
    assert batch.active.tolist() == [True, False, True, True]
    assert batch.own.data_ptr() == own.data_ptr()  # where a captured round finds it


def test_attributes_that_come_into_use_weigh_nothing_in_older_rows():
    batch = Batch([[1], [2]], [4, 4], torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([7, 8]), [])
    batch.state.hold(batch, "sums", torch.ones(2, 1 + 3), by_attribute=True)
    batch.state.use(2, 1)
    assert batch.weights.tolist() == [[1], [4]]
    assert batch.sums.shape == (2, 2)
    batch.replace([1], [[3]], [4], torch.tensor([[7.0]]), torch.tensor([9]))
    batch.state.use(2, 3)
    assert batch.weights.tolist() == [[1, 0, 0], [7, 0, 0]]
    assert batch.sums.tolist() == [[1, 1, 0, 0]] * 2
