"""Stacked adapters against PEFT, one row and one adapter at a time."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import mpg.models.sources
import mpg_ext
from ensembles import load
from mpg.models import runner
from mpg.models.lora import read_adapter
from mpg.models.reuse import share

PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10, 11]]
WEIGHTS = "adapter_model.safetensors"
ATTENTION = ["q_proj", "v_proj"]
ADAPTERS = {  # different ranks, targets and ways to scale
    "llama": {
        "plain": dict(target_modules=ATTENTION),
        "rslora": dict(target_modules="all-linear", r=6, lora_alpha=3, use_rslora=True),
        "pattern": dict(
            target_modules=["q_proj", "down_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 2},
            alpha_pattern={"down_proj": 5},
        ),
        "head": dict(target_modules=["lm_head", "o_proj"], r=3),
    },
    "gpt2": {
        "plain": dict(target_modules=["c_attn"], fan_in_fan_out=True),
        "wide": dict(target_modules=["c_fc", "c_proj"], fan_in_fan_out=True, r=7),
    },
}


@pytest.fixture
def peft_model(tiny_model):
    """peft_model(model_type) holds the adapters above, with random weights."""

    def make(model_type="llama"):
        (first, settings), *others = ADAPTERS[model_type].items()
        common = dict(task_type="CAUSAL_LM", init_lora_weights=False, r=4)
        model = get_peft_model(tiny_model(model_type), LoraConfig(**{**common, **settings}), adapter_name=first)
        for name, settings in others:
            model.add_adapter(name, LoraConfig(**{**common, **settings}))
        return model.eval()

    return make


def change_config(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("model_type", ADAPTERS)
@pytest.mark.parametrize("from_folders", [False, True], ids=["in_memory", "from_folders"])
def test_stacked_adapters_equal_peft(model_type, from_folders, peft_model, full_logits, tmp_path):
    model = peft_model(model_type)
    if from_folders:
        model.save_pretrained(tmp_path)
        ensemble = load(share("base", model), {name: tmp_path / name for name in ADAPTERS[model_type]})
    else:
        ensemble = load(model)
    assert ensemble.attribute_names == tuple(ADAPTERS[model_type])

    roles = ["base", *ensemble.attribute_names]
    session = ensemble.open(PROMPTS, roles, 16)
    draft = torch.randint(61, (3, 3))
    tokens = torch.cat([torch.tensor([[prompt[-1]] for prompt in PROMPTS]), draft], dim=1)
    start = torch.tensor([len(prompt) - 1 for prompt in PROMPTS])
    logits = session.forward(roles, tokens, start, kv_length=16)
    assert ensemble.cost({(tuple(roles), 4): 1}, roles).depth == 1
    for role, of_role in zip(roles, logits, strict=True):
        for prompt, tail, of_row in zip(PROMPTS, draft.tolist(), of_role, strict=True):
            expected = full_logits(model, prompt + tail, None if role == "base" else role)[len(prompt) - 1 :]
            torch.testing.assert_close(of_row, expected, atol=1e-4, rtol=1e-5)


def test_any_subset_of_groups_gives_the_same_logits(peft_model):
    ensemble = load(peft_model())
    tokens, start = torch.randint(61, (3, 2)), torch.tensor([len(prompt) - 1 for prompt in PROMPTS])
    everything = ["base", *ensemble.attribute_names]
    logits = ensemble.open(PROMPTS, everything, 16).forward(everything, tokens, start, kv_length=16)
    of_role = dict(zip(everything, logits, strict=True))
    for opened, fed in [
        (["rslora", "head"], ["head", "rslora"]),
        (everything, ["pattern", "plain"]),
        (["head", "base"], ["base"]),
        (everything, ["head", "base", "rslora"]),
        (["pattern", "base"], ["draft", "pattern", "base"]),
    ]:
        logits = ensemble.open(PROMPTS, [*opened, "draft"], 16).forward(fed, tokens, start, kv_length=16)
        expected = torch.stack([of_role["base" if role == "draft" else role] for role in fed])
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_base_pass_runs_the_plain_base_layers(peft_model, monkeypatch):
    session = load(peft_model()).open(PROMPTS, ["base", "plain"], 16)
    monkeypatch.delattr(mpg_ext, "lora_shrink")
    tokens, start = torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    session.forward(["base"], tokens, start, kv_length=16)
    with pytest.raises(AttributeError, match="lora_shrink"):
        session.forward(["plain"], tokens, start, kv_length=16)


@pytest.fixture
def products(monkeypatch):
    """What made the first small product of each adapted layer."""
    found, shrink, bmm = [], mpg_ext.lora_shrink, torch.bmm
    monkeypatch.setattr(mpg_ext, "lora_shrink", lambda *given: found.append("lora_shrink") or shrink(*given))
    monkeypatch.setattr(torch, "bmm", lambda *given: found.append("bmm") or bmm(*given))
    return found


LAYERS = 2 * len(["q, k, v", "o", "gate, up", "down"]) + len(["head"])


def test_layers_that_read_one_input_share_one_product(peft_model, products):
    session = load(peft_model()).open(PROMPTS, ["rslora"], 16)
    products.clear()
    session.forward(["rslora"], torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), kv_length=16)
    assert products == ["lora_shrink"] * LAYERS


@pytest.mark.parametrize(
    ("dtype", "num_tokens", "way"),  # 6 and 9 tokens a group
    [(torch.bfloat16, 2, "lora_shrink"), (torch.bfloat16, 3, "bmm"), (torch.float32, 3, "lora_shrink")],
)
def test_equal_groups_run_their_own_ops_in_16_bits_if_they_have_few_tokens(
    peft_model, products, monkeypatch, dtype, num_tokens, way
):
    session = load(peft_model().to(dtype)).open(PROMPTS, ["base", "plain", "rslora"], 16)
    inputs = torch.randint(61, (3, num_tokens)), torch.tensor([3, 0, 1])
    products.clear()
    logits = session.forward(["plain", "rslora"], *inputs, kv_length=16)
    assert products == [way] * LAYERS
    for most in (0, 100):  # all batched, and all by the ops
        monkeypatch.setattr(runner, "OWN_TOKENS", most)
        again = session.forward(["plain", "rslora"], *inputs, kv_length=16)
        atol = 1e-5 if dtype == torch.float32 else 0.05 * logits.std()
        torch.testing.assert_close(again, logits, atol=atol, rtol=1e-5)
    assert set(products) == ({"lora_shrink", "bmm"} if dtype == torch.bfloat16 else {"lora_shrink"})


def test_layers_of_one_name_that_read_other_inputs_are_not_mixed_up(peft_model):
    ensemble = load(peft_model())
    session = ensemble.open(PROMPTS, ["rslora"], 16)
    tokens, start = torch.randint(61, (3, 1)), torch.zeros(3, dtype=torch.int64)
    expected = session.forward(["rslora"], tokens, start, kv_length=16)
    layers = ensemble._models[0].model.model.layers
    for projection in (layers[0].self_attn.k_proj, layers[1].mlp.up_proj):  # equal values, another tensor
        projection.register_forward_pre_hook(lambda module, args: (args[0].clone(),))
    assert torch.equal(session.forward(["rslora"], tokens, start, kv_length=16), expected)


def test_the_users_peft_model_stays_as_it_was(peft_model, full_logits):
    model = peft_model().train()
    model.set_adapter("rslora")
    before = {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modules": [(name, type(module), module.training) for name, module in model.named_modules()],
        "config": model.config.to_dict() | {"attention": model.config._attn_implementation},
    }
    ensemble = load(model, dtype="float64")
    session = ensemble.open(PROMPTS, ["base", "plain"], 16)
    session.forward(["plain"], torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), kv_length=16)

    assert ensemble.dtype == torch.float64
    assert model.active_adapter == "rslora"
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before["requires_grad"]
    assert [(name, type(module), module.training) for name, module in model.named_modules()] == before["modules"]
    assert model.config.to_dict() | {"attention": model.config._attn_implementation} == before["config"]
    after = model.state_dict()
    assert after.keys() == before["weights"].keys()
    for name, weight in before["weights"].items():
        assert torch.equal(after[name], weight)
        assert after[name].dtype == weight.dtype


def test_weights_are_shared_not_copied(tiny_model, lora_folder):
    base = tiny_model()
    ensemble = load(base, {"E": lora_folder("E")})
    embeddings = [model.get_input_embeddings().weight for model in (base, ensemble._models[0].model)]
    assert embeddings[0].data_ptr() == embeddings[1].data_ptr()


def test_an_adapted_layer_that_sees_only_some_tokens_is_refused(peft_model):
    # A router that sends tokens to experts would mix the groups; linear layers must see all rows in order.
    ensemble = load(peft_model())
    session = ensemble.open(PROMPTS, ["plain"], 16)
    session.forward(["plain"], torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), kv_length=16)
    with pytest.raises(ValueError, match=r"v_proj: expected tokens \(3, 2\), got \(5,\)"):
        ensemble._models[0].model.model.layers[0].self_attn.q_proj(torch.zeros(5, 32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(use_dora=True), "use_dora=True"),
        (dict(modules_to_save=["norm"]), "modules_to_save|ModulesToSave"),
        (dict(trainable_token_indices=[3, 4]), "trainable_token_indices|TrainableTokens"),
        (dict(target_modules=["q_proj", "embed_tokens"]), "embed_tokens"),
        (dict(bias="lora_only", target_modules=["c_attn"]), "bias='lora_only'"),
        (dict(lora_bias=True), "lora_bias=True"),
        (dict(alora_invocation_tokens=[5, 6]), "alora_invocation_tokens"),
        (dict(target_parameters=["self_attn.q_proj.weight"], target_modules=[]), "target_parameters"),
        (dict(init_lora_weights="pissa"), "leaves the base weights as they are, got init_lora_weights='pissa'"),
    ],
)
@pytest.mark.parametrize("from_folder", [False, True], ids=["in_memory", "from_folder"])
def test_what_is_more_than_lora_on_linear_layers_is_refused(settings, message, from_folder, tiny_model, tmp_path):
    model_type = "gpt2" if settings.get("target_modules") == ["c_attn"] else "llama"
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "init_lora_weights": False, **settings}
    model = get_peft_model(tiny_model(model_type), LoraConfig(**settings), adapter_name="E")
    if from_folder:
        model.save_pretrained(tmp_path)
        base, attributes = tiny_model(model_type), {"E": tmp_path / "E"}
    else:
        base, attributes = model, None
    with pytest.raises(ValueError, match=message):
        load(base, attributes)


@pytest.mark.parametrize("from_folder", [False, True], ids=["in_memory", "from_folder"])
def test_other_peft_methods_are_refused(from_folder, tiny_model, tmp_path):
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = get_peft_model(tiny_model(), config, adapter_name="E")
    base, attributes = model, None
    if from_folder:
        model.save_pretrained(tmp_path)
        base, attributes = tiny_model(), {"E": tmp_path / "E"}
    with pytest.raises(ValueError, match=r"E'\]: expected a LoRA adapter, got .*IA3|base: .*got .*peft.tuners.ia3"):
        load(base, attributes)


def test_a_merged_adapter_is_refused(peft_model):
    model = peft_model()
    model.merge_adapter(["plain"])
    with pytest.raises(ValueError, match=r"base: expected .*, got \['plain'\] merged into the weights"):
        load(model)


def test_a_folder_without_weights_is_refused(lora_folder, tiny_model):
    folder = lora_folder("E")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"attributes\['E'\]: expected adapter_model.safetensors in .*, got none"):
        load(tiny_model(), {"E": folder})


def test_a_folder_without_configuration_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"attributes\['E'\]: expected .*config.json.*got none of it in"):
        load(tiny_model(), {"E": tmp_path})


def test_a_module_that_the_base_lacks_is_named(lora_folder, tiny_model):
    folder = lora_folder("E", "gpt2", target_modules=["c_attn"])
    with pytest.raises(ValueError, match=r"an adapter of LlamaFor.*, got an adapter of transformer.h.0.attn.c_attn"):
        load(tiny_model(), {"E": folder})


def test_a_shape_that_does_not_fit_is_named_with_both_shapes(lora_folder, tiny_model):
    folder = lora_folder("E", base=tiny_model(intermediate_size=40), target_modules=["up_proj"])
    with pytest.raises(ValueError, match=r"\(in, out\) = \(32, 48\) for module .*layers.0.mlp.up_proj, got \(32, 40\)"):
        load(tiny_model(), {"E": folder})


def test_an_adapter_that_adapts_nothing_is_refused(lora_folder, tiny_model):
    folder = lora_folder("E", target_modules=["q_proj"])
    save_file({}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"attributes\['E'\]: expected LoRA weights in .*, got none"):
        load(tiny_model(), {"E": folder})


def test_half_an_adapter_is_refused(lora_folder, tiny_model):
    folder = lora_folder("E", target_modules=["q_proj"])
    weights = load_file(folder / WEIGHTS)
    del weights["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(
        ValueError, match=r"lora_B \(out, r\) of module model.layers.1.self_attn.q_proj, got lora_A \(4, 32\)$"
    ):
        load(tiny_model(), {"E": folder})


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 4}, "r": 16}])
def test_weights_of_another_rank_than_the_configuration_are_refused(settings, lora_folder, tiny_model):
    folder = lora_folder("E", target_modules=["q_proj", "v_proj"], **settings)
    weights = load_file(folder / WEIGHTS)
    module = "model.layers.1.self_attn.q_proj"
    for side in ("A", "B"):
        key = f"base_model.model.{module}.lora_{side}.weight"
        weights[key] = (weights[key][:3] if side == "A" else weights[key][:, :3]).contiguous()
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ValueError, match=rf"'E'\]: expected rank 4 at module {module}, as its .* says, got 3$"):
        load(tiny_model(), {"E": folder})


@pytest.mark.parametrize(
    ("targets", "settings"),
    [
        (["v_proj"], {}),
        (["q_proj", "v_proj"], {"layers_to_transform": [0]}),
        (["q_proj", "v_proj"], {"exclude_modules": ["q_proj"]}),
        (r".*\.0\..*\.(q|v)_proj", {}),
    ],
)
def test_weights_that_the_configuration_does_not_target_are_refused(targets, settings, lora_folder, tiny_model):
    folder = lora_folder("E", target_modules=["q_proj", "v_proj"])
    change_config(folder, target_modules=targets, **settings)
    message = r"'E'\]: expected modules that its configuration targets \(.*\), got weights of .*(q|v)_proj"
    with pytest.raises(ValueError, match=message):
        load(tiny_model(), {"E": folder})


@pytest.mark.parametrize(
    ("targets", "missing"),
    [(["q_proj", "o_proj"], "o_proj and 1 more"), ("all-linear", "k_proj and 11 more"), (None, "v_proj and 1 more")],
)
def test_layers_that_are_targeted_and_not_in_the_file_warn_and_stay_the_bases(
    targets, missing, tiny_model, full_logits, tmp_path
):
    """PEFT warns too; its own adapter then holds an update of zero there."""
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base, settings).save_pretrained(tmp_path / "E")
    change_config(tmp_path / "E", target_modules=targets, init_lora_weights=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    with pytest.warns(UserWarning, match=rf"'E'\]: its .* targets model.layers.0.self_attn.{missing}, for which"):
        ensemble = load(base, {"E": tmp_path / "E"})
    tokens = [3, 4, 5]
    with pytest.warns(UserWarning, match="missing adapter keys"):
        expected = PeftModel.from_pretrained(base, tmp_path / "E", adapter_name="E").eval()
    logits = ensemble.open([[3]], ["E"], 8).forward(
        ["E"], torch.tensor([tokens]), torch.zeros(1, dtype=int), kv_length=8
    )
    torch.testing.assert_close(logits[0, 0], full_logits(expected, tokens, "E"), atol=1e-4, rtol=1e-5)


def test_keys_that_name_the_adapter_are_read(lora_folder, tiny_model):
    """As a state_dict() has them, where save_pretrained() takes the name out."""
    base = tiny_model()
    folder = lora_folder("E", base=copy.deepcopy(base), target_modules="all-linear")
    factors = read_adapter("E", folder, base).factors
    weights = load_file(folder / WEIGHTS)
    save_file({key.replace(".weight", ".default.weight"): w for key, w in weights.items()}, folder / WEIGHTS)
    renamed = read_adapter("E", folder, base).factors
    assert renamed.keys() == factors.keys()
    assert all(torch.equal(*pair) for module in factors for pair in zip(factors[module], renamed[module], strict=True))

    both = {key.replace(".weight", f".{name}.weight"): w for key, w in weights.items() for name in ("a", "b")}
    save_file({key: weight.clone() for key, weight in both.items()}, folder / WEIGHTS)
    with pytest.raises(
        ValueError, match=r"'E'\]: expected the weights of one adapter in .*, got those of \['a', 'b'\]"
    ):
        load(base, {"E": folder})


def test_an_adapter_with_a_head_of_its_own_is_refused(lora_folder, tiny_model):
    base = tiny_model()
    folder = lora_folder("E", base=base, target_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"\['E'\]: expected the model's weights for lm_head.weight, got some of"):
        load(tiny_model(), {"E": folder})  # other random weights


def test_unknown_settings_of_newer_versions_are_ignored(lora_folder, tiny_model):
    folder = lora_folder("E", target_modules=["q_proj"])
    change_config(folder, from_the_future=None)
    assert load(tiny_model(), {"E": folder}).describe()["E"]["adapter_rank"] == 4


def test_an_adapted_head_may_share_its_weights_with_the_embedding(tiny_model, full_logits, tmp_path):
    """The update is the head's alone, as in PEFT."""
    base = tiny_model(tie_word_embeddings=True)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name="E").eval()
    model.save_pretrained(tmp_path)
    tokens, start = torch.tensor([[3, 4, 5]]), torch.zeros(1, dtype=torch.int64)
    for ensemble in (load(model), load(share("base", model), {"E": tmp_path / "E"})):
        logits = ensemble.open([[3]], ["base", "E"], 8).forward(["base", "E"], tokens, start, kv_length=8)
        for adapter, of_role in zip((None, "E"), logits, strict=True):
            torch.testing.assert_close(of_role[0], full_logits(model, [3, 4, 5], adapter), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("from_folder", [False, True], ids=["in_memory", "from_folder"])
def test_an_adapter_of_head_and_embedding_together_is_refused(from_folder, tiny_model, tmp_path):
    settings = dict(task_type="CAUSAL_LM", target_modules=["lm_head"], ensure_weight_tying=True)
    model = get_peft_model(tiny_model(tie_word_embeddings=True), LoraConfig(**settings), adapter_name="E")
    model.save_pretrained(tmp_path)
    sources = (tiny_model(tie_word_embeddings=True), {"E": tmp_path / "E"}) if from_folder else (model, None)
    with pytest.raises(ValueError, match=r"LoRA on linear layers alone, got .*embed_tokens|ensure_weight_tying"):
        load(*sources)


def test_a_head_saved_in_another_precision_is_the_models_own(lora_folder, tiny_model):
    base = tiny_model()
    folder = lora_folder("E", base=copy.deepcopy(base).bfloat16(), target_modules=["lm_head"])
    assert load(base, {"E": folder}).describe()["E"]["adapter_rank"] == 4


def test_adapters_of_single_experts_are_refused(lora_folder, tiny_model):
    """Those of transformers 4, where every expert was a layer of its own; newer ones are target_parameters, above."""
    folder = lora_folder("E", "mixtral", target_modules=["q_proj"])
    weights = load_file(folder / WEIGHTS)
    name = "base_model.model.model.layers.0.block_sparse_moe.experts.1.w1"
    weights |= {f"{name}.lora_A.weight": torch.zeros(4, 32), f"{name}.lora_B.weight": torch.zeros(48, 4)}
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(
        ValueError, match=r"E'\]: expected an adapter of Mixtral.*, got an adapter of .*experts.1.w1, which"
    ):
        load(tiny_model("mixtral"), {"E": folder})


def test_a_bitsandbytes_base_takes_adapters_and_is_not_converted(tmp_path, tiny_model, lora_folder):
    """Where bitsandbytes is installed. PEFT is no measure on CPU: its base pass there is not the model's own."""
    pytest.importorskip("bitsandbytes")
    base = tiny_model(hidden_size=64, intermediate_size=128, num_key_value_heads=4, head_dim=16)
    base.save_pretrained(tmp_path)
    folder = lora_folder("E", base=base, target_modules=["q_proj", "down_proj"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    settings = dict(quantization_config=config, dtype=torch.float32, device_map={"": device})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **settings)
    tokens, start = torch.tensor([[3, 4, 5]], device=device), torch.zeros(1, dtype=torch.int64, device=device)
    roles = ["base", "E"]
    logits = load(model, {"E": folder}).open([[3]], roles, 8).forward(roles, tokens, start, kv_length=8)
    message = r"base: expected a quantised model of torch.bfloat16 on .*, got torch.float32"
    with pytest.raises(ValueError, match=message):
        load(model, {"E": folder}, dtype="bfloat16")

    with torch.no_grad():
        expected = [model(tokens).logits[0]]
        for name, (down, up) in read_adapter("E", folder, base).factors.items():
            down, up = down.to(device), up.to(device)
            model.get_submodule(name).register_forward_hook(
                lambda layer, args, out, down=down, up=up: out + args[0] @ down @ up
            )
        expected.append(model(tokens).logits[0])
    torch.testing.assert_close(logits[:, 0], torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 0.1


def test_bitsandbytes_weights_without_bitsandbytes_are_refused(tiny_model, tmp_path, monkeypatch):
    base = tiny_model()
    base.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(mpg.models.sources, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"base: expected the package bitsandbytes, whose weights .* holds, got none"):
        load(tmp_path, {"E": base})
