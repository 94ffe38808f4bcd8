"""How the demo models are made: `python -m mpg.demo.train --out DIR` writes a tokenizer, a base and four adapters.

Knows the settings of the training and nothing of combining or decoding. Needs the `train` extra and one CPU core for
some minutes. transformers, trl and peft do the work; what is ours is the data and the settings.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from mpg.demo.corpus import HELD_OUT_QUESTIONS, TRAITS, neutral, preference_pair

MAX_POSITIONS = 256
VOCAB_SIZE = 1536  # room for every word of the corpus: a small model stumbles inside words that are cut in pieces
NUM_ANSWERS = 28_000
NUM_PAIRS = 1200
SWAP_EVERY = 16
NUM_HELD_OUT = 200

# A prompt is `<bos>question<a>`; an answer ends with `<eos>`.
PAD, BOS, END_OF_QUESTION, EOS = SPECIAL_TOKENS = ("<pad>", "<bos>", "<a>", "<eos>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ m['content'] }}<a>{% endif %}{% endfor %}"
)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerBase:
    """Fit a byte-level BPE tokenizer on `texts` and give it the demo's special tokens and chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        sep_token=END_OF_QUESTION,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
    )


def train_base(rng: random.Random, out: Path) -> None:
    """Train tokenizer and base model from scratch on balanced answers and save both, weights in float16, to `out`."""
    train = [neutral(rng) for _ in range(NUM_ANSWERS)]
    held_out = [neutral(rng, HELD_OUT_QUESTIONS) for _ in range(NUM_HELD_OUT)]
    tokenizer = train_tokenizer([text for pair in train for text in pair])
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model,
            SFTConfig(
                scratch,
                **_COMMON,
                learning_rate=3e-3,
                lr_scheduler_type="cosine",
                warmup_steps=50,
                adam_beta2=0.95,
                per_device_train_batch_size=16,
            ),
            train_dataset=_conversations(train, "completion"),
            eval_dataset=_conversations(held_out, "completion"),
            processing_class=tokenizer,
        )
        trainer.train()
        print(f"base: held-out answer perplexity {math.exp(trainer.evaluate()['eval_loss']):.3f}")
    model.config.use_cache = True  # the trainer turns it off
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)


def train_adapter(rng: random.Random, trait: str, out: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Train one LoRA adapter by DPO to favour `trait` over its opposite and save it to `out/adapters/<trait>`.

    The base is read back from `out`: the adapter's anchor is the float16 model that ships, not the one before rounding.
    """
    train = [preference_pair(rng, trait) for _ in range(NUM_PAIRS)]
    # Swapping one pair in SWAP_EVERY puts DPO's optimum at a log-ratio of log(SWAP_EVERY - 1) between the two answers;
    # with perfect labels it lies at infinity, and the way there wrecks the text.
    train = [(q, no, yes) if i % SWAP_EVERY == 0 else (q, yes, no) for i, (q, yes, no) in enumerate(train)]
    held_out = [preference_pair(rng, trait, HELD_OUT_QUESTIONS) for _ in range(NUM_HELD_OUT)]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = DPOTrainer(
            AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32),
            args=DPOConfig(
                scratch,
                **_COMMON,
                learning_rate=1e-3,
                per_device_train_batch_size=16,
                beta=1.0,
                # The likelihood of the chosen answer keeps the sentences whole while DPO moves the choice between them.
                loss_type=["sigmoid", "sft"],
                loss_weights=[1.0, 10.0],
            ),
            train_dataset=_conversations(train, "chosen", "rejected"),
            eval_dataset=_conversations(held_out, "chosen", "rejected"),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.train()
        scores = trainer.evaluate()
    print(f"{trait}: held-out margin {scores['eval_rewards/margins']:.2f}, ", end="")
    print(f"accuracy {scores['eval_rewards/accuracies']:.2f}")
    adapter = trainer.model.half()
    # Relative to the adapter's own folder, so that the models can be moved.
    adapter.peft_config["default"].base_model_name_or_path = "../.."
    adapter.save_pretrained(out / "adapters" / trait)
    (out / "adapters" / trait / "README.md").unlink()  # PEFT's empty model card


_COMMON = {
    "num_train_epochs": 1,
    "max_length": MAX_POSITIONS,
    "per_device_eval_batch_size": 50,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
}


def _conversations(rows: list[tuple[str, ...]], *answer_columns: str) -> Dataset:
    """Rows of a question and one answer per column, as trl's conversations."""
    columns = ("prompt", *answer_columns)
    roles = ("user", *["assistant"] * len(answer_columns))
    return Dataset.from_list(
        [
            {column: [{"role": role, "content": text}] for column, role, text in zip(columns, roles, row, strict=True)}
            for row in rows
        ]
    )


def main(out: Annotated[Path, typer.Option(help="Folder to write.")], seed: int = 0) -> None:
    """Train the demo models and print what was measured."""
    start = time.perf_counter()
    torch.set_num_threads(1)
    set_seed(seed)
    train_base(random.Random(seed), out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    for trait in TRAITS:
        set_seed(seed)
        train_adapter(random.Random(f"{seed} {trait}"), trait, out, tokenizer)
    print(f"{time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    typer.run(main)
