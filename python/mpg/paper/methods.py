"""Every method of the paper's tables (arXiv 2511.01891, sections 4.2, 4.5 and 4.6) behind one call.

Knows which models, sampler and prompt make a method; nothing of how they run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mpg.frontend.contexts import contexts_of
from mpg.model import Contexts, Model, Prompt, Weights
from mpg.models.ensemble import Ensemble
from mpg.options import check_weights
from mpg.results import OnToken, Result


@dataclass(frozen=True)
class Method:
    """One method: what it does, and what it needs beside a base and attribute models."""

    summary: str
    needs: str


_SPECIALISED = "a specialised base: mpg.load(specialised, anchor=original)"
_POSITIVE_SUM = "weights of positive sum"
_DESCRIPTIONS = "descriptions of the attributes (built in for the letters of MBTI)"
METHODS: dict[str, Method] = {
    "base": Method("the base alone", "nothing"),
    "base-specialized": Method("the specialised base alone", _SPECIALISED),
    "pp": Method("preference prompting: the base, told the attributes", _DESCRIPTIONS),
    "pp-single": Method("preference prompting of every single attribute's model", _DESCRIPTIONS),
    "pp-specialized": Method("preference prompting of the specialised base", f"{_DESCRIPTIONS}; {_SPECIALISED}"),
    "dpo-single": Method("every single attribute's model alone", "nothing"),
    "soups": Method("DPO Soups: the adapters' weighted average", f"LoRA adapters of one model; {_POSITIVE_SUM}"),
    "mod": Method("MOD: the attribute models' logits, averaged by weight", _POSITIVE_SUM),
    "seq-rs": Method("rejection sampling of whole texts", _POSITIVE_SUM),
    "token-rs": Method("rejection sampling token by token", _POSITIVE_SUM),
    "scr": Method("SCR with the base as reference", _POSITIVE_SUM),
    "scr-dpo-single": Method(
        "SCR with every single attribute's model as reference, the anchor being the original", _POSITIVE_SUM
    ),
    "scr-specialized": Method("SCR with the specialised base as reference", f"{_POSITIVE_SUM}; {_SPECIALISED}"),
}
SINGLE_METHODS = ("pp-single", "dpo-single", "scr-dpo-single")  # one text per attribute; tables average over them
PROMPTED_METHODS = ("pp", "pp-single", "pp-specialized")
PAPERS_DRAW = {"temperature": 0.7, "top_p": 0.9}  # section 4.1, of every method
DESCRIPTIONS = {
    "E": "outgoing; energised by company; quick to speak and to act",
    "I": "reserved; energised by quiet; thinks before speaking",
    "S": "practical; trusts concrete details, facts and experience",
    "N": "imaginative; drawn to ideas, patterns and what could be",
    "T": "logical; decides by analysis and says plainly what is wrong",
    "F": "warm; decides by how people feel and what they value",
    "J": "organised; makes plans, sets goals and keeps deadlines",
    "P": "flexible; keeps options open and takes things as they come",
}


def answer(
    model: Model,
    method: str,
    prompts: Sequence[Prompt],
    weights: Weights | None = None,
    *,
    contexts: Contexts | None = None,
    descriptions: Mapping[str, str] | None = None,
    raw: bool = False,
    on_token: OnToken = None,
    on_result: Callable[[str, int, Result], None] | None = None,
    **options: Any,
) -> dict[str, list[Result]]:
    """Answer prompts by one of the paper's methods. Where the base is a specialised one, those named so run it, and all
    others the anchor, which is the original: one model answers by every method.

    method        a name in `METHODS`
    prompts       a list of texts or conversations; also of token ids, except under preference prompting
    weights       as in `Model.generate`, for every prompt; the base alone ignores them
    contexts      as there, for every prompt
    descriptions  for preference prompting: what an attribute is, in words; goes before those in `DESCRIPTIONS`
    raw           as in `Model.generate`
    on_token      as there; under `SINGLE_METHODS` one attribute's texts after another's
    on_result     as there, before its arguments the key that the result will have
    options       of `Options`, but sampler and target; temperature is .7 and top_p .9 unless given; a recipe's
                  options do not count; what `trace` returns under mod is against the first attribute's model

    out: results in the order of the prompts: by attribute of nonzero weight under `SINGLE_METHODS`, else under "";
    their `weights` are those that the method looked at

    Raises ValueError, naming the argument, for an unknown method and where a method lacks what it needs.
    """
    sampler = sampler_of(method, options)
    models = model.models.with_contexts([contexts_of(contexts)])
    if method.endswith("-specialized") and models.is_same("base", "anchor"):
        raise ValueError(f"method: {method!r} needs {_SPECIALISED}; got a base that is the anchor")
    if not method.endswith("-specialized"):
        models = models.with_roles(base="anchor")
    requests = list(prompts)
    if isinstance(prompts, str) or not all(isinstance(request, (str, list, tuple)) for request in requests):
        raise ValueError(f"prompts: expected a list of prompts, got {prompts!r}")
    alpha: dict[str, float] = {}
    if method not in ("base", "base-specialized"):
        ordered = check_weights(model.recipe.weigh(weights), models.attribute_names, "geometric")
        alpha = {name: a for name, a in zip(models.attribute_names, ordered, strict=True) if a}
    if method in PROMPTED_METHODS:
        preference = _state_preference(alpha, {**DESCRIPTIONS, **(descriptions or {})})
        requests = [_prefix(request, preference) for request in requests]

    own = {name: value for name, value in options.items() if value is not None} | {"sampler": sampler}
    direct = {**PAPERS_DRAW, **own}

    def run(models: Ensemble, weights: Weights | None = None, name: str = "", **how: Any) -> list[Result]:
        def finish(index: int, result: Result) -> None:
            if on_result is not None:
                on_result(name, index, replace(result, weights=alpha))

        how |= {"raw": raw, "on_token": on_token, "on_result": finish}
        return [replace(result, weights=alpha) for result in Model(models).generate(requests, weights=weights, **how)]

    if method in ("pp-single", "dpo-single"):
        return {name: run(models.with_roles(base=name), None, name, **direct, target="base") for name in alpha}
    if method == "scr-dpo-single":
        return {name: run(models.with_roles(base=name), alpha, name, **own) for name in alpha}
    if method == "soups":
        merge_weights = _average(method, alpha)
        merged = models.merge(list(merge_weights), torch.tensor(list(merge_weights.values()), device=models.device))
        return {"": run(merged.with_roles(base="merged"), **direct, target="base")}
    if method == "mod":  # weights add up to 1, so the base cancels
        return {"": run(models, _average(method, alpha), **direct, target="geometric")}
    if sampler != "direct":  # seq-rs, token-rs, scr, scr-specialized
        return {"": run(models, alpha, **own)}
    return {"": run(models, **direct, target="base")}  # base, pp and their specialised forms


def sampler_of(method: str, options: Mapping[str, Any]) -> str:
    """The sampler that a method runs. Raises ValueError for an unknown one, and for options that it sets itself."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    for name in ("sampler", "target"):
        if options.get(name) is not None:
            raise ValueError(f"{name}: expected none beside method {method!r}, which sets it, got {options[name]!r}")
    return "scr" if method.startswith("scr") else method if method in ("seq-rs", "token-rs") else "direct"


def _average(method: str, alpha: Mapping[str, float]) -> dict[str, float]:
    """The weights divided by their sum."""
    total = sum(alpha.values())
    if total <= 0:
        raise ValueError(f"weights: method {method!r} averages, expected a positive sum, got {total:g} from {alpha!r}")
    return {name: a / total for name, a in alpha.items()}


def _state_preference(alpha: Mapping[str, float], descriptions: Mapping[str, str]) -> str:
    """The attributes of positive weight as traits to show, those of negative weight as traits to avoid."""
    if missing := [name for name in alpha if name not in descriptions]:
        raise ValueError(f"descriptions: preference prompting expected one for {missing[0]!r}, got none")
    shown = "".join(f"- {descriptions[name]}\n" for name, a in alpha.items() if a > 0)
    avoided = "".join(f"- {descriptions[name]}\n" for name, a in alpha.items() if a < 0)
    show = f"Answer as a person with these traits:\n{shown}" if shown else ""
    return show + (f"Answer as a person without these traits:\n{avoided}" if avoided else "")


def _prefix(prompt: Any, text: str) -> Any:
    """The prompt with a text before its user's first words."""
    if isinstance(prompt, str):
        return f"{text}\n{prompt}" if prompt else prompt
    for index, message in enumerate(prompt):
        if isinstance(message, Mapping) and message.get("role") == "user" and message.get("content"):
            return [*prompt[:index], {**message, "content": f"{text}\n{message['content']}"}, *prompt[index + 1 :]]
    raise ValueError(f"prompts: preference prompting expected text or a conversation with the user's, got {prompt!r}")
