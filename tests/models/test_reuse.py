"""Models that are loaded beside others of the same base share its weights, and are what they are when loaded alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from longer import IS_LONG
from mpg.model import Model
from mpg.models import linear, loading, sources
from mpg.models.linear import EVERY
from mpg.recipe import Recipe

HOWS = ["packed", "merged", "int4-draft"] + ["plain", "a model", "int4"] * IS_LONG
OPTIONS = {"weights": {"E": 1, "F": 0.5}, "max_new_tokens": 8, "seed": 1}


def weights(*ensembles):
    """Every weight and buffer of all modules, by where it lies; those in blocks of oneDNN lie nowhere."""
    tensors = [
        tensor
        for ensemble in ensembles
        for loaded in ensemble._models
        for tensor in (*loaded.model.parameters(), *loaded.model.buffers())
    ]
    return {id(t) if t.is_mkldnn else t.untyped_storage().data_ptr(): t.nbytes for t in tensors}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", HOWS)
def test_an_adapter_comes_and_goes_beside_the_weights_that_are_there(
    how, tiny_model, lora_folder, tmp_path, monkeypatch
):
    if how == "packed":
        monkeypatch.setattr(linear, "MIN_WEIGHTS", 0)
        monkeypatch.setattr(linear, "choose", lambda times, may_keep_both=True: EVERY)
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    folders = {
        "E": lora_folder("E", base=copy.deepcopy(base), target_modules=["q_proj", "down_proj"]),
        "T": lora_folder("T", base=copy.deepcopy(base), target_modules="all-linear", r=3),
    }
    folders["F"] = lora_folder("F", base=copy.deepcopy(base), use_dora=how == "merged", target_modules=["v_proj"])
    if how == "a model":
        folders["F"] = tmp_path / "other"
        tiny_model().save_pretrained(folders["F"])
    recipe = Recipe(
        tmp_path / "base", {name: folders[name] for name in "EF"}, allow_other_base=True,
        merge_adapters=how == "merged", quantize=how if "int4" in how else None,
    )  # fmt: skip
    first = Model(loading.load(recipe, device="cpu"), recipe)
    text = first.generate([3, 4, 5], **OPTIONS).tokens
    wider, fewer = replace(recipe, attributes=folders), replace(recipe, attributes={"F": folders["F"]})
    fresh = [Model(loading.load(other, device="cpu"), other) for other in (wider, fewer)]

    read_model, read = sources.read_model, []
    monkeypatch.setattr(sources, "read_model", lambda *arguments: read.append(1) or read_model(*arguments))
    more = Model(loading.load(wider, device="cpu", beside=first.models), wider)
    less = Model(loading.load(fewer, device="cpu", beside=more.models), fewer)
    assert read == []
    assert weights(first.models, more.models, less.models) == weights(first.models)
    of_t = {**OPTIONS, "weights": {"T": 1, "F": 0.5}}
    of_f = {**OPTIONS, "weights": {"F": 1}}
    if how == "int4-draft":
        of_t["draft"] = of_f["draft"] = "merged"
    assert more.generate([3, 4, 5], **of_t).tokens == fresh[0].generate([3, 4, 5], **of_t).tokens
    assert less.generate([3, 4, 5], **of_f).tokens == fresh[1].generate([3, 4, 5], **of_f).tokens
    for model in (first, more):
        assert model.generate([3, 4, 5], **OPTIONS).tokens == text
    assert less.models.attribute_names == ("F",) and more.models.attribute_names == ("E", "T", "F")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", [None, EVERY])
def test_an_adapter_beside_is_checked_as_any_other(rows, tiny_model, lora_folder, tmp_path, monkeypatch):
    """By the modules that the base has, joined and packed or not, and by weights that were saved with it."""
    monkeypatch.setattr(linear, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(linear, "choose", lambda times, may_keep_both=True: rows)
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    folder = lora_folder("E", base=copy.deepcopy(base), target_modules=["q_proj"])
    recipe = Recipe(tmp_path / "base", {"E": folder}, allow_other_base=True)
    beside = loading.load(recipe, device="cpu")

    def add(name, source):
        other = replace(recipe, attributes={"E": folder, name: source})
        return loading.load(other, device="cpu", beside=beside)

    head = tmp_path / "head"
    peft_model = PeftModel.from_pretrained(tiny_model(), folder)
    peft_model.get_base_model().load_state_dict(
        {key.replace("q_proj.", "q_proj.base_layer."): value for key, value in base.state_dict().items()}, strict=False
    )
    peft_model.save_pretrained(head, save_embedding_layers=True)
    assert add("same", head).attribute_names == ("E", "same")
    with torch.no_grad():
        peft_model.get_base_model().lm_head.weight += 1
    peft_model.save_pretrained(head, save_embedding_layers=True)
    with pytest.raises(ValueError, match=r"expected the model's weights for lm_head\.weight, got some of its own"):
        add("other", head)
    other = tiny_model(hidden_size=64)
    with pytest.raises(ValueError, match=r"expected \(in, out\) ="):
        add("wide", lora_folder("wide", base=other, target_modules=["q_proj"]))
