"""Adapters that cannot be stacked, merged into models of their own, against PEFT's own unmerged forward."""

from __future__ import annotations

import copy
import json
import warnings
from itertools import product

import pytest
import torch
import yaml
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)  # fmt: skip
from peft.tuners.lora.variants import DoraLinearVariant
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mpg
from ensembles import load
from longer import IS_LONG, thinned

TOKENS = [3, 4, 5, 6, 7, 3]
LORA = dict(target_modules=["q_proj", "v_proj"], init_lora_weights=False, r=4)
KINDS = {
    "dora": (LoraConfig, dict(LORA, use_dora=True)),
    "saved head": (LoraConfig, dict(LORA, modules_to_save=["lm_head"])),
    "saved norm": (LoraConfig, dict(LORA, modules_to_save=["norm"])),
    "saved embedding": (LoraConfig, dict(LORA, modules_to_save=["embed_tokens"])),
    "embedding": (LoraConfig, dict(LORA, target_modules=["q_proj", "embed_tokens"])),
    "embedding and head": (LoraConfig, dict(LORA, target_modules=["embed_tokens", "lm_head"])),
    "head tied to the embedding": (LoraConfig, dict(LORA, target_modules=["lm_head"], ensure_weight_tying=True)),
    "trained tokens": (LoraConfig, dict(LORA, trainable_token_indices=[3, 4])),
    "biases": (LoraConfig, dict(LORA, bias="all")),
    "biases of factors": (LoraConfig, dict(LORA, lora_bias=True)),
    "parameters": (LoraConfig, dict(LORA, target_modules=[], target_parameters=["self_attn.q_proj.weight"])),
    "pissa": (LoraConfig, dict(LORA, init_lora_weights="pissa")),
    "ia3": (
        IA3Config,
        dict(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
    ),
    "loha": (LoHaConfig, dict(target_modules=["q_proj"], init_weights=False)),
    "lokr": (LoKrConfig, dict(target_modules=["q_proj"], init_weights=False)),
    "oft": (OFTConfig, dict(target_modules=["q_proj"], oft_block_size=8, init_weights=False)),
}  # fmt: skip

TIED = ("head tied to the embedding",)  # which it can be where the base ties them


@pytest.fixture
def folders(tmp_path, tiny_model):
    """folders(kind, **settings of the base): a base, an adapter E of some kind beside it and a plain one T."""

    def make(kind, **settings):
        base = tiny_model(attention_bias="bias" in kind, **settings)
        base.save_pretrained(tmp_path / "base")
        made, adapter = KINDS[kind]
        for name, config in {"E": made(task_type="CAUSAL_LM", **adapter), "T": LoraConfig(**LORA)}.items():
            model = get_peft_model(copy.deepcopy(base), config)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.1 * torch.randn_like(parameter)
            model.save_pretrained(tmp_path / name)
        return tmp_path / "base", {name: tmp_path / name for name in ("E", "T")}

    return make


def peft(base, folder):
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    return model if folder is None else PeftModel.from_pretrained(model, folder).eval()


@torch.no_grad()
def logits_of_peft(base, folder):
    return peft(base, folder)(torch.tensor([TOKENS]), use_cache=False).logits[0]


def logits_of(ensemble):
    roles, start = ("base", "E", "T"), torch.zeros(1, dtype=torch.int64)
    logits = ensemble.open([TOKENS[:1]], roles, 8).forward(roles, torch.tensor([TOKENS]), start, kv_length=8)
    return dict(zip(roles, logits[:, 0], strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        pytest.param(kind, tied, id=f"{kind}-{'tied' if tied else 'untied'}")
        for (i, kind), tied in product(enumerate(KINDS), (False, True))
        if tied or kind not in TIED  # which are always
        if IS_LONG or kind in TIED or i % 2 == tied
    ],
)
def test_a_merged_adapter_beside_a_stacked_one_computes_what_peft_computes(kind, tied, folders):
    base, attributes = folders(kind, tie_word_embeddings=tied or kind in TIED)
    model = mpg.load(base, attributes, device="cpu", merge_adapters=True)
    assert [len(loaded.adapters) for loaded in model.models._models] == [1, 0]
    expected = {role: logits_of_peft(base, attributes.get(role)) for role in ("base", "E", "T")}
    for role, of_role in logits_of(model.models).items():
        torch.testing.assert_close(of_role, expected[role], atol=1e-4, rtol=1e-4)
    how = dict(weights={"E": 1, "T": 1}, temperature=0, max_new_tokens=6)
    tokens = list(model.generate(TOKENS, sampler="direct", **how).tokens)
    assert tokens == list(model.generate(TOKENS, sampler="exact", **how).tokens)
    rows = [of_role[-1].log_softmax(-1) for of_role in expected.values()]
    assert tokens[0] == (rows[1] + rows[2] - rows[0]).argmax()


@pytest.mark.parametrize("kind", thinned([*KINDS]))
def test_without_merge_adapters_the_refusal_names_it(kind, folders):
    base, attributes = folders(kind, tie_word_embeddings=kind in TIED)
    with pytest.raises(ValueError, match=r"^attributes\['E'\]: expected .*, got .*, or load with merge_adapters=True$"):
        load(base, attributes)


def test_what_a_merged_model_takes_is_said_and_counts_a_head_of_its_own(folders):
    base, attributes = folders("saved head", tie_word_embeddings=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        described = load(base, attributes, device="cpu", merge_adapters=True).describe()
    assert described["E"]["parameters"] == described["T"]["parameters"] + 61 * 32
    size = 4 * described["E"]["parameters"] / 2**20
    text = f"attributes['E']: it cannot be stacked; merged, it takes {size:.1f} MiB of its own"
    said = [str(warning.message) for warning in caught]
    assert text in said
    assert not any("tie_word_embeddings" in words for words in said)  # which PEFT would have the caller look after


@pytest.mark.filterwarnings("ignore")
def test_tied_weights_are_shared_again_where_the_adapter_left_them_alone(folders):
    base, attributes = folders("dora", tie_word_embeddings=True)
    described = load(base, attributes, device="cpu", merge_adapters=True).describe()
    assert described["E"]["parameters"] == described["T"]["parameters"]


@pytest.mark.filterwarnings("ignore")
def test_a_base_in_memory_keeps_its_weights_and_modules(folders):
    base, attributes = folders("dora")
    model = AutoModelForCausalLM.from_pretrained(base)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ensemble = load(model, attributes, merge_adapters=True)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    for role, of_role in logits_of(ensemble).items():
        torch.testing.assert_close(of_role, logits_of_peft(base, attributes.get(role)), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["dora", "saved head", "embedding"])
def test_merging_keeps_the_dtype_and_follows_the_device_map(kind, folders):
    base, attributes = folders(kind)
    ensemble = load(base, attributes, dtype="bfloat16", device_map={"E": "cpu"}, merge_adapters=True)
    assert {p.dtype for loaded in ensemble._models for p in loaded.model.parameters()} == {torch.bfloat16}
    assert logits_of(ensemble)["E"].dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore")
def test_the_found_adapters_of_a_folder_are_merged_and_saved_in_a_recipe(folders, tmp_path):
    base, attributes = folders("dora")
    (base / "adapters").mkdir()
    for name, folder in attributes.items():
        folder.rename(base / "adapters" / name)
    mpg.load(base, device="cpu", merge_adapters=True).save_pretrained(tmp_path)
    recipe = yaml.safe_load((tmp_path / "mpg.yaml").read_text())
    assert recipe["merge_adapters"] is True
    assert recipe["attributes"] == {name: f"base/adapters/{name}" for name in attributes}
    assert mpg.load(tmp_path, device="cpu").models.describe()["E"]["adapter"] is None
    (tmp_path / "mpg.yaml").write_text(yaml.safe_dump(recipe | {"merge_adapters": 1}))
    with pytest.raises(ValueError, match="merge_adapters: expected True or False, got 1"):
        mpg.load(tmp_path, device="cpu")


def test_an_adapter_in_memory_is_refused_with_the_way_out(folders):
    base, attributes = folders("dora")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), attributes["E"], adapter_name="E")
    message = r"^attributes\['E'\]: .*use_dora=True; save it and load its folder with merge_adapters=True$"
    with pytest.raises(ValueError, match=message):
        load(model, merge_adapters=True)


def test_what_peft_cannot_merge_is_refused(folders, tiny_model, tmp_path):
    base, _ = folders("dora")
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(tiny_model(), prompts).save_pretrained(tmp_path / "P")
    with pytest.raises(ValueError, match=r"^attributes\['E'\]: expected a LoRA adapter, got .*PROMPT_TUNING$"):
        load(base, {"E": tmp_path / "P"}, merge_adapters=True)
    invoked = LoraConfig(task_type="CAUSAL_LM", **LORA, alora_invocation_tokens=[5, 6])
    get_peft_model(tiny_model(), invoked).save_pretrained(tmp_path / "A")
    wanted = "expected an adapter that PEFT can merge, got NotImplementedError: aLoRA"
    with pytest.raises(ValueError, match=rf"^attributes\['E'\]: {wanted}"):
        load(base, {"E": tmp_path / "A"}, merge_adapters=True)


@pytest.mark.parametrize("kind", ["saved head", "saved embedding", "embedding"])
def test_a_vocabulary_that_has_grown_is_refused(kind, folders, tiny_model):
    base, attributes = folders(kind, vocab_size=64)
    tiny_model().save_pretrained(base)
    wanted = "an adapter that fits LlamaForCausalLM and its vocabulary of 61 tokens"
    with pytest.raises(ValueError, match=rf"^attributes\['E'\]: expected {wanted}, got .*/E: .*64.*61"):
        load(base, attributes, merge_adapters=True)


def test_weights_that_the_configuration_does_not_describe_are_refused(folders):
    base, attributes = folders("dora")
    file = attributes["E"] / "adapter_model.safetensors"
    more = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"
    save_file(load_file(file) | {more: torch.zeros(4, 32)}, file)
    message = rf"^attributes\['E'\]: expected weights that its configuration describes, got {more} too$"
    with pytest.raises(ValueError, match=message):
        load(base, attributes, merge_adapters=True)


def test_a_damaged_file_is_named(folders):
    base, attributes = folders("ia3")
    (attributes["E"] / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(
        ValueError, match=r"^attributes\['E'\]: expected a file that can be read, got .*adapter_model.safe"
    ):
        load(base, attributes, merge_adapters=True)


def test_an_adapter_of_another_base_is_refused(folders, tiny_model, tmp_path):
    base, attributes = folders("dora")
    tiny_model().save_pretrained(tmp_path / "other")
    config = attributes["E"] / "adapter_config.json"
    trained_on = {"base_model_name_or_path": str(tmp_path / "other")}
    config.write_text(json.dumps(json.loads(config.read_text()) | trained_on))
    with pytest.raises(ValueError, match=r"^attributes\['E'\]: expected an adapter of .*, got one that was trained on"):
        load(base, attributes, merge_adapters=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_that_computes_something_else_is_refused(dtype, folders, monkeypatch):
    base, attributes = folders("dora")
    monkeypatch.setattr(DoraLinearVariant, "merge_unsafe", staticmethod(lambda module, adapter, weight: weight))
    with pytest.raises(ValueError, match=r"^attributes\['E'\]: expected a model that computes the same .*, got logits"):
        load(base, attributes, dtype=dtype, merge_adapters=True)
