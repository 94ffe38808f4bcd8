"""Layers that read one input are one product, and their columns are what each of them would compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpg.models.joined import JoinedLinear, JoinedPart, join_linears


class Attention(nn.Module):
    def __init__(self, k_bias=True, k_in=32, k_dtype=torch.float32):
        super().__init__()
        self.q_proj = nn.Linear(32, 24)
        self.k_proj = nn.Linear(k_in, 8, bias=k_bias, dtype=k_dtype)
        self.v_proj = nn.Linear(32, 8)

    def forward(self, x, y):
        return self.q_proj(x), self.k_proj(y), self.v_proj(y)


@pytest.mark.parametrize("shape", [(1, 32), (3, 2, 32), (7, 32)])
def test_every_layer_gives_what_it_gave(shape):
    model = nn.ModuleDict({"self_attn": Attention()})
    x, own = torch.randn(shape), model["self_attn"]
    before = own(x, x)
    join_linears(model)
    assert own.q_proj.joined.names == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert [part.out_features for part in (own.q_proj, own.k_proj, own.v_proj)] == [24, 8, 8]
    for got, wanted in zip(own(x, x), before, strict=True):
        torch.testing.assert_close(got, wanted)
    assert not own.q_proj.joined.latest  # nothing is held from forward to forward


def test_layers_that_read_something_else_after_all_are_right_too():
    own = Attention()
    x, y = torch.randn(2, 3, 32)
    before = own(x, y)
    join_linears(own)
    for got, wanted in zip(own(x, y), before, strict=True):
        torch.testing.assert_close(got, wanted)


def test_one_product_serves_all(monkeypatch):
    own = Attention()
    join_linears(own)
    calls = []
    own.q_proj.joined.linear.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 32)
    own(x, x)
    own(x.clone(), x)
    assert len(calls) == 1 + 2


@pytest.mark.parametrize("other", [dict(k_bias=False), dict(k_in=16), dict(k_dtype=torch.float16), "hook", "kind"])
def test_layers_that_are_not_alike_stay_as_they_are(other):
    own = Attention(**other) if isinstance(other, dict) else Attention()
    if other == "hook":
        own.k_proj.register_forward_hook(lambda *_: None)
    if other == "kind":
        own.k_proj = nn.Identity()
    join_linears(own)
    assert not [part for part in own.modules() if isinstance(part, JoinedLinear | JoinedPart)]
