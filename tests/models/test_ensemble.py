"""Which model stands behind a role, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

import ensembles
import mpg.models.sources
import mpg_ext
from longer import thinned
from mpg.model import Model

load = partial(ensembles.load, device="cpu")  # where the tensors of these tests are

PROMPTS = [[3, 4, 5, 6], [7, 8]]


@pytest.fixture
def set_folder(tmp_path, tiny_model, lora_folder):
    """A base folder with adapters/T and adapters/E inside it."""
    base = tiny_model()
    base.save_pretrained(tmp_path / "set")
    for name in ("T", "E"):
        lora_folder(f"set/adapters/{name}", base=base, target_modules=["q_proj"])
    return tmp_path / "set"


def _tokenizer(*words: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary)), eos_token=words[-1])


def _logits(ensemble, roles):
    tokens, start = torch.tensor([[6, 9], [8, 10]]), torch.tensor([3, 1])
    return ensemble.open(PROMPTS, roles, 16).forward(roles, tokens, start, kv_length=16)


def test_a_folder_takes_the_adapters_inside_it_by_name(set_folder):
    assert load(set_folder).attribute_names == ("E", "T")
    assert load(str(set_folder), {"T": set_folder / "adapters/T"}).attribute_names == ("T",)


def test_a_peft_model_takes_named_adapters_in_the_order_given(set_folder):
    base = AutoModelForCausalLM.from_pretrained(set_folder)
    model = PeftModel.from_pretrained(base, set_folder / "adapters/T", "one")
    model.load_adapter(set_folder / "adapters/E", "two")
    assert load(model).attribute_names == ("one", "two")
    ensemble = load(model, {"E": "two", "T": "one"})
    assert ensemble.attribute_names == ("E", "T")
    torch.testing.assert_close(_logits(ensemble, ["E", "T"]), _logits(load(set_folder), ["E", "T"]))


def test_a_peft_model_as_attribute_or_draft_is_its_active_adapter(set_folder):
    base = AutoModelForCausalLM.from_pretrained(set_folder)
    model = PeftModel.from_pretrained(base, set_folder / "adapters/T", "one")
    model.load_adapter(set_folder / "adapters/E", "two")
    expected = _logits(load(set_folder), ["base", "T", "E"])
    model.set_adapter("two")
    for given in (base, model):  # PEFT has put its layers into `base` itself
        ensemble = load(given, {"T": "one", "E": model}, draft=model)
        torch.testing.assert_close(_logits(ensemble, ["base", "T", "E"]), expected)
        assert ensemble.is_same("draft", "E")
        assert ensemble.is_same("anchor", "base")


def test_two_peft_models_around_one_base_are_two_attributes(set_folder):
    base = AutoModelForCausalLM.from_pretrained(set_folder)
    models = {name: PeftModel.from_pretrained(base, set_folder / "adapters" / name, name) for name in ("T", "E")}
    roles = ["base", "T", "E"]
    torch.testing.assert_close(_logits(load(base, models), roles), _logits(load(set_folder), roles))


def test_a_merged_model_as_attribute_equals_its_adapter(set_folder):
    base = AutoModelForCausalLM.from_pretrained(set_folder)
    merged = PeftModel.from_pretrained(base, set_folder / "adapters/E").merge_and_unload()
    ensemble = load(set_folder, {"E": set_folder / "adapters/E", "full": merged})
    logits = _logits(ensemble, ["E", "full", "base"])
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)
    assert (logits[1] - logits[2]).abs().max() > 0.1
    assert not ensemble.is_same("E", "full")


def test_roles_default_to_the_base_and_share_its_slot(set_folder):
    ensemble = load(set_folder)
    assert ensemble.is_same("base", "anchor")
    assert ensemble.is_same("base", "draft")
    assert not ensemble.is_same("base", "E")
    assert not ensemble.is_same("E", "T")


@pytest.mark.parametrize("role", ["anchor", "draft"])
def test_a_role_can_be_an_attribute_an_adapter_or_a_model(role, set_folder, tiny_model, full_logits):
    assert load(set_folder, **{role: "E"}).is_same(role, "E")
    assert load(set_folder, **{role: set_folder / "adapters/E"}).is_same(role, "E")
    assert load(set_folder, **{role: set_folder}).is_same(role, "base")

    model = tiny_model()
    attributes = {"E": model}  # nothing attaches to the host, so that only the role counts
    ensemble = load(set_folder, attributes, **{role: model})
    assert ensemble.is_same(role, "E")
    assert not ensemble.is_same(role, "base")
    expected = full_logits(model, [3, 4, 5, 6, 9])[3:]
    torch.testing.assert_close(_logits(ensemble, [role])[0, 0], expected, atol=1e-5, rtol=1e-5)


def test_adapters_attach_to_an_anchor_model(set_folder, tiny_model):
    original, specialised = AutoModelForCausalLM.from_pretrained(set_folder), tiny_model()
    adapters = {name: set_folder / "adapters" / name for name in ("E", "T")}
    ensemble = load(specialised, adapters, anchor=original)
    expected = load(original, adapters)
    torch.testing.assert_close(_logits(ensemble, ["anchor", "E", "T"]), _logits(expected, ["base", "E", "T"]))
    torch.testing.assert_close(_logits(ensemble, ["base"]), _logits(load(specialised, {"x": original}), ["base"]))
    assert ensemble.is_same("draft", "base")
    assert load(specialised, anchor=set_folder).attribute_names == ("E", "T")


@pytest.mark.parametrize("target", ["geometric", "arithmetic"])
@pytest.mark.parametrize("is_folder", [True, False])
def test_text_over_an_anchor_that_hosts_the_adapters_is_of_the_base_times_their_ratios(
    target, is_folder, set_folder, tiny_model, full_logits
):
    adapters = {name: set_folder / "adapters" / name for name in ("E", "T")}
    specialised = tiny_model()
    anchor = set_folder if is_folder else AutoModelForCausalLM.from_pretrained(set_folder)
    model = Model(load(specialised, None if is_folder else adapters, anchor=anchor))
    original = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(set_folder), adapters["E"], "E")
    original.load_adapter(adapters["T"], "T")
    weights, tokens = {"E": 1.5, "T": 0.5}, [3, 4, 5]
    for _ in range(6):
        of_anchor, *of_attributes = (
            full_logits(original, tokens, name)[-1].log_softmax(-1) for name in (None, *weights)
        )
        ratios = zip(weights.values(), (logprobs - of_anchor for logprobs in of_attributes), strict=True)
        if target == "geometric":
            score = sum(alpha * ratio for alpha, ratio in ratios)
        else:
            score = sum(alpha * ratio.exp() for alpha, ratio in ratios).log()
        tokens.append(int((full_logits(specialised, tokens)[-1].log_softmax(-1) + score).argmax()))
    alone = model.generate([3, 4, 5], target="base", temperature=0, max_new_tokens=6)
    assert list(alone.tokens) != tokens[3:]
    for how in ({"sampler": "direct"}, {"draft": "reference"}, {"draft": "merged"}):
        text = model.generate([3, 4, 5], weights=weights, target=target, temperature=0, max_new_tokens=6, **how)
        assert list(text.tokens) == tokens[3:]


def test_describe_says_what_stands_behind_each_role(set_folder):
    described = load(set_folder).describe()
    assert list(described) == ["base", "E", "T", "anchor", "draft"]
    assert described["base"] == described["draft"]
    assert described["E"] == {
        "source": str(set_folder),
        "model_type": "llama",
        "parameters": AutoModelForCausalLM.from_pretrained(set_folder).num_parameters(),
        "device": "cpu",
        "adapter": str(set_folder / "adapters/E"),
        "adapter_rank": 4,
    }


def test_eos_ids_come_from_generation_config_then_config_then_tokenizer(tiny_model):
    base = tiny_model()
    base.generation_config.eos_token_id = [5, 6]
    assert load(base, {"E": base}).eos_token_ids == (5, 6)
    base.generation_config.eos_token_id = None
    assert load(base, {"E": base}).eos_token_ids == (2,)
    base.config.eos_token_id = None
    assert load(base, {"E": base}).eos_token_ids == ()
    assert load(base, {"E": base}, tokenizer=_tokenizer("a", "b", "c", "d")).eos_token_ids == (3,)


def test_limits_are_the_smallest_of_all_models(tiny_model):
    assert load(tiny_model(), {"E": tiny_model(max_position_embeddings=48)}).max_positions == 48


def test_a_folder_is_read_in_float32_on_cpu_unless_asked_otherwise(set_folder):
    assert load(set_folder, device="cpu").dtype == torch.float32
    ensemble = load(set_folder, device="cpu", dtype="bfloat16")
    assert ensemble.dtype == torch.bfloat16
    assert _logits(ensemble, ["base", "E"]).dtype == torch.bfloat16


def test_the_tokenizer_comes_from_the_base_folder(set_folder):
    assert load(set_folder).tokenizer is None
    _tokenizer("a", "b").save_pretrained(set_folder)
    assert load(set_folder).tokenizer.get_vocab() == {"a": 0, "b": 1}


def test_each_tokenizer_is_read_once_however_many_folders_hold_a_copy(set_folder, tiny_model, tmp_path, monkeypatch):
    read, from_pretrained = [], mpg.models.sources.AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        mpg.models.sources.AutoTokenizer,
        "from_pretrained",
        lambda *args, **how: read.append(str(args[0])) or from_pretrained(*args, **how),
    )
    load(set_folder)
    assert read == []
    tokenizer = _tokenizer("a", "b", "c")
    tokenizer.save_pretrained(set_folder)
    load(set_folder)
    assert read == [str(set_folder)]
    read.clear()
    draft = _folder(tmp_path / "draft", tiny_model(), tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    for name in ("E", "T"):
        tokenizer.save_pretrained(set_folder / "adapters" / name)
    ensemble = load(set_folder, draft=draft, tokenizer=set_folder)
    assert read == [str(set_folder), str(set_folder / "adapters/E")]
    assert ensemble.tokenizer.get_vocab() == {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize(("named", "model_type"), [(None, "gpt2"), ("PreTrainedTokenizerFast", "qwen2")])
def test_a_draft_whose_tokenizer_is_of_another_class_by_its_config_is_refused(named, model_type, tiny_model, tmp_path):
    ids = {token: index for index, token in enumerate(("a", "b", "ab", "</s>"))}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(ids, [("a", "b")])), eos_token="</s>")
    folders = [_folder(tmp_path / kind, tiny_model(kind), tokenizer) for kind in ("llama", model_type)]
    for folder in folders:
        file = folder / "tokenizer_config.json"
        config = {**json.loads(file.read_text()), "tokenizer_class": named}
        file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    base, draft = folders
    assert (base / "tokenizer.json").read_bytes() == (draft / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match=r"draft: expected token '<\|endoftext\|>' to have the base's id None, got 4"):
        load(base, {"E": base}, draft=draft)


@pytest.mark.parametrize("name", ["config.json", "tekken.json", "emoji.json", "additional_chat_templates/rag.jinja"])
def test_tokenizers_of_which_one_file_differs_are_read_apart(name, tmp_path):
    tokenizers = mpg.models.sources.Tokenizers()
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    for folder in (one, same, other):
        _tokenizer("a", "b").save_pretrained(folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (other / name).write_text("{ }")
    read = [tokenizers.read("base", folder) for folder in (one, same, other)]
    assert read[0] is read[1] is not read[2]


def test_logits_carry_no_gradient(set_folder):
    base = AutoModelForCausalLM.from_pretrained(set_folder)
    ensemble = load(base, {"E": set_folder / "adapters/E"})
    assert not _logits(ensemble, ["E", "base"]).requires_grad


# What is refused.


def test_encoder_decoders_are_refused(tmp_path):
    config = AutoConfig.for_model("t5", vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(ValueError, match=r"base: .*decoder-only"):
        load(model, {"E": model})
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"base: .*decoder-only"):
        load(tmp_path, {"E": tmp_path})


def test_a_model_without_a_head_is_refused(tiny_model):
    model = tiny_model().model
    with pytest.raises(ValueError, match=r"base: .*causal language model"):
        load(model, {"E": model})


def test_different_vocabulary_sizes_are_refused(tiny_model):
    message = r"attributes\['E'\]: expected the base's vocabulary of 61 tokens, got 64, without the tokenizers of both"
    with pytest.raises(ValueError, match=message):
        load(tiny_model(), {"E": tiny_model(vocab_size=64)})


def _warnings(*arguments, **settings) -> list[str]:
    """What a load warns of."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        load(*arguments, **settings)
    return [str(warning.message) for warning in warned if warning.category is UserWarning]


def _folder(path: Path, model, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_other_architectures_with_padded_vocabularies_are_cut_to_the_smallest(tiny_model, full_logits, tmp_path):
    models = {"base": tiny_model(vocab_size=64), "E": tiny_model("qwen3", vocab_size=72), "draft": tiny_model("gpt2")}
    folders = {role: _folder(tmp_path / role, model, _tokenizer(*"abcd")) for role, model in models.items()}
    ensemble = load(folders["base"], {"E": folders["E"]}, draft=folders["draft"])
    assert ensemble.vocab_size == 61
    for role, of_role in zip(models, _logits(ensemble, list(models)), strict=True):
        expected = full_logits(models[role], [3, 4, 5, 6, 9])[3:, :61]
        torch.testing.assert_close(of_role[0], expected, atol=2e-5, rtol=2e-5)

    model, options = Model(ensemble), dict(weights={"E": 0.5}, max_new_tokens=20, seed=0)
    greedy = [model.generate([3, 4, 5], temperature=0, draft=draft, **options) for draft in ("model", "reference")]
    assert greedy[0].tokens == greedy[1].tokens
    assert max(model.generate([3, 4, 5], temperature=5.0, **options).tokens) < 61


def test_a_token_in_what_would_be_cut_is_refused(tiny_model, tmp_path):
    words = [f"t{index}" for index in range(64)]
    base = _folder(tmp_path / "base", tiny_model(vocab_size=64), _tokenizer(*words))
    other = _folder(tmp_path / "other", tiny_model(), _tokenizer(*words))
    with pytest.raises(
        ValueError, match=r"draft: expected models of 64 and 61 tokens .*, got the token 't63' of id 63"
    ):
        load(base, {"E": base}, draft=other)


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_tokenizers_that_map_a_token_elsewhere_are_refused(kind, set_folder, tiny_model, tmp_path):
    _tokenizer("a", "b", "c").save_pretrained(set_folder)
    other = _folder(tmp_path / "other", tiny_model(), _tokenizer("a", "c", "b"))
    if kind == "adapter":
        other = set_folder / "adapters/E"
        _tokenizer("a", "c", "b").save_pretrained(other)
    with pytest.raises(ValueError, match=r": expected token '[bc]' to have the base's id [12], got [12]"):
        load(set_folder, draft=other)


def test_a_padding_token_of_its_own_makes_no_other_vocabulary(set_folder):
    _tokenizer("a", "b", "c").save_pretrained(set_folder)
    tokenizer = _tokenizer("a", "b", "c")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(set_folder / "adapters/E")
    assert load(set_folder).attribute_names == ("E", "T")


def test_another_chat_template_or_end_of_text_warns(set_folder, tiny_model, tmp_path):
    tokenizer = _tokenizer("a", "b", "c")
    tokenizer.chat_template = "one"
    tokenizer.save_pretrained(set_folder)
    tokenizer.chat_template = "two"
    other = _folder(tmp_path / "other", tiny_model(eos_token_id=1), tokenizer)
    assert _warnings(set_folder, {"F": other}) == [
        "attributes['F']: its texts end with [1], those of the base with [2], which will be looked for",
        "attributes['F']: its chat template is not the base's, which writes every conversation",
    ]
    tokenizer.save_pretrained(set_folder / "adapters/E")
    assert _warnings(set_folder) == [
        "attributes['E']: its chat template is not the base's, which writes every conversation"
    ]
    assert not _warnings(set_folder, {"T": set_folder / "adapters/T"}, draft=other)  # changes the speed alone


TRAINED_ON = [  # what it names, what it gets; `kept` are repositories in the hub's cache, others are not here
    ("../..", "set", "fine"),
    ("../..", "link", "fine"),
    ("{here}/set", "link", "fine"),
    (None, "set", "fine"),
    ("{here}/copy", "set", "fine"),
    ("../../../copy", "set", "fine"),
    ("kept/set", "set", "fine"),
    ("{here}/copy", "kept/set", "fine"),
    ("kept/mirror", "kept/set", "fine"),
    ("{here}/hub/models--kept--mirror/snapshots/0123", "kept/set", "fine"),
    ("somebody/Set", "somebody/set", "fine"),
    ("/cache/models--somebody--set/snapshots/0123", "somebody/set", "fine"),
    ("somebody/Set", "set", "warned"),
    ("mirror/Set", "somebody/set", "warned"),
    ("/elsewhere/set/", "set", "warned"),
    ("/cache/models--somebody--set/snapshots/0123", "set", "warned"),
    ("somebody/other", "set", "warned"),
    ("other", "set", "warned"),
    ("/elsewhere/other", "set", "warned"),
    ("/elsewhere/other", "somebody/set", "warned"),
    ("{here}/other", "somebody/set", "warned"),
    ("{here}/set", "somebody/set", "warned"),
    ("somebody/other", "somebody/set", "warned"),
    ("somebody/other", "kept/set", "warned"),
    ("somebody/set", "/cache/models--somebody--set-instruct/snapshots/0123", "warned"),
    ("/cache/models--somebody--other/snapshots/0123", "somebody/set", "warned"),
    ("kept/bare", "set", "warned"),
    ("{here}/empty", "set", "warned"),
    ("{here}/damaged", "set", "warned"),
    ("{here}/converted", "set", "warned"),
    ("{here}/other", "set", "refused"),
    ("{here}/other/set", "set", "refused"),
    ("../../../other", "set", "refused"),
    ("kept/other", "set", "refused"),
    ("kept/other", "kept/set", "refused"),
    ("{here}/other", "kept/set", "refused"),
    ("kept/other", "{here}/hub/models--kept--set/snapshots/0123", "refused"),
]


def _keep(hub: Path, name: str, folder: Path) -> Path:
    """A repository in the hub's cache, with the files of a folder."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0123")
    shutil.copytree(folder, repository / "snapshots/0123")
    return repository / "snapshots/0123"


@pytest.mark.parametrize(("trained_on", "base", "verdict"), thinned(TRAINED_ON))
def test_an_adapter_of_another_base_is_refused_where_that_is_certain_and_warned_of_where_it_is_not(
    trained_on, base, verdict, set_folder, tiny_model, monkeypatch
):
    here = set_folder.parent
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(here / "hub"))
    shutil.copytree(set_folder, here / "copy")
    for other in ("other", "other/set"):
        tiny_model().save_pretrained(here / other)
    shutil.copytree(set_folder, here / "damaged")
    (here / "damaged/model.safetensors").write_bytes(b"no weights")
    (here / "empty").mkdir()
    shutil.copytree(here / "other", here / "converted")  # whose weights may have been rounded to four bits before
    (here / "converted/converted.json").write_text(json.dumps({"source": "other.gguf"}))
    for name, folder in {"set": "set", "mirror": "copy", "other": "other", "bare": "set"}.items():
        kept = _keep(here / "hub", f"kept/{name}", here / folder)
        if name == "bare":
            (kept / "model.safetensors").unlink()
    (here / "link").symlink_to(set_folder)
    trained_on = trained_on and trained_on.format(here=here)
    file = set_folder / "adapters/E/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": trained_on}))
    model = AutoModelForCausalLM.from_pretrained(set_folder)
    model.name_or_path = source = str(here / base) if base in ("set", "link") else base.format(here=here)
    if trained_on and trained_on.startswith("."):
        trained_on = (file.parent / trained_on).resolve()
    arguments = model, {"E": set_folder / "adapters/E"}
    if verdict == "refused":
        got = f"got one that was trained on {trained_on}, which is another model; allow_other_base=True takes it"
        message = f"attributes['E']: expected an adapter of {source}, {got}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            load(*arguments)
    else:
        texts = [f"attributes['E']: it was trained on {trained_on}, and attaches to {source}; "] * (verdict == "warned")
        assert [message.split("if that")[0] for message in _warnings(*arguments)] == texts
    assert not _warnings(*arguments, allow_other_base=True)
    with pytest.raises(ValueError, match="allow_other_base: expected True or False, got 'yes'"):
        load(*arguments, allow_other_base="yes")


def test_a_base_that_is_copied_or_moved_keeps_its_adapters(set_folder, tmp_path):
    file = set_folder / "adapters/E/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(set_folder)}))
    shutil.copytree(set_folder, tmp_path / "y")
    assert not _warnings(tmp_path / "y")
    shutil.rmtree(set_folder)
    assert _warnings(tmp_path / "y") == [
        f"attributes['E']: it was trained on {set_folder}, and attaches to {tmp_path / 'y'}; if that is the same model "
        f"under another name, load with allow_other_base=True, else its effect is undefined"
    ]


def _change(model: torch.nn.Module, name: str, row: int) -> None:
    model.get_parameter(name).data[row, 0] += 1


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda model: model, True),
        (lambda model: model.bfloat16(), True),
        (lambda model: _change(model, "model.layers.1.mlp.down_proj.weight", -1), False),
        (lambda model: _change(model.bfloat16(), "lm_head.weight", 0), False),
        (lambda model: model.resize_token_embeddings(7), False),
        (lambda model: model.set_submodule("model.layers.1", torch.nn.Identity()), None),  # other names
    ],
)
def test_bases_are_one_by_their_tensors_however_they_are_stored(change, same, tiny_model, tmp_path):
    whole, model = tmp_path / "x", tiny_model()
    model.save_pretrained(whole)
    change(model)
    model.save_pretrained(tmp_path / "y", max_shard_size="4KB")
    assert len(list((tmp_path / "y").glob("model-*.safetensors"))) > 1
    assert mpg.models.sources.is_same_model(str(whole), str(tmp_path / "y")) is same


def test_whether_two_roundings_are_of_one_model_is_not_told(tiny_model, tmp_path):
    tiny_model().half().save_pretrained(tmp_path / "x")
    tiny_model().bfloat16().save_pretrained(tmp_path / "y")
    assert mpg.models.sources.is_same_model(str(tmp_path / "x"), str(tmp_path / "y")) is None


@pytest.mark.parametrize("is_terminal", [False, True])
def test_bars_of_transformers_show_on_a_terminal_alone(is_terminal, set_folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    load(set_folder)
    assert ("Loading weights" in capsys.readouterr().err) is is_terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    AutoModelForCausalLM.from_pretrained(set_folder)  # by someone else, it is as before
    assert "Loading weights" in capsys.readouterr().err


def test_forwards_run_in_what_observes_them(set_folder):
    seen = []

    @contextmanager
    def observe(reads_prompts):
        seen.append(reads_prompts)
        yield

    ensemble = load(set_folder)
    ensemble.observer = observe
    _logits(ensemble.with_roles(base="E"), ["base", "T"])  # twins are observed as well
    assert seen == [True, False]


def test_a_warning_shows_the_line_that_loads(set_folder, tiny_model, tmp_path):
    tokenizer = _tokenizer("a", "b", "c")
    tokenizer.save_pretrained(set_folder)
    tokenizer.chat_template = "two"
    other = _folder(tmp_path / "other", tiny_model(eos_token_id=1), tokenizer)
    set_folder.rename(tmp_path / "renamed")
    folder = tmp_path / "renamed"
    file = folder / "adapters/E/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "somebody/set"}))
    with pytest.warns(UserWarning, match="it was trained on") as seen:
        mpg.load(folder, {"E": folder / "adapters/E", "F": other}, device="cpu")
    ours = [warning for warning in seen if str(warning.message).startswith("attributes[")]
    assert len(ours) == 3
    assert {warning.filename for warning in ours} == {__file__}


def test_no_attributes_at_all_is_refused(tiny_model):
    with pytest.raises(
        ValueError, match=r"attributes: expected at least one, or \{\} for contexts that calls bring, got none"
    ):
        load(tiny_model())


def test_a_folder_without_adapters_is_refused_with_what_was_looked_for(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    wanted = re.escape(str(tmp_path / "adapters/NAME/adapter_config.json"))
    with pytest.raises(ValueError, match=f"attributes: expected at least one, .*{wanted}, got none"):
        load(tmp_path)


def test_a_missing_folder_is_refused_by_argument_before_anything_is_loaded(set_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(mpg.models.sources, "read_model", None)
    missing = tmp_path / "missing"
    wanted = r"expected a model \(config.json\) or an adapter \(adapter_config.json\), got"
    for attributes in (None, {"E": set_folder / "adapters/E"}):
        with pytest.raises(
            ValueError, match=f"^base: expected a model .config.json., got {missing}, which is no folder$"
        ):
            load(missing, attributes)
        with pytest.raises(ValueError, match=f"^base: expected a model .config.json., got none of it in {tmp_path}$"):
            load(tmp_path, attributes)
        for role in ("anchor", "draft"):
            with pytest.raises(ValueError, match=f"^{role}: {wanted} {missing}, which is no folder$"):
                load(set_folder, attributes, **{role: missing})
    with pytest.raises(ValueError, match=rf"^attributes\['E'\]: {wanted} {missing}, which is no folder$"):
        load(set_folder, {"E": missing})
    with pytest.raises(ValueError, match=rf"^tokenizer: expected a tokenizer .*, got {missing}, which is no folder$"):
        load(set_folder, tokenizer=missing)
    with pytest.raises(ValueError, match=r"^tokenizer: expected a folder, a hub name or a loaded tokenizer, got int"):
        load(set_folder, tokenizer=3)


def _no_repository(repository, name):
    return False


def _no_network(repository, name):
    raise ConnectionError("no network\nmore of it")


@pytest.mark.parametrize(
    ("hub", "answer"),
    [
        (_no_repository, "and none of it in a repository of the hub by that name"),
        (_no_network, "and could not be looked for on the hub: ConnectionError: no network"),
    ],
)
def test_a_name_that_is_no_folder_is_asked_for_once_a_file_on_the_hub(hub, answer, tiny_model, monkeypatch):
    asked = []
    monkeypatch.setattr(mpg.models.sources, "file_exists", lambda *of: asked.append(of) or hub(*of))
    with pytest.raises(
        ValueError, match=rf"^attributes\['E'\]: expected .*, got me/mine, which is no folder, {answer}$"
    ):
        load(tiny_model(), {"E": "me/mine"})
    assert len(asked) == 3  # for an adapter, a model, and the reason


@pytest.mark.parametrize("name", ["./mine", "models/of/mine", "~/mine", "my model", "/models/mine"])
def test_a_name_that_is_no_repositorys_is_not_looked_for_on_the_hub(name, tiny_model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", None)
    with pytest.raises(ValueError, match=rf"^attributes\['E'\]: expected .*, got {name}, which is no folder$"):
        load(tiny_model(), {"E": name})


def test_an_unknown_adapter_name_is_refused_with_the_names_there_are(tiny_model):
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]), adapter_name="one")
    with pytest.raises(
        ValueError, match=r"attributes\['E'\]: expected .* or an adapter of \['one'\], got ./two, which is no folder"
    ):
        load(model, {"E": "./two"})


def test_an_adapter_as_base_is_refused(set_folder):
    for attributes in (None, {"E": set_folder / "adapters/E"}):
        with pytest.raises(ValueError, match="base: expected a model, got the adapter"):
            load(set_folder / "adapters/E", attributes)


def test_a_peft_model_around_another_model_is_refused(tiny_model):
    base, peft_model = tiny_model(), get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    for arguments in (dict(attributes={"E": peft_model}), dict(attributes={"E": base}, draft=peft_model)):
        with pytest.raises(ValueError, match=r"expected a PeftModel around the very model .*, got one around another"):
            load(base, **arguments)
    with pytest.raises(ValueError, match="base: expected a PeftModel only where adapters attach to it"):
        load(peft_model, {"E": base}, anchor=base)


def test_a_peft_model_with_two_active_adapters_is_refused_as_an_attribute(tiny_model):
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]), adapter_name="one")
    model.add_adapter("two", LoraConfig(target_modules=["q_proj"]))
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match=r"attributes\['E'\]: .*one active adapter, got \['one', 'two'\]"):
        load(model, {"E": model})


def test_adapters_injected_into_a_plain_model_are_refused(set_folder):
    model = AutoModelForCausalLM.from_pretrained(set_folder)
    model.load_adapter(str(set_folder / "adapters/E"))
    with pytest.raises(ValueError, match=r"base: .*PeftModel"):
        load(model, {"T": set_folder / "adapters/T"})


@pytest.mark.parametrize(
    ("with_cuda", "count", "device", "message"),
    [
        (False, 2, "cuda:1", "device: expected 'cpu', as mpg was built without CUDA, got 'cuda:1'"),
        (
            True,
            0,
            "cuda",
            "device: expected 'cpu', as (torch .* was built without CUDA|no CUDA .* visible), got 'cuda'",
        ),
        (True, 2, "cuda:2", "device: expected one of 2 CUDA devices, got 'cuda:2'"),
        (True, 2, "cuda:99", "device: expected one of 2 CUDA devices, got 'cuda:99'"),
    ],
)
def test_a_cuda_device_that_is_not_there_is_refused(with_cuda, count, device, message, set_folder, monkeypatch):
    monkeypatch.setattr(mpg_ext, "build_info", lambda: {"cuda": with_cuda})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ValueError, match=message):
        load(set_folder, device=device)


def test_a_build_without_cuda_runs_folders_on_cpu(set_folder, monkeypatch):
    monkeypatch.setattr(mpg_ext, "build_info", lambda: {"cuda": False})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ensembles.load(set_folder).device.type == "cpu"


def test_a_loaded_model_of_another_dtype_is_refused(tiny_model):
    base, attribute = tiny_model().bfloat16(), tiny_model()
    message = r"attributes\['E'\]: expected the base's dtype torch.bfloat16, got torch.float32; dtype="
    with pytest.raises(ValueError, match=message):
        load(base, {"E": attribute})
    assert _logits(load(base, {"E": attribute}, dtype="float32"), ["base", "E"]).dtype == torch.float32


def test_a_folder_takes_the_dtype_of_a_loaded_base(tiny_model, set_folder):
    logits = _logits(load(tiny_model().bfloat16(), {"E": set_folder}), ["base", "E"])
    assert logits.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float", "int64", "bf16", 16])
def test_a_dtype_that_is_none_is_refused(dtype, set_folder):
    if dtype == "float":  # torch's own alias of float32
        assert load(set_folder, dtype=dtype).dtype == torch.float32
    else:
        with pytest.raises(ValueError, match="dtype: expected a floating-point torch dtype"):
            load(set_folder, dtype=dtype)


@pytest.mark.parametrize(
    ("prompts", "roles", "capacity", "message"),
    [
        ([[]], ["base"], 8, r"prompts\[0\]: expected at least one token, got none"),
        ([[1], [2, 61]], ["base"], 8, r"prompts\[1\]: expected token ids below 61, got 61"),
        ([[-1]], ["base"], 8, r"prompts\[0\]: expected token ids below 61, got -1"),
        ([[1] * 9], ["base"], 8, "capacity: expected 9 .* to 64 positions, got 8"),
        ([[1]], ["base"], 65, "capacity: expected 1 .* to 64 positions, got 65"),
        ([[1]], ["F"], 8, r"roles: expected some of \['base', 'E', 'T', 'anchor', 'draft'\], got 'F'"),
        ([[1]], [], 8, "prompts, roles: expected at least one of each"),
        ([], ["base"], 8, "prompts, roles: expected at least one of each"),
    ],
)
def test_sessions_that_cannot_start_are_refused(prompts, roles, capacity, message, set_folder):
    with pytest.raises(ValueError, match=message):
        load(set_folder).open(prompts, roles, capacity)


@pytest.mark.skipif("MPG_MODELS" not in os.environ, reason="MPG_MODELS names no folder with trained model sets")
def test_the_trained_set_runs_as_peft_runs_it(full_logits):
    folder = Path(os.environ["MPG_MODELS"]) / "mbti-tiny"
    ensemble = load(folder)
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), folder / "adapters/E", "E")
    for name in ensemble.attribute_names[1:]:
        peft_model.load_adapter(folder / "adapters" / name, name)
    roles = ["base", *ensemble.attribute_names]
    logits = _logits(ensemble, roles)
    for role, of_role in zip(roles, logits, strict=True):
        expected = full_logits(peft_model, [3, 4, 5, 6, 9], None if role == "base" else role)[3:]
        torch.testing.assert_close(of_role[0], expected, atol=5e-5, rtol=1e-5)
