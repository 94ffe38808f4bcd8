"""Log-probabilities of texts against plain forwards, text by text."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from mpg.demo import MODELS
from mpg.paper.scoring import token_logprobs


def test_tokens_have_the_log_probabilities_of_a_plain_forward(model):
    """Of prompts and texts of other lengths, one of them longer than a slice."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda size: torch.randint(4, 1400, (size,), generator=generator).tolist()  # noqa: E731
    prompts, texts = [draw(3), draw(9), draw(1)], [draw(40), draw(1), draw(17)]
    found = token_logprobs(model.models, ("base", "E"), prompts, texts)
    assert found.shape == (2, 3, 40)
    plain = AutoModelForCausalLM.from_pretrained(MODELS, dtype=torch.float32)
    for row, prompt, text in zip(found[0], prompts, texts, strict=True):
        logits = plain(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
        wanted = logits.double().log_softmax(-1).gather(1, torch.tensor(text)[:, None])[:, 0]
        torch.testing.assert_close(row[: len(text)], wanted, rtol=0, atol=1e-4)
        assert (row[len(text) :] == 0).all()
    plain.load_adapter(str(MODELS / "adapters" / "E"))
    with_adapter = plain(torch.tensor([prompts[0] + texts[0]])).logits[0, len(prompts[0]) - 1 : -1].double()
    wanted = with_adapter.log_softmax(-1).gather(1, torch.tensor(texts[0])[:, None])[:, 0]
    torch.testing.assert_close(found[1, 0], wanted, rtol=0, atol=1e-4)
