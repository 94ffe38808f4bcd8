"""The check of samplers on one's own models: how much of the intended shift their texts deliver, and at what cost.

Knows what to sample and how to measure it; how a token is drawn, and from what, is the samplers' business.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpg.frontend.contexts import contexts_of
from mpg.frontend.prompts import Prompt
from mpg.model import Contexts, Model, Weights
from mpg.models.ensemble import Ensemble
from mpg.options import MAX_WEIGHT, MIN_WEIGHT, TARGETS, check_weights
from mpg.paper.report import Report, Row, Section
from mpg.paper.scoring import token_logprobs
from mpg.paper.statistics import FEW_PROMPTS, Bootstrap
from mpg.results import Result

_UNWARPED = {"temperature": 1.0, "top_p": 1.0}
_BASE = ("base", {"sampler": "direct", "target": "base"})
_YARDSTICK = ("exact, reference draft", {"sampler": "exact", "draft": "reference"})
# where SCR can accept no token at all, one text among hundreds must not end the check
_SCR = ("scr", {"sampler": "scr", "empty": "base"})
_COSTS_PER_TOKEN = ("model_calls_per_token", "depth_per_token", "positions_per_token")
_MAX_LOG_RATIO = 80.0  # a token that a model excludes must not make a mean infinite


def check(
    model: Model,
    weights: Weights | None,
    prompts: Sequence[Any],
    *,
    contexts: Contexts | None = None,
    target: str = "geometric",
    max_new_tokens: int | None = None,
    num_seeds: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    raw: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Measure how far each sampler moves the text, at temperature 1 and top_p 1.

    Every sampler continues every prompt `num_seeds` times, each text from a seed of its own. One more pass of all
    models over a text gives its combined log-ratio, sum_i alpha_i (log pi_i - log anchor) summed over its tokens; means
    are per token. SCR divides its weights by their sum, so it is compared at those weights, for both scores, with the
    exact sampler of that same target.

    weights      as in `Model.generate`, one for all prompts; a recipe's options do not count
    contexts     as there, one mapping for all prompts
    prompts      at least 2, each as `Model.generate` takes one
    target       what direct and exact draw from: "arithmetic", "anchored" or "geometric"
    num_seeds    texts per prompt and sampler
    on_progress  called with a label of the sampler that runs, its texts so far and its texts in all

    Raises ValueError that names the argument, as `Model.generate` does. What only one sampler cannot do (a draft that
    these models do not have, a row that came out empty) becomes the reason in its row.
    """
    if target not in TARGETS[:-1]:
        raise ValueError(f"target: expected one of {', '.join(TARGETS[:-1])}, got {target!r}")
    if isinstance(prompts, str) or len(prompts) < 2:
        raise ValueError(f"prompts: expected a list of at least 2, to tell a shift from chance, got {prompts!r}")
    for name, value in (("num_seeds", num_seeds), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
    models = model.models.with_contexts([contexts_of(contexts)])
    names = models.attribute_names
    alphas = dict(zip(names, check_weights(model.recipe.weigh(weights), names, target), strict=True))
    model = Model(models)  # without the recipe's options
    plans, notes = _plan(models, {name: alpha for name, alpha in alphas.items() if alpha}, target)
    for index, prompt in enumerate(prompts):  # before anything runs
        model.encode(prompt, raw=raw, name=f"prompts[{index}]")
    on_progress = on_progress or (lambda *_: None)
    sampling = _Sampling(
        model, list(prompts) * num_seeds, raw, max_new_tokens, num_seeds, seed, batch_size, on_progress
    )

    bootstrap = Bootstrap(len(prompts), seed)
    base = sampling.draw(*_BASE, plans[0].weights)
    sections = []
    for plan in plans:
        texts: dict[str, _Texts | str] = {_BASE[0]: base}
        texts[_YARDSTICK[0]] = sampling.draw(*_YARDSTICK, plan.weights, plan.target)
        for name, options in plan.samplers:
            try:
                texts[name] = sampling.draw(name, options, plan.weights, plan.target)
            except ValueError as error:
                texts[name] = str(error)
        sections.append(_compare(plan, texts, bootstrap))
    if len(prompts) < FEW_PROMPTS:
        notes += (
            f"{len(prompts)} prompts are few: a bootstrap over fewer than {FEW_PROMPTS} gives intervals too narrow",
        )
    device = str(model.models.device)
    return Report(len(prompts), num_seeds, batch_size, seed, device, model.precision, tuple(sections), notes)


@dataclass(frozen=True)
class _Plan:
    """One section to be: samplers by name and options, beside the base and the yardstick."""

    target: str
    weights: dict[str, float]
    samplers: list[tuple[str, dict[str, Any]]]


def _plan(models: Ensemble, weights: dict[str, float], target: str) -> tuple[list[_Plan], tuple[str, ...]]:
    """What to compare, section by section, and what had to be left out."""
    total = sum(weights.values())
    of_scr = weights
    if total > 0 and not math.isclose(total, 1):
        of_scr = {name: alpha / total for name, alpha in weights.items()}
    can_be_scr = all(MIN_WEIGHT <= abs(alpha) <= MAX_WEIGHT for alpha in of_scr.values())
    if target == "arithmetic" and can_be_scr:  # whose law does not depend on the scale of the weights
        weights = of_scr
    drafts = ["lookup", "merged", *([] if models.is_same("draft", "base") else ["model"])]
    samplers: list[tuple[str, dict[str, Any]]] = [("direct", {"sampler": "direct"})]
    samplers += [(f"exact, {draft} draft", {"sampler": "exact", "draft": draft}) for draft in drafts]
    plans, notes = [_Plan(target, weights, samplers)], []
    for score in ("arithmetic", "geometric"):
        if (score, of_scr) == (target, weights):
            samplers.append(_SCR)
        elif not can_be_scr:
            wanted = f"divides the weights by their sum, {total:g}, and weights are {MIN_WEIGHT:g} to {MAX_WEIGHT:g}"
            notes.append(f"scr with the {score} score was left out: it {wanted} in size")
        elif score == "arithmetic" and total <= 0:
            notes.append(
                f"scr as published was left out: its arithmetic score needs weights of a positive sum, got {total:g}"
            )
        else:
            plans.append(_Plan(score, of_scr, [_SCR]))
    return plans, tuple(notes)


@dataclass(frozen=True)
class _Texts:
    """What one sampler wrote, summed over the texts of each of P prompts, and what that cost in all.

    log_ratios  (P, N) by attribute
    num_tokens  (P,)
    """

    log_ratios: np.ndarray
    num_tokens: np.ndarray
    costs: dict[str, float]


@dataclass
class _Sampling:
    """Draws and measures the texts of one sampler after another, no two of them from one seed.

    prompts  all of them, `num_seeds` times
    """

    model: Model
    prompts: list[Prompt]
    raw: bool
    max_new_tokens: int | None
    num_seeds: int
    next_seed: int
    batch_size: int
    on_progress: Callable[[str, int, int], None]

    def draw(self, name: str, options: Mapping[str, Any], weights: Mapping[str, float], target: str = "base") -> _Texts:
        """The texts of one sampler. `weights` also names the attributes that are measured."""
        limits = {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}
        options = {"target": target, "raw": self.raw, **options, **_UNWARPED, **limits}
        alpha = None if options["target"] == "base" else weights
        label = f"{name} ({options['target']}, {len(self.prompts)} texts)" if alpha else name
        # what only a first call costs is not timed
        self.model.generate(self.prompts[: self.batch_size], weights=alpha, seed=0, **{**options, "max_new_tokens": 1})
        results: list[Result] = []
        log_ratios: list[torch.Tensor] = []
        seconds = 0.0
        for first in range(0, len(self.prompts), self.batch_size):
            self.on_progress(label, first, len(self.prompts))
            prompts = self.prompts[first : first + self.batch_size]
            started_at = time.perf_counter()
            batch = self.model.generate(prompts, weights=alpha, seed=self.next_seed + first, **options)
            seconds += time.perf_counter() - started_at
            token_ids = [self.model.encode(prompt, raw=self.raw) for prompt in prompts]
            texts = [self.model.encode_contexts(prompt, names=("anchor", *weights), raw=self.raw) for prompt in prompts]
            of_batch = [result.tokens for result in batch]
            log_ratios.append(score_texts(self.model.models, tuple(weights), token_ids, of_batch, texts))
            results += batch
        self.on_progress(label, len(self.prompts), len(self.prompts))
        self.next_seed += len(self.prompts)

        by_prompt = (self.num_seeds, len(self.prompts) // self.num_seeds)
        num_tokens = np.array([len(result.tokens) for result in results], dtype=float)
        total = float(num_tokens.sum())
        costs: dict[str, float] = {
            cost: float(num_tokens @ [result.stats[cost] for result in results]) / total for cost in _COSTS_PER_TOKEN
        }
        costs["tokens_per_round"] = total / sum(result.stats["rounds"] for result in results)
        costs["tokens_per_second"] = total / seconds
        of_prompts = torch.cat(log_ratios).numpy().reshape(*by_prompt, -1).sum(0)
        return _Texts(of_prompts, num_tokens.reshape(by_prompt).sum(0), costs)


def score_texts(
    models: Ensemble,
    attributes: Sequence[str],
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    contexts: Sequence[Mapping[str, Sequence[int]]] | None = None,
) -> torch.Tensor:
    """log pi_i(text | prompt) - log anchor(text | prompt) of finished texts, in one pass over them (Eq. 15).

    prompts, texts: B sequences of token ids each; no text is empty
    contexts:       of every prompt, what these names read in its place

    out: (B, N) float64 on the CPU, in the order of `attributes`; a token adds at most 80 either way
    """
    anchor, *of_attributes = token_logprobs(models, ("anchor", *attributes), prompts, texts, contexts)
    # where neither allows the token, the ratio is 1
    ratios = [torch.where(logprobs == anchor, 0, logprobs - anchor) for logprobs in of_attributes]
    return torch.stack([part.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).sum(1) for part in ratios], 1).cpu()


def _compare(plan: _Plan, texts: Mapping[str, _Texts | str], bootstrap: Bootstrap) -> Section:
    """Place every sampler's mean log-ratio per token between the base's and the yardstick's, resample by resample."""
    alpha = np.array(list(plan.weights.values()))

    def shift(sample: _Texts | str) -> np.ndarray:
        """Nats per token."""
        assert isinstance(sample, _Texts)
        return bootstrap.ratios(sample.log_ratios @ alpha, sample.num_tokens)

    zero = shift(texts[_BASE[0]])
    intended = shift(texts[_YARDSTICK[0]]) - zero
    estimate = bootstrap.estimate(intended)
    is_resolved = estimate.low > 0 or estimate.high < 0
    rows = []
    for name, sample in texts.items():
        if isinstance(sample, str):
            rows.append(Row(name, skipped=sample))
        else:
            moved = shift(sample) - zero
            delivered = bootstrap.estimate(moved / intended) if is_resolved else None
            rows.append(Row(name, None, bootstrap.estimate(moved), delivered, **sample.costs))
    return Section(plan.target, plan.weights, estimate, is_resolved, tuple(rows))
