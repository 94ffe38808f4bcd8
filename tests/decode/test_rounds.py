"""Rounds that are captured whole give the texts and statistics of others, whoever enters or leaves; bugs planted in
what they depend on do not go unnoticed.

On the CPU a tape stands in for the capture of CUDA, which is used where MPG_DEVICE says so.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from itertools import chain
from weakref import ref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import mpg
from longer import thinned
from mpg.decode import rounds, run
from mpg.decode.batch import Batch, Snapshot
from mpg.decode.rounds import Rounds
from mpg.decode.run import Scheduler
from mpg.demo import MODELS
from mpg.demo.corpus import DEMO_QUESTIONS, HELD_OUT_QUESTIONS
from mpg.models import graphs
from mpg.models.idle import MAX_IDLE
from mpg.models.routes import Forward, Routes
from mpg.models.upload import Addresses
from planted import plant
from tape import Tape

DEVICE = os.environ.get("MPG_DEVICE", "cpu")
QUESTIONS = [*DEMO_QUESTIONS[:3], *(question.text for question in HELD_OUT_QUESTIONS[:3])]
WEIGHTS = [{"E": 1, "T": 1}, {"T": 0.5, "J": 1}, {"E": 1, "T": 0.5}, {"J": 1}, {"E": 2, "J": 0.5}, {"E": 0.5, "T": 1}]
TIMES = ("tokens_per_second", "time_to_first_token")
WAYS = [
    {"sampler": "direct", "target": "geometric", "trace": True},
    {"sampler": "exact", "target": "geometric", "trace": True},
    {"sampler": "exact", "target": "geometric", "draft": "merged", "verify": "token"},
    {"sampler": "exact", "target": "arithmetic", "draft": "lookup", "adaptive": True},
    {"sampler": "exact", "target": "arithmetic", "mixture_span": 3},
    {"sampler": "exact", "target": "geometric", "draft": "model", "adaptive": True},
    {"sampler": "scr", "target": "geometric", "trace": True},
    {"sampler": "token-rs", "target": "geometric"},
    {"sampler": "seq-rs", "target": "geometric", "tries": 2},
]


def without(field):
    """The arguments of `plant` that take a field out of a round's key."""
    return "batch.num_top)", f"batch.num_top)._replace({field}=None)"


@pytest.fixture(scope="module")
def model():
    return mpg.load(MODELS, draft=MODELS, device=DEVICE, dtype="float32")


@pytest.fixture
def graphed(monkeypatch):
    monkeypatch.setitem(graphs.CAPTURES, "cpu", Tape)
    monkeypatch.setattr(rounds, "MEETINGS", 2)
    return mpg.load(MODELS, draft=MODELS, device=DEVICE, dtype="float32", graphs=True)


@pytest.fixture
def replayed(monkeypatch):
    """A list that grows with every round, by whether it was run from a graph."""
    found, run_one = [], rounds.Rounds.run

    def noting(self):
        fed, note_fed = [], self.session.note_fed
        self.session.note_fed = lambda kv_length: (fed.append(kv_length), note_fed(kv_length))
        run_one(self)
        del self.session.note_fed
        found.append(bool(fed))

    monkeypatch.setattr(rounds.Rounds, "run", noting)
    return found


def named(way):
    return " ".join(map(str, way.values()))


def told(result):
    """What is told of a text, but for times: its tokens, and the numbers beside them."""
    stats = [value for name, value in result.stats.items() if name not in TIMES]
    return result.tokens, torch.tensor(
        [*stats, *chain(*(ratios.values() for ratios in result.log_ratios or ()))], dtype=torch.float64
    )


def is_same(ones, others):
    return all(
        one == other and numbers.shape == wanted.shape and numbers.allclose(wanted, 1e-3, 1e-4, equal_nan=True)
        for (one, numbers), (other, wanted) in zip(ones, others, strict=True)
    )


def called(model, way, prompts=([5, 6, 7],), calls=2, **options):
    """What the last of some like calls tells: all of its rounds have been met before, and are captured before it where
    it is the third."""
    options = {
        "weights": WEIGHTS[: len(prompts)],
        "seed": 7,
        "max_new_tokens": 12,
        "eos_token_id": [],
        **way,
        **options,
    }
    for _ in range(calls):
        results = model.generate(list(prompts), **options)
    return list(map(told, results))


def served(model, way, asked, **sizes):
    """What a scheduler that lives long tells of requests, of each what `generate` takes and `num_top`: some have a row
    at first, and others one whenever one ends; all of them twice."""
    names = model.models.attribute_names
    call = model.read([1], weights=dict.fromkeys(names, 1.0), **way)
    sizes = {"num_rows": 2, "capacity": 140, "most": 2, "rounds_ahead": 0, **sizes}
    scheduler = Scheduler(model.models, call.options, (), attributes=names, **sizes)
    found = []
    for _ in range(2):
        entries, tops = [], {}
        for options in asked:
            given = {"prompt": [5, 6, 7], "weights": WEIGHTS[0], "seed": 3, "max_new_tokens": 12, **way, **options}
            num_top = given.pop("num_top", None)
            call = model.read(**given)
            entries.append(scheduler.add(replace(call.requests[0], options=call.options, num_top=num_top)))
        while scheduler.has_work:
            for entry, tokens in scheduler.step():
                tops.setdefault(entry, []).extend(token.top_logprobs and token.top_logprobs[0][0] for token in tokens)
        assert [entry.error for entry in entries] == [None] * len(entries)
        found += [((tokens, tops[entry]), numbers) for entry in entries for tokens, numbers in [told(entry.result)]]
    return found


def weighing(*names, **options):
    return [{"weights": dict.fromkeys(of_request, 1.0), **options} for of_request in names]


LONG = list(range(1, 45)) + list(range(1, 17))  # the next chunk of four goes past a cache length
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
ONE = {"sampler": "direct", "target": "geometric", "trace": True}
MANY = {"sampler": "exact", "target": "geometric", "trace": True}
BARE = {"sampler": "direct", "target": "arithmetic", "trace": True}  # runs no base
UNLIKE = [{"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 2}, {"temperature": 2.0, "top_p": 0.5}, {}]
SCENARIOS = {
    "growing": lambda model: called(model, ONE, [LONG]),
    "adaptive": lambda model: called(model, MANY, PROMPTS[:3], draft="model", adaptive=True, max_new_tokens=24),
    "company": lambda model: called(model, MANY, PROMPTS, calls=3, batch_size=3),
    "whole texts": lambda model: called(model, WAYS[-1], [LONG]),
    "alone": lambda model: served(model, ONE, [{"trace": False}, *UNLIKE, {"num_top": 1}], num_rows=1),
    "unlike": lambda model: served(model, ONE, [*UNLIKE, {"top_k": 9}, *UNLIKE[3:1:-1], *UNLIKE[::2]]),
    "one by one": lambda model: served(
        model, BARE, [*weighing("E", "T"), *weighing("E", prompt=LONG), *weighing("E")], num_rows=1
    ),
    "in order": lambda model: served(model, ONE, weighing(*"ETJ", *"TEJ", *"TJE"), num_rows=3),
    "behind others": lambda model: served(  # the row of the draft, which is J
        model, MANY, [*weighing("T"), *weighing("J", prompt=[8, 9, 10])], num_rows=1
    ),
    "pairs": lambda model: served(model, BARE, weighing("ET", "E", "E", "ET", "TJ"), num_rows=3),
    "ahead": lambda model: served(
        model, {**MANY, "trace": False, "chunk_size": 4}, [{"prompt": LONG}, {"seed": 4}], rounds_ahead=1
    ),
}


@pytest.fixture(scope="module")
def sharp():
    """A small model with adapters that turn every row: what is fed wrongly is seen at once."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=50, max_position_embeddings=256, initializer_range=0.2, **sizes)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(LlamaForCausalLM(config), lora, adapter_name="E")
    for name in "TJ":
        adapted.add_adapter(name, lora)
    return adapted.to(DEVICE)


@pytest.fixture(scope="module")
def sharp_model(sharp):
    return mpg.load(sharp, draft="J")


@pytest.fixture
def sharp_graphed(sharp, graphed):
    return mpg.load(sharp, draft="J", graphs=True)


@pytest.mark.filterwarnings("error:rounds cannot be captured")
@pytest.mark.parametrize("way", thinned(WAYS, 3), ids=named)
def test_texts_are_those_of_rounds_that_are_not_captured(way, sharp_model, sharp_graphed, replayed, monkeypatch):
    """Six requests of unlike attributes in four rows, some of which end early; all that a second call meets is
    captured."""
    monkeypatch.setitem(run.ROUNDS_AHEAD, "cpu", WAYS.index(way) % 2)
    monkeypatch.setattr(rounds, "MEETINGS", 1000)
    prompts, options = [*PROMPTS, [15, 16], [17]], {"weights": WEIGHTS, "seed": 7, "max_new_tokens": 16, **way}
    wanted = list(map(told, sharp_model.generate(prompts, batch_size=4, **options)))
    assert len(sharp_model.models.idle) == 0
    for num_captured in (0, len(wanted)):
        replayed.clear()
        found = {}
        results = sharp_graphed.generate(prompts, batch_size=4, on_result=found.__setitem__, **options)
        assert is_same(list(map(told, results)), wanted)
        assert found == dict(enumerate(results))
        (idle,) = sharp_graphed.models.idle
        assert idle.batch.num_rounds == len(replayed)
        assert replayed.count(False) <= 1 if num_captured else True not in replayed


PLANTED = {
    "a chunk that is not in the key": ("adaptive", Rounds, "_key", *without("longest_draft")),
    "places that are not in the key": ("behind others", Forward, "shape", "self.places, ", ""),
    "a cache length that is not the key's": (
        "growing",
        Rounds,
        "_run_captured",
        "recorded = key.kv_length",
        "recorded = self.batch.kv_length(self.sampler.reach())",
    ),
    "positions that are not noted": (
        "company",
        Rounds,
        "_run_captured",
        "self.session.note_fed(key.kv_length)",
        "pass",
    ),
    "a capture that counts": ("adaptive", graphs.Graphs, "run", "_fill(held, before)", "pass"),
    "outputs that the next replay overwrites": ("ahead", Snapshot, "__init__", ", copy=True", ""),
    "a length that is not counted": ("ahead", Batch, "snapshot", " + self.outputs.done.shape[1] - NUM_FLAGS", ""),
    "a round that is not counted": ("whole texts", Batch, "snapshot", "self.num_rounds += 1", "pass"),
    "forwards that are not in the key": ("one by one", Rounds, "_key", *without("forwards")),
    "rows that are not in the key": ("pairs", Rounds, "_key", *without("num_rows")),
    "a warp that is not in the key": ("alone", Rounds, "_key", *without("warp")),
    "a trace that is not in the key": ("alone", Rounds, "_key", *without("is_traced")),
    "what is told that is not in the key": ("alone", Rounds, "_key", *without("num_top")),
    "a cache length that is not in the key": (
        "growing",
        Rounds,
        "_run_captured",
        "run(key,",
        "run(key._replace(kv_length=0),",
    ),
    "a runner that is not in the key": ("one by one", Forward, "shape", "ref(self.pool.runner), ", ""),
    "adapters that are not in the key": ("one by one", Forward, "shape", ", runs", ""),
    "an order that is not in the key": ("in order", Routes, "signature", "each.order is None, ", ""),
    "graphs in a graph": ("growing", Rounds, "_run_captured", "recorded = key.kv_length", "recorded = None"),
    "routes of the capture in every replay": (
        "in order",
        Addresses,
        "put",
        "return self._tensors[key]",
        "return numbers",
    ),
    "cuts of the capture in every replay": (
        "unlike",
        Addresses,
        "put",
        "return self._tensors[key]",
        "return numbers",
    ),
}


@cache
def expected(model, scenario):
    return SCENARIOS[scenario](model)


@pytest.mark.filterwarnings("error:rounds cannot be captured")
@pytest.mark.parametrize("scenario", thinned([*SCENARIOS]))
def test_scenarios_are_right(scenario, sharp_model, sharp_graphed):
    assert is_same(SCENARIOS[scenario](sharp_graphed), expected(sharp_model, scenario))


@pytest.mark.filterwarnings("error:rounds cannot be captured")
@pytest.mark.parametrize("bug", thinned(list(PLANTED), 5))
def test_a_planted_bug_is_noticed(bug, sharp_model, sharp_graphed, monkeypatch):
    scenario, *planted = PLANTED[bug]
    wanted = expected(sharp_model, scenario)
    plant(monkeypatch, *planted)
    try:
        found = SCENARIOS[scenario](sharp_graphed)
    except (RuntimeError, UserWarning, IndexError, AssertionError):
        return
    assert not is_same(found, wanted)


def test_requests_that_no_capture_can_hold_run_among_others(model, graphed, replayed):
    """A processor is Python, and a text beside the prompt is read elsewhere."""
    contexts = [{}, {}, {"kind": "You are kind."}, {}]
    weights = [{"E": 1}, {"E": 1, "T": 1}, {"E": 1, "kind": 1}, {"T": 1}]

    def run_both(model):
        options = {"weights": weights, "contexts": contexts, "seed": 0, "max_new_tokens": 12, "batch_size": 2}
        beside = model.generate(QUESTIONS[:4], **options)
        return [*called(model, MANY, QUESTIONS[:2], repetition_penalty=1.3), *map(told, beside)]

    assert is_same(run_both(graphed), run_both(model))
    assert True in replayed and False in replayed


def test_a_round_that_cannot_be_captured_is_told_once_and_changes_nothing(model, graphed, replayed, monkeypatch):
    wanted, commit = called(model, WAYS[6]), Batch.commit

    def wait(self, *args):
        assert self.lengths.amax().item()
        return commit(self, *args)

    monkeypatch.setattr(Batch, "commit", wait)
    with pytest.warns(UserWarning, match="rounds cannot be captured, their forwards alone are: aten") as seen:
        found = called(graphed, WAYS[6])
    assert len(seen) == 1 and True not in replayed and len(graphed.models.idle) == 0
    assert is_same(found, wanted)


@torch.no_grad()
def test_a_request_that_fails_in_a_captured_round_leaves_the_others_alone(model, graphed, replayed):
    options = {"weights": WEIGHTS[:2], "seed": 0, "max_new_tokens": 24, **ONE}
    wanted = told(model.generate(QUESTIONS[0], **options | {"weights": WEIGHTS[0]}))
    call = graphed.read(QUESTIONS[:2], **options)
    sizes = Scheduler.sizes(graphed.models, call.requests, call.options)
    scheduler = Scheduler(graphed.models, call.options, call.eos_token_ids, **sizes)
    good, bad = map(scheduler.add, call.requests)
    for _ in range(4):
        scheduler.step()
    assert replayed[-1]
    scheduler.batch.weights[1] = torch.nan
    while scheduler.has_work:
        scheduler.step()
    assert replayed[-1] and is_same([told(good.result)], [wanted])
    assert isinstance(bad.error, ValueError)


def test_calls_leave_few_schedulers_and_none_that_failed_or_whose_weights_have_changed(graphed, monkeypatch):
    base = AutoModelForCausalLM.from_pretrained(MODELS).to(DEVICE)
    own = mpg.load(base, {}, graphs=True, tokenizer=graphed.tokenizer)
    options = {"target": "base", "sampler": "direct", "seed": 0, "max_new_tokens": 8, "eos_token_id": []}
    before = [own.generate(QUESTIONS[0], **options).tokens for _ in range(2)]
    (left,) = map(ref, own.models.idle)
    with torch.no_grad():
        base.get_output_embeddings().weight.mul_(-1)
    changed = [own.generate(QUESTIONS[0], **options).tokens for _ in range(3)]
    plain = mpg.load(base, {}, tokenizer=graphed.tokenizer).generate(QUESTIONS[0], **options).tokens
    assert changed == [plain] * 3 and before[0] == before[1] != plain
    assert left() is None and len(own.models.idle) == 1

    def fail(token):
        raise KeyError(token)

    with pytest.raises(KeyError):
        own.generate(QUESTIONS[0], on_token=fail, **options)
    assert len(own.models.idle) == 0
    for num_rows in range(1, MAX_IDLE + 2):
        own.generate([QUESTIONS[0]] * 2**num_rows, **options | {"max_new_tokens": 1})
    assert len(own.models.idle) == MAX_IDLE
    while own.models.drop_idle():
        pass
    assert len(own.models.idle) == own.models.graph_bytes() == 0


class CountDownloads(TorchDispatchMode):
    """Counts what the host reads of a device that holds all tensors, one of a snapshot among them."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.num_copies, self.is_paused = 0, False
        read, tolist = Snapshot.read, torch.Tensor.tolist

        def read_what_is_copied(snapshot):
            self.is_paused = True
            try:
                return read(snapshot)
            finally:
                self.is_paused = False

        def counted(tensor):
            self.num_copies += not self.is_paused
            return tolist(tensor)

        monkeypatch.setattr(Snapshot, "read", read_what_is_copied)
        monkeypatch.setattr(torch.Tensor, "tolist", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_copied = func is torch.ops.aten._to_copy.default and (kwargs or {}).get("device") is not None
        is_read = func is torch.ops.aten._local_scalar_dense.default
        self.num_copies += (is_copied or is_read) and not self.is_paused
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.skipif(DEVICE != "cpu", reason="counts what a CPU is asked for in place of a device")
@pytest.mark.parametrize("way", [{**ONE, "trace": True}, WAYS[3], WAYS[6], WAYS[7]], ids=named)
def test_a_round_is_read_in_one_copy_and_what_ended_in_it_in_one_more(way, graphed, monkeypatch):
    names = graphed.models.attribute_names
    call = graphed.read(QUESTIONS[:3], weights=WEIGHTS[:3], max_new_tokens=6, seed=0, **way)
    sizes = {"num_rows": 2, "capacity": 64, "most": 2, "rounds_ahead": 0}
    scheduler = Scheduler(graphed.models, call.options, (), attributes=names, **sizes)
    num_top = 2 if way["sampler"] in ("direct", "exact") else None
    entries = [scheduler.add(replace(request, num_top=num_top)) for request in call.requests]
    downloads = CountDownloads(monkeypatch)
    while scheduler.has_work:
        scheduler._admit()
        num_over, downloads.num_copies = sum(entry.is_over for entry in entries), 0
        with downloads:
            scheduler.step()
        has_ended = sum(entry.is_over for entry in entries) > num_over
        assert downloads.num_copies == 1 + has_ended
    assert all(entry.result is not None for entry in entries)
