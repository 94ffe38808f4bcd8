"""A request whose prompt begins in what models have read for another one has the law that it has alone.

Small models with adapters, and not tables: their caches are what a prompt begins in. The law that is wanted comes from
forwards of whole texts without a cache, by transformers and PEFT. Every branch of the production loop is walked.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from itertools import product
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import mpg
from fakes import OfRequests, total_variation
from laws import target_law
from longer import IS_LONG
from mpg.decode.request import Request
from mpg.decode.run import Scheduler
from mpg.models import beginnings
from mpg.models.ahead import Ahead
from mpg.models.beginnings import count_common
from mpg.models.kept import Kept
from mpg.models.pool import Pool
from mpg.models.runner import LoadedModel, ModelRunner
from mpg.models.session import Session
from mpg.options import Options
from planted import plant
from replaying import enumerate_branches

PREFIX, NUM_TOKENS = [1, 3, 0, 2, 1, 1, 3, 0], 2
PROMPT, OTHER = [*PREFIX, 3, 1], [*PREFIX, 0, 2, 2]
WEIGHTS = {"E": 0.7, "T": 0.6, "F": -0.2}  # two adapters, and a model of its own
SAMPLERS = {
    "direct": {"sampler": "direct"},
    "exact": {"sampler": "exact", "chunk_size": 2},
    "arithmetic": {"sampler": "exact", "target": "arithmetic", "chunk_size": 1, "draft": "lookup"},
}
KNOWN = {"all": WEIGHTS, "not E": {"T": 1.0, "F": 0.5}}  # beside the base
WAYS = ["kept", "in a row", "kept, in parts", "in a row, in parts"]
PART = 3  # tokens between two rounds, where prompts are read in parts


class Plain:
    """The models as `target_law` has them."""

    vocab_size, eos_token_ids = 4, ()

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.base = _gpt2()
        adapted = get_peft_model(deepcopy(self.base), _lora(), adapter_name="E")
        adapted.add_adapter("T", _lora())
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                # of few bits, as they are when an adapter is loaded
                parameter.data = torch.randn(parameter.shape).half().to(parameter.dtype) / 2
        self.adapted, self.full = adapted.double().eval(), _gpt2()
        self._log_rows: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def is_same(self, role, other):
        return role == other or {role, other} == {"base", "anchor"}

    @torch.no_grad()
    def log_row(self, role, prompt, text=()):
        key = role, (*prompt, *text)
        if key not in self._log_rows:
            self._log_rows[key] = self._forward(role, torch.tensor([key[1]])).log_softmax(-1)
        return self._log_rows[key]

    def _forward(self, role, ids):
        if role == "F":
            return self.full(ids, use_cache=False).logits[0, -1]
        if role in ("base", "anchor"):
            with self.adapted.disable_adapter():
                return self.adapted(ids, use_cache=False).logits[0, -1]
        self.adapted.set_adapter(role)
        return self.adapted(ids, use_cache=False).logits[0, -1]


def _gpt2():
    """In double precision throughout, which models with RMS norms are not in transformers."""
    config = GPT2Config(
        vocab_size=4, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=None, eos_token_id=None
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def _lora():
    return LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)


@pytest.fixture(scope="module")
def plain():
    return Plain()


@pytest.fixture(scope="module")
def models(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    plain.adapted.save_pretrained(folder)
    return mpg.load(plain.base, {"E": folder / "E", "T": folder / "T", "F": plain.full}, device="cpu").models


@pytest.fixture(autouse=True)
def _any_beginning_is_worth_a_copy(monkeypatch):
    monkeypatch.setattr(beginnings, "MIN_SHARED", 2)


def enumerate_behind(models, way, known, sampler):
    """The law of the prompt where another request, which weighs `known`, has read what it begins with; and the
    positions that models then read of it, over all of them."""
    options, read, counts, forward = Options.of(sampler), [], set(), ModelRunner.forward
    most = 1e9 if way.startswith("kept") else 0

    def watched(self, rows, layout, tokens, *args, **kwargs):
        if "logits_to_keep" in kwargs:
            read.append(sum(count for _, count in layout.runs) * tokens.shape[1])
        return forward(self, rows, layout, tokens, *args, **kwargs)

    def request(prompt, limit, weights):
        alpha = tuple(weights.get(name, 0.0) for name in models.attribute_names)
        return Request(prompt, alpha, weights, limit, seed=5)

    def open_scheduler(num_rows):
        return Scheduler(
            models, options, (), num_rows=num_rows, capacity=40, attributes=models.attribute_names, rounds_ahead=0,
            part=PART if way.endswith("in parts") else None,
        )  # fmt: skip

    def run(replaying, batch_size):
        models.kept = Kept(max_bytes=most)
        first = open_scheduler(1)
        with patch("mpg.decode.run.Decisions", partial(OfRequests, replaying)):
            scheduler = open_scheduler(batch_size + 1)
        scheduler.decide.follow(scheduler, [])
        before = first if most else scheduler  # what is kept comes from a scheduler that is closed by then
        other = before.add(request(OTHER, 4 if most else 25, known))
        while not (other.is_over if most else scheduler.rows):
            before.step()
        first.close()
        read.clear()
        entries = [scheduler.add(request(PROMPT, NUM_TOKENS, WEIGHTS)) for _ in range(batch_size)]
        scheduler.decide.follow(scheduler, entries)
        while not all(entry.is_over for entry in entries):
            scheduler.step()
        assert other.is_over == bool(most)
        scheduler.close()
        counts.add(sum(read))
        return [entry.result.tokens for entry in entries]

    law: dict[tuple[int, ...], float] = {}
    with patch.object(ModelRunner, "forward", watched):
        for prob, text in enumerate_branches(run):
            law[text] = law.get(text, 0.0) + prob
    return law, counts


def cases():
    """All ways with all samplers, behind a request that read with every model or without E; half of it where no more
    is asked for."""
    for (i, way), (j, sampler), (k, known) in product(*map(enumerate, (WAYS, SAMPLERS, KNOWN))):
        if IS_LONG or (j < 2 and (i + j) % 2 == k):
            yield way, sampler, known


@pytest.mark.parametrize(("way", "sampler", "known"), [*cases()])
def test_prompt_that_begins_in_what_another_request_has_read_has_its_own_law(
    way, sampler, known, plain, models, record_property
):
    law, read = enumerate_behind(models, way, KNOWN[known], SAMPLERS[sampler])
    defect = total_variation(law, target_law(plain, PROMPT, NUM_TOKENS, WEIGHTS, **SAMPLERS[sampler]))
    record_property("defect", defect)
    assert len(law) == 16 and defect < 1e-12
    num_models = 3 if sampler == "arithmetic" else 4  # a mixture has no base
    behind = len(PROMPT) - 1 - len(PREFIX)
    assert read == {num_models * behind + (len(PREFIX) if known == "not E" else 0)}


def one_longer(text, other):
    return min(count_common(text, other) + 1, len(text) - 1, len(other) - 1)


MISTAKES = {  # the way in which it is planted, where, and what becomes of what
    "one position more of a kept text": ("kept", Kept, "find", "shared[best]\n", "shared[best] + 1\n"),
    "a kept text of any adapter": ("kept", LoadedModel, "reader", "self._stream(), group", "self._stream()"),
    "one position more of a row": ("in a row", None),
    "a row of any adapter": ("in a row", Session, "_hand_out", "place: (pair.slot.group,", "place: (0,"),
    "a row of any adapter, in parts": ("in a row, in parts", Pool, "begins_as", "pair.slot.group == group and", ""),
    "a part one position later": (
        "kept, in parts",
        Ahead,
        "read",
        "torch.full((1,), first,",
        "torch.full((1,), first + 1,",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_wrong_beginning_is_flagged(name, plain, models, monkeypatch, record_property):
    way, owner, *planted = MISTAKES[name]
    if owner is None:
        monkeypatch.setattr(beginnings, "count_common", one_longer)
    else:
        plant(monkeypatch, owner, *planted)
    law, _ = enumerate_behind(models, way, WEIGHTS, SAMPLERS["direct"])
    defect = total_variation(law, target_law(plain, PROMPT, NUM_TOKENS, WEIGHTS))
    record_property("mutant_flagged", defect > 1e-6)
    assert defect > 1e-6
