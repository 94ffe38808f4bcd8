"""lm-evaluation-harness scores options on a server by its own client."""

from __future__ import annotations

import pytest

from mpg.demo import MODELS

pytest.importorskip("lm_eval", reason="needs lm_eval")
OPTIONS = [("The weather is", " nice"), ("The weather is", " a plan for the trip"), ("How do you", " do?")]


def test_the_harness_scores_options_as_the_combined_law_has_them(served):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model, tokenizer = served.model, served.model.tokenizer
    harness = LocalCompletionsAPI(
        base_url=f"{served.url}/v1/completions", model="E=1,T=0.5", tokenizer=str(MODELS),
        tokenizer_backend="huggingface", batch_size=2, num_concurrent=1, max_length=256,
    )  # fmt: skip
    requests = [Instance("loglikelihood", {}, option, index) for index, option in enumerate(OPTIONS)]
    found = harness.loglikelihood(requests, disable_tqdm=True)
    for (context, option), (logprob, is_greedy) in zip(OPTIONS, found, strict=True):
        prompt, whole = tokenizer(context)["input_ids"], tokenizer(context + option)["input_ids"]
        told = score(model, whole, {"E": 1, "T": 0.5})
        assert logprob == pytest.approx(sum(told[len(prompt) - 1 :]), abs=1e-6)
        assert not is_greedy
    prompts = [Instance("generate_until", {}, ("The weather is", {"until": ["."], "max_gen_toks": 6}), 0)]
    wanted = model.generate("The weather is", raw=True, weights="E=1,T=0.5", temperature=0, max_new_tokens=6).text
    assert harness.generate_until(prompts, disable_tqdm=True) == [wanted.split(".")[0]]


def score(model, token_ids, weights):
    """log p of every token but the first under the geometric target, by one model after the other."""
    import torch

    from mpg.paper.scoring import token_logprobs

    every = torch.tensor([list(range(model.models.vocab_size))])
    told = []
    for end in range(1, len(token_ids)):
        prompts = [token_ids[:end]] * every.shape[1]
        rows = token_logprobs(model.models, ("base", *weights), prompts, every.T.tolist())[:, :, 0]
        ratios = torch.tensor(list(weights.values()), dtype=rows.dtype)[:, None] * (rows[1:] - rows[0])
        told.append((rows[0] + ratios.sum(0)).log_softmax(0)[token_ids[end]].item())
    return told
