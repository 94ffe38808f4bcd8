"""Rows attend by mpg's own op on the CPU: which models do, and that logits stay those by a mask."""

from __future__ import annotations

import sys

import pytest
import torch

import mpg
import mpg_ext
from mpg.models import attention, loading
from mpg.models.cache import RaggedCache, as_argument

START = [3, 0, 6]  # of three rows, of which the second begins


def _chosen(model):
    attention.use_ragged_attention(model, "base")
    return attention.most_by_rows(model)


@pytest.fixture
def calls(monkeypatch):
    """Grows by the queries a row of every call of the op."""
    made, attend = [], mpg_ext.attend_rows

    def attend_rows(query, *args, **kwargs):
        made.append(query.shape[2])
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(mpg_ext, "attend_rows", attend_rows)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_models_attend_by_rows_unless_scores_are_capped_or_there_are_sinks(architecture, dtype, tiny_model):
    most = 1 if dtype == torch.bfloat16 else sys.maxsize
    assert _chosen(tiny_model(architecture).to(dtype)) == (most if architecture in ("llama", "gpt2") else 0)


def test_a_model_whose_logits_deviate_keeps_the_mask(tiny_model, monkeypatch):
    attend = mpg_ext.attend_rows

    def chosen(factor, offset):
        def wrong(query, key, value, positions, scale):
            return attend(query, key, value, positions + offset, scale=scale) * factor

        monkeypatch.setattr(mpg_ext, "attend_rows", wrong)
        return _chosen(tiny_model())

    assert chosen(1, 0)
    assert not any(chosen(factor, offset) for factor, offset in [(-1, 0), (1, 1), (1, -1)])


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text"])  # full, sliding, both
@pytest.mark.parametrize("rows", [slice(1, 4), torch.tensor([3, 1, 2])], ids=["neighbours", "numbers"])
def test_logits_are_those_by_a_mask(architecture, rows, tiny_model, calls):
    model, logits = tiny_model(architecture), []
    attention.use_ragged_attention(model, "base")
    for by_rows in (0, 1, 12):
        cache = RaggedCache(model.config.num_hidden_layers, 4, 12, by_rows=by_rows)
        for start, tokens in ([0, 0, 0], torch.arange(3, 24).view(3, 7)), (START, torch.arange(30, 33).view(3, 1)):
            positions = cache.place(rows, torch.tensor(start), tokens.shape[1], 9)
            arguments = {"position_ids": positions, "use_cache": True, **as_argument(model, cache)}
            logits.append(model(input_ids=tokens, **arguments).logits)
        fed = {queries for queries in (1, 7) if queries <= by_rows}
        assert set(calls) == (fed if architecture != "mistral" else set())
        calls.clear()
    assert torch.equal(logits[2], logits[0])  # prompts, where single queries alone attend so
    for of_rows, of_mask in zip(logits[2:], logits[:2] * 2, strict=True):
        torch.testing.assert_close(of_rows, of_mask, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampler", ["direct", "exact"])
def test_texts_are_those_by_a_mask(sampler, tiny_model, calls, monkeypatch):
    base, attribute, texts = tiny_model(), tiny_model(), []
    for by_rows in (0, 1, 99):
        monkeypatch.setattr(loading, "most_by_rows", lambda model, by_rows=by_rows: by_rows)
        model = mpg.load(base, {"E": attribute})
        calls.clear()
        prompts = [[3, 4, 5, 6, 7, 8, 9], [10], [11, 12, 13]]
        results = model.generate(prompts, weights={"E": 1.0}, seed=3, max_new_tokens=8, sampler=sampler)
        texts.append([result.tokens for result in results])
        assert (1 in calls, max(calls, default=0) > 1) == (by_rows > 0, by_rows > 1)
    assert texts[0] == texts[1] == texts[2]
