"""Where models are put, and that several of them work side by side on several devices, without having any.

"cpu:1" and "cpu:2" are different devices to a FakeTensor, which holds nothing and refuses to be mixed with another's.
The last test wants a GPU.
"""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM

import mpg.models.loading
import mpg_ext
from ensembles import load
from mpg.model import Model
from mpg.models.cache import NAMES
from mpg.models.lora import read_adapter

FIRST, SECOND = torch.device("cpu:1"), torch.device("cpu:2")
PROMPTS = [[3, 4, 5, 6], [7, 8]]
ADAPTED = {"E": ["q_proj", "down_proj", "lm_head"], "T": ["v_proj"]}


def _move(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """What accelerate's hooks do for a model that is split: bring a layer its input, but for the cache."""

    def move(values):
        return tree_map_only(Tensor, lambda value: value.to(SECOND), values)

    return move(args), {name: value if name in NAMES else move(value) for name, value in kwargs.items()}


@pytest.mark.parametrize("is_split", [False, True], ids=["whole", "split"])
def test_models_on_several_devices_answer_on_that_of_the_base(is_split, tiny_model, lora_folder, monkeypatch):
    whole = tiny_model()
    folders = {
        name: lora_folder(name, base=copy.deepcopy(whole), target_modules=targets) for name, targets in ADAPTED.items()
    }
    adapters = {folder: read_adapter(name, folder, whole) for name, folder in folders.items()}  # before values are gone
    monkeypatch.setattr(mpg.models.loading, "read_adapter", lambda name, folder, model, **_: adapters[folder])
    monkeypatch.setattr(mpg.models.loading, "Origin", lambda *given: None)  # nor any to change
    for check in ("verify_ragged_attention", "most_by_rows", "fuse_norms"):  # there are no values
        monkeypatch.setattr(mpg.models.loading, check, lambda *given: 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with FIRST:
            base = tiny_model()
        with SECOND:
            other = tiny_model()
        for module in (base.model.layers[1], base.model.norm, base.lm_head) if is_split else ():
            module.to(SECOND).register_forward_pre_hook(_move, with_kwargs=True)
        ensemble = load(base, {**folders, "F": other}, draft=other)
        ensemble = ensemble.merge(list(ADAPTED), torch.ones(2, 2, device=FIRST))
        roles = ["base", *ensemble.attribute_names, "draft", "merged"]
        session = ensemble.open(PROMPTS, roles, 16)
        tokens, start = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        logits = session.forward(roles, tokens.to(FIRST), start.to(FIRST), kv_length=8)
    assert ensemble.device == logits.device == FIRST
    assert logits.shape == (6, 2, 3, 61)
    first = "cpu:1, cpu:2" if is_split else "cpu:1"
    described = ensemble.describe()
    assert [described[role]["device"] for role in ("base", "E", "F", "draft")] == [first, first, "cpu:2", "cpu:2"]
    caches = [
        [layer.keys.device for layer in runner.cache.layers]
        for runner in (pool.runner for pool in session._pools.values())
    ]
    assert caches[:2] == [[FIRST, SECOND if is_split else FIRST], [SECOND, SECOND]]


def test_a_model_with_accelerates_hooks_runs_and_stays_as_it_was(tiny_model, full_logits):
    base = tiny_model()
    expected = full_logits(base, [3, 4, 5])
    names = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    hooked = dispatch_model(base, dict.fromkeys(names, "cpu"), force_hooks=True)
    layer = hooked.model.layers[0]
    hooks = [module._hf_hook for module in (hooked, layer)]
    session = load(hooked, {"F": tiny_model()}).open([[3]], ["base"], 8)
    logits = session.forward(["base"], torch.tensor([[3, 4, 5]]), torch.tensor([0]), kv_length=8)
    torch.testing.assert_close(logits[0, 0], expected, atol=2e-5, rtol=2e-5)
    assert [module._hf_hook for module in (hooked, layer)] == hooks
    assert layer.forward.args == (layer,)
    assert hooked.config._attn_implementation == "eager"


def test_loaded_models_stay_where_they_are_unless_a_device_is_named(tiny_model):
    base, other = tiny_model(), tiny_model().to("meta")
    assert load(base, {"E": other}).describe()["E"]["device"] == "meta"
    assert load(base, {"E": tiny_model()}, device_map={"E": "meta"}).describe()["E"]["device"] == "meta"
    for arguments in (dict(device="meta"), dict(device="meta", device_map={"E": "meta"})):
        described = load(tiny_model(), {"E": tiny_model()}, **arguments).describe()
        assert described["base"]["device"] == described["E"]["device"] == "meta"
    described = load(tiny_model(), {"E": tiny_model()}, device="meta", device_map={"E": "cpu"}).describe()
    assert (described["base"]["device"], described["E"]["device"]) == ("meta", "cpu")


def test_folders_go_where_the_device_map_says(tiny_model, tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    asked = []

    def from_pretrained(source, *, device_map, **settings):
        asked.append(device_map)
        raise RuntimeError("enough")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    split = {"model": "cpu", "lm_head": "cpu"}
    monkeypatch.setattr(mpg_ext, "build_info", lambda: {"cuda": True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for place in ("auto", split, "cuda:3"):
        with pytest.raises(ValueError, match="enough"):
            load(tiny_model(), {"E": tmp_path}, device_map={"E": place})
    assert asked == ["auto", split, {"": torch.device("cuda:3")}]


def test_a_model_that_does_not_fit_its_devices_is_refused(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    split = {"model": "cpu", "lm_head": "meta"}
    with pytest.raises(ValueError, match=r"attributes\['E'\]: expected devices that hold all of .*, got none for "):
        load(tiny_model(), {"E": tmp_path}, device_map={"E": split})


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("auto", r"device_map: expected a mapping from \['E', 'base', 'anchor', 'draft'\] to devices, got 'auto'"),
        ({"F": "cpu"}, r"device_map: expected some of \['E', 'base', 'anchor', 'draft'\], got 'F'"),
        ({"E": "gpu"}, r"device_map\['E'\]: expected 'cpu' or 'cuda\[:i\]', got 'gpu'"),
        ({"E": "cuda:0"}, r"device_map\['E'\]: expected 'cpu', as .*, got 'cuda:0'"),
        ({"E": "auto"}, r"attributes\['E'\]: expected one device in device_map for a loaded model, got 'auto'"),
        (
            {"draft": "cpu"},
            "device_map: expected names that bring a model of their own, got draft, an adapter or a model",
        ),
    ],
)
def test_a_device_map_that_says_nothing_is_refused(device_map, message, tiny_model, monkeypatch):
    monkeypatch.setattr(mpg_ext, "build_info", lambda: {"cuda": False})
    with pytest.raises(ValueError, match=message):
        load(tiny_model(), {"E": tiny_model()}, device_map=device_map)


def test_a_split_model_is_not_moved(tiny_model):
    model = tiny_model()
    model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(
        ValueError, match=r"base: expected a split model of torch.bfloat16 on cpu, .*, got torch.float32"
    ):
        load(model, {"E": tiny_model()}, dtype="bfloat16")


NO_GPU = not (torch.cuda.is_available() and mpg_ext.build_info()["cuda"])


@pytest.mark.skipif(NO_GPU, reason="needs a GPU, and mpg built for it")
def test_a_base_on_a_gpu_and_full_models_beside_it_answer_as_one_by_one(tiny_model, lora_folder, full_logits, tmp_path):
    models = {name: tiny_model() for name in ("base", "F")}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    adapter = lora_folder("E", base=tiny_model(), target_modules=["q_proj", "down_proj"])
    attributes = {"E": adapter, "F": tmp_path / "F"}
    apart = load(tmp_path / "base", attributes, draft="F", device="cuda", device_map={"F": "cpu"})
    assert [apart.describe()[role]["device"] for role in ("base", "E", "F", "draft")] == ["cuda:0"] * 2 + ["cpu"] * 2
    prompt, text = [3, 4, 5], [6, 7, 8]
    session = apart.open([prompt], ["base", "E", "F"], 16)
    tokens, start = torch.tensor([[prompt[-1], *text]]).cuda(), torch.tensor([len(prompt) - 1]).cuda()
    logits = session.forward(["base", "E", "F"], tokens, start, kv_length=8)
    assert logits.device == apart.device == torch.device("cuda:0")
    for role, of_role in (("base", logits[0, 0]), ("F", logits[2, 0])):
        expected = full_logits(models[role], prompt + text)[len(prompt) - 1 :]
        torch.testing.assert_close(of_role.cpu(), expected, atol=1e-3, rtol=1e-3)

    together = load(tmp_path / "base", attributes, draft="F", device="cpu")
    how = dict(weights={"E": 1.0, "F": 0.5}, max_new_tokens=24, temperature=0)
    greedy = [
        Model(m).generate(prompt, sampler=s, **how).tokens for m in (apart, together) for s in ("exact", "direct")
    ]
    assert greedy == greedy[:1] * 4
