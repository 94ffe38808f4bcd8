"""Equal prompts are read once, and every row holds them as if it had read them itself."""

from __future__ import annotations

import pytest
import torch

from ensembles import load
from mpg.models import reading
from mpg.models.runner import ModelRunner

SHORT, LONG = [3, 4, 5], [10, 11, 12, 13, 14, 15]
PROMPTS = [SHORT, LONG, SHORT, [20], LONG, SHORT, [20]]
ROLES = ["base", "E", "T", "full"]


@pytest.fixture
def models(tiny_model, lora_folder):
    adapters = {name: lora_folder(name, target_modules=["q_proj", "v_proj"]) for name in ("E", "T")}
    return load(tiny_model(), {**adapters, "full": tiny_model()}, device="cpu")


@pytest.fixture
def fed(monkeypatch):
    """The shapes (rows, positions) of all forwards."""
    shapes, forward = [], ModelRunner.forward

    def record(runner, fed, layout, tokens, start, kv_length, *rest, **kwargs):
        num_rows = sum(count for _, count in layout.runs)
        shapes.append((len(layout.runs), num_rows // len(layout.runs), tokens.shape[1]))
        return forward(runner, fed, layout, tokens, start, kv_length, *rest, **kwargs)

    monkeypatch.setattr(ModelRunner, "forward", record)
    return shapes


def _alone(models, roles, rows):
    """Logits behind the last token of every row, each in a session of its own."""
    return torch.cat([_last(models.open([row], roles, 16), roles, [row]) for row in rows], 1)


def _last(session, roles, rows, kv_length=16):
    tokens, start = torch.tensor([[row[-1]] for row in rows]), torch.tensor([len(row) - 1 for row in rows])
    return session.forward(roles, tokens, start, kv_length=kv_length)


@pytest.mark.parametrize("prefill_tokens", [512, 2], ids=["in one part", "in parts of two tokens"])
def test_equal_prompts_give_the_logits_of_each_alone(models, prefill_tokens, monkeypatch):
    monkeypatch.setattr(reading, "PREFILL_TOKENS", prefill_tokens)
    logits = _last(models.open(PROMPTS, ROLES, 16), ROLES, PROMPTS)
    torch.testing.assert_close(logits, _alone(models, ROLES, PROMPTS), atol=1e-5, rtol=1e-5)


def test_each_prompt_is_read_once_by_each_model(models, fed):
    models.open(PROMPTS, ROLES, 16)
    # base, E and T in one forward; full; of a prompt of one token nothing
    assert fed == [(3, 2, len(LONG) - 1), (1, 2, len(LONG) - 1)]


def test_a_prompt_that_a_row_has_still_is_not_read_again(models, fed):
    session = models.open([SHORT, LONG, [20, 21]], ROLES, 16)
    rows = [[*SHORT, 7], [*LONG, 8], [20, 21, 9]]
    _last(session, ROLES, [SHORT, LONG, [20, 21]])
    _last(session, ROLES, rows)
    fed.clear()
    session.replace([0, 2], [LONG, [20, 21]])  # row 1 decodes on, row 2 begins anew
    assert fed == []
    rows = [LONG, rows[1], [20, 21]]
    torch.testing.assert_close(_last(session, ROLES, rows), _alone(models, ROLES, rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lost_by", ["idling", "another prompt"])
def test_a_prompt_that_no_row_has_any_more_is_read_again(lost_by, models, fed):
    session = models.open([LONG, SHORT], ROLES, 16)
    if lost_by == "idling":  # a row that has ended, beside a shorter one
        _last(session, ROLES, [LONG, SHORT])
        session.forward(
            ROLES, torch.tensor([[7], [8]]), torch.tensor([len(LONG), len(SHORT)]), kv_length=len(SHORT) + 1
        )
        rows = [LONG, [*SHORT, 8, 9]]
        fed.clear()
        session.replace([0], [LONG])
    else:
        rows = [SHORT, LONG]
        fed.clear()
        session.replace([0, 1], rows)
    assert sum(shape[2] for shape in fed) == 2 * (len(LONG) - 1)  # of two models
    torch.testing.assert_close(_last(session, ROLES, rows), _alone(models, ROLES, rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("num_shares", "num_read"), [(3, 3), (1, 1)])
def test_a_merged_model_reads_what_is_another_model_for_every_row(models, fed, num_shares, num_read):
    shares = torch.tensor([[1.0, 0.0], [0.3, -0.5], [2.0, 1.0]])[:num_shares]
    given = shares if num_shares > 1 else shares[0]
    session = models.merge(["E", "T"], given).open([LONG] * 3, ["merged"], 16)
    assert fed == [(1, num_read, len(LONG) - (num_read == 1))]  # with the last token where all rows are read
    logits = _last(session, ["merged"], [LONG] * 3)
    for row in range(3):
        alone = _alone(models.merge(["E", "T"], shares[row % num_shares, None]), ["merged"], [LONG])
        torch.testing.assert_close(logits[:, row, None], alone, atol=1e-5, rtol=1e-5)


def test_late_sequences_of_one_prompt_read_nothing(model, fed):
    options = {"weights": {"E": 1, "T": 1}, "seed": 0, "sampler": "direct", "max_new_tokens": 6}
    prompt = model.encode("How do you get ready for the trip?")
    results = model.generate(prompt, num_return_sequences=5, batch_size=2, **options)
    assert sum(shape[2] > 1 for shape in fed) == 1
    expected = model.generate(prompt, num_return_sequences=5, batch_size=5, **options)
    assert [result.tokens for result in results] == [result.tokens for result in expected]


@pytest.mark.parametrize("prefill_tokens", [512, 2], ids=["in one part", "in parts of two tokens"])
def test_prompts_of_one_length_that_fill_all_rows_are_read_with_their_last_tokens(
    models, fed, prefill_tokens, monkeypatch
):
    """The first forward of each role is then over, of some roles at once or of each alone; the next is one again."""
    monkeypatch.setattr(reading, "PREFILL_TOKENS", prefill_tokens)
    prompts = [LONG, LONG[::-1]]
    session = models.open(prompts, ROLES, 16)
    num_read = len(fed)
    assert sum(width for groups, _, width in fed if groups == 3) == len(LONG)
    by_roles = [_last(session, roles, prompts, len(LONG)) for roles in (["T"], ["base", "E"], ["full"])]
    first = torch.cat(by_roles)
    assert len(fed) == num_read
    torch.testing.assert_close(_last(session, ["T"], prompts, len(LONG)), by_roles[0], atol=1e-5, rtol=1e-5)
    assert len(fed) == num_read + 1  # once each
    alone = [models.open([prompt], ROLES, 16) for prompt in prompts]
    fed_whole = torch.tensor([[7, 8]])  # more than a last token: read anew
    for row, (session_alone, prompt) in enumerate(zip(alone, prompts, strict=True)):
        tokens, start = torch.tensor([[prompt[-1], *fed_whole[0]]]), torch.tensor([len(prompt) - 1])
        expected = session_alone.forward(["T", "base", "E", "full"], tokens, start, kv_length=16)
        torch.testing.assert_close(first[:, row, 0], expected[:, 0, 0], atol=1e-5, rtol=1e-5)
        start = torch.full((2,), len(prompt))
        following = session.forward(["T", "base", "E", "full"], fed_whole.expand(2, 2), start, kv_length=16)
        torch.testing.assert_close(following[:, row], expected[:, 0, 1:], atol=1e-5, rtol=1e-5)
    session.replace([0], [SHORT])
    assert _last(session, ["E"], [SHORT, prompts[1]]).shape[:2] == (1, 2)
    assert fed[-1] == (1, 2, 1)


def test_what_was_read_with_prompts_is_never_taken_for_a_later_token(models):
    """A role that sat out the first round is fed where it begins, behind the prompt, which it has read to the end."""
    session, whole = models.open([LONG], ROLES, 16), models.open([LONG], ROLES, 16)
    start = torch.tensor([len(LONG) - 1])
    _last(session, ["T"], [LONG], len(LONG))
    later = session.forward(["E"], torch.tensor([[7]]), start + 1, kv_length=len(LONG) + 1)
    expected = whole.forward(["E"], torch.tensor([[LONG[-1], 7]]), start, kv_length=len(LONG) + 1)
    torch.testing.assert_close(later[:, :, 0], expected[:, :, 1], atol=1e-5, rtol=1e-5)
