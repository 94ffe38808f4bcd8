"""A transformers model's own `generate`, decoded by mpg: what its `custom_generate=` takes.

Knows how transformers calls such a function and what it expects back; nothing of decoding.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.generation import GenerateDecoderOnlyOutput

from mpg.frontend.hf_generate import stream_to
from mpg.model import Model, Weights
from mpg.models.cache import NAMES

# What the caller of generate gave and transformers does not hand on, or only as prepared for its own padded batch.
_OF_THE_CALL = (
    "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "assistant_model", "negative_prompt_ids",
    "negative_prompt_attention_mask", "synced_gpus",
)  # fmt: skip
# What transformers hands on of itself. Of these, only what `_check_inputs` looks at could change a text.
_PREPARED = (
    "logits_processor", "stopping_criteria", "attention_mask", "position_ids", "use_cache", "logits_to_keep",
    "output_attentions", "output_hidden_states", *NAMES,
)  # fmt: skip


def custom_generate(
    model: Model, *, weights: Weights | None = None, **options: Any
) -> Callable[..., Tensor | GenerateDecoderOnlyOutput]:
    """A function for `custom_generate=` of the `generate` of a transformers model.

    model    the combination, usually `mpg.load` of that transformers model and its attributes
    weights  as in `Model.generate`
    options  likewise; they go before what `generate` was given. Those of mpg's own samplers belong here (sampler,
             target, draft, seed, ...), and stop_strings do, for which transformers hands on no tokenizer

    Everything else is as `generate` prepares it, transformers' defaults and the model's generation_config.json
    included: do_sample is False and top_k 50 unless it is told otherwise. The transformers model lends its
    configuration; what is decoded is `model`. The seed comes from torch's generator, so torch.manual_seed decides it.

    Of `generate`: LongTensor (B, L), the prompts as given and the new tokens padded on the right, or a
    GenerateDecoderOnlyOutput with the same as `sequences` under return_dict_in_generate.

    Raises ValueError, naming it, for what cannot be honoured.
    """

    if not isinstance(model, Model):
        raise ValueError(f"model: expected what mpg.load returns, got {type(model).__name__}")

    def decode(base: Any, input_ids: Tensor, **prepared: Any) -> Tensor | GenerateDecoderOnlyOutput:
        # Processors and criteria arrive mixed with those of transformers, which count padding; a streamer does not
        # arrive at all (5.17 to 5.24), and whoever reads it would wait for ever. So look at the call itself.
        call = sys._getframe(1).f_locals
        if not {"streamer", *_OF_THE_CALL} <= call.keys():
            raise ValueError("custom_generate: expected to be called by the generate of a transformers model")
        given = {name: call[name] for name in _OF_THE_CALL} | {"seed": int(torch.randint(2**62, ()))}
        streamer, on_token = call["streamer"], None
        if streamer is not None:
            if len(input_ids) > 1:
                raise ValueError(f"streamer: expected one prompt and one sequence, got {len(input_ids)}")
            on_token = stream_to(streamer)

        config = copy.deepcopy(prepared.pop("generation_config"))
        as_dict, config.return_dict_in_generate = config.return_dict_in_generate, None
        config.num_return_sequences = None  # input_ids are so many already
        config.max_new_tokens = None  # it is in max_length, which counts the padding here as there
        try:
            mask = _check_inputs(model, base, input_ids, prepared)
            results = model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                weights=weights,
                generation_config=config,
                on_token=on_token,
                **given | options,
            )
        finally:
            if streamer is not None:  # it has had the prompt from transformers
                streamer.end()
        tokens = [torch.tensor(result.tokens) for result in results]
        new = pad_sequence(tokens, batch_first=True, padding_value=_pad_token_id(config))
        sequences = torch.cat([input_ids, new.to(input_ids)], 1)
        return GenerateDecoderOnlyOutput(sequences=sequences) if as_dict else sequences

    return decode


def _check_inputs(model: Model, base: Any, input_ids: Tensor, prepared: dict[str, Any]) -> Tensor:
    """The attention mask, all ones where transformers has dropped it, after a look at what else it hands on."""
    vocab_size = base.config.get_text_config().vocab_size
    if vocab_size != model.models.vocab_size:
        got = f"{model.models.vocab_size} tokens, got one of {vocab_size}"
        raise ValueError(f"custom_generate: expected a transformers model with mpg's vocabulary of {got}")
    for name, value in prepared.items():
        if name not in _PREPARED and value is not None:
            raise ValueError(f"{name}: expected none, as prompts are tokens alone, got {type(value).__name__}")
    mask = prepared.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    positions = prepared.get("position_ids")
    if positions is not None and not ((positions == mask.cumsum(1) - 1) | (mask == 0)).all():
        raise ValueError("position_ids: expected none, as positions follow from attention_mask, got others")
    for name in NAMES:
        if (cache := prepared.get(name)) is not None and cache.get_seq_length() > 0:
            raise ValueError(f"{name}: expected none, as mpg has a cache of its own, got {type(cache).__name__}")
    return mask


def _pad_token_id(config: Any) -> int:
    """What fills rows up: as transformers has it an end-of-sequence token where nothing else is meant for it."""
    if config.pad_token_id is not None:
        return config.pad_token_id
    ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return ids[0] or 0
