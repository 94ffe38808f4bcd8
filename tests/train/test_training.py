"""Training on the shipped tiny model: the adapter that comes out, resuming, and what is refused by name."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mpg
from full_disk import small_files
from longer import long, thinned
from mpg.demo import MODELS
from mpg.demo.corpus import preference_pair
from mpg.train.pairs import read_pairs, split
from mpg.train.settings import Settings

pytest.importorskip("trl", reason="needs mpg[train]")
run = pytest.importorskip("mpg.train.run", reason="needs mpg[train]")

SETTINGS = Settings.of("small", dict(held_out=4, batch_size=4, checkpoint_steps=2, max_answer=24, learning_rate=1e-3))


@pytest.fixture
def file(tmp_path):
    """Twelve pairs to train on and four that are held out."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join((MODELS.parent / "traits" / "ei.jsonl").read_text().splitlines()[:16]))
    return file


@pytest.fixture
def train(file, tmp_path):
    def train(name="adapter", base=MODELS, pole="E", settings=SETTINGS, pairs=None, **how):
        pairs = read_pairs(file, pole) if pairs is None else pairs
        return run.train(base, pairs, tmp_path / name, settings, device="cpu", threads=1, **how)

    return train


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def changed(**changes):
    return Settings(**{**{name: getattr(SETTINGS, name) for name in Settings.__dataclass_fields__}, **changes})


def test_twelve_pairs_make_an_adapter_that_loads_and_says_what_it_is_made_of(train, tmp_path):
    steps, epochs = [], []
    card = train(on_step=lambda *step: steps.append(step), on_epoch=lambda *epoch: epochs.append(epoch))
    assert steps == [(step, 6) for step in range(1, 7)]
    assert [(epoch, scores) for epoch, scores in enumerate(card["epochs"], 1)] == epochs
    assert json.loads((tmp_path / "adapter" / "training.json").read_text()) == card
    assert (card["pairs"], card["held_out"], card["base"]) == (12, 4, str(MODELS))
    assert card["recipe"]["learning_rate"] == 1e-3 and card["data"]["sha256"] and card["versions"]["trl"]
    assert len(card["losses"]) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "pairs.jsonl"]
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }

    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(MODELS, dtype=torch.float32)
    prompt = torch.tensor([[1, 5, 9]])
    plain = base(prompt).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert not torch.equal(adapted(prompt).logits, plain)
    model = mpg.load(MODELS, {"E": tmp_path / "adapter"}, device="cpu")
    assert model.generate("Hello", weights={"E": 1}, max_new_tokens=3, seed=0).text


@long  # by a training of seconds
def test_the_attribute_is_learnt(train, tmp_path):
    rng = random.Random(0)
    rows = [dict(zip(("prompt", "chosen", "rejected"), preference_pair(rng, "E"), strict=True)) for _ in range(40)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = read_pairs(tmp_path / "corpus.jsonl", drop_identical=True)
    learnt = train(pairs=pairs, settings=changed(held_out=8, batch_size=8, learning_rate=1e-2, max_answer=None))
    assert learnt["scores"]["accuracy"] >= 0.9 and learnt["scores"]["margin"] > 0


def test_the_best_pass_is_kept(train):
    wild = train("wild", settings=changed(learning_rate=3e-4, max_answer=40, adapter_dtype="float32"))
    best = min(wild["epochs"], key=lambda scores: scores["loss"])
    assert best != wild["epochs"][-1]
    assert wild["scores"] == pytest.approx(best)


@pytest.mark.parametrize(
    ("settings", "when"),
    thinned(
        [
            ({"learning_rate": 1e30}, "at step 3 the loss is nan"),
            ({"beta": 1e38}, "at step 1 the grad_norm is nan"),
            ({"learning_rate": 1e30, "accumulation": 5, "warmup_steps": 0}, "at step 1 the eval_loss is nan"),
        ]
    ),
)
def test_a_training_that_diverges_is_refused_with_its_step_and_leaves_nothing(settings, when, train, tmp_path):
    with pytest.raises(ValueError, match=rf"^learning_rate: expected one that .*: {when}; a lower one helps"):
        train(settings=changed(epochs=1, **settings))
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_an_adapter_that_its_type_cannot_hold_is_refused(train, tmp_path, monkeypatch):
    def spoil(trainer, **of_an_epoch):
        scores = evaluate(trainer, **of_an_epoch)
        return scores if of_an_epoch else {**scores, "eval_rewards/margins": math.inf}

    evaluate = run._Trainer.evaluate
    monkeypatch.setattr(run._Trainer, "evaluate", spoil)
    with pytest.raises(
        ValueError, match=r"^learning_rate: .*: as bfloat16, which it is saved as \(adapter_dtype\), the"
    ):
        train(settings=changed(epochs=1))
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """What a training writes that nothing stopped: the folder and its card."""
    folder = tmp_path_factory.mktemp("whole")
    lines = (MODELS.parent / "traits" / "ei.jsonl").read_text().splitlines()[:16]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    card = run.train(
        MODELS, read_pairs(folder / "pairs.jsonl", "E"), folder / "adapter", SETTINGS, device="cpu", threads=1
    )
    return folder / "adapter", card


@long
def test_one_seed_gives_the_same_weights_and_another_others(train, whole, tmp_path):
    assert train()["losses"] == whole[1]["losses"]
    train("other", settings=changed(seed=1))
    assert weights(tmp_path / "adapter") == weights(whole[0]) != weights(tmp_path / "other")


@long  # peft's own; that the setting reaches it
def test_dropout_of_the_adapter_is_not_silenced(train, whole):
    assert train(settings=changed(dropout=0.0, epochs=1))["losses"] != whole[1]["losses"][:3]


@long  # a process of its own; the tests below end one in this process
def test_a_killed_training_goes_on_where_it_was_and_ends_as_if_nothing_had_been(train, whole, file, tmp_path):
    """Killed in a process of its own, right after a checkpoint and again with one half written."""
    settings = [f"--{name.replace('_', '-')}={getattr(SETTINGS, name)}" for name in ("held_out", "checkpoint_steps")]
    settings += ["--batch-size=4", "--max-answer=24", "--learning-rate=1e-3", "--preset=small"]
    command = [sys.executable, "-m", "mpg", "train", "--base=demo", f"--data={file}", "--pole=E", "--device=cpu"]
    command += [f"--out={tmp_path / 'killed'}", "--threads=1", *settings]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    work = tmp_path / "killed.partial"
    while process.poll() is None and not (work / "checkpoint-2" / "trainer_state.json").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    process.stderr.close()
    assert not (tmp_path / "killed").exists()
    done = max(int(folder.name.rpartition("-")[2]) for folder in work.glob("checkpoint-*"))
    half = shutil.copytree(work / f"checkpoint-{done}", work / "checkpoint-9")
    (half / "trainer_state.json").write_text('{"best')

    steps = []
    resumed = train("killed", on_step=lambda step, total: steps.append(step))
    assert steps[0] >= 3 and steps == list(range(steps[0], 7))
    assert resumed["losses"] == whole[1]["losses"] and len(resumed["losses"]) == 6
    assert resumed["epochs"] == whole[1]["epochs"]
    assert weights(tmp_path / "killed") == weights(whole[0])
    assert not work.exists()


@pytest.mark.parametrize(
    "num_bytes", thinned([pytest.param(300_000, id="optimiser"), pytest.param(100_000, id="weights")])
)
def test_a_full_disk_stops_a_training_that_goes_on_from_what_is_finished(num_bytes, train, tmp_path):
    with ExitStack() as stack:

        def fill(step, total):
            if step == 3:
                stack.enter_context(small_files(num_bytes))

        with pytest.raises(
            ValueError, match=r"^out: expected room to write in .*full.partial, got .*; the checkpoints there are whole"
        ):
            train("full", on_step=fill)
    assert (tmp_path / "full.partial" / "checkpoint-2" / "trainer_state.json").exists()
    steps = []
    train("full", on_step=lambda step, total: steps.append(step))
    assert steps == list(range(3, 7))


def test_a_finished_training_is_not_done_again(whole):
    folder, card = whole
    pairs, before = read_pairs(folder.parent / "pairs.jsonl", "E"), weights(folder)
    again = run.train(MODELS, pairs, folder, SETTINGS, device="cpu", threads=1, on_step=interrupt)
    assert again == card and weights(folder) == before


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", thinned(["before a pass is scored", "after the last"]))
def test_a_training_that_was_killed_at_the_end_of_a_pass_goes_on(where, train, whole, tmp_path, monkeypatch):
    is_last = where == "after the last"
    with monkeypatch.context() as patch:
        patch.setattr(run._Trainer, "_load_best_model" if is_last else "evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train()
    steps = []
    card = train(on_step=lambda step, total: steps.append(step))
    assert steps == ([] if is_last else [3, 4, 5, 6])
    assert (card["losses"], card["epochs"]) == (whole[1]["losses"], whole[1]["epochs"])
    assert weights(tmp_path / "adapter") == weights(whole[0])


def test_a_folder_that_holds_something_else_is_refused(train, tmp_path):
    (tmp_path / "adapter").mkdir()
    train(settings=changed(epochs=1))  # an empty folder is as good as none
    with pytest.raises(ValueError, match=r"^out: .*adapter holds another training: epochs is 1, asked is 2$"):
        train()
    with pytest.raises(ValueError, match=r"^out: .*adapter holds another training: data is '"):
        train(settings=changed(epochs=1), pole="I")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("Dear all")
    (tmp_path / "plain").write_text("a file")
    for name in ("mine", "plain"):
        with pytest.raises(ValueError, match=rf"^out: expected a folder that is not there yet, or empty, got .*{name}"):
            train(name)
    with pytest.raises(ValueError, match=r"^out: expected a folder that can be written, got .*plain/adapter.partial: "):
        train("plain/adapter")
    (tmp_path / "begun.partial" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "begun.partial" / "checkpoint-2" / "trainer_state.json").write_text("{}")
    shutil.copy(tmp_path / "adapter" / "training.json", tmp_path / "begun.partial" / "started.json")
    with pytest.raises(ValueError, match=r"^out: .*begun.partial holds another training, begun: epochs is 1, asked"):
        train("begun")


def test_another_base_of_the_same_name_is_refused_by_what_is_begun_and_what_is_finished(train, tmp_path):
    base = shutil.copytree(MODELS, tmp_path / "base", ignore=shutil.ignore_patterns("adapters"))
    weights, once = load_file(base / "model.safetensors"), changed(epochs=1)

    def stop(step, total):
        if step == 3:
            interrupt()

    with pytest.raises(KeyboardInterrupt):
        train(base=base, settings=once, on_step=stop)
    for other in (tmp_path / "adapter.partial", tmp_path / "adapter"):
        name = max(weights, key=lambda name: weights[name].dim())
        save_file({**weights, name: weights[name] * 1.5}, base / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=rf"^out: .*{other.name} holds another training.*: base_sha256 is "):
            train(base=base, settings=once)
        save_file(
            {name: weight.float() for name, weight in weights.items()}, base / "model.safetensors", {"format": "pt"}
        )
        card = train(base=base, settings=once)  # the same, written otherwise
    file = tmp_path / "adapter" / "training.json"
    file.write_text(json.dumps({name: value for name, value in card.items() if name != "base_sha256"}))
    assert train(base=base, settings=once) == json.loads(file.read_text())  # as cards were that did not say it


def test_a_folder_in_which_another_process_trains_is_refused_and_left_to_it(train):
    def again(step, total):
        if step == 1:
            with pytest.raises(ValueError, match=r"^out: .*adapter.partial is being trained in now$"):
                train()

    assert len(train(on_step=again, settings=SETTINGS)["losses"]) == 6


def test_pairs_longer_than_the_model_are_refused_and_so_are_answers_that_are_equal_where_they_are_cut(train, tmp_path):
    long = tmp_path / "long.jsonl"
    rows = [{"prompt": f"What {n}?", "chosen": f"yes yes yes {n}", "rejected": f"yes yes yes no {n}"} for n in range(9)]
    rows[3]["chosen"] = "yes " * 400
    long.write_text("\n".join(map(json.dumps, rows)))
    place = re.escape(f"{long}, line 4: ")
    with pytest.raises(ValueError, match=rf"^{place}expected at most the 256 tokens of the model's positions, got \d+"):
        train(pairs=read_pairs(long), settings=changed(max_answer=None))
    with pytest.raises(ValueError, match=r"long.jsonl, line \d: expected two different answers, got equal ones in"):
        train(pairs=read_pairs(long), settings=changed(max_answer=1))


def test_messages_are_read_as_generation_reads_them_and_others_are_refused(train, file, monkeypatch):
    def pairs(message):
        said = {"role": "user", "content": "Well?"}
        rows = [{"prompt": [message, said], "chosen": "yes", "rejected": "no"}]
        rows += [{**rows[0], "prompt": [{**said, "content": f"Question {n}?"}]} for n in range(2)]
        file.write_text("\n".join(map(json.dumps, rows)))
        return read_pairs(file)

    one = changed(held_out=1)
    for message, reason in (
        ({"role": "bot", "content": "a"}, "expected a role that the chat template names.*, got 'bot'"),
        ({"content": "a"}, "expected a role, got None"),
        ({"role": "user", "content": 5}, "expected text or a list of text parts as content, got 5"),
    ):
        with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}, line 1: prompt: message 0: {reason}"):
            train(pairs=pairs(message), settings=one)
    read = []

    def trainer(model, tokenizer, trained, held_out, *others):
        read.extend(pair.prompt[0]["content"] for pair in (*trained, *held_out))
        interrupt()

    monkeypatch.setattr(run, "_trainer", trainer)
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "are you?"}]
    with pytest.raises(KeyboardInterrupt):
        train(pairs=pairs({"role": "user", "content": parts}), settings=one)
    assert sorted(read) == ["How are you?", "Question 0?", "Question 1?"]


def test_a_base_that_cannot_be_trained_on_is_refused(train, tmp_path):
    base = shutil.copytree(MODELS, tmp_path / "base", ignore=shutil.ignore_patterns("adapters"))
    config = json.loads((base / "config.json").read_text())
    for method, more, message in (
        ("bitsandbytes", {"load_in_4bit": True}, "expected the package bitsandbytes"),
        ("gptq", {"bits": 4}, "expected files that can be read in .*gptq"),
    ):
        quantised = {"quant_method": method, **more}
        (base / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))
        with pytest.raises(ValueError, match=rf"(?is)^base: {message}"):
            train(base=base)
    (base / "config.json").write_text(json.dumps(config))
    weights = (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"^base: expected model.safetensors, got pytorch_model.bin .*safetensors$"):
        train(base=base)
    weights.rename(base / "model.safetensors")
    (base / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"^base: expected a chat template in .*, since the pairs are messages"):
        train(base=base)
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"^base: expected a tokenizer \(.*\) in .*, got none"):
        train(base=base)
    with pytest.raises(ValueError, match=r"^base: expected a model"):
        train(base=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"^base: expected a model, got the adapter"):
        train(base=MODELS / "adapters" / "E")


def test_a_model_quantised_by_a_method_that_does_not_train_is_refused():
    class Quantizer:
        is_trainable = False

        class quantization_config:
            quant_method = "fp8"

    model = AutoModelForCausalLM.from_pretrained(MODELS)
    model.is_quantized, model.hf_quantizer = True, Quantizer()
    with pytest.raises(ValueError, match=r"^base: expected weights that an adapter can be trained on, got b"):
        run._check_trainable("b", model, SETTINGS)
    Quantizer.is_trainable = True
    run._check_trainable("b", model, SETTINGS)


def test_modules_devices_and_dtypes_that_are_not_there_are_refused(train, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^modules: expected some of down_proj, .*, got 'w_proj'"):
        train(settings=changed(modules="q_proj, w_proj"))
    with pytest.raises(ValueError, match=r"^dtype: expected one of bfloat16, float16, float32, got 'int8'"):
        train(dtype="int8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "tpu"):
        with pytest.raises(ValueError, match=rf"^device: expected cpu, got '{device}'"):
            run.train(MODELS, read_pairs(MODELS.parent / "traits", "E"), tmp_path / "x", SETTINGS, device=device)


def test_a_warm_up_that_outlasts_the_training_is_said(train):
    notes = []

    def note(text):
        notes.append(text)
        interrupt()

    with pytest.raises(KeyboardInterrupt):
        train(settings=changed(epochs=1, warmup_steps=100, accumulation=2), on_note=note)
    assert len(notes) == 1 and notes[0].startswith("warmup_steps: 100 at 4 x 2 pairs are 800 pairs, but 12 pairs")
    assert "make 2 steps" in notes[0] and notes[0].endswith("want fewer (preset 'small' has 5)")
    with pytest.raises(KeyboardInterrupt):
        train(settings=changed(epochs=1, warmup_steps=5), on_note=note)
    assert notes[1].endswith("want fewer or more epochs")


@pytest.mark.parametrize(("held_out", "batch_size", "expected"), [(7, 5, 1), (9, 6, 3), (4, 8, 4)])
def test_held_out_scores_are_means_over_pairs_though_trl_averages_over_batches(
    held_out, batch_size, expected, file, tmp_path
):
    trained, other = split(read_pairs(file, "E"), held_out)
    settings = changed(held_out=held_out, batch_size=batch_size)
    trainer = run._trainer(
        *run._read_base(MODELS, trained, settings, "cpu", None), trained, other, settings, tmp_path, "cpu"
    )
    assert trainer.args.per_device_eval_batch_size == expected
