"""What the arguments of transformers' generate mean here: each is honoured, idle, or refused by name.

Knows fields, logits processors and what ends a text; no batch and no loop. A keyword goes before the same field of a
GenerationConfig, and a field that is None takes mpg's own default (temperature 1, top_p 1, top_k 0, sampling), not
transformers'. Of the base's generation_config.json mpg takes the end-of-sequence ids alone;
`generation_config=GenerationConfig.from_pretrained(base)` takes all of it.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from mpg.decode.batch import Processor
from mpg.frontend import guidance
from mpg.models.cache import NAMES
from mpg.options import MAX_COUNT, OPTIONS, ROW_SAMPLERS, Options, an_integer, check_truth, hint
from mpg.results import Token

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

Criterion: TypeAlias = Callable[[Tensor, None], Any]
MAX_SEQUENCES = 2**16  # of one prompt in a call, each of which takes memory before it begins
# Honoured: what each does here it does there. Beside it the value other than None that asks for nothing.
HONOURED: dict[str, Any] = {
    # options of the sampler; do_sample=False is temperature 0
    "do_sample": None, "temperature": None, "top_k": None, "top_p": None, "min_p": None, "max_new_tokens": None,
    # lengths of prompt and new tokens, padding counted where there is some; max_new_tokens goes before max_length
    "max_length": None, "min_length": 0, "min_new_tokens": 0,
    # what ends a text; pad_token_id tells what is no prompt where input_ids come without an attention_mask
    "eos_token_id": None, "pad_token_id": None, "stop_strings": None, "max_time": None,
    "num_return_sequences": 1,
    # a context of weight 1 - guidance_scale: see `guidance`
    "guidance_scale": 1,
    # processors of the target's row, in the order in which they run (with min_length and min_new_tokens)
    "sequence_bias": None, "encoder_repetition_penalty": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "prefix_allowed_tokens_fn": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "exponential_decay_length_penalty": None,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
# Idle: true of every call (rows are normalised), or about no text.
IDLE = ("renormalize_logits", "bos_token_id", "disable_compile", "transformers_version")
# Every other field and argument of transformers' generate is refused unless it asks for nothing. Of some, the way out:
REASONS = {
    "num_beams": "there is no beam search; sampling of several is num_return_sequences",
    "assistant_model": "a draft model is mpg.load(draft=...)",
    "prompt_lookup_num_tokens": "prompt lookup is draft='lookup', chunk_size=...",
    "num_assistant_tokens": "how much is drafted is the option chunk_size",
    "typical_p": "rows are warped by temperature, top_k, top_p and min_p alone",
    "output_scores": "rows stay where they are computed; trace=True returns every token's log-ratios",
    "return_dict_in_generate": "a `Result` is returned; under custom_generate it is honoured",
    "inputs_embeds": "prompts are tokens",
    **dict.fromkeys(NAMES, "mpg has a cache of its own"),
    "position_ids": "positions follow from attention_mask",
}
_THEIR_ARGUMENTS = inspect.signature(transformers.GenerationMixin.generate).parameters.keys()
_THEIRS = {*vars(GenerationConfig()), *_THEIR_ARGUMENTS, *REASONS} - {"self", "inputs", "kwargs"}
_THEIR_DEFAULTS = GenerationConfig._get_default_generation_params()
_ARGUMENTS = (
    "weights", "raw", "on_token", "on_result", "input_ids", "attention_mask", "generation_config", "logits_processor",
    "stopping_criteria", "streamer", "tokenizer", "continue_final_message", "chat_template_kwargs", "contexts",
    *guidance.ARGUMENTS,
)  # fmt: skip
_HAVE_STATE = (  # a drafted position is asked for more than once, or in vain
    "SynthIDTextWatermarkLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
)


@dataclass(frozen=True)
class _Text:
    """What a processor made from a field may want to know of its request."""

    index: int  # of its result in the call
    prompt: Any  # Tensor (1, L) int64
    padding: int  # tokens of padding beside it, which transformers counts in its lengths
    max_length: int
    eos_token_ids: list[int]


_PROCESSORS: dict[str, Callable[[Any, _Text], Processor]] = {
    "sequence_bias": lambda v, _: transformers.SequenceBiasLogitsProcessor(v),
    "encoder_repetition_penalty": lambda v, t: transformers.EncoderRepetitionPenaltyLogitsProcessor(v, t.prompt),
    "repetition_penalty": lambda v, _: transformers.RepetitionPenaltyLogitsProcessor(v),
    "no_repeat_ngram_size": lambda v, _: transformers.NoRepeatNGramLogitsProcessor(v),
    "encoder_no_repeat_ngram_size": lambda v, t: transformers.EncoderNoRepeatNGramLogitsProcessor(v, t.prompt),
    "bad_words_ids": lambda v, t: transformers.NoBadWordsLogitsProcessor(v, t.eos_token_ids or None),
    "min_length": lambda v, t: transformers.MinLengthLogitsProcessor(
        max(v - t.padding, 0), t.eos_token_ids, t.prompt.device
    ),
    "min_new_tokens": lambda v, t: transformers.MinNewTokensLengthLogitsProcessor(
        t.prompt.shape[1], v, t.eos_token_ids, t.prompt.device
    ),
    "prefix_allowed_tokens_fn": lambda v, t: transformers.PrefixConstrainedLogitsProcessor(
        lambda _, tokens: v(t.index, tokens), 1
    ),
    "forced_bos_token_id": lambda v, _: transformers.ForcedBOSTokenLogitsProcessor(v),
    "forced_eos_token_id": lambda v, t: transformers.ForcedEOSTokenLogitsProcessor(t.max_length, v, t.prompt.device),
    "exponential_decay_length_penalty": lambda v, t: transformers.ExponentialDecayLengthPenalty(
        v, torch.tensor(t.eos_token_ids, device=t.prompt.device), t.prompt.shape[1]
    ),
    "suppress_tokens": lambda v, t: transformers.SuppressTokensLogitsProcessor(v, t.prompt.device),
    "begin_suppress_tokens": lambda v, t: transformers.SuppressTokensAtBeginLogitsProcessor(
        v, t.prompt.shape[1], t.prompt.device
    ),
}
# What is looked at before anything runs. What a processor is made from is that class's to judge, when it is made.
_INTEGERS = (
    "max_length", "min_length", "min_new_tokens", "pad_token_id", "num_return_sequences", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "forced_bos_token_id",
)  # fmt: skip
_TOKEN_IDS = ("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")
_ABOUT_THE_END = ("min_length", "min_new_tokens", "exponential_decay_length_penalty")  # nothing without such a token
_NEED_TOKENIZER = ("stop_strings", "continue_final_message", "chat_template_kwargs")


@dataclass(frozen=True, kw_only=True)
class HFGenerationConfig:
    """What a call asks for in transformers' words, beside the options of its sampler; checked once.

    fields             what is `HONOURED` and asks for something, but for the sampler's own options
    eos_token_ids      what ends a text
    tokenizer          or None
    logits_processor   the caller's own, run behind those of the fields; one of the same class replaces a field's
    stopping_criteria  the caller's own
    """

    fields: Mapping[str, Any]
    eos_token_ids: tuple[int, ...] = ()
    tokenizer: Any = None
    logits_processor: Sequence[Processor] = ()
    stopping_criteria: Sequence[Criterion] = ()

    def __post_init__(self) -> None:
        for name in ("logits_processor", "stopping_criteria"):
            given = getattr(self, name)
            if not isinstance(given, (list, tuple)) or not all(callable(each) for each in given):
                raise ValueError(f"{name}: expected a list of callables, got {given!r}")
        for processor in self.logits_processor:
            if type(processor).__name__ in _HAVE_STATE:
                wanted = "processors that depend on their arguments alone, as drafted tokens may be taken back"
                raise ValueError(f"logits_processor: expected {wanted}, got {type(processor).__name__}")
        for name, value in self.fields.items():
            if name in _INTEGERS and not _is_integer(value):
                raise ValueError(f"{name}: expected an integer, got {value!r}")
            if name in _TOKEN_IDS and not all(_is_integer(one) and one <= MAX_COUNT for one in _as_tuple(value)):
                raise ValueError(f"{name}: expected a token id or a list of them, got {value!r}")
        an_integer(1, MAX_SEQUENCES)("num_return_sequences", self.num_return_sequences)
        if not callable(self.fields.get("prefix_allowed_tokens_fn", callable)):
            got = self.fields["prefix_allowed_tokens_fn"]
            raise ValueError(f"prefix_allowed_tokens_fn: expected a callable, got {got!r}")
        if "eos_token_id" in self.fields:
            object.__setattr__(self, "eos_token_ids", _as_tuple(self.fields["eos_token_id"]))
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase | None):
            raise ValueError(f"tokenizer: expected a tokenizer of transformers, got {type(self.tokenizer).__name__}")
        got = self.fields.get("stop_strings")
        if self.stop_strings() and self.tokenizer is None:
            raise ValueError(f"stop_strings: this model has no tokenizer, expected tokenizer=..., got {got!r}")
        for string in self.stop_strings():
            if not isinstance(string, str) or not string:
                raise ValueError(f"stop_strings: expected a string or a list of them, none empty, got {got!r}")
            if any("\ud800" <= c <= "\udfff" for c in string):
                raise ValueError(f"stop_strings: expected text that UTF-8 can hold, got {string!r}")
        if "max_time" in self.fields:  # counted from here
            limit = self.fields["max_time"]
            if not isinstance(limit, (int, float)) or not limit >= 0:
                raise ValueError(f"max_time: expected seconds, got {limit!r}")
            criterion = transformers.MaxTimeCriteria(limit, time.time())
            object.__setattr__(self, "stopping_criteria", (*self.stopping_criteria, criterion))

    @classmethod
    def of(
        cls, generation_config: GenerationConfig | None, keywords: Mapping[str, Any], **own: Any
    ) -> tuple[dict[str, Any], HFGenerationConfig]:
        """The keywords of `Options` among a call's keywords and configuration, and everything else.

        own: the other fields of `HFGenerationConfig`, eos_token_ids being the default

        Raises ValueError for a keyword that nobody knows, with the nearest known one, and for a refused field unless
        its value asks for nothing.
        """
        given = _fields_of(generation_config) | {name: value for name, value in keywords.items() if value is not None}
        for name, value in given.items():
            if name in HONOURED or name in IDLE or name in OPTIONS:
                continue
            if name in _ARGUMENTS:
                raise ValueError(f"{name}: expected an option, got an argument of Model.generate")
            if name not in _THEIRS:
                raise ValueError(f"{name}: unknown option; {hint(name, (*OPTIONS, *HONOURED, *_ARGUMENTS))}")
            is_plain, default = isinstance(value, (int, float, str)), _THEIR_DEFAULTS.get(name)
            if value is not False and not (is_plain and value == default):
                got = repr(value) if is_plain else type(value).__name__  # it may be a whole model
                raise ValueError(
                    f"{name}: expected {default!r}, as {REASONS.get(name, 'it is not honoured')}; got {got}"
                )
        asked = {name: value for name, value in given.items() if name in HONOURED and not _is_neutral(name, value)}
        options = {name: value for name, value in given.items() if name in OPTIONS}
        do_sample = asked.pop("do_sample", True)
        check_truth("do_sample", do_sample)
        if not do_sample:  # as transformers has it, what warps a draw is ignored where nothing is drawn
            options = {name: value for name, value in options.items() if name not in ("top_k", "top_p", "min_p")}
            options["temperature"] = 0
        return options, cls(fields={name: asked[name] for name in asked if name not in OPTIONS}, **own)

    def options(self, chosen: Mapping[str, Any], defaults: Mapping[str, Any]) -> Options:
        """The options of the call: those that `of` found, and defaults where it is silent.

        Raises ValueError as `Options.of` does, and for what the sampler cannot honour.
        """
        if "max_length" in self.fields:  # it says how many tokens are new
            defaults = {name: value for name, value in defaults.items() if name != "max_new_tokens"}
        options = Options.of(chosen, defaults)
        if self.num_return_sequences > 1 and options.temperature == 0:
            got = self.num_return_sequences
            raise ValueError(f"num_return_sequences: expected 1 where nothing is drawn (temperature 0), got {got}")
        names = self._processing()
        if names and options.sampler not in ROW_SAMPLERS:
            raise ValueError(
                f"{names[0]}: acts on the combined row, which sampler {options.sampler!r} never builds (it draws from "
                f"the base and weighs by ratios); expected sampler {' or '.join(map(repr, ROW_SAMPLERS))}"
            )
        return options

    def _processing(self) -> list[str]:
        """Names of what acts on rows."""
        names = [name for name in _PROCESSORS if name in self.fields]
        return [*names, "logits_processor"] if self.logits_processor else names

    @property
    def num_return_sequences(self) -> int:
        return self.fields.get("num_return_sequences", 1)

    @property
    def pad_token_id(self) -> int | None:
        """What is padding where no mask says so; None where it may be a text's end."""
        pad = self.fields.get("pad_token_id", getattr(self.tokenizer, "pad_token_id", None))
        return None if pad in self.eos_token_ids else pad

    def max_new_tokens(self, index: int, prompt_length: int) -> int | None:
        """What max_length leaves behind a prompt and its padding, None where none is given."""
        limit = self.fields.get("max_length")
        if limit is None:
            return None
        if limit <= prompt_length:
            wanted = f"an integer above the {prompt_length} tokens of prompt {index}"
            raise ValueError(f"max_length: expected {wanted}, got {limit!r}")
        return limit - prompt_length

    def processor(
        self, index: int, prompt: Sequence[int], padding: int, max_new_tokens: int, device: torch.device
    ) -> Processor | None:
        """What the rows of the request with this index in the call pass through; None where that is nothing."""
        if not self._processing():
            return None
        input_ids = torch.tensor([list(prompt)], device=device)
        text = _Text(index, input_ids, padding, len(prompt) + max_new_tokens, list(self.eos_token_ids))
        own = {type(processor): processor for processor in self.logits_processor}
        chain: list[Any] = []
        for name, make in _PROCESSORS.items():
            if name in self.fields and (self.eos_token_ids or name not in _ABOUT_THE_END):
                try:
                    made = make(self.fields[name], text)
                except Exception as error:  # whatever a value of the wrong form makes it raise
                    raise ValueError(f"{name}: {error}; got {self.fields[name]!r}") from None
                chain.append(own.get(type(made), made))
        chain += [processor for processor in self.logits_processor if not any(processor is other for other in chain)]
        return LogitsProcessorList(chain) if chain else None

    def ends(self, prompt: Sequence[int], device: torch.device) -> Callable[[Sequence[int]], bool] | None:
        """Whether the last new token of the request with this prompt ends its text, beside eos_token_ids and its limit;
        None where nothing does."""
        strings = self.stop_strings()
        if not strings and not self.stopping_criteria:
            return None
        return end_of_text(prompt, strings, self.stopping_criteria, self.tokenizer, device)

    def stop_strings(self) -> tuple[str, ...]:
        return _as_tuple(self.fields.get("stop_strings", ()))


def end_of_text(
    prompt: Sequence[int], strings: Sequence[str], criteria: Sequence[Criterion], tokenizer: Any, device: torch.device
) -> Callable[[Sequence[int]], bool]:
    """Whether the last of one request's new tokens ends its text, given that none before it did; beside its
    end-of-sequence tokens and its limit.

    prompt     token ids
    strings    end the text with the token that completes one of them within the new text, special tokens spelled out
    criteria   of transformers' protocol, criterion(input_ids (1, L), scores=None) -> bool or (1,) bool, called after
               every new token with prompt and new tokens; a truth ends the text
    tokenizer  decodes the new tokens; needed for strings alone
    device     of `input_ids`
    """

    def ends(tokens: Sequence[int]) -> bool:
        if strings and _has_string(tokens, strings, tokenizer):
            return True
        if not criteria:
            return False
        input_ids = torch.tensor([[*prompt, *tokens]], device=device)
        answers = [criterion(input_ids, None) for criterion in criteria]  # every one is asked, as it may count
        return any(_is_true(answer) for answer in answers)

    return ends


def _has_string(tokens: Sequence[int], strings: Sequence[str], tokenizer: Any) -> bool:
    longest = max(len(string.encode()) for string in strings)
    # Most tokens hold a byte at least, so that as many suffice, and one more, as decoding may strip a space before the
    # first. An id that the tokenizer does not know holds none: then read on.
    num_read = longest + 1
    while True:
        text, before = (
            tokenizer.decode(part, skip_special_tokens=False) for part in (tokens[-num_read:], tokens[-num_read:-1])
        )
        if any(string in text for string in strings):
            return True
        before = before.replace("\ufffd", "")  # part of a character counts as nothing
        if num_read >= len(tokens) or len(before.encode()) >= longest - 1:
            return False
        num_read *= 2


def check_options(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> Options:
    """The options of a call with these keywords and a recipe's defaults, before there is a model.

    Raises ValueError as `Model.generate` does, but for what needs a tokenizer.
    """
    known = {name: value for name, value in options.items() if name not in _NEED_TOKENIZER}
    chosen, hf_config = HFGenerationConfig.of(None, known)
    return hf_config.options(chosen, defaults)


def _is_true(answer: Any) -> bool:
    try:
        return bool(torch.as_tensor(answer).item())
    except (RuntimeError, TypeError):
        wanted = "True, False or a tensor of one of them"
        raise ValueError(f"stopping_criteria: expected {wanted}, got {answer!r} from a criterion") from None


def _fields_of(config: GenerationConfig | None) -> dict[str, Any]:
    """The fields of a configuration that are set, but for entries that transformers does not know itself."""
    if config is None:
        return {}
    if not isinstance(config, GenerationConfig):
        raise ValueError(f"generation_config: expected a GenerationConfig, got {type(config).__name__}")
    given = {name: value for name, value in vars(config).items() if name in _THEIRS and not name.startswith("_")}
    return {name: value for name, value in given.items() if value is not None}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    """One or several, as several."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _is_neutral(name: str, value: Any) -> bool:
    neutral = HONOURED[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return neutral is not None and is_number and value == neutral


def stream_to(streamer: BaseStreamer, on_token: Callable[[Token], None] | None = None) -> Callable[[Token], None]:
    """on_token, and each token's id to the streamer as transformers puts it there, (1,) int64."""

    def put(token: Token) -> None:
        streamer.put(torch.tensor([token.id]))
        if on_token is not None:
            on_token(token)

    return put
