"""`mpg generate`: prompts, from the command line, standard input or a file, and their answers as they are done."""

from __future__ import annotations

import dataclasses
import json
import secrets
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from mpg.app.cli import arguments
from mpg.app.cli.prompts import Line, read_prompts, read_text
from mpg.files import check_writable, whole_file
from mpg.options import DRAFTS, Options, check_weights, parse_pair

if TYPE_CHECKING:
    from mpg.recipe import Recipe
    from mpg.results import Result, Token


@arguments.clear_errors
def generate(
    prompt: Annotated[
        list[str] | None, typer.Option(help="A user message, or - for standard input; repeat it for a batch.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A file, or - for standard input: a prompt a line; or JSON, an object a line or a list of them, each "
            "with prompt or messages, and with weights, seed and any option where they differ."
        ),
    ] = None,
    weights: arguments.Weights = None,
    context: arguments.Contexts = None,
    models: arguments.Models = "demo",
    method: Annotated[
        str | None,
        typer.Option(help="A method of the paper's tables instead of sampler and target: mpg info --methods."),
    ] = None,
    describe: Annotated[
        list[str] | None, typer.Option(help="NAME=TEXT: what the methods that prompt (pp, ...) say of an attribute.")
    ] = None,
    sampler: Annotated[str | None, arguments.option("sampler")] = None,
    target: Annotated[str | None, arguments.option("target")] = None,
    max_new_tokens: Annotated[int | None, arguments.option("max_new_tokens")] = None,
    temperature: Annotated[float | None, arguments.option("temperature")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the first prompt; the next ones count up. Default: drawn.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends a text; repeat the option.")] = None,
    batch_size: Annotated[int | None, arguments.option("batch_size")] = None,
    settings: arguments.Settings = None,
    raw: arguments.Raw = False,
    draft: Annotated[str | None, arguments.option("draft", "; or a model's folder, to draft with it.")] = None,
    anchor: Annotated[
        str | None, typer.Option(help="What the attributes were trained on where it is not the base: a model's folder.")
    ] = None,
    device: arguments.Device = None,
    device_map: Annotated[
        str | None, typer.Option(help="NAME=DEVICE,...: where the model of base, anchor, draft or an attribute goes.")
    ] = None,
    dtype: arguments.Dtype = None,
    quantize: arguments.Quantize = None,
    graphs: arguments.Graphs = False,
    allow_other_base: arguments.OtherBase = False,
    merge_adapters: arguments.MergeAdapters = False,
    allow_pickle: arguments.AllowPickle = False,
    trace: Annotated[
        Path | None, typer.Option(help="Also write a page (.html) that shows which attribute pushed which token.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON Lines on stdout, one a text, and nothing else.")
    ] = False,
) -> None:
    """Answer prompts as a weighted combination of attributes."""
    lines = [Line(read_text("prompt", text).rstrip("\r\n") if text == "-" else text) for text in prompt or ()]
    lines += read_prompts(prompts) if prompts is not None else []
    if not lines:
        raise ValueError("prompt: expected --prompt TEXT or --prompts FILE, got neither")
    if stop and not all(stop):
        raise ValueError(f"stop: expected strings that are not empty, got {stop!r}")
    if trace is not None:
        if trace.suffix != ".html":
            raise ValueError(f"trace: expected a file whose name ends in .html, got {str(trace)!r}")
        check_writable("trace", trace)
    own_draft = None if draft in (None, *DRAFTS) else draft
    options: dict[str, Any] = {
        "sampler": sampler, "target": target, "max_new_tokens": max_new_tokens, "temperature": temperature,
        "seed": seed, "stop_strings": stop or None, "batch_size": batch_size, "draft": "model" if own_draft else draft,
    }  # fmt: skip
    from mpg.frontend.contexts import contexts_of
    from mpg.paper.methods import PROMPTED_METHODS, SINGLE_METHODS, answer
    from mpg.recipe import parse_settings

    options |= parse_settings(settings, options)
    if describe and method not in PROMPTED_METHODS:
        raise ValueError(f"describe: expected a method among {', '.join(PROMPTED_METHODS)}, got {method!r}")
    descriptions = dict(parse_pair("describe", "NAME=TEXT", text) for text in describe or ())
    named = [] if device_map is None else device_map.split(",")
    places = dict(parse_pair("device_map", "NAME=DEVICE", text) for text in named) or None
    recipe, seed, contexts = arguments.read_recipe(models), options.pop("seed"), arguments.read_contexts(context)
    targets = []
    for line in lines:  # before minutes of loading
        line.contexts = contexts | line.contexts
        line.options = options | line.options | ({} if trace is None else {"trace": True})
        line.weights = weights if line.weights is None else line.weights
        with line.locate_errors():
            recipe.weigh(line.weights)
            targets.append(_check({"seed": seed, **line.options}, recipe, method).target)
    answers = _Answers(lines, seed, as_json, streams=not as_json and method not in SINGLE_METHODS)
    model = arguments.load(
        models, any(line.contexts for line in lines), device=device, dtype=dtype, quantize=quantize, draft=own_draft,
        anchor=anchor, device_map=places, graphs=graphs, allow_other_base=allow_other_base,
        merge_adapters=merge_adapters, allow_pickle=allow_pickle,
    )  # fmt: skip
    for index, (line, of_line) in enumerate(zip(lines if method is None else (), targets, strict=False)):
        with line.locate_errors():
            names = model.models.with_contexts([contexts_of(line.contexts)]).attribute_names
            weighed = model.recipe.weigh(line.weights, of_line)
            if weighed is not None or line.options.get("guidance_scale") is None:
                check_weights(weighed, names, of_line)
            model.encode(line.prompt, raw=raw, name=f"prompt[{index}]")
    is_hidden = sys.stdout.isatty() or not arguments.err.is_terminal  # the texts are progress enough
    bar = Progress(console=arguments.err, disable=is_hidden, transient=True, redirect_stdout=False)
    with bar as progress, closing(answers):
        task = progress.add_task("tokens", total=None)

        def on_token(token: Token) -> None:
            progress.advance(task)
            answers.stream(token)

        for indices in _alike(lines, method):
            how = {"raw": raw, "on_token": on_token, **lines[indices[0]].options}
            how["seed"] = [answers.seeds[index] for index in indices]
            asked, weighed = [lines[index].prompt for index in indices], [lines[index].weights for index in indices]
            show = answers.of(indices)
            if method is None:
                texts = [lines[index].contexts for index in indices]
                model.generate(asked, weights=weighed, contexts=texts, on_result=partial(show, ""), **how)
            else:
                how |= {"contexts": lines[indices[0]].contexts, "descriptions": descriptions}
                answer(model, method, asked, weighed[0], on_result=show, **how)
    if trace is not None:
        from mpg.results import to_html

        with whole_file("trace", trace) as file:
            file.write_text(to_html(answers.shown), encoding="utf-8")


def _check(options: dict[str, Any], recipe: Recipe, method: str | None) -> Options:
    """The options of a prompt. Refuses what can be refused without the models."""
    from mpg.frontend.hf_generate import check_options
    from mpg.paper.methods import sampler_of

    if isinstance(options["seed"], list):
        raise ValueError(f"seed: expected one number, got {options['seed']!r}")
    if method is None:
        return check_options(options, recipe.options)
    return check_options({**options, "sampler": sampler_of(method, options)}, {})


def _alike(lines: list[Line], method: str | None) -> list[list[int]]:
    """The indices of lines that one call can answer: of the same options, and under a method of the same weights
    and contexts."""
    calls: dict[str, list[int]] = {}
    for index, line in enumerate(lines):
        shared = {name: value for name, value in line.options.items() if name != "seed"}
        key = json.dumps([shared, method and [line.weights, line.contexts]], sort_keys=True, default=str)
        calls.setdefault(key, []).append(index)
    return list(calls.values())


class _Answers:
    """The texts of a run, printed in the order of their prompts, each as soon as those before it are printed; where the
    run ends early, those that are done.

    seeds  of the first text of each prompt
    """

    def __init__(self, lines: list[Line], seed: int | None, as_json: bool, *, streams: bool) -> None:
        first = secrets.randbits(32) if seed is None else seed
        self.lines, self.as_json = lines, as_json
        self.seeds: list[int] = []
        self.prompts: list[int] = []  # of each text the index of its prompt
        for index, line in enumerate(lines):
            own = line.options.get("seed")
            self.seeds.append(int(first + len(self.prompts) if own is None else own) % 2**63)
            self.prompts += [index] * (line.options.get("num_return_sequences") or 1)
        self.streams = streams and len(self.prompts) == 1
        self.waiting: dict[str, dict[int, Result]] = {}  # by attribute under a method for single ones
        self.num_shown: dict[str, int] = {}
        self.shown: list[Result] = []
        self.is_begun = False  # the one text that is streamed

    def close(self) -> None:
        if self.is_begun and not self.shown:
            print(flush=True)  # what follows on the terminal has a line of its own
        for name, results in self.waiting.items():
            for text in sorted(results):
                self._show(name, text, results[text])

    def of(self, indices: list[int]) -> Callable[[str, int, Result], None]:
        """What a call that answers these prompts does with each of its results."""
        texts = [text for text, index in enumerate(self.prompts) if index in set(indices)]

        def take(name: str, index: int, result: Result) -> None:
            waiting = self.waiting.setdefault(name, {})
            waiting[texts[index]] = result
            while (text := self.num_shown.setdefault(name, 0)) in waiting:
                self.num_shown[name] += 1
                self._show(name, text, waiting.pop(text))

        return take

    def stream(self, token: Token) -> None:
        if self.streams:
            self.is_begun = True
            print(token.text, end="", flush=True)

    def _show(self, name: str, text: int, result: Result) -> None:
        index = self.prompts[text]
        self.shown.append(result)
        if self.as_json:
            answer = {"index": index, "attribute": name or None, **dataclasses.asdict(result)}
            print(json.dumps(answer, allow_nan=False), flush=True)
            return
        shown = "" if self.streams else f"> {name and f'[{name}] '}{self.lines[index].words()}\n{result.text}\n"
        print(shown, flush=True)
        arguments.say(result.summary(), "dim")
