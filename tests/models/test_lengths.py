"""Attention by lengths: what it computes and when it is chosen, with what its kernel does in plain torch.

The kernel runs on a GPU alone; what stands for it here reads what that one reads and nothing else.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import mpg
from mpg.models import attention, lengths, loading
from mpg.models.cache import RaggedCache, as_argument

PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10], [11, 12, 13]]


def _flash(query, key, value, queries, keys, *sizes_and_flags, scale, seqused_k):
    """What torch's kernel computes of texts of one query, text by text."""
    assert queries.dtype == keys.dtype == seqused_k.dtype == torch.int32
    longest_query, longest, dropout, is_causal, wants_mask = sizes_and_flags
    assert longest_query == 1 and not is_causal, "the kernel does not split keys of longer texts, nor under a window"
    assert dropout == 0 and not wants_mask
    out = torch.full_like(query, torch.nan)
    for text, (used, begin) in enumerate(zip(seqused_k.tolist(), keys.tolist()[:-1], strict=True)):
        assert queries[text : text + 2].tolist() == [text, text + 1] and 0 < used <= longest
        assert begin + used <= len(key)
        held = (part[begin : begin + used].transpose(0, 1) for part in (key, value))
        out[text] = torch.nn.functional.scaled_dot_product_attention(
            query[text][:, None], *held, scale=scale, enable_gqa=True
        )[:, 0]
    return out, None, None, None, None


@pytest.fixture
def kernel(monkeypatch):
    """Lengths on the CPU too, where they always win."""
    monkeypatch.setattr(attention, "DEVICE_OF_LENGTHS", "cpu")
    monkeypatch.setattr(lengths, "flash_attention", _flash)
    monkeypatch.setattr(lengths, "_time", lambda calls: [2.0, 1.0])


def _logits(model, by_lengths, kv_length):
    """Of a chunk behind each of three rows in places 1 to 3, and of rows by number."""
    cache = RaggedCache(model.config.num_hidden_layers, 4, 12, by_lengths)
    out = []
    for rows, tokens, start in (
        (slice(1, 4), torch.tensor([[*prompt, *[0] * 7][:7] for prompt in PROMPTS]), [0, 0, 0]),
        (slice(1, 4), torch.tensor([[20, 21], [22, 23], [24, 25]]), [7, 1, 3]),
        (torch.tensor([3, 1]), torch.tensor([[30], [31]]), [5, 9]),
        (slice(2, 4), torch.tensor([[40, 41], [42, 43]]), [30, 6]),  # the first one runs past its end
    ):
        positions = cache.place(rows, torch.tensor(start), tokens.shape[1], kv_length)
        out.append(model(input_ids=tokens, position_ids=positions, use_cache=True, **as_argument(model, cache)).logits)
        cache.resize(cache.num_rows + 1, cache.capacity + 3, num_positions=11)
    return [*out[:3], out[3][1:]]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "qwen3"])
def test_logits_are_those_by_a_mask(architecture, tiny_model, kernel):
    model = tiny_model(architecture)
    attention.use_ragged_attention(model, "base")
    with torch.no_grad():
        for own, by_mask in zip(_logits(model, 2, 12), _logits(model, 0, 12), strict=True):
            torch.testing.assert_close(own, by_mask, atol=1e-5, rtol=1e-5)


def _chosen(model):
    attention.use_ragged_attention(model, "base")
    return attention.choose_lengths(model)


def test_lengths_are_chosen_where_they_are_right_and_faster(tiny_model, kernel, monkeypatch):
    model = tiny_model().bfloat16()
    assert _chosen(model) == 32
    monkeypatch.setattr(lengths, "_time", lambda calls: [1.0, 1.0])
    assert _chosen(model) == 0
    times = iter([[2.0, 1.0], [2.0, 1.0], [1.5, 1.0], [1.5, 1.0], [3.0, 1.0], [1.0, 3.0]])
    monkeypatch.setattr(lengths, "_time", lambda calls: next(times))
    assert _chosen(model) == 8


def test_times_are_of_the_device_that_the_model_is_on(tiny_model, kernel, monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    _chosen(tiny_model().bfloat16())
    assert set(entered) == {-1}  # what a tensor of the CPU says


def test_lengths_are_not_chosen_where_they_are_wrong_or_cannot_be(tiny_model, kernel, monkeypatch):
    assert _chosen(tiny_model()) == 0  # in 32 bits there is no such kernel
    for architecture in ("gemma2", "gpt_oss"):  # scores are capped, a model has sinks
        assert _chosen(tiny_model(architecture).bfloat16()) == 0
    model = tiny_model().bfloat16()

    def wrong_from(longest):
        def kernel(query, key, value, queries, keys, max_q, max_k, *flags, **named):
            out, *others = _flash(query, key, value, queries, keys, max_q, max_k, *flags, **named)
            return (out if max_k < longest else -out), *others

        return kernel

    def raising(*args, **kwargs):
        raise RuntimeError("head_size must be a multiple of 8")

    for kernel in (wrong_from(1), wrong_from(256), raising):  # of long rows keys are split, which is another kernel
        monkeypatch.setattr(lengths, "flash_attention", kernel)
        assert _chosen(model) == 0


@pytest.mark.parametrize("is_compiled", [False, True])
def test_calls_are_such_as_torch_takes_and_traces(is_compiled):
    attend = lengths.attend_by_lengths
    if is_compiled:  # as a part of a layer: what cannot be traced raises
        attend = torch.compile(attend, fullgraph=True, dynamic=True, backend="eager")
    query, held = torch.zeros(2, 6, 3, 8, device="meta"), torch.zeros(2, 12, 2, 8, device="meta").transpose(1, 2)
    of_rows = lengths.Lengths.of(torch.zeros(2, 3, dtype=torch.int64, device="meta"), 12)
    assert attend(query, held, held, of_rows, None).shape == (2, 3, 6, 8)


def test_lengths_are_asked_for_on_a_gpu_alone(tiny_model):
    assert _chosen(tiny_model().bfloat16()) == 0


@pytest.mark.parametrize("options", [{"sampler": "direct"}, {"sampler": "exact"}, {"sampler": "scr"}])
def test_texts_are_those_by_a_mask(options, tiny_model, monkeypatch):
    base, attribute, calls = tiny_model(), tiny_model(), []

    def kernel(*args, **kwargs):
        calls.append(args)
        return _flash(*args, **kwargs)

    monkeypatch.setattr(lengths, "flash_attention", kernel)
    texts = []
    for most in (0, 32):
        monkeypatch.setattr(loading, "choose_lengths", lambda model, most=most: most)
        model = mpg.load(base, {"E": attribute})
        model.models.eos_token_ids = ()
        results = model.generate(PROMPTS, weights={"E": 1.0}, seed=3, max_new_tokens=8, **options)
        texts.append([result.tokens for result in results])
        assert bool(calls) == bool(most)
    assert texts[0] == texts[1]
