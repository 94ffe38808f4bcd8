"""The `mpg` command: demo, generate, chat, check, info. Knows how to read arguments and print, no more."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

import mpg
import mpg_ext
from mpg.app.chat import Chat, parse_setting
from mpg.app.chat import run as run_chat
from mpg.demo import MODELS as DEMO_MODELS
from mpg.demo.corpus import DEMO_QUESTIONS, HELD_OUT_QUESTIONS
from mpg.demo.show import show
from mpg.options import DRAFTS, SAMPLERS, TARGETS
from mpg.paper.check import PROMPTS as NEUTRAL_PROMPTS
from mpg.paper.check import TARGETS as CHECK_TARGETS
from mpg.paper.check import check as run_check
from mpg.paper.check import check_plot, read_prompts, render
from mpg.paper.check import plot as draw_report
from mpg.paper.methods import METHODS, PROMPTED_METHODS, SINGLE_METHODS, answer, sampler_of
from mpg.recipe import Recipe

FEW_PARAMETERS = 10**7  # models with fewer lose more to threads that wait for one another than the threads compute

app = typer.Typer(
    help="Text from several aligned language models at once, combined while decoding.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
err = Console(stderr=True)

Models = Annotated[
    str,
    typer.Option(
        "--models",
        help="'demo'; a recipe (.yaml) or a folder that holds mpg.yaml; or a base with adapters/NAME inside it.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="NAME=NUMBER,..., where attributes not named weigh 0, or a recipe's preset. Default: the recipe's."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: cuda where there is one.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, ... Default: the checkpoint's on cuda, else float32.")
]
Graphs = Annotated[bool, typer.Option("--graphs", help="Capture forwards as CUDA graphs; not yet run on a GPU.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


@app.command()
def demo(
    questions: Annotated[int, typer.Option(min=1, max=len(DEMO_QUESTIONS), help="How many questions.")] = 3,
    held_out: Annotated[int, typer.Option(min=2, max=100, help="How many more to measure the traits over.")] = 100,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Device = None,
) -> None:
    """Answer a few questions as the base, as E, as T, and as both: the shipped demo models, offline."""
    with _clear_errors():
        # without a terminal five columns need more than the usual 80 characters
        console = Console(width=None if sys.stdout.isatty() else 160)
        show(console, _load("demo", device, None), DEMO_QUESTIONS[:questions], held_out, seed)


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Option(help="A user message; repeat the option for a batch.")],
    weights: Weights = None,
    models: Models = "demo",
    method: Annotated[
        str | None,
        typer.Option(help="A method of the paper's tables instead of sampler and target: " + " | ".join(METHODS)),
    ] = None,
    describe: Annotated[list[str] | None, typer.Option(help="NAME=TEXT: what method pp says of an attribute.")] = None,
    anchor: Annotated[
        str | None, typer.Option(help="The attributes' own base where it is not --models: a folder.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help=" | ".join(SAMPLERS) + ". Default: the recipe's, exact.")] = None,
    target: Annotated[str | None, typer.Option(help=" | ".join(TARGETS) + ". Default: the sampler's own.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Default: 128 or what the positions leave.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the target row, or of the draft under scr.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus mass of the same row.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first prompt; the next ones count up.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends a text; repeat the option.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Prompts decoded at once; the others wait. Default: 32.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Tokens that the target row keeps, 0 for all.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Share of the largest probability that a token needs.")] = None,
    mixture_span: Annotated[str | None, typer.Option(help="arithmetic: token | sequence | a number of tokens.")] = None,
    draft: Annotated[str | None, typer.Option(help="exact: reference | lookup | merged | a model's folder.")] = None,
    verify: Annotated[str | None, typer.Option(help="exact: block | token.")] = None,
    adaptive: Annotated[bool | None, typer.Option("--adaptive", help="exact: adapt k to what is accepted.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Take prompts verbatim, without the chat template.")] = False,
    chunk_size: Annotated[int | None, typer.Option(help="exact, scr: k, tokens drafted a round.")] = None,
    window: Annotated[int | None, typer.Option(help="scr: W, scores the bound looks back on.")] = None,
    gamma: Annotated[float | None, typer.Option(help="scr: safety margin of the bound.")] = None,
    tau: Annotated[float | None, typer.Option(help="scr: variance below which the bound freezes.")] = None,
    initial_bound: Annotated[float | None, typer.Option(help="scr: M_0, the bound of the warm-up.")] = None,
    tries: Annotated[int | None, typer.Option(help="token-rs, seq-rs: candidates of one token or text.")] = None,
    empty: Annotated[str | None, typer.Option(help="scr: raise | base, where nothing can be accepted.")] = None,
    observed: Annotated[bool | None, typer.Option(help="scr: push every tested score, not only the accepted.")] = None,
    device: Device = None,
    device_map: Annotated[
        str | None, typer.Option(help="NAME=DEVICE,...: where the model of base, anchor, draft or an attribute goes.")
    ] = None,
    dtype: Dtype = None,
    graphs: Graphs = False,
    as_json: Json = False,
) -> None:
    """Continue prompts as a weighted combination of attributes."""
    options = {
        "sampler": sampler, "target": target, "max_new_tokens": max_new_tokens, "temperature": temperature,
        "top_p": top_p, "seed": seed, "chunk_size": chunk_size, "window": window, "gamma": gamma, "tau": tau,
        "initial_bound": initial_bound, "tries": tries, "empty": empty, "observed": observed, "top_k": top_k,
        "min_p": min_p, "batch_size": batch_size,
        "mixture_span": int(mixture_span) if mixture_span and mixture_span.isdecimal() else mixture_span,
        "verify": verify, "adaptive": adaptive, "draft": draft if draft in (None, *DRAFTS) else "model",
    }  # fmt: skip
    with _clear_errors():
        if method is not None and (sampler is not None or target is not None):
            given = f"sampler {sampler!r}" if sampler is not None else f"target {target!r}"
            raise ValueError(f"method: expected no sampler and no target beside {method!r}, got {given}")
        if describe and method not in PROMPTED_METHODS:
            raise ValueError(f"describe: expected a method among {', '.join(PROMPTED_METHODS)}, got {method!r}")
        if stop and not all(stop):
            raise ValueError(f"stop: expected strings that are not empty, got {stop!r}")
        recipe = Recipe.of(_place(models))
        recipe.weigh(weights)  # before minutes of loading, as the options
        if method is None:
            mpg.Options.of(options, recipe.options)
        else:
            mpg.Options.of({**options, "sampler": sampler_of(method)})
        descriptions = _parse_pairs("describe", "NAME=TEXT", describe or [])
        places = None if device_map is None else _parse_pairs("device_map", "NAME=DEVICE", device_map.split(","))
        own_draft = None if draft in (None, *DRAFTS) else draft
        model = _load(models, device, dtype, draft=own_draft, anchor=anchor, device_map=places, graphs=graphs)
        with Progress(console=err, disable=len(prompt) == 1, transient=True) as progress:
            task = progress.add_task("tokens", total=None)
            streamed = len(prompt) == 1 and not as_json and method not in SINGLE_METHODS

            def on_token(token: mpg.Token) -> None:
                progress.advance(task)
                if streamed:
                    print(token.text, end="", flush=True)

            how: dict[str, Any] = {"raw": raw, "on_token": on_token, "stop_strings": stop or None, **options}
            if method is None:
                answers = {"": model.generate(list(prompt), weights=weights, **how)}
            else:
                answers = answer(model, method, prompt, weights, descriptions=descriptions, **how)
    if as_json:
        print(json.dumps(_json_of(answers), allow_nan=False))
        return
    for name, results in answers.items():
        for text, result in zip(prompt, results, strict=True):
            print() if streamed else print(f"> {name and f'[{name}] '}{text}\n{result.text}\n")
            err.print(result.summary(), style="dim")


@app.command()
def chat(
    weights: Weights = None,
    models: Models = "demo",
    system: Annotated[str, typer.Option(help="A system prompt, where the chat template takes one.")] = "",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE: an option, such as sampler=direct; repeat it.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    graphs: Graphs = False,
) -> None:
    """Talk with a weighted combination; weights, sampler and options change on the way. /help lists the commands."""
    with _clear_errors():
        options = dict(parse_setting(setting) for setting in settings or ())
        recipe = Recipe.of(_place(models))
        recipe.weigh(weights)  # before minutes of loading, as the options
        mpg.Options.of(options, recipe.options)
        run_chat(Chat(_load(models, device, dtype, graphs=graphs), weights, options, system), Console())


@app.command()
def info(
    models: Annotated[str | None, typer.Option("--models", help="Describe these models too.")] = None,
    methods: Annotated[bool, typer.Option("--methods", help="List the methods of the paper's tables instead.")] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show the build, the devices and, if asked, the models; or the methods."""
    if methods:
        if as_json:
            print(json.dumps({"methods": {name: dataclasses.asdict(method) for name, method in METHODS.items()}}))
            return
        table = Table("method", "what it is", "what it needs")
        for name, method in METHODS.items():
            table.add_row(name, method.summary, method.needs)
        Console().print(table)
        return
    with _clear_errors():
        facts: dict[str, Any] = {
            "mpg": mpg.__version__,
            "torch": torch.__version__,
            "build": mpg_ext.build_info(),
            "devices": ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))],
            "samplers": list(SAMPLERS),
            "targets": list(TARGETS),
            "statistics": mpg.STATISTICS,
        }
        if models is not None:
            model = _load(models, device, None)
            facts["models"] = model.models.describe()
            facts["recipe"] = {name: getattr(model.recipe, name) for name in ("weights", "presets", "options")}
    if as_json:
        print(json.dumps(facts))
    else:
        Console().print(facts)


@app.command()
def check(
    weights: Weights = None,
    models: Models = "demo",
    prompts: Annotated[
        Path | None, typer.Option(help="A prompt a line, or a JSON list. Default: the demo's held-out, else neutral.")
    ] = None,
    target: Annotated[str, typer.Option(help=" | ".join(CHECK_TARGETS))] = "geometric",
    max_new_tokens: Annotated[int | None, typer.Option(help="Default: 128 or what the positions leave.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Texts per prompt and sampler.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of the first text; all others count up.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that are written at once.")] = 32,
    plot: Annotated[Path | None, typer.Option(help="Draw delivered share against depth into this image file.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Take prompts verbatim, without the chat template.")] = False,
    draft: Annotated[str | None, typer.Option(help="A model's folder: exact drafts with it too.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure how much of the intended shift each sampler delivers on these models, and at what cost."""
    with _clear_errors():
        if plot is not None:
            check_plot(plot)
        if prompts is not None:
            chosen = read_prompts(prompts)
        else:
            chosen = [question.text for question in HELD_OUT_QUESTIONS] if models == "demo" else list(NEUTRAL_PROMPTS)
            err.print(f"prompts: {len(chosen)} that come with mpg; --prompts FILE measures on yours", style="dim")
        model = _load(models, device, dtype, draft)
        with Progress(console=err, transient=True) as progress:
            tasks: dict[str, TaskID] = {}

            def on_progress(label: str, done: int, total: int) -> None:
                if label not in tasks:
                    tasks[label] = progress.add_task(label, total=total)
                progress.update(tasks[label], completed=done)

            report = run_check(
                model, weights, chosen, target=target, max_new_tokens=max_new_tokens, num_seeds=seeds,
                seed=seed, batch_size=batch_size, raw=raw, on_progress=on_progress,
            )  # fmt: skip
    if as_json:
        print(json.dumps(dataclasses.asdict(report), allow_nan=False))
    else:
        # without a terminal the tables need more than the usual 80 characters
        Console(width=None if sys.stdout.isatty() else 120).print(render(report))
    if plot is not None:
        with _clear_errors():
            draw_report(report, plot)


def _parse_pairs(option: str, form: str, items: list[str]) -> dict[str, str]:
    """What an option's items, of a form like NAME=TEXT, say of each name."""
    pairs = {}
    for item in items:
        name, _, text = (part.strip() for part in item.partition("="))
        if not name or not text:
            raise ValueError(f"{option}: expected {form}, got {item!r}")
        pairs[name] = text
    return pairs


def _json_of(answers: dict[str, list[mpg.Result]]) -> dict[str, Any]:
    """One object for the answer to one prompt, {"results": ...} for several prompts or attributes."""
    objects = {name: [dataclasses.asdict(result) for result in results] for name, results in answers.items()}
    if list(objects) != [""]:
        return {"results": {name: of_name[0] if len(of_name) == 1 else of_name for name, of_name in objects.items()}}
    return objects[""][0] if len(objects[""]) == 1 else {"results": objects[""]}


def _load(
    models: str,
    device: str | None,
    dtype: str | None,
    draft: str | None = None,
    anchor: str | None = None,
    device_map: dict[str, str] | None = None,
    graphs: bool = False,
) -> mpg.Model:
    place = _place(models)
    for name, folder in (("draft", draft), ("anchor", anchor)):
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"{name}: expected a model's folder, got {folder!r}")
    how: dict[str, Any] = dict(
        device=device, dtype=dtype, draft=draft, anchor=anchor, device_map=device_map, graphs=graphs
    )
    # transformers' bar over the shipped models is gone before it can be read
    with redirect_stderr(io.StringIO()) if models == "demo" else nullcontext():
        model = mpg.load(place, **how)
    if all(role["parameters"] < FEW_PARAMETERS for role in model.models.describe().values()):
        torch.set_num_threads(1)
    return model


def _place(models: str) -> Path:
    """The recipe or folder that --models means."""
    if models != "demo" and not Path(models).exists():
        raise ValueError(f"models: expected 'demo', a folder or a recipe, got {models!r}")
    return DEMO_MODELS if models == "demo" else Path(models)


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turn the library's errors about its input into one line on stderr and exit status 2."""
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        err.print(f"mpg: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
