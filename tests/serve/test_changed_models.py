"""A served model that its owner goes on changing: no answer mixes two versions of its weights."""

from __future__ import annotations

from time import monotonic

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import mpg
from mpg.demo import MODELS
from mpg.results import Result
from mpg.serve.groups import DecodeGroup
from mpg.serve.jobs import Job
from serving import serving

BODY = {"model": "E", "prompt": [5, 6, 7], "max_tokens": 8, "seed": 3}


@pytest.fixture
def adapted():
    base = AutoModelForCausalLM.from_pretrained(MODELS)
    return PeftModel.from_pretrained(base, str(MODELS / "adapters" / "E"), adapter_name="E").eval()


def change(adapted):
    with torch.no_grad():
        adapted.get_base_model().model.layers[0].mlp.down_proj.weight.mul_(3)


def job(model):
    call = model.read([5, 6, 7], weights={"E": 1.0}, seed=3, max_new_tokens=8)
    return Job("id", model, call, call.requests[0], lambda events: None, monotonic() + 60)


def finish(group):
    texts = []
    while group.running:
        texts += [event.text for _, event in group.step() if isinstance(event, Result)]
    return texts


@torch.no_grad()
def test_a_request_does_not_join_others_that_began_with_other_weights(adapted):
    model = mpg.load(adapted, tokenizer=MODELS, device="cpu")
    first, second = job(model), job(model)
    group = DecodeGroup(first, 4, 64, 64, gather=0.0)
    group.begin(first)
    group.step()
    change(adapted)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"^base: expected the weights that requests began with .*, got others; ask"
        ):
            group.begin(second)
    assert len(finish(group)) == 1
    group.begin(second)
    expected = mpg.load(adapted, tokenizer=MODELS, device="cpu")
    assert finish(group) == [expected.generate([5, 6, 7], weights={"E": 1.0}, seed=3, max_new_tokens=8).text]


def test_a_server_refuses_every_request_to_a_model_with_a_merged_adapter(adapted):
    with serving(mpg.load(adapted, tokenizer=MODELS, device="cpu")) as served:
        text = served.post("/v1/completions", BODY).json()["choices"][0]["text"]
        adapted.merge_adapter()
        for _ in range(2):
            answer = served.post("/v1/completions", BODY)
            assert answer.status_code == 500
            assert "base: expected adapters beside the base, got ['E'] merged" in answer.json()["error"]["message"]
        adapted.unmerge_adapter()
        assert served.post("/v1/completions", BODY).json()["choices"][0]["text"] == text
        change(adapted)
        assert served.post("/v1/completions", BODY).json()["choices"][0]["text"] != text
        assert served.is_idle()
