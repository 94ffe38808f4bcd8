"""Training of one adapter by direct preference optimisation, which a kill does not undo.

Knows trl, checkpoints and folders; nothing of where pairs come from. Needs the `train` extra.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, DPOTrainer

import mpg
from mpg.frontend.prompts import read_messages
from mpg.models import gguf, sources
from mpg.options import one_of
from mpg.train.pairs import Pair, data_hash, split
from mpg.train.settings import DTYPES, PRESETS, Settings

CARD = "training.json"  # in the finished adapter's folder
PARTIAL = ".partial"  # the end of the name of the folder beside it that holds checkpoints until then
STARTED = "started.json"  # in that one: what is trained there
PACKAGES = ("torch", "transformers", "peft", "trl", "datasets")
# Of a step or a pass, what a training that diverges makes NaN or infinite first
WATCHED = ("loss", "grad_norm", "rewards/margins", "eval_loss", "eval_rewards/margins")
SCORES = {"accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins", "loss": "eval_loss"}


def train(
    base: str | Path,
    pairs: Sequence[Pair],
    out: str | Path,
    settings: Settings,
    *,
    base_name: str | None = None,
    about: Mapping[str, Any] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    on_note: Callable[[str], None] = print,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    on_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, scores: None,
) -> dict[str, Any]:
    """Train an adapter of `base` on pairs, except those of the held-out questions, and write it to the folder `out`.

    base       a model's folder or hub name, a GGUF file, or "smollm2"
    base_name  what the adapter says that its base is. Default: `base`, its absolute path or the name on the hub
    about      what else `training.json` is to say of the data
    device     cpu or cuda. Default: cuda where there is one
    dtype      of the base. Default: float32 on cpu, else the checkpoint's
    threads    of torch. Default: torch's own
    on_note    is called with what should be known before the training starts
    on_step    after every step, with how many there are
    on_epoch   after every pass, with the held-out accuracy, margin (of rewards, beta is in them) and loss

    The same call goes on from the last checkpoint of one that was killed, and returns what one that was finished wrote.
    One seed, machine and number of threads give the same weights.

    out: what `training.json` says: data, recipe, versions, the held-out scores of every pass and of the adapter as it
    is saved, the loss of every step, and the seconds since the last start

    Raises ValueError, before the first step, for what cannot be trained; where a checkpoint cannot be written; and
    where training diverges, of which nothing stays.
    """
    trained, held_out = split(pairs, settings.held_out)
    device = _check_device(device)
    if dtype is not None:
        one_of(*DTYPES)("dtype", dtype)
    if threads is not None:
        torch.set_num_threads(threads)
    own_name = (
        gguf.SMOLLM2_ON_HUB if base == gguf.SMOLLM2 else str(Path(base).resolve() if Path(base).exists() else base)
    )
    name = base_name or own_name
    base = gguf.resolve("base", base)
    start = time.perf_counter()
    model, tokenizer = _read_base(base, trained, settings, device, dtype)
    template = str(tokenizer.chat_template)
    trained, held_out = ([_read_prompt(pair, template) for pair in part] for part in (trained, held_out))
    card = {
        "base": name,
        "base_sha256": sources.weights_hash(model),
        "data": {**(about or {}), "sha256": data_hash([*trained, *held_out])},
        "pairs": len(trained),
        "held_out": len(held_out),
        "recipe": dataclasses.asdict(settings),
        "device": device,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "versions": {"mpg": mpg.__version__, **{package: version(package) for package in PACKAGES}},
    }
    place = Path(out).resolve()
    if finished := _read_finished(place, card):
        return finished
    with _folder_of(place, card) as work, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers about names that trl gives it
        trainer = _trainer(model, tokenizer, trained, held_out, settings, work, device)
        steps_per_epoch = -(-len(trained) // (settings.batch_size * settings.accumulation))
        total = steps_per_epoch * settings.epochs
        if settings.warmup_steps >= total:
            small = PRESETS["small"]["warmup_steps"]
            hint = f" (preset 'small' has {small})" if settings.warmup_steps > small else " or more epochs"
            of_warmup = settings.warmup_steps * settings.batch_size * settings.accumulation
            on_note(
                f"warmup_steps: {settings.warmup_steps} at {settings.batch_size} x {settings.accumulation} pairs are "
                f"{of_warmup:,} pairs, but {len(trained):,} pairs in {settings.epochs} epochs make {total} steps: the "
                f"learning rate never reaches {settings.learning_rate:g}; so few pairs want fewer{hint}"
            )
        reports = _Reports(steps_per_epoch, settings, on_step, on_epoch)
        trainer.add_callback(reports)
        trainer.train(resume_from_checkpoint=_last_checkpoint(work))
        trainer.remove_callback(reports)
        adapted: Any = trainer.model
        weights = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        saved_as = getattr(torch, settings.adapter_dtype)
        for weight in weights:  # what is measured is what is saved
            weight.data = weight.data.to(saved_as).to(weight.dtype)
        measured = trainer.evaluate()
        _check_finite(f"as {settings.adapter_dtype}, which it is saved as (adapter_dtype),", measured, settings)
        scores = _scores(measured)
        history = trainer.state.log_history
        card["epochs"] = [_scores(entry) for entry in history if "eval_loss" in entry][: settings.epochs]
        card["losses"] = [entry["loss"] for entry in history if "loss" in entry]
        card["scores"] = scores
        card["seconds"] = round(time.perf_counter() - start)
        for weight in weights:
            weight.data = weight.data.to(saved_as)
        adapted.peft_config["default"].base_model_name_or_path = name
        adapted.save_pretrained(work / "adapter", save_embedding_layers=False)  # else it looks for that base
        (work / "adapter" / "README.md").unlink()  # PEFT's empty model card
        (work / "adapter" / CARD).write_text(json.dumps(card, indent=1) + "\n")
        os.replace(work / "adapter", place)
        shutil.rmtree(work)
    return card


def _check_device(device: str | None) -> str:
    """The device of a training. Of several GPUs the first is taken, as CUDA_VISIBLE_DEVICES orders them."""
    has_cuda = torch.cuda.is_available()
    if device not in (None, "cpu", "cuda") or (device == "cuda" and not has_cuda):
        raise ValueError(f"device: expected cpu{' or cuda' * has_cuda}, got {device!r}")
    return device or ("cuda" if has_cuda else "cpu")


def _made_of(card: Mapping[str, Any]) -> dict[str, Any]:
    """What decides upon an adapter's weights, flat. Versions may differ between a start and its end."""
    names = ("base", "base_sha256", "pairs", "held_out", "device", "dtype", "threads")
    return {**{name: card.get(name) for name in names}, "data": card["data"]["sha256"], **card["recipe"]}


def _read_finished(place: Path, card: Mapping[str, Any]) -> dict[str, Any] | None:
    """The card of an adapter that is there already. Refuses another adapter and whatever else the folder holds."""
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return None
    try:
        found = json.loads((place / CARD).read_text())
        differs = _difference(found, card)
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"out: expected a folder that is not there yet, or empty, got {place}") from None
    if differs:
        raise ValueError(f"out: expected a folder of its own, but {place} holds another training: {differs}")
    return found


def _difference(card: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What another training is made of that this one is not; cards that do not say what the base held agree in that."""
    found, asked = _made_of({"base_sha256": other["base_sha256"], **card}), _made_of(other)
    differs = (f"{name} is {found.get(name)!r}, asked is {asked[name]!r}" for name in asked)
    return next((text for name, text in zip(asked, differs, strict=True) if found.get(name) != asked[name]), "")


@contextmanager
def _folder_of(place: Path, card: Mapping[str, Any]) -> Iterator[Path]:
    """The folder of checkpoints beside the adapter's, which stays if it has any. Refuses that of another training."""
    work = place.with_name(place.name + PARTIAL)
    with ExitStack() as stack:
        try:
            work.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((work / "lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _last_checkpoint(work) is None:
                (work / STARTED).write_text(json.dumps(card))
            differs = _difference(json.loads((work / STARTED).read_text()), card)
        except BlockingIOError:
            raise ValueError(f"out: expected a folder of its own, but {work} is being trained in now") from None
        except OSError as error:
            raise ValueError(f"out: expected a folder that can be written, got {work}: {error.strerror}") from error
        if differs:
            raise ValueError(f"out: expected a folder of its own, but {work} holds another training, begun: {differs}")
        try:
            yield work
        except Diverged:
            shutil.rmtree(work)  # as another recipe is wanted now
            raise
        except (OSError, SafetensorError) as error:
            stays = "the checkpoints there are whole, and the same call goes on from the last"
            raise ValueError(f"out: expected room to write in {work}, got {error}; {stays}") from error
        finally:
            if work.exists() and _last_checkpoint(work) is None:
                shutil.rmtree(work)


def _read_base(
    base: str | Path, trained: Sequence[Pair], settings: Settings, device: str, dtype: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, which these pairs can be trained on."""
    sources.check_found("base", base, base)
    tokenizer = sources.read_tokenizer("base", base)
    if tokenizer is None:
        raise ValueError(f"base: expected a tokenizer ({' or '.join(sources.TOKENIZER_FILES)}) in {base}, got none")
    if tokenizer.chat_template is None and not isinstance(trained[0].prompt, str):
        raise ValueError(f"base: expected a chat template in {base}, since the pairs are messages, got none")
    sources.refuse_pickle("base", base, adapts=False, otherwise="")
    model = sources.read_model("base", base, getattr(torch, dtype) if dtype else None, torch.device(device))
    _check_trainable(base, model, settings)
    return model, tokenizer


def _read_prompt(pair: Pair, template: str) -> Pair:
    """The pair with its prompt as generation reads it. Refuses messages that are refused there."""
    if isinstance(pair.prompt, str):
        return pair
    return dataclasses.replace(pair, prompt=read_messages(pair.prompt, f"{pair.place}: prompt", template))


def _trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trained: Sequence[Pair],
    held_out: Sequence[Pair],
    settings: Settings,
    work: Path,
    device: str,
) -> DPOTrainer:
    """trl's trainer, with every pair tokenised, cut and checked against the model's positions."""
    config = DPOConfig(
        str(work),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        # trl averages over batches: the mean over pairs if all are of one size
        per_device_eval_batch_size=max(n for n in range(1, settings.batch_size + 1) if len(held_out) % n == 0),
        beta=settings.beta,
        loss_type=["sigmoid", "sft"] if settings.likelihood else ["sigmoid"],
        loss_weights=[1.0, settings.likelihood] if settings.likelihood else [1.0],
        disable_dropout=False,  # True would silence the adapter's too
        max_length=None,  # what is too long is refused, not cut
        gradient_checkpointing=settings.gradient_checkpointing,
        seed=settings.seed,
        full_determinism=device == "cuda",
        use_cpu=device == "cpu",
        bf16=model.dtype != torch.float32,
        eval_strategy="epoch",
        save_strategy="epoch",  # and in between by _Reports
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # or losses that are NaN would be left out of what is logged
        report_to="none",
        disable_tqdm=True,
    )
    config._n_gpu = min(config.n_gpu, 1)
    modules = settings.modules if settings.modules == "all-linear" else settings.modules.replace(" ", "").split(",")
    disable_progress_bars()
    trainer = _Trainer(
        model,
        args=config,
        train_dataset=Dataset.from_list([pair.columns() for pair in trained]),
        eval_dataset=Dataset.from_list([pair.columns() for pair in held_out]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=modules,
            task_type="CAUSAL_LM",
        ),
    )
    trainer.remove_callback(PrinterCallback)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    trainer.train_dataset = _cut(trainer.train_dataset, trained, settings.max_answer, positions)
    trainer.eval_dataset = _cut(trainer.eval_dataset, held_out, settings.max_answer, positions)
    return trainer


def _check_trainable(base: str | Path, model: PreTrainedModel, settings: Settings) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    if getattr(model, "is_quantized", False) and not (quantizer and quantizer.is_trainable):
        method = quantizer.quantization_config.quant_method if quantizer else "a method that transformers does not name"
        raise ValueError(f"base: expected weights that an adapter can be trained on, got {base}, quantised by {method}")
    linears = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    for name in settings.modules.replace(" ", "").split(","):
        if name not in ("all-linear", *linears):
            raise ValueError(f"modules: expected some of {', '.join(sorted(linears))}, got {name!r}")


def _cut(dataset: Dataset, pairs: Sequence[Pair], max_answer: int | None, positions: int | None) -> Dataset:
    """The tokenised pairs with their answers cut. Refuses one that is longer than the model, and equal answers then."""

    def cut(row: dict[str, Any], index: int) -> dict[str, Any]:
        answers = {side: row[side][:max_answer] for side in ("chosen_ids", "rejected_ids")}
        length = len(row["prompt_ids"]) + max(map(len, answers.values()))
        if positions is not None and length > positions:
            raise ValueError(
                f"{pairs[index].place}: expected at most the {positions} tokens of the model's positions, got {length}"
                "; max_answer cuts answers"
            )
        if answers["chosen_ids"] == answers["rejected_ids"]:
            raise ValueError(
                f"{pairs[index].place}: expected two different answers, got equal ones in their first {max_answer} "
                "tokens (max_answer)"
            )
        return answers

    return dataset.map(cut, with_indices=True)


def _scores(logged: Mapping[str, float]) -> dict[str, float]:
    return {name: logged[key] for name, key in SCORES.items()}


def _check_finite(when: str, logged: Mapping[str, Any], settings: Settings) -> None:
    for name in WATCHED:
        if not math.isfinite(value := logged.get(name, 0.0)):
            got = f"{settings.learning_rate:g}: {when} the {name} is {value}"
            remedy = "a lower one helps, more warmup_steps, or a dtype of a wider range; nothing of it is kept"
            raise Diverged(f"learning_rate: expected one that training converges with, got {got}; {remedy}")


def _last_checkpoint(work: Path) -> str | None:
    """The last checkpoint that was written to its end, where its state is; what a kill left of others is removed."""
    for folder in work.glob("checkpoint-*"):
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            shutil.rmtree(folder)
    return get_last_checkpoint(str(work))


class Diverged(ValueError):
    """A training whose loss or margin is no number any more."""


class _Trainer(DPOTrainer):
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:  # as torch reports a disk that is full
            raise OSError(str(error).splitlines()[0]) from error


class _Reports(TrainerCallback):
    """Reports steps and epochs, and asks for the checkpoints within an epoch. That at its end follows its scores.

    Raises Diverged, before anything is saved, where what is logged is no number.
    """

    def __init__(self, steps_per_epoch: int, settings: Settings, on_step: Any, on_epoch: Any) -> None:
        self.steps_per_epoch, self.settings = steps_per_epoch, settings
        self.on_steps, self.on_epochs = on_step, on_epoch

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step_of_epoch = state.global_step % self.steps_per_epoch
        control.should_save = step_of_epoch != 0 and step_of_epoch % self.settings.checkpoint_steps == 0
        self.on_steps(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        _check_finite(f"at step {state.global_step}", logs or {}, self.settings)

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.on_epochs(state.global_step // self.steps_per_epoch, _scores(more["metrics"]))
