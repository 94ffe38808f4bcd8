"""Rows that begin again with another prompt while the others go on, against unbatched, uncached full forwards."""

from __future__ import annotations

import pytest
import torch

from ensembles import load
from mpg.models import reading

PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10], [11, 12, 13]]


@pytest.mark.parametrize("prefill_tokens", [512, 3], ids=["in one part", "in parts of three tokens"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mistral"])
def test_replaced_rows_hold_their_new_prompts_and_leave_the_others_alone(
    model_type, prefill_tokens, tiny_model, lora_folder, full_logits, monkeypatch
):
    monkeypatch.setattr(reading, "PREFILL_TOKENS", prefill_tokens)
    base, full = tiny_model(model_type), tiny_model(model_type)
    target, settings = ("q_proj", {}) if model_type != "gpt2" else ("c_attn", {"fan_in_fan_out": True})
    adapter = lora_folder("E", model_type, target_modules=[target], **settings)
    models = load(base, {"E": adapter, "full": full}, device="cpu")
    roles = ["E", "base", "full"]
    session = models.open(PROMPTS, roles, 24)
    rows = [list(prompt) for prompt in PROMPTS]
    for _ in range(2):  # rows 0 and 2 have something to forget
        _feed_last(session, roles, rows)
        for row in rows:
            row.append(20)
    rows[0], rows[2] = [30, 31], [32, 33, 34, 35, 36, 37, 38, 39]
    session.replace([0, 2], [rows[0], rows[2]])
    logits = _feed_last(session, roles, rows)
    whole = models.open([[row[0]] for row in rows], roles, 24)
    for b, row in enumerate(rows):
        torch.testing.assert_close(logits[1, b, 0], full_logits(base, row)[-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits[2, b, 0], full_logits(full, row)[-1], atol=1e-5, rtol=1e-5)
        tokens = torch.tensor([row] * len(rows))
        plain = whole.forward(roles, tokens, torch.zeros(3, dtype=torch.int64), kv_length=len(row))
        torch.testing.assert_close(logits[:, b, 0], plain[:, b, -1], atol=1e-5, rtol=1e-5)


def test_replaced_row_forgets_that_a_model_was_unusable(tiny_model):
    model = tiny_model()
    models = load(model, {"E": model}, device="cpu")
    session = models.open(PROMPTS, ["base"], 24)
    hook = models._models[0].model.lm_head.register_forward_hook(lambda module, args, out: out.fill_(float("nan")))
    _feed_last(session, ["base"], PROMPTS)
    assert session.blame(1, 0, [10], ["base"]) == "the 'base' model returned NaN"
    hook.remove()
    session.replace([1], [[5, 6]])
    assert session.blame(1, 1, [6], ["base"]) is None


def test_a_row_that_begins_again_forgets_what_was_not_finite(tiny_model, lora_folder):
    """A masked NaN would still be NaN in the weighted sum of the values, and an equal prompt would be copied."""
    models = load(tiny_model(), {"E": lora_folder("E", target_modules=["q_proj"])}, device="cpu")
    roles = ["base", "E"]
    session = models.open(PROMPTS, roles, 24)

    def poison(module, args, out):
        out[[0, 3] if len(out) == 6 else slice(None)] = float("nan")  # row 0 of both, fed with the others or alone

    hook = models._models[0].model.model.layers[0].mlp.register_forward_hook(poison)
    _feed_last(session, roles, PROMPTS)
    assert session.blame(0, len(PROMPTS[0]) - 1, PROMPTS[0][-1:], roles) == "the 'base' model returned NaN"
    hook.remove()
    rows = [PROMPTS[0][:2], PROMPTS[0], PROMPTS[2]]
    expected = _feed_last(models.open(rows, roles, 24), roles, rows)
    for replaced in ([0, 1], [0]):  # the second time a row has its prompt still
        session.replace(replaced, [rows[row] for row in replaced])
        torch.testing.assert_close(_feed_last(session, roles, rows), expected, atol=1e-5, rtol=1e-5)


def _feed_last(session, roles, rows):
    """Logits behind the last token of every row."""
    tokens, start = torch.tensor([[row[-1]] for row in rows]), torch.tensor([len(row) - 1 for row in rows])
    return session.forward(roles, tokens, start, kv_length=24)
