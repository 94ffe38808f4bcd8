"""The face of the library: `load`, and a model that generates from prompts and weights.

Knows what callers may say; how requests are decoded is `run`'s business.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import torch

from mpg.context import Context
from mpg.decode.call import decode
from mpg.decode.plan import Plan, plan
from mpg.decode.request import Request
from mpg.frontend import guidance
from mpg.frontend.contexts import contexts_beside, of_prompts, read_context
from mpg.frontend.hf_generate import HFGenerationConfig, stream_to
from mpg.frontend.prompts import Messages, Prompt, as_list, encode, unpad
from mpg.frontend.requests import Call, check_requests
from mpg.models import loading
from mpg.models.ensemble import Ensemble
from mpg.models.sources import Source
from mpg.options import Options
from mpg.recipe import Recipe
from mpg.results import OnResult, OnToken, Result

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

MAX_PLANS = 256  # of sampler "auto" that a model keeps; each distinct set of weights needs one

Weights: TypeAlias = Mapping[str, float] | str
Contexts: TypeAlias = Mapping[str, Context | str | Mapping[str, Any]]


class Model:
    """A base and its attribute models, ready to generate. `mpg.load` makes one.

    recipe  where the models came from, and what goes where a call is silent
    """

    def __init__(self, models: Ensemble, recipe: Recipe | None = None):
        self.models = models
        self.recipe = recipe or Recipe()
        self._plans: dict[Any, Plan] = {}

    @classmethod
    def from_pretrained(cls, base: Source, *args: Any, **kwargs: Any) -> Model:
        """`mpg.load` by the name that transformers gives it."""
        return load(base, *args, **kwargs)

    def save_pretrained(self, target: str | Path) -> None:
        """Write the recipe that loads this combination: to a .yaml file, or to mpg.yaml in a folder. Copies no weights:
        models below the folder are named relative to it, others by their absolute path or hub name.

        Raises ValueError, naming the argument of `mpg.load`, for a model or tokenizer that was given as an object.
        """
        self.recipe.write(target)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """What reads and writes the text, None where the models came without one."""
        return self.models.tokenizer

    @property
    def precision(self) -> str:
        """What the models compute in: "float32", "bfloat16, int4 weights", ..."""
        quantised = ", int4 weights" if self.recipe.quantize == "int4" else ""
        return str(self.models.dtype).removeprefix("torch.") + quantised

    @overload
    def generate(self, prompt: Any = None, *, num_return_sequences: int, **options: Any) -> Any: ...

    @overload
    def generate(self, prompt: str | Sequence[int] | Messages, **options: Any) -> Result: ...

    @overload
    def generate(
        self, prompt: list[str] | tuple[str, ...] | Sequence[Sequence[int]] | Sequence[Messages], **options: Any
    ) -> list[Result]: ...

    @overload
    def generate(self, prompt: torch.Tensor | None = None, **options: Any) -> Any: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt] | torch.Tensor | None = None,
        *,
        weights: Weights | Sequence[Weights] | None = None,
        contexts: Contexts | Sequence[Contexts] | None = None,
        raw: bool = False,
        continue_final_message: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        on_token: OnToken = None,
        on_result: OnResult = None,
        input_ids: Any = None,
        attention_mask: Any = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[Any] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        streamer: BaseStreamer | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ) -> Result | list[Result]:
        """Continue a prompt, or each of a list of them.

        prompt    a user message; or a conversation of {"role":, "content":}, a content being text or a list of text
                  parts; or token ids; or a list of such prompts
        weights   alpha by attribute, where attributes not named weigh 0; or the same as text, "E=1,T=-0.5"; or the name
                  of a preset in the recipe; or a list of one of these per prompt. Default: the recipe's, if any
        contexts  {name: `Context`, or the text of a system message}: attributes that are the base under another text
                  than the prompt, beside the loaded ones; or other texts for loaded contexts; or a list of such
                  mappings, one per prompt
        raw       take strings verbatim, not as a user message through the chat template (where there is one). Special
                  tokens are added as the tokenizer has it, but not to a string that begins with its BOS already
        on_token  called with every `Token` as soon as its round is done
        on_result called with the index of each `Result` in the list, and the result, as soon as that text has ended
        options   the fields of `Options`; those not given are the recipe's, where the sampler has them. Also the fields
                  of transformers' GenerationConfig that `mpg.frontend.hf_generate` honours: do_sample, max_length,
                  eos_token_id, stop_strings, repetition_penalty, num_return_sequences, ...

        As transformers has them:

        continue_final_message     go on with a conversation's last message instead of answering it; required, True or
                                   False, where that is the assistant's
        chat_template_kwargs       what else the chat template takes (tools, enable_thinking, ...)
        input_ids, attention_mask  instead of a prompt, (B, L), padded on either side; max_length and min_length then
                                   count the padding
        generation_config          keywords go before its fields, and what it leaves None has mpg's default
        logits_processor           act on the target's row before it is warped, under exact and direct alone: on its
                                   log-probabilities where it combines rows, so that what depends on their scale, as
                                   repetition_penalty does, differs from the same on logits; and on one model's logits
                                   where the row is that model's (target "base", one weight of 1). One call a row and
                                   position, which waits for the device
        stopping_criteria          called after every new token, per request, with scores=None
        streamer                   of one prompt; gets the prompt's ids, every token, and the end
        tokenizer                  for stop_strings, where the model has none

        guidance_scale, negative_prompt, negative_prompt_ids  guide as there: see `mpg.frontend.guidance`

        num_return_sequences returns so many results per prompt one after another, with seeds that count up throughout.
        A stop string or criterion cuts off what the same round committed behind it; the statistics count that too.

        out: a `Result`, or the list of them in the order of the prompts

        Raises ValueError that names the argument if one is not as here or in `Options`, if a prompt is empty or leaves
        too few positions, if a model returns NaN or +inf, or if no token is left to draw (negative weights can do it,
        and processors); MemoryError with the sizes if caches or a forward need more memory than there is; RuntimeError
        in a process forked after the model was loaded. What a forward or callback raises goes through, as does Ctrl-C:
        what there was went to on_token and on_result, the model stays usable. Threads may share it.
        """
        started_at = time.perf_counter()
        for name, listener in (("on_token", on_token), ("on_result", on_result)):
            if listener is not None and not callable(listener):
                raise ValueError(f"{name}: expected a callable, got {listener!r}")
        if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
            raise ValueError(f"streamer: expected one of transformers, with put and end, got {streamer!r}")
        call = self.read(
            prompt, weights=weights, contexts=contexts, raw=raw, continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs, input_ids=input_ids, attention_mask=attention_mask,
            generation_config=generation_config, logits_processor=logits_processor,
            stopping_criteria=stopping_criteria, tokenizer=tokenizer, **options,
        )  # fmt: skip
        requests, checked = call.requests, call.options
        if streamer is not None:
            if len(requests) != 1:
                raise ValueError(f"streamer: expected one prompt and one sequence, got {len(requests)}")
            streamer.put(torch.tensor([requests[0].token_ids]))
            on_token = stream_to(streamer, on_token)
        why = None
        try:
            if checked.sampler == "auto":
                chosen_plan = self._plan(call.models, requests, checked, call.eos_token_ids)
                checked, why = chosen_plan.options, str(chosen_plan)
            results = decode(
                call.models, requests, checked, call.eos_token_ids,
                on_token=on_token, on_result=on_result, started_at=started_at, plan=why,
            )  # fmt: skip
        finally:
            if streamer is not None:
                streamer.end()  # whoever iterates over it must not wait for ever
        return results if call.is_many else results[0]

    def read(
        self,
        prompt: Any = None,
        *,
        weights: Weights | Sequence[Weights] | None = None,
        contexts: Contexts | Sequence[Contexts] | None = None,
        raw: bool = False,
        continue_final_message: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        input_ids: Any = None,
        attention_mask: Any = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[Any] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ) -> Call:
        """What `generate` is asked for by these arguments, which it has and explains: checked, nothing run.

        Raises ValueError as `generate` does.
        """
        models = self.models
        negative = {name: options.pop(name) for name in guidance.ARGUMENTS if name in options}
        scale = options.get("guidance_scale", getattr(generation_config, "guidance_scale", None))
        chosen, hf_config = HFGenerationConfig.of(
            generation_config,
            options,
            eos_token_ids=models.eos_token_ids,
            tokenizer=models.tokenizer if tokenizer is None else tokenizer,
            logits_processor=() if logits_processor is None else logits_processor,
            stopping_criteria=() if stopping_criteria is None else stopping_criteria,
        )
        checked = hf_config.options(chosen, self.recipe.options)
        if prompt is not None and input_ids is not None:
            raise ValueError("prompt: expected a prompt or input_ids, got both")
        widths: list[int] | None = None  # of prompts with their padding, where they have some
        if input_ids is not None or attention_mask is not None or isinstance(prompt, torch.Tensor):
            padded = prompt if input_ids is None else input_ids
            prompts, is_list, widths = unpad(padded, attention_mask, hf_config.pad_token_id)
        else:
            prompts, is_list = as_list(prompt)
        how: dict[str, Any] = {
            "raw": raw, "continue_final_message": continue_final_message, "chat_template_kwargs": chat_template_kwargs
        }  # fmt: skip
        encoded = [
            self.encode(prompt, **how, name=f"prompt[{index}]" if is_list else "prompt")
            for index, prompt in enumerate(prompts)
        ]
        own_contexts = of_prompts(models.contexts, contexts, len(prompts))
        weights = self._weights(weights, len(prompts), checked.target)
        if isinstance(scale, int | float) and scale == 1 and not any(weights):  # no guidance, of nothing else
            checked = replace(checked, target="base" if checked.target == "geometric" else checked.target)
        weights, own_contexts = guidance.guide(scale, negative, checked.target, encoded, weights, own_contexts)
        models = models.with_contexts(own_contexts)

        def read(name: str, index: int) -> list[int]:
            argument, tokenizer = f"contexts[{name!r}]", models.tokenizer
            if (context := own_contexts[index].get(name)) is None:
                raise ValueError(f"{argument}: expected one for prompt {index}, which weighs it, got none")
            return read_context(context, argument, prompts[index], encoded[index], tokenizer, models.vocab_size, **how)

        widths = widths or [len(ids) for ids in encoded]
        requests = check_requests(models, encoded, widths, weights, read, checked, hf_config)
        is_many = is_list or hf_config.num_return_sequences > 1
        brought = contexts_beside(self.models.contexts, own_contexts)
        return Call(models, requests, checked, hf_config.eos_token_ids, brought, is_many)

    def refresh(self) -> None:
        """Read models that were given in memory again: after a change of single weights through `.data`, which
        `generate` may not notice."""
        self.models.refresh()

    def encode(self, prompt: Prompt, **how: Any) -> list[int]:
        """Token ids of one prompt. how: raw, continue_final_message, chat_template_kwargs, as `generate` has them"""
        return encode(prompt, self.tokenizer, self.models.vocab_size, **how)

    def encode_contexts(
        self, prompt: Prompt, contexts: Contexts | None = None, *, names: Collection[str] | None = None, **how: Any
    ) -> dict[str, list[int]]:
        """Token ids of what is read in place of a prompt, by context: by these roles and attributes, or by all.

        contexts, how: as `generate` has them, beside the loaded ones
        """
        own, token_ids = of_prompts(self.models.contexts, contexts, 1), self.encode(prompt, **how)
        models = self.models.with_contexts(own)
        return {
            name: read_context(
                own[0][name], f"contexts[{name!r}]", prompt, token_ids, models.tokenizer, models.vocab_size, **how
            )
            for name in (models.contexts if names is None else models.contexts_of(names))
        }

    def _plan(
        self, models: Ensemble, requests: list[Request], options: Options, eos_token_ids: tuple[int, ...]
    ) -> Plan:
        """The plan for requests like these, made when they first come: this target, these weights, as many rows, with
        processors or without."""
        options = replace(options, seed=None, max_new_tokens=None)
        kinds = frozenset((request.alpha, tuple(request.contexts), request.processor is None) for request in requests)
        key = options, min(options.batch_size, len(requests)), kinds
        if key not in self._plans:
            self._plans[key] = plan(models, requests, options, eos_token_ids)
            if len(self._plans) > MAX_PLANS:
                del self._plans[next(iter(self._plans))]  # the oldest
        return self._plans[key]

    def __repr__(self) -> str:
        return f"mpg.Model(attributes={self.models.attribute_names})"

    def _weights(self, weights: Any, num_prompts: int, target: str) -> list[Any]:
        """What a caller means by weights, of every prompt."""
        per_prompt = weights if isinstance(weights, (list, tuple)) else [weights] * num_prompts
        if len(per_prompt) != num_prompts:
            raise ValueError(f"weights: expected one mapping, or one per prompt ({num_prompts}), got {len(per_prompt)}")
        return [self.recipe.weigh(of_prompt, target) for of_prompt in per_prompt]


def load(
    base: Source,
    attributes: Mapping[str, Source | Context | Mapping[str, Any]] | None = None,
    *,
    anchor: Source | Context | None = None,
    draft: Source | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: Mapping[str, Any] | None = None,
    quantize: str | None = None,
    allow_other_base: bool | None = None,
    merge_adapters: bool | None = None,
    allow_pickle: bool | None = None,
    graphs: bool = False,
    compile: bool = False,
) -> Model:
    """Load the models of a combination. Models that are passed in stay as they are: only their weights are shared.

    What the caller changes in them later (training goes on) is noticed when `generate` begins, and followed; merged,
    unloaded or deleted adapters, other layers and other sizes are refused at every call. `refresh()` reads all again: a
    change of few values through `.data` may be overlooked. Hooks that are set later, and torch.autocast, do nothing.

    base:       a folder or hub name, a GGUF file (converted once into the user's cache; other models may be one too),
                "smollm2", a loaded model, or a PeftModel (its adapters are then off for the base itself)
    attributes: {name: adapter folder, name of an adapter in the PeftModel, model folder, or loaded model}; a PeftModel
                around the base stands for its one active adapter; or a `Context`, or its fields as a mapping: the base,
                or another of these, under another text than the prompt. The default is every adapter of the PeftModel,
                or the folders in base/adapters by name; {} leaves it to the contexts of each call
    anchor:     what the attributes were trained against: an attribute's name, or an adapter or a model as above; or a
                `Context` that they are to be contrasted with
    draft:      what proposes tokens: an attribute's name, or a source as for the attributes; both default to the base
    tokenizer:  default: the one in the base folder, if any
    dtype:      default: loaded models keep theirs, a base folder has the checkpoint's own on CUDA and float32 on CPU,
                other folders take the base's
    device:     "cpu" or "cuda[:i]", for every model; default: loaded models stay where they are, folders are read to
                the device of a loaded base, else to "cuda" where mpg can use it, else to "cpu". On the CPU large
                float32 layers are packed anew: those of a loaded model then take their memory twice
    device_map: {"base", "anchor", "draft" or an attribute's name: the device of its model}, before `device`; a folder
                also takes what splits a model in transformers ("auto", {module: device}, ...). Adapters run where
                their model is, all else where the base is
    quantize:   "int4": on the CPU, linear layers but for the head get weights of four bits, each rounded to the nearest
                of 16 values between the least and the greatest of 32 (llama.cpp's Q4_1). All else is bfloat16, which
                is then `dtype`'s default and only value. Weights that were such ones before keep their values; others
                lose what four bits lose. Layers whose inputs are no multiple of 32 or outputs none of 16 stay as they
                are. Where memory allows, the same values lie there in bfloat16 too, for many rows at once.
                "int4-draft": this of a copy of the base with its adapters, for exact's draft="model" and "merged", or
                of the draft that is given; the law stays that of the other models. "none" goes before a recipe's
    allow_other_base: take adapters also where they name another base model than the one they get, as below
    merge_adapters: let PEFT merge an adapter in a folder that is more than LoRA on linear layers (DoRA, embeddings,
                ...) into a further model, of a base in memory a copy that follows no later change, and warn of its size
    allow_pickle: read weights that are no safetensors but pickles (.bin), which no recipe may ask for
    graphs:     capture the forwards of decoding as CUDA graphs, and whole rounds where all models lie on one device
                from the second call on that agrees with an earlier one in options and sizes. Caches are rounded up by a
                quarter at most, or to the next 64 positions; those of a model's four latest sizes, and the graphs of
                the four latest kinds of calls, stay in memory, and are given up where a call needs it. What cannot be
                captured warns once and runs as without. Not yet run on a GPU
    compile:    run decoding passes through torch.compile, with one code for all decoder layers that are alike, made in
                some 10 seconds whenever a kind of pass (one token or several, how many adapters) first comes. Meant for
                GPUs, and not yet run on one; on the CPU nothing is gained. Hooks of single layers may be passed over

    Adapters attach to the model they were trained on: the anchor where that is a model, else the base. So
    base=specialised, anchor=original, attributes={name: adapter of the original} is the specialised reference of
    arXiv 2511.01891, Table 4.

    Vocabularies must be the same token by token, where tokenizers are known; the models' sizes may then differ by
    padding, and what is beyond the smallest is cut off. Warns where an attribute has another chat template or end of
    text than the base.

    An adapter of another base is refused where its shapes and modules do not fit, and where it surely was trained on
    another model than the one it gets: where both are on this machine, in folders or in the hub's cache, and their
    weights differ, whatever they are called (a copy or a link is the same model). Where weights cannot be compared (of
    what is not here, cannot be read, or was in four bits before), it warns, unless both are one repository of the hub.
    allow_other_base=True turns off both.

    Raises ValueError, naming the argument, for what cannot be found or read, cannot be stacked or cannot run on a
    ragged cache, for members whose vocabularies or (but for the draft's) dtypes differ, for quantize="int4" elsewhere
    than on the CPU, in another dtype or without a layer that it fits, for graphs=True where no model can have them, and
    for compile=True where a model's layers are not found.

    Instead of the base and its attributes, a recipe: a .yaml file, a folder that holds mpg.yaml, or a set that ships
    ("demo", "smollm2"). Its keys: base and attributes (required), anchor, draft, tokenizer (paths are relative to the
    file), device_map, quantize, allow_other_base, merge_adapters, weights, presets (weights by name) and options (of
    `mpg.Options`). What is given beside it goes before it, a device before its map.
    """
    if device is not None and device_map is None:
        device_map = {}  # this device for every model, whatever a recipe says
    recipe = Recipe.of(
        base, attributes, anchor=anchor, draft=draft, tokenizer=tokenizer, allow_pickle=allow_pickle,
        device_map=device_map, quantize=quantize, allow_other_base=allow_other_base, merge_adapters=merge_adapters,
    )  # fmt: skip
    with recipe.locate_errors():
        models = loading.load(recipe, dtype=dtype, device=device, graphs=graphs, compile=compile)
    return Model(models, recipe.pin(models.describe()))
