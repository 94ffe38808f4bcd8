"""What ragged rows promise beside the right logits, which test_architectures.py holds against full forwards."""

from __future__ import annotations

import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ensembles import load
from mpg.models.cache import RaggedCache
from mpg.models.ensemble import Cost
from mpg.models.upload import Upload

CAPACITY = 40
PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10], [11, 12, 13]]


def _feed(session, roles, rows, drafted, *, kv_length=CAPACITY):
    """Feed each row's last token and a draft behind it."""
    tokens = torch.tensor([[row[-1], *draft] for row, draft in zip(rows, drafted, strict=True)])
    start = torch.tensor([len(row) - 1 for row in rows])
    return session.forward(roles, tokens, start, kv_length=kv_length)


def test_a_role_that_sat_out_rounds_catches_up(tiny_model, full_logits):
    base, attribute = tiny_model(), tiny_model()
    session = load(base, {"E": attribute}).open(PROMPTS, ["base", "E"], CAPACITY)
    rows = [list(prompt) for prompt in PROMPTS]
    _feed(session, ["base"], rows, [[20, 21]] * 3)
    logits = _feed(session, ["E"], rows, [[22, 23]] * 3)
    for row, of_row in zip(rows, logits[0], strict=True):
        torch.testing.assert_close(of_row, full_logits(attribute, [*row, 22, 23])[len(row) - 1 :], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt_oss"])
def test_rejected_tokens_leave_no_trace(architecture, tiny_model):
    base = tiny_model(architecture)
    ensemble = load(base, {"E": base})
    logits = []
    for rejected in ([], [[30, 31, 32, 33]] * 3, [[34, 35, 36, 37]] * 3):
        session = ensemble.open(PROMPTS, ["base"], CAPACITY)
        if rejected:
            _feed(session, ["base"], PROMPTS, rejected)
        logits.append(_feed(session, ["base"], PROMPTS, [[40]] * 3))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_a_row_past_its_end_harms_no_other_and_is_finite(architecture, tiny_model):
    base = tiny_model(architecture)
    session = load(base, {"E": base}).open(PROMPTS, ["base"], 12)
    tokens = torch.randint(61, (3, 4))
    before = session.forward(["base"], tokens, torch.tensor([6, 0, 2]), kv_length=12)
    after = session.forward(["base"], tokens, torch.tensor([30, 0, 2]), kv_length=12)
    assert torch.equal(before[:, 1:], after[:, 1:])
    assert after.isfinite().all()


def test_kv_length_beyond_the_capacity_is_refused(tiny_model):
    base = tiny_model()
    session = load(base, {"E": base}).open(PROMPTS, ["base"], 12)
    with pytest.raises(ValueError, match="kv_length: expected 1 to the capacity 12, got 13"):
        _feed(session, ["base"], PROMPTS, [[1]] * 3, kv_length=13)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_a_forward_needs_no_data_on_the_host(architecture, tiny_model):
    # Meta tensors have no data: whatever would wait for the device raises.
    base, attribute = tiny_model(architecture).to("meta"), tiny_model(architecture).to("meta")
    session = load(base, {"E": attribute}).open(PROMPTS, ["base", "E"], CAPACITY)
    tokens = torch.zeros(3, 4, dtype=torch.int64, device="meta")
    start = torch.zeros(3, dtype=torch.int64, device="meta")
    logits = session.forward(["E", "base"], tokens, start, kv_length=20)
    assert logits.shape == (2, 3, 4, 61)
    assert logits.device.type == "meta"


def test_prefill_builds_the_logits_of_one_position_only(tiny_model, monkeypatch):
    base = tiny_model()
    ensemble = load(base, {"E": base})
    seen = []
    head = ensemble._models[0].model.lm_head
    head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    ensemble.open(PROMPTS, ["base"], CAPACITY)
    assert seen == [(2, 1, 61)]  # one of the prompts is of one token, which is not read yet


def test_cost_counts_slots_forwards_and_positions(tiny_model):
    base = tiny_model()
    roles = ("base", "draft", "E")  # base and draft are one slot
    ensemble = load(base, {"E": tiny_model()})
    assert ensemble.cost({(roles, 3): 1}, roles) == Cost(model_calls=2, depth=2, positions=6)
    assert ensemble.cost({(roles, 3): 1, (("draft",), 1): 4}, roles) == Cost(model_calls=6, depth=6, positions=10)


def _break_on(token, value, model):
    """Let a model return `value` alone behind a token."""

    def hook(module, args, kwargs, out):
        out.logits[kwargs["input_ids"] == token] = value

    model.register_forward_hook(hook, with_kwargs=True)


@pytest.mark.parametrize(
    ("value", "cause"), [(math.nan, "NaN"), (math.inf, "+inf"), (-math.inf, "nothing but -inf"), (7.0, None)]
)
def test_blame_feeds_a_row_again_and_names_the_role_and_the_cause(value, cause, tiny_model):
    ensemble = load(tiny_model(), {"E": tiny_model()})
    session = ensemble.open(PROMPTS, ["base", "E"], 12)
    expected = f"the 'E' model returned {cause}" if cause else None
    _break_on(5, value, ensemble._models[1].model)
    before = _feed(session, ["base", "E"], PROMPTS, [[1]] * 3, kv_length=12)
    chunk = [9, 1, 5, 1, 1, 1, 1, 1, 1]  # more than the row has room for
    assert session.blame(0, 6, chunk, ["base", "E"]) == expected
    assert session.blame(0, 6, chunk[:2], ["base", "E"]) is None
    assert session.blame(0, 6, chunk, ["base"]) is None
    after = _feed(session, ["base", "E"], PROMPTS, [[1]] * 3, kv_length=12)
    assert torch.equal(before, after)


def test_blame_names_the_model_that_broke_first_in_the_text(tiny_model):
    """What follows is of no account: a token that came from broken logits may break the others."""
    ensemble = load(tiny_model(), {"E": tiny_model()})
    session = ensemble.open(PROMPTS, ["base", "E"], CAPACITY)
    _break_on(5, math.nan, ensemble._models[0].model)
    _break_on(6, -math.inf, ensemble._models[1].model)
    assert session.blame(1, 0, [10, 6, 5], ["base", "E"]) == "the 'E' model returned nothing but -inf"
    assert session.blame(1, 0, [10, 5, 6], ["base", "E"]) == "the 'base' model returned NaN"


def test_two_threads_may_share_a_model(tiny_model, lora_folder):
    """What adapters a forward runs is state of the model: the other thread must not change it in between."""
    ensemble = load(tiny_model(), {name: lora_folder(name) for name in ("E", "T")})
    tokens, start = torch.randint(61, (3, 2)), torch.zeros(3, dtype=torch.int64)

    def forward(role):
        return ensemble.open([[1]] * 3, [role], 8).forward([role], tokens, start, kv_length=8)

    expected = {role: forward(role) for role in ("E", "T")}
    both_inside = threading.Barrier(2)

    def meet(module, args):
        with suppress(threading.BrokenBarrierError):  # as it must be: one waits outside
            both_inside.wait(0.2)

    ensemble._models[0].model.model.layers[0].register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as threads:
        for role, logits in zip(expected, threads.map(forward, expected), strict=True):
            assert torch.equal(logits, expected[role])


class _Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _ops_of(session, tokens, start, kv_length):
    with _Ops() as ops:
        logits = session.forward(["base"], tokens, torch.tensor(start), kv_length=kv_length)
    return ops.counts, logits


MASK_OPS = ("arange", "full", "le", "masked_fill_", "where")


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_mask_and_positions_are_made_once_a_forward(architecture, tiny_model):
    counts = []
    for num_layers in (2, 4):
        base = tiny_model(architecture, num_hidden_layers=num_layers)
        session = load(base, {"E": base}).open(PROMPTS, ["base"], CAPACITY)
        counts.append(_ops_of(session, torch.ones(3, 1, dtype=torch.int64), [6, 0, 2], 7)[0])
    few, many = ([count[name] for name in MASK_OPS] for count in counts)
    assert few == many
    assert counts[0]["arange"] > 1


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt_oss"])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_rows_that_start_together_are_written_as_a_block_and_hide_nothing(architecture, num_tokens, tiny_model):
    """To the same logits as beside a row that starts elsewhere; a window still needs its mask."""
    base = tiny_model(architecture)
    ensemble = load(base, {"E": base})
    tokens, length = torch.randint(61, (3, num_tokens)), 6 + num_tokens
    alone = ensemble.open(PROMPTS[:1] * 2, ["base"], CAPACITY)
    alone.forward(["base"], tokens[:2, :1], torch.tensor([6, 6]), kv_length=7)  # read with the prompts
    counts, logits = _ops_of(alone, tokens[:2], [6, 6], length)
    assert not counts["index_put_"] or architecture == "gpt_oss"  # whose experts write so
    if architecture == "llama" and num_tokens == 1:
        assert not any(counts[name] for name in MASK_OPS[1:])
    beside = ensemble.open([*PROMPTS[:1] * 2, PROMPTS[1]], ["base"], CAPACITY)
    counts, expected = _ops_of(beside, tokens, [6, 6, 0], length)
    assert counts["index_put_"]
    torch.testing.assert_close(logits, expected[:, :2], atol=1e-5, rtol=1e-5)


def test_rows_that_start_together_past_their_end_or_at_the_first_token_are_right(tiny_model, full_logits):
    base = tiny_model()
    session = load(base, {"E": base}).open([[5]] * 2, ["base"], 3)
    _, logits = _ops_of(session, torch.tensor([[5, 6, 7]] * 2), [0, 0], 3)
    torch.testing.assert_close(logits[0, 0], full_logits(base, [5, 6, 7]), atol=1e-5, rtol=1e-5)
    _, logits = _ops_of(session, torch.tensor([[8, 9]] * 2), [2, 2], 3)
    assert logits.isfinite().all()


def test_rows_that_are_copied_are_named_once_for_all_layers_and_cleared_ones_not_at_all(tiny_model):
    """On a GPU every list of them would be an upload."""
    base = tiny_model(num_hidden_layers=4)
    session = load(base, {"E": base}).open(PROMPTS, ["base"], CAPACITY)
    (cache,) = (pool.runner.cache for pool in session._pools.values())
    other = RaggedCache(4, 2, CAPACITY)
    steps = (cache.copy, Upload().add([[0, 1], [1, 2]]), 5), (cache.clear, [0, 2]), (other.take, range(1, 3), 5, cache)
    for named, (step, *arguments) in zip((1, 0, 0), steps, strict=True):
        with _Indices() as indices:
            step(*arguments)
        assert len({index.untyped_storage().data_ptr() for index in indices.seen}) == named
    of_layers = zip(cache.layers, other.layers, strict=True)
    assert all(torch.equal(own.keys[1:, :, :5], its.keys[:, :, :5]) for own, its in of_layers)
    assert not any(own.keys[[0, 2]].any() for own in cache.layers) and all(own.keys[1].any() for own in cache.layers)


class _Indices(TorchDispatchMode):
    """Notes the indices of what is run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "index" in func.overloadpacket.__name__:
            is_list = func.overloadpacket.__name__ in ("index", "index_put_")
            self.seen += [index for index in args[1] if index is not None] if is_list else [args[2]]
        return func(*args, **(kwargs or {}))
