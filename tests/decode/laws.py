"""The laws that samplers claim, enumerated in plain Python, prefix by prefix, without the library's arithmetic."""

from __future__ import annotations

import math

from fakes import FakeModels

Law = dict[tuple[int, ...], float]


def target_row(models, prompt, text, weights, *, target="geometric", mixture_span="token", **_):
    """The unwarped target after `text`, a list of V probabilities; all 0 where it is empty."""
    rows = {role: models.log_row(role, prompt, text).tolist() for role in ("base", "anchor", *weights)}
    alpha = carried_weights(models, prompt, text, weights, mixture_span) if target == "arithmetic" else weights
    values = []
    for token in range(models.vocab_size):
        base, anchor = rows["base"][token], rows["anchor"][token]
        if target == "base":
            value = math.exp(base)
        elif target == "geometric":
            value = math.exp(base + sum(a * (rows[name][token] - anchor) for name, a in alpha.items()))
        elif target == "anchored":
            value = math.exp(base) * (
                1 + sum(a * (math.exp(rows[name][token] - anchor) - 1) for name, a in alpha.items())
            )
        elif models.is_same("base", "anchor"):
            value = sum(a * math.exp(rows[name][token]) for name, a in alpha.items())
        else:
            value = math.exp(base) * sum(a * math.exp(rows[name][token] - anchor) for name, a in alpha.items())
        values.append(max(0.0, value))
    total = sum(values)
    return [value / total if total else 0.0 for value in values]


def carried_weights(models, prompt, text, weights, mixture_span):
    """alpha, times every attribute's probability of the tokens since the span began."""
    carried = dict(weights)
    for index, token in enumerate(text):
        for name in carried:
            carried[name] *= math.exp(models.log_row(name, prompt, text[:index])[token])
        if mixture_span == "token" or (mixture_span != "sequence" and (index + 1) % mixture_span == 0):
            carried = dict(weights)
    return carried


def warp(row, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, **_):
    """Temperature, then the k largest, then the nucleus of what is left, then what is not far below the largest."""
    if temperature == 0:
        return [float(token == row.index(max(row))) for token in range(len(row))]
    row = _normalised([p ** (1 / temperature) for p in row])
    ranked = sorted(range(len(row)), key=lambda token: -row[token])
    for token in ranked[top_k or len(row) :]:
        row[token] = 0.0
    row, mass = _normalised(row), 0.0
    for token in ranked:
        row[token], mass = (row[token] if mass < top_p else 0.0), mass + row[token]
    return _normalised([p if p >= min_p * max(row) else 0.0 for p in row])


def target_law(
    models: FakeModels, prompt, max_new_tokens, weights, *, process=lambda history, row: row, stops=None, **options
) -> Law:
    """The law of the target over whole texts, which end at an end-of-sequence token, the limit, or where `stops(text)`.

    process: what becomes of a normalised row after a history, before it is warped
    """
    law, open_texts = {}, {(): 1.0}
    while open_texts:
        text, prob = open_texts.popitem()
        row = process((*prompt, *text), target_row(models, prompt, text, weights, **options))
        row = warp(_normalised(row), **options)
        for token, p in enumerate(row):
            grown = (*text, token)
            done = token in models.eos_token_ids or len(grown) == max_new_tokens or (stops is not None and stops(grown))
            if p > 0:
                (law if done else open_texts)[grown] = prob * p
    return law


def _normalised(row):
    return [p / sum(row) for p in row]
