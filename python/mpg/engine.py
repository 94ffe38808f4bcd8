"""The face of the library: `load`, and a model that generates from prompts and weights.

Knows what callers may say; how requests are decoded is `run`'s business.
"""

from __future__ import annotations

import math
import numbers
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import torch
from jinja2 import TemplateError

from mpg import ensemble
from mpg.config import DEFAULT_NEW_TOKENS, Options, check_weights
from mpg.ensemble import Ensemble, Source
from mpg.plan import Plan, plan
from mpg.recipe import Recipe
from mpg.results import Result, Token
from mpg.run import Request, decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages: TypeAlias = Sequence[Mapping[str, str]]
Prompt: TypeAlias = str | Messages | Sequence[int]
Weights: TypeAlias = Mapping[str, float] | str
OnToken: TypeAlias = Callable[[Token], None] | None


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

    @overload
    def generate(self, prompt: str, **options: Any) -> Result: ...

    @overload
    def generate(self, prompt: Sequence[Any], **options: Any) -> Any: ...

    def generate(
        self,
        prompt: Prompt | Sequence[str] | Sequence[Messages],
        *,
        weights: Weights | Sequence[Weights] | None = None,
        raw: bool = False,
        on_token: OnToken = None,
        **options: Any,
    ) -> Result | list[Result]:
        """Continue a prompt, or each of a list of them.

        prompt    a user message; or a conversation of {"role":, "content":}; or token ids; or a list of such prompts
        weights   alpha by attribute, where attributes not named weigh 0; or the same as text, "E=1,T=-0.5"; or the name
                  of a preset in the recipe; or a list of one of these per prompt. Default: the recipe's, if any
        raw       take strings verbatim, not as a user message through the chat template (where there is one)
        on_token  called with every `Token` as soon as its round is done
        options   the fields of `Options`; those not given are the recipe's, where the sampler has them

        out: a `Result`, or the list of them in the order of the prompts

        Raises ValueError that names the argument if one is not as here or in `Options`, if a prompt is empty or leaves
        too few positions, if a model returns NaN or +inf, or if no token is left to draw (negative weights can do it).
        Raises MemoryError with the sizes if the caches or a forward need more memory than there is; the model stays
        usable.
        """
        started_at = time.perf_counter()
        checked = Options.of(options, self.recipe.options)
        if on_token is not None and not callable(on_token):
            raise ValueError(f"on_token: expected a callable, got {on_token!r}")
        prompts, is_list = _as_list(prompt)
        requests = self._check_requests([self._encode(prompt, raw) for prompt in prompts], weights, checked)
        why = None
        if checked.sampler == "auto":
            chosen = self._plan(requests, checked)
            checked, why = chosen.options, str(chosen)
        results = decode(self.models, requests, checked, on_token, started_at)
        if why is not None:
            results = [replace(result, plan=why) for result in results]
        return results if is_list else results[0]

    def _plan(self, requests: list[Request], options: Options) -> Plan:
        """The plan for requests like these, made when they first come: this target, these weights, as many rows."""
        options = replace(options, seed=None, max_new_tokens=None)
        key = options, min(options.batch_size, len(requests)), frozenset(request.alpha for request in requests)
        if key not in self._plans:
            self._plans[key] = plan(self.models, requests, options)
        return self._plans[key]

    def __repr__(self) -> str:
        return f"mpg.Model(attributes={self.models.attribute_names})"

    def _encode(self, prompt: Any, raw: bool) -> list[int]:
        """Token ids of one prompt."""
        tokenizer, vocab_size = self.models.tokenizer, self.models.vocab_size
        token_ids: Any
        if not prompt:
            raise ValueError(f"prompt: expected at least one token, got {prompt!r}")
        if isinstance(prompt, str) and any("\ud800" <= c <= "\udfff" for c in prompt):
            raise ValueError(f"prompt: expected text that UTF-8 can hold, got {prompt!r}")
        if not isinstance(prompt, str) and isinstance(prompt[0], numbers.Integral):
            token_ids = [int(token) for token in prompt]
        elif tokenizer is None:
            raise ValueError(f"prompt: this model has no tokenizer, expected token ids, got {prompt!r}")
        elif isinstance(prompt, str) and (raw or not tokenizer.chat_template):
            token_ids = tokenizer(prompt)["input_ids"]
        elif not tokenizer.chat_template:
            raise ValueError(f"prompt: this model has no chat template, expected a string, got {prompt!r}")
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            if not all(message.get("content") for message in messages):
                raise ValueError(f"prompt: expected some text in every message, got {prompt!r}")
            try:
                token_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            except (TemplateError, TypeError) as error:  # a role that it refuses; text that UTF-8 cannot hold
                wanted = "messages that the chat template takes"
                raise ValueError(f"prompt: expected {wanted}, got {prompt!r}: {error}") from error
        for token in token_ids:
            if not 0 <= token < vocab_size:
                raise ValueError(f"prompt: expected token ids in 0..{vocab_size - 1}, got {token}")
        return token_ids

    def _check_requests(self, prompts: list[list[int]], weights: Any, options: Options) -> list[Request]:
        per_prompt = weights if isinstance(weights, (list, tuple)) else [weights] * len(prompts)
        if len(per_prompt) != len(prompts):
            raise ValueError(
                f"weights: expected one mapping, or one per prompt ({len(prompts)}), got {len(per_prompt)}"
            )
        first_seed = secrets.randbits(32) if options.seed is None else int(options.seed)
        requests = []
        for index, (token_ids, given) in enumerate(zip(prompts, per_prompt, strict=True)):
            chosen = self.recipe.weigh(given, options.target)
            alpha = check_weights(chosen, self.models.attribute_names, options.target)
            room = math.inf if self.models.max_positions is None else self.models.max_positions - len(token_ids)
            positions = f"the model has {self.models.max_positions} positions and prompt {index} takes {len(token_ids)}"
            if room < 1:
                raise ValueError(f"prompt: {positions}, expected at least one left for a new token")
            max_new_tokens = options.max_new_tokens or min(DEFAULT_NEW_TOKENS, room)
            if max_new_tokens > room:
                raise ValueError(f"max_new_tokens: {positions}, expected at most {room}, got {max_new_tokens}")
            seed = (first_seed + index) % 2**63
            weighed = {name: float(weight) for name, weight in (chosen or {}).items()}
            requests.append(Request(token_ids, alpha, weighed, int(max_new_tokens), seed))
        return requests


def load(
    base: Source,
    attributes: Mapping[str, Source] | None = None,
    *,
    anchor: Source | None = None,
    draft: Source | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Model:
    recipe = Recipe.of(base, attributes, anchor=anchor, draft=draft, tokenizer=tokenizer)
    with recipe.locate_errors():
        models = ensemble.load(
            recipe.base, recipe.attributes, anchor=recipe.anchor, draft=recipe.draft, tokenizer=recipe.tokenizer,
            dtype=dtype, device=device,
        )  # fmt: skip
    return Model(models, recipe.pin(models.describe()))


# one description, of the function that does it
load.__doc__ = f"""{ensemble.load.__doc__}
    Instead of the base and its attributes, a recipe: a .yaml file, or a folder that holds mpg.yaml. Its keys: base and
    attributes (required), anchor, draft, tokenizer (paths are relative to the file), weights, presets (weights by name)
    and options (of `mpg.Options`). What is given beside it goes before it.
    """


def _as_list(prompt: Any) -> tuple[list[Prompt], bool]:
    """The prompts of a call, and whether they were given as a list of them."""
    if isinstance(prompt, str):
        return [prompt], False
    if isinstance(prompt, (list, tuple)) and prompt:
        if _is_all(prompt, Mapping) or _is_all(prompt, numbers.Integral):
            return [prompt], False
        if all(isinstance(part, str) or _is_all(part, Mapping) or _is_all(part, numbers.Integral) for part in prompt):
            return list(prompt), True
    raise ValueError(f"prompt: expected text, messages, token ids, or a list of one of these, got {prompt!r}")


def _is_all(parts: Any, kind: type) -> bool:
    return isinstance(parts, (list, tuple)) and all(isinstance(p, kind) and not isinstance(p, bool) for p in parts)
