"""A request that begins in a row which another one has left has the law that it has alone: nothing stays of the other.

The production loop is enumerated over all branches of both requests, beside companions that go on meanwhile.
"""

from __future__ import annotations

import math
from itertools import product

import pytest

from fakes import FakeModels, enumerate_in_company, enumerate_sampler, total_variation
from laws import target_law

PROMPT, PREDECESSOR = [1, 0], ([2, 2, 1], 2)
NUM_TOKENS = 2
WEIGHTS = {"E": 0.7, "T": 0.6}
OPTIONS = {
    "exact": {"sampler": "exact", "draft": "model", "chunk_size": 2},
    "exact over a span": {"sampler": "exact", "target": "arithmetic", "mixture_span": "sequence", "chunk_size": 2},
    "exact that adapts": {"sampler": "exact", "draft": "lookup", "adaptive": True, "chunk_size": 3},
    "direct over a span": {"sampler": "direct", "target": "arithmetic", "mixture_span": 2},
    "scr": {"sampler": "scr", "window": 1, "tau": 10.0, "chunk_size": 2, "initial_bound": 1.2, "temperature": 1.0},
    "token-rs": {"sampler": "token-rs", "window": 1, "tau": 10.0, "initial_bound": 1.2, "top_p": 1.0},
    "seq-rs": {"sampler": "seq-rs", "tries": 2, "window": 1, "initial_bound": 1.2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_late_arrival_has_the_law_of_a_first_one(name, record_property):
    models, options = FakeModels(3, others={"draft": 1.0}, eos_token_ids=[2], seed=5), OPTIONS[name]
    alone = enumerate_sampler(models, PROMPT, NUM_TOKENS, WEIGHTS, **options)
    late = enumerate_sampler(models, PROMPT, NUM_TOKENS, WEIGHTS, predecessor=PREDECESSOR, **options)
    assert len(alone) > 3
    defect = total_variation(alone, late)
    assert defect < 1e-12
    if options["sampler"] in ("exact", "direct"):
        assert total_variation(late, target_law(models, PROMPT, NUM_TOKENS, WEIGHTS, **options)) < 1e-12
    record_property("defect", defect)


# Requests that weigh less, more and others than the one that joins them; some end before it and some after.
COMPANY = [([2, 1], 1, {"T": 0.5}), ([0], 2, {"J": 0.4, "E": 0.3, "T": 0.2}), ([1, 1, 0], 4, {"J": 1.0})]


@pytest.mark.parametrize("name", OPTIONS)
def test_request_among_others_that_weigh_other_attributes_has_the_law_that_it_has_alone(name, record_property):
    """In the scheduler itself: rows move to where others have ended, and numbers of attributes in use rise and fall."""
    models, options = FakeModels(3, ("E", "T", "J"), others={"draft": 1.0}, eos_token_ids=[2], seed=5), OPTIONS[name]
    alone = enumerate_sampler(models, PROMPT, NUM_TOKENS, WEIGHTS, **options)
    joined = enumerate_in_company(models, PROMPT, NUM_TOKENS, WEIGHTS, company=COMPANY, **options)
    assert len(alone) > 3
    defect = total_variation(alone, joined)
    record_property("defect", defect)
    assert defect < 1e-12


# Attributes that read something else than the prompt: longer, shorter; one of them in the company too.
CONTEXTS = {"calm": ("base", [2, 0, 1, 1]), "loud": ("E", [1])}
OF_CONTEXTS = {"E": 0.5, "calm": 0.7, "loud": -0.3}
COMPANY_WITH_CONTEXTS = [([2, 1], 1, {"T": 0.5}), ([0], 2, {"calm": 0.4, "E": 0.3}), ([1, 1, 0], 4, {"loud": 1.0})]
DRAFTS = {
    f"{draft}, by {verify}": {"sampler": "exact", "draft": draft, "verify": verify, "chunk_size": 2}
    for draft in ("reference", "model", "lookup", "merged")
    for verify in ("block", "token")
} | {
    "direct": {"sampler": "direct"},
    "anchored": {"sampler": "exact", "target": "anchored", "draft": "merged", "chunk_size": 2},
    "arithmetic": {"sampler": "direct", "target": "arithmetic"},
    "over a span": {"sampler": "exact", "target": "arithmetic", "mixture_span": "sequence", "chunk_size": 2},
}


@pytest.mark.parametrize(
    ("name", "anchor"),
    [*((name, None) for name in DRAFTS), ("direct", ("base", [2, 2, 0])), ("merged, by block", ("base", [0]))],
    ids=str,
)
def test_request_with_contexts_among_others_has_the_law_of_their_texts(name, anchor, record_property):
    """Of two contexts and an adapter, also against a neutral sentence."""
    contexts = CONTEXTS if anchor is None else {**CONTEXTS, "anchor": anchor}
    models = FakeModels(3, others={"draft": 1.0, "merged": 1.0}, eos_token_ids=[2], contexts=contexts, seed=5)
    options, weights = DRAFTS[name], OF_CONTEXTS
    if options.get("target") == "arithmetic":
        weights = {**OF_CONTEXTS, "loud": 0.3}
    law = enumerate_in_company(models, PROMPT, NUM_TOKENS, weights, company=COMPANY_WITH_CONTEXTS, **options)
    defect = total_variation(law, target_law(models, PROMPT, NUM_TOKENS, weights, **options))
    record_property("defect", defect)
    assert len(law) > 3
    assert defect < 1e-12


@pytest.mark.parametrize("name", ["scr", "token-rs", "seq-rs"])
def test_rejection_with_contexts_does_not_depend_on_company(name, record_property):
    models = FakeModels(3, others={"draft": 1.0}, eos_token_ids=[2], contexts=CONTEXTS, seed=5)
    weights = {"E": 0.5, "calm": 0.7}
    laws = [
        enumerate_in_company(models, PROMPT, NUM_TOKENS, weights, company=company, **OPTIONS[name])
        for company in (COMPANY_WITH_CONTEXTS, [([1], 1, weights)])
    ]
    defect = total_variation(*laws)
    record_property("defect", defect)
    assert defect < 1e-12


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        *product(
            ["direct", "anchored", "lookup, by block", "model, by token", "merged, by token"],
            [{"E": 0.25, "T": 0.75}, {"T": 1.0}],
        ),
        ("anchored", {"E": 1.5, "T": -0.5}),
    ],
    ids=str,
)
def test_request_whose_weights_sum_to_one_has_its_law_without_the_base(name, weights, record_property):
    models, options = FakeModels(3, others={"draft": 1.0, "merged": 1.0}, eos_token_ids=[2], seed=5), DRAFTS[name]
    wanted = target_law(models, PROMPT, NUM_TOKENS, weights, **options)
    assert len(wanted) > 3
    models.logits["base"].fill_(math.nan)
    law = enumerate_in_company(
        models,
        PROMPT,
        NUM_TOKENS,
        weights,
        company=[([2, 1], 1, {"E": 1.0}), ([0], 4, {"E": 0.5, "T": 0.5})],
        **options,
    )
    defect = total_variation(law, wanted)
    record_property("defect", defect)
    assert defect < 1e-12
