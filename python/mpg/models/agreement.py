"""Whether models of one combination fit together: types, vocabularies, ends, and the base that an adapter is of.

Knows loaded models; what does not fit is refused, and what nobody can tell is warned of.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mpg.models import gguf, sources
from mpg.models.ensemble import DRAFT
from mpg.models.runner import LoadedModel


def check_agreement(base: LoadedModel, other: LoadedModel) -> None:
    if base.model.dtype != other.model.dtype and other.argument != DRAFT:
        dtypes = f"expected the base's dtype {base.model.dtype}, got {other.model.dtype}"
        raise ValueError(f"{other.argument}: {dtypes}; dtype= converts them all")
    size, other_size = base.vocab_size, other.vocab_size
    if size != other_size and (base.tokenizer is None or other.tokenizer is None):
        known = "without the tokenizers of both, which would tell padding from tokens"
        raise ValueError(
            f"{other.argument}: expected the base's vocabulary of {size} tokens, got {other_size}, {known}"
        )
    for tokenizer in (base.tokenizer, other.tokenizer) if size != other_size else ():
        assert tokenizer is not None
        token, token_id = max(_vocabulary(tokenizer).items(), key=lambda item: item[1])
        if token_id >= min(size, other_size):
            wanted = f"models of {size} and {other_size} tokens that differ by padding alone"
            raise ValueError(f"{other.argument}: expected {wanted}, got the token {token!r} of id {token_id}")
    ends, other_ends = base.eos_token_ids, other.eos_token_ids
    if other.argument != DRAFT and not set(other_ends) <= set(ends):
        text = f"its texts end with {list(other_ends)}, those of the base with {list(ends)}, which will be looked for"
        warnings.warn(f"{other.argument}: {text}", stacklevel=5)


def check_tokenizers(base: PreTrainedTokenizerBase, argument: str, other: PreTrainedTokenizerBase) -> None:
    ids, other_ids = _vocabulary(base), _vocabulary(other)
    for token in ids.keys() | other_ids.keys() if ids != other_ids else ():
        if ids.get(token) != other_ids.get(token):
            wanted, got = ids.get(token), other_ids.get(token)
            raise ValueError(f"{argument}: expected token {token!r} to have the base's id {wanted}, got {got}")
    if argument != DRAFT and other.chat_template and other.chat_template != base.chat_template:
        text = "its chat template is not the base's, which writes every conversation"
        warnings.warn(f"{argument}: {text}", stacklevel=5)


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids by token, but for a padding token of its own: training scripts add one, and no text has it."""
    ids = dict(tokenizer.get_vocab())
    if tokenizer.pad_token not in (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token):
        ids.pop(tokenizer.pad_token, None)
    return ids


def check_trained_on(argument: str, adapter: str, trained_on: str, loaded: LoadedModel) -> None:
    """Refuse an adapter of a model that surely is another than the one it gets, and warn where nobody can tell."""
    given, places = loaded.model.name_or_path or "", [trained_on]
    names = [name for name in (given, gguf.converted_from(given)) if name]
    if trained_on.startswith("."):  # seen from its own folder, by its name or by where that is a link to
        place = Path(adapter, trained_on)
        places = [str(place.resolve()), os.path.normpath(place)]
    verdicts = [sources.is_same_model(place, name) for place in places for name in names if trained_on]
    if not verdicts or True in verdicts:
        return
    if False in verdicts:
        got = f"one that was trained on {places[0]}, which is another model"
        remedy = "allow_other_base=True takes it all the same"
        raise ValueError(f"{argument}: expected an adapter of {loaded.source}, got {got}; {remedy}")
    text = f"it was trained on {places[0]}, and attaches to {loaded.source}"
    remedy = "if that is the same model under another name, load with allow_other_base=True"
    warnings.warn(f"{argument}: {text}; {remedy}, else its effect is undefined", stacklevel=7)
