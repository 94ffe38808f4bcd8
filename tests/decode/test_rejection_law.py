"""`token-rs` and `seq-rs` sample the laws of their loops, every try of which is walked here in plain Python."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from fakes import FakeModels, enumerate_sampler, rounds_of, total_variation
from laws import target_law, warp
from mpg.decode import SAMPLERS
from mpg.decode.batch import Batch
from mpg.options import Options
from replaying import Recording, RecordingComposed
from test_scr_law import Settings, State

EOS = 1


@dataclass(frozen=True)
class Tries(Settings):
    tries: int = 2
    sampler: str = "token-rs"

    def options(self) -> dict:
        names = ("sampler", "tries", "window", "gamma", "tau", "initial_bound", "temperature", "top_p")
        return {name: getattr(self, name) for name in names} | {"target": self.score}


def rejection_law(models, prompt, max_new_tokens, weights, settings: Settings):
    total = sum(weights.values())
    alpha = {name: a / total if total > 0 else a for name, a in weights.items()}
    law: dict[tuple[int, ...], float] = {}
    start = State((), 0, settings.initial_bound, False)

    def is_whole(text) -> bool:
        return len(text) == max_new_tokens or (text and text[-1] in models.eos_token_ids)

    def score(text, candidate) -> float:
        shifts = dict.fromkeys(alpha, 0.0)
        for j, token in enumerate(candidate):
            prefix = (*prompt, *text, *candidate[:j])
            for name in alpha:
                shifts[name] += float(models.log_row(name, prefix)[token] - models.log_row("anchor", prefix)[token])
        if settings.score == "geometric":
            return sum(alpha[name] * shifts[name] for name in alpha)
        value = sum(alpha[name] * math.exp(shifts[name]) for name in alpha)
        return math.log(value) if value > 1e-14 else -math.inf

    def row(text):
        return warp(
            models.log_row("base", (*prompt, *text)).exp().tolist(),
            temperature=settings.temperature,
            top_p=settings.top_p,
        )

    def candidates(text, size):
        """Texts that go on from `text` by up to `size` tokens, with their probabilities under the draft."""
        grown = {(): 1.0}
        while any(len(c) < size and not is_whole((*text, *c)) for c in grown):
            grown = {
                (*c, *token): prob * p
                for c, prob in grown.items()
                for token, p in (
                    [((), 1.0)]
                    if len(c) == size or is_whole((*text, *c))
                    else [((y,), p) for y, p in enumerate(row((*text, *c))) if p > 0]
                )
            }
        return grown

    def attempt(text, prob, state, num_tried, size):
        """One try: a candidate of `size` tokens, and what follows its acceptance, rejection or forced acceptance."""
        if prob < 1e-18:
            return
        for candidate, p in candidates(text, size).items():
            log_score = score(text, candidate)
            accept_prob = min(1.0, math.exp(log_score) / state.bound)
            accepted = state.after(log_score, settings)
            go((*text, *candidate), prob * p * accept_prob, accepted, size)
            rejected = accepted if settings.sampler == "seq-rs" else state  # seq-rs pushes what it tested
            left = prob * p * (1 - accept_prob)
            if num_tried + 1 < settings.tries:
                attempt(text, left, rejected, num_tried + 1, size)
            else:
                capped = rejected if settings.sampler == "seq-rs" else state.after(-math.inf, settings)
                go((*text, *candidate), left, capped, size)

    def go(text, prob, state, size):
        if is_whole(text):
            law[text] = law.get(text, 0.0) + prob
        else:
            attempt(text, prob, state, 0, size)

    go((), 1.0, start, 1 if settings.sampler == "token-rs" else max_new_tokens)
    return law


CASES = {
    "as published": (Tries(), {"E": 1.0, "T": 3.0}, ("anchor",)),
    "own anchor": (Tries(), {"E": 0.5, "T": 0.5}, ()),
    "geometric score": (Tries(score="geometric"), {"E": 1.0, "T": 1.0}, ("anchor",)),
    "negative weight": (Tries(), {"E": 2.0, "T": -1.5}, ("anchor",)),
    "geometric, negative sum": (Tries(score="geometric"), {"E": 0.5, "T": -1.0}, ("anchor",)),
    "one try": (Tries(tries=1), {"E": 1.0, "T": 1.0}, ("anchor",)),
    "truncated draft": (Tries(top_p=0.8), {"E": 1.0, "T": 1.0}, ("anchor",)),
    "moving bound": (Tries(window=1, tau=0.0), {"E": 1.0, "T": 1.0}, ("anchor",)),
}


@pytest.mark.parametrize("sampler", ["token-rs", "seq-rs"])
@pytest.mark.parametrize("case", CASES)
def test_rejection_samples_the_law_of_its_loop(case, sampler):
    settings, weights, same = CASES[case]
    if case == "moving bound" and sampler == "seq-rs":  # M moves with the second score, and the last try takes any text
        settings = replace(settings, tries=4)
    settings = replace(settings, sampler=sampler)
    max_new_tokens = 4 if sampler == "token-rs" else 2
    models = FakeModels(3 if sampler == "token-rs" else 2, same=same, eos_token_ids=[EOS], seed=3)
    law = enumerate_sampler(models, [1, 0], max_new_tokens, weights, **settings.options())
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    expected = rejection_law(models, (1, 0), max_new_tokens, weights, settings)
    assert total_variation(law, expected) < 1e-12


def test_more_tries_come_nearer_to_the_mixture_and_one_try_is_the_draft():
    models, weights = FakeModels(3, eos_token_ids=[EOS]), {"E": 0.5, "T": 0.5}
    options = {"sampler": "token-rs", "temperature": 1.0, "top_p": 1.0, "initial_bound": 1e3}
    mixture = target_law(models, (1,), 3, weights, target="arithmetic")
    law = enumerate_sampler(models, [1], 3, weights, tries=10**6, **options)
    assert total_variation(law, mixture) < 1e-9
    law = enumerate_sampler(models, [1], 3, weights, tries=1, **options)
    assert total_variation(law, target_law(models, (1,), 3, {}, target="base")) < 1e-9


@pytest.mark.parametrize("sampler", ["token-rs", "seq-rs"])
def test_no_key_is_used_twice_and_every_request_ends_within_its_tries(sampler):
    models = FakeModels(3, eos_token_ids=[EOS], spread=2.0)
    batch, decide, counted = _run(models, sampler, tries=5, initial_bound=1e6)  # nearly everything is rejected
    assert decide.keys
    assert (counted["capped_rate"] == 1).all()
    assert (counted["reject_rate"] > 0.99).all()
    if sampler == "seq-rs":
        assert counted["num_tries"].tolist() == [5, 5, 5]
        assert (batch.rounds <= 5 * 6).all()


@pytest.mark.parametrize("sampler", ["token-rs", "seq-rs"])
def test_nothing_is_rejected_where_every_ratio_exceeds_the_bound(sampler):
    models = FakeModels(3, same=("anchor", "E", "T"), eos_token_ids=[EOS])
    batch, _, counted = _run(models, sampler, tries=5, initial_bound=0.5)
    assert counted["reject_rate"].tolist() == counted["capped_rate"].tolist() == [0, 0, 0]
    expected = batch.num_new_tokens() if sampler == "token-rs" else torch.ones(3)
    assert counted["num_tries"].tolist() == expected.tolist()


@pytest.mark.parametrize("sampler", ["token-rs", "seq-rs"])
def test_composed_and_fused_take_the_same_decisions(sampler):
    models = FakeModels(7, eos_token_ids=[EOS], spread=1.5)
    runs = [_run(models, sampler, decisions)[0] for decisions in (RecordingComposed, Recording)]
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    assert torch.equal(runs[0].lengths, runs[1].lengths)


def _run(models, sampler, decisions=Recording, **options):
    prompts, limits = [[1, 0], [2], [0, 2, 2]], [6, 6, 4]
    checked = Options(sampler=sampler, **options)
    batch = Batch(prompts, limits, torch.ones(3, 2, dtype=torch.float64), torch.arange(3), models.eos_token_ids)
    decide = decisions(batch.seeds, batch.rounds)
    running = SAMPLERS[sampler](models, ("E", "T"), checked)
    running.start(models.open(prompts, running.roles, batch.capacity), batch, decide)
    for _ in rounds_of(running, batch):
        pass
    assert not batch.unusable.any()
    return batch, decide, running.statistics()
