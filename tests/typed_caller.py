"""What the results of calls are, for a type checker: `make lint` reads this file, nothing runs it."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import assert_type

import mpg

model = mpg.load("base")
talk = [{"role": "user", "content": "hi"}]


def one(text: str, ids: list[int], messages: list[dict[str, Any]]) -> None:
    assert_type(model.generate("hi", weights={"E": 1}), mpg.Result)
    assert_type(model.generate(text, max_new_tokens=3), mpg.Result)
    assert_type(model.generate(ids), mpg.Result)
    assert_type(model.generate(talk), mpg.Result)
    assert_type(model.generate(messages), mpg.Result)


def several(texts: list[str], ids: list[list[int]]) -> None:
    assert_type(model.generate(["hi", "ho"]), list[mpg.Result])
    assert_type(model.generate(("hi", "ho")), list[mpg.Result])
    assert_type(model.generate(texts, temperature=0.5), list[mpg.Result])
    assert_type(model.generate(ids), list[mpg.Result])
    assert_type(model.generate([talk, talk]), list[mpg.Result])


def either(count: int, prompt: Any, tensor: torch.Tensor) -> None:
    assert_type(model.generate(tensor), Any)
    assert_type(model.generate(input_ids=tensor), Any)
    assert_type(model.generate("hi", num_return_sequences=count), Any)
    assert_type(model.generate(prompt), Any)
