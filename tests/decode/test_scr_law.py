"""`scr` samples the law of Algorithm 1 as documented: every branch of its loop, against that law enumerated on its own.

The enumeration below shares no code with the sampler: plain Python over probabilities, the bound as a list of scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from fakes import FakeModels, enumerate_sampler, rounds_of, total_variation
from laws import target_law, warp
from mpg.decode.batch import Batch
from mpg.decode.rng import Decisions
from mpg.decode.scr import SCR
from mpg.options import Options

EOS = 2


@dataclass(frozen=True)
class Settings:
    k: int = 2
    window: int = 2
    gamma: float = 1.3
    tau: float = 0.05
    initial_bound: float = 1.6
    temperature: float = 0.9
    top_p: float = 1.0
    score: str = "arithmetic"
    empty: str = "raise"
    observed: bool = False

    def options(self) -> dict:
        return {
            "sampler": "scr", "target": self.score, "chunk_size": self.k, "window": self.window, "gamma": self.gamma,
            "tau": self.tau, "initial_bound": self.initial_bound, "temperature": self.temperature,
            "top_p": self.top_p, "empty": self.empty, "observed": self.observed,
        }  # fmt: skip


@dataclass(frozen=True)
class State:
    """The bound: pushed scores, rounds, M, frozen."""

    scores: tuple[float, ...]
    rounds: int
    bound: float
    frozen: bool

    def after(self, log_score: float, settings: Settings, tested: tuple[float, ...] = ()) -> State:
        """After a round that pushes the scores tested in vain (option "observed") and then the accepted one."""
        scores = (*self.scores, *(score for score in (*tested, log_score) if score != -math.inf))
        rounds, bound, frozen = self.rounds + 1, self.bound, self.frozen
        last = scores[-settings.window :]
        if rounds <= settings.window or len(scores) < 2:
            bound, frozen = settings.initial_bound, False
        else:
            if not frozen:
                bound = math.exp(max(last)) * settings.gamma
            mean = sum(last) / len(last)
            frozen = sum((s - mean) ** 2 for s in last) / len(last) < settings.tau
        return State(scores, rounds, bound, frozen)


def scr_law(models: FakeModels, prompt, max_new_tokens, weights, settings: Settings) -> dict[tuple[int, ...], float]:
    total = sum(weights.values())
    alpha = {name: a / total if total > 0 else a for name, a in weights.items()}
    law: dict[tuple[int, ...], float] = {}

    def score(text, chunk) -> float:
        """log S of the chunk after the text."""
        shifts = dict.fromkeys(alpha, 0.0)
        for j, token in enumerate(chunk):
            prefix = (*prompt, *text, *chunk[:j])
            for name in alpha:
                shifts[name] += float(models.log_row(name, prefix)[token] - models.log_row("anchor", prefix)[token])
        if settings.score == "geometric":
            return sum(alpha[name] * shifts[name] for name in alpha)
        value = sum(alpha[name] * math.exp(shifts[name]) for name in alpha)
        return math.log(value) if value > 1e-14 else -math.inf

    def accept_prob(log_score: float, state: State) -> float:
        return min(1.0, math.exp(log_score) / state.bound)

    def draft(text) -> list[float]:
        return warp(
            models.log_row("base", (*prompt, *text)).exp().tolist(),
            temperature=settings.temperature,
            top_p=settings.top_p,
        )

    def chunks(text, limit):
        """Every chunk that can be drafted, with its probability: it ends at EOS, k tokens or the limit."""
        open_chunks = [((), 1.0)]
        for _ in range(min(settings.k, limit)):
            grown = []
            for chunk, prob in open_chunks:
                if chunk and chunk[-1] in models.eos_token_ids:
                    grown.append((chunk, prob))
                else:
                    row = draft((*text, *chunk))
                    grown += [((*chunk, token), prob * p) for token, p in enumerate(row) if p > 0]
            open_chunks = grown
        return open_chunks

    def go(text, prob, state):
        if prob == 0:
            return
        if len(text) == max_new_tokens or (text and text[-1] in models.eos_token_ids):
            law[text] = law.get(text, 0.0) + prob
            return
        for chunk, chunk_prob in chunks(text, max_new_tokens - len(text)):
            left, tested = prob * chunk_prob, ()
            for j in range(len(chunk), 0, -1):
                log_score = score(text, chunk[:j])
                p = accept_prob(log_score, state)
                go((*text, *chunk[:j]), left * p, state.after(log_score, settings, tested))
                left *= 1 - p
                tested = (*tested, log_score) if settings.observed else ()
            row = draft(text)
            scores = [score(text, (token,)) for token in range(models.vocab_size)]
            mass = [q * accept_prob(s, state) for q, s in zip(row, scores, strict=True)]
            if sum(mass) == 0:  # only reached with empty="base"
                mass, scores = row, [-math.inf] * len(row)
            for token, m in enumerate(mass):
                go((*text, token), left * m / sum(mass), state.after(scores[token], settings, tested))

    go((), 1.0, State((), 0, settings.initial_bound, False))
    return law


CASES = {
    "as published": (Settings(), {"E": 1.0, "T": 3.0}, ("anchor",)),
    "own anchor": (Settings(), {"E": 0.5, "T": 0.5}, ()),
    "geometric score": (Settings(score="geometric"), {"E": 1.0, "T": 1.0}, ("anchor",)),
    "negative weight": (Settings(), {"E": 2.0, "T": -1.0}, ("anchor",)),
    "geometric, negative sum": (Settings(score="geometric"), {"E": 0.5, "T": -1.0}, ("anchor",)),
    "truncated draft": (Settings(top_p=0.8), {"E": 1.0, "T": 1.0}, ("anchor",)),
    "empty falls to the base": (Settings(empty="base", top_p=0.4), {"E": 2.0, "T": -1.9}, ("anchor",)),
    "k = 1": (Settings(k=1), {"E": 1.0, "T": 1.0}, ("anchor",)),
}


@pytest.mark.parametrize("case", CASES)
def test_scr_samples_its_own_law(case):
    settings, weights, same = CASES[case]
    models = FakeModels(3, same=same, eos_token_ids=[EOS], seed=3)
    law = enumerate_sampler(models, [1, 0], 3, weights, **settings.options())
    assert total_variation(law, scr_law(models, (1, 0), 3, weights, settings)) < 1e-12


@pytest.mark.parametrize("tau", [0.0, 0.05, 100.0], ids=["never frozen", "sometimes frozen", "always frozen"])
def test_scr_samples_its_own_law_through_all_three_phases(tau):
    settings = Settings(k=1, window=1 if tau == 0 else 2, tau=tau)
    models = FakeModels(2, seed=5)
    law = enumerate_sampler(models, [1], 5, {"E": 1.0, "T": 1.0}, **settings.options())
    assert total_variation(law, scr_law(models, (1,), 5, {"E": 1.0, "T": 1.0}, settings)) < 1e-12


@pytest.mark.parametrize("k", [1, 2])
def test_scr_that_pushes_every_tested_score_samples_its_own_law(k):
    models, weights = FakeModels(2, seed=5), {"E": 1.0, "T": 1.0}
    settings = Settings(k=k, observed=True)
    law = scr_law(models, (1,), 4, weights, settings)
    assert total_variation(enumerate_sampler(models, [1], 4, weights, **settings.options()), law) < 1e-12
    assert total_variation(scr_law(models, (1,), 4, weights, replace(settings, observed=False)), law) > 1e-6


def test_token_of_the_base_pushes_no_score():
    """Where the fallback has nothing to draw, no score was accepted: the bound must not see one."""
    settings = Settings(k=1, window=1, empty="base", top_p=0.75)
    models, weights = FakeModels(3, seed=9, spread=1.5), {"E": 2.0, "T": -1.95}
    law = enumerate_sampler(models, [1, 0], 5, weights, **settings.options())
    assert total_variation(law, scr_law(models, (1, 0), 5, weights, settings)) < 1e-12


def test_large_bound_gives_the_token_mixture_and_a_small_one_the_draft():
    models, weights = FakeModels(3, eos_token_ids=[EOS]), {"E": 0.5, "T": 0.5}
    plain = {"temperature": 1.0, "top_p": 1.0, "sampler": "scr", "chunk_size": 2}
    mixture = target_law(models, (1,), 3, weights, target="arithmetic")
    law = enumerate_sampler(models, [1], 3, weights, initial_bound=1e12, **plain)
    assert total_variation(law, mixture) < 1e-9
    law = enumerate_sampler(models, [1], 3, weights, initial_bound=1e-12, **plain)
    assert total_variation(law, target_law(models, (1,), 3, {}, target="base")) < 1e-9


def test_scr_is_biased_at_a_bound_that_clips():
    """What `approximate` means: at M = 1.43 its law is nearer to the draft than to neither, and not the target."""
    models, weights = FakeModels(4, eos_token_ids=[EOS], spread=0.5), {"E": 0.5, "T": 0.5}
    law = enumerate_sampler(
        models, [1], 2, weights, sampler="scr", chunk_size=2, initial_bound=1.43, temperature=1.0, top_p=1.0
    )
    assert total_variation(law, target_law(models, (1,), 2, weights, target="arithmetic")) > 0.01


@pytest.mark.parametrize("same", [("anchor",), ()], ids=["anchor is base", "own anchor"])
@pytest.mark.parametrize("initial_bound", [1e-9, 1.6, 1e9], ids=["all accepted", "some", "all fall back"])
def test_a_round_takes_k_passes_of_the_base_and_one_of_the_others(initial_bound, same):
    """The rows that the chunk was drafted from are those it is scored and salvaged with: no pass more for either."""
    k, num_attributes = 3, 2
    models = FakeModels(4, same=same, seed=3)
    options = Options(sampler="scr", chunk_size=k, initial_bound=initial_bound)
    batch = Batch([[1, 0], [2]], [12, 12], torch.ones(2, num_attributes, dtype=torch.float64), torch.arange(2), [])
    sampler = SCR(models, ("E", "T"), options)
    session = models.open([[1, 0], [2]], sampler.roles, batch.capacity)
    sampler.start(session, batch, Decisions(batch.seeds, batch.rounds))
    num_rounds = sum(1 for _ in rounds_of(sampler, batch))
    scored = ("E", "T") if same else ("anchor", "E", "T")
    assert session.passes == num_rounds * [*[(("base",), 1)] * k, (scored, k)] == num_rounds * sampler.passes(k)
