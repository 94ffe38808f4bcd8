"""The study's pictures, from its scores: the same bytes whenever they are drawn by one matplotlib, which they name.

Knows how to draw; what a picture says is `reproduction`'s business. A picture without scores is not drawn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mpg.evaluate import tune
from mpg.paper.statistics import Estimate
from scores import (
    RESULTS,
    TARGET_TEXTS,
    Rows,
    distance,
    enumerated,
    perplexity,
    ratio,
    read,
    share_of,
    share_of_round,
    trait,
)

DPI = 110
BOUNDS = (1.25, 2.0, 5.0, 10.0)
BOUND_TICKS = (1, 1.25, 1.5, 2, 3, 5, 10)
METHODS = {"soups": "C0", "best-soups": "C9", "geometric": "C1", "anchored": "C2"}
METHODS |= {"arithmetic-scr": "C4", "geometric-scr": "C5", "pp": "C6", "token-rs": "C8", "seq-rs": "C3"}
METHODS["base"] = "0.3"
WAYS = {"own adapter, weight below 0": "E=-", "opposite pole's adapter": "I="}
TARGETS = {"geometric": "C1", "anchored": "C2", "arithmetic": "C3"}


def draw_all(folder: Path) -> list[str]:
    """Draw every picture whose scores are there. out: their names"""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, figure in PICTURES.items():
        if (picture := figure()) is not None:
            picture.savefig(folder / f"{name}.png", dpi=DPI)
            drawn.append(name)
    for path in sorted(RESULTS.glob("tune-*.jsonl")):
        trials = tuned(path)
        if any(trials):
            _, type_name, search = path.stem.split("-")
            tune.plot(trials, folder / f"{path.stem}.png", f"{type_name}, {search}")
            drawn.append(path.stem)
    return drawn


def tuned(path: Path) -> list[dict[str, Any]]:
    """The trials of a history."""
    return [row for row in map(json.loads, path.read_text().splitlines()[1:]) if "trial" in row]


def _bars(axes: Any, xs: Sequence[float], estimates: Sequence[Estimate], **how: Any) -> None:
    """Points with their intervals."""
    values = [e.value for e in estimates]
    spread = [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]
    axes.errorbar(xs, values, spread, capsize=2, ms=4, lw=1.2, **how)


def _plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """These numbers on a logarithmic axis, as one would say them."""
    axis.set_ticks(values, [f"{value:g}" for value in values])
    axis.set_ticks([], minor=True)


def delivered() -> Figure | None:
    """Share over chunk sizes, by bound: of all tokens, and of a chunk's first one under both scores."""
    if share_of("arithmetic", 4, 4, 2.0) is None:
        return None
    figure = Figure(figsize=(11.6, 3.6), layout="constrained")
    shares: dict[str, Callable[[int, float], Estimate | None]] = {
        "all tokens, arithmetic score": share_of_round,
        "first token, arithmetic score": lambda k, bound: share_of("arithmetic", 4, k, bound),
        "first token, geometric score": lambda k, bound: share_of("geometric", 4, k, bound),
    }
    panels = figure.subplots(1, len(shares), sharey=True)
    sizes = range(1, 9)
    for axes, (title, share) in zip(panels, shares.items(), strict=True):
        for index, bound in enumerate(BOUNDS):
            own = {k + 0.06 * index: estimate for k in sizes if (estimate := share(k, bound))}
            _bars(axes, list(own), list(own.values()), fmt="o-", label=f"M = {bound:g}")
        axes.axhline(1, color="0.7", lw=0.8)
        axes.axhline(0, color="0.7", lw=0.8)
        axes.set(title=title, xlabel="k, tokens a chunk", ylim=(-0.05, 1.25))
    panels[0].set_ylabel("share of the intended shift (target = 1)")
    panels[-1].legend(fontsize="small")
    return figure


def bound() -> Figure | None:
    """Share over the bound, with the bounds that runs end with; dotted, that of a chunk's first token."""
    header, runs = read("laws-ESTP")
    if "rounds" not in runs:
        return None
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for index, k in enumerate((1, 2, 4, 8)):
        own = [share_of_round(k, m) for m in header["bounds"]]
        _bars(axes, header["bounds"], [e for e in own if e], fmt="o-", color=f"C{index}", label=f"k = {k}")
        first = [share_of("arithmetic", 4, k, m) for m in header["bounds"]]
        axes.plot(header["bounds"], [e.value for e in first if e], ":", color=f"C{index}", lw=1)
    for index, name in enumerate(name for name in runs if name.startswith("scr") and name != TARGET_TEXTS):
        ends = sorted(math.e ** row["log_bound"] for row in runs[name])
        of_run = {"ms": 9, "color": f"C{4 + index}", "label": f"M at the end of a text, {name}"}
        axes.plot(ends, [-0.08 - 0.06 * index] * len(ends), "|", **of_run)
    axes.set(xscale="log", xlabel="M, the bound", ylabel="share of the intended shift (target = 1)")
    _plain_ticks(axes.xaxis, BOUND_TICKS)
    axes.legend(fontsize="x-small")
    return figure


def attributes() -> Figure | None:
    """Share and the target's distance from the base over the number of attributes."""
    sizes = [n for n in range(1, 9) if share_of("arithmetic", n, 4, 2.0)]
    if not sizes:
        return None
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for label, k, style, share in (
        ("k = 1", 1, "o-", share_of_round), ("k = 4, all tokens", 4, "o-", share_of_round),
        ("k = 4, first token of a chunk", 4, "s--", lambda k, bound, n: share_of("arithmetic", n, k, bound)),
    ):  # fmt: skip
        own = [share(k, 2.0, n) for n in sizes]
        if all(own):
            _bars(axes, sizes, [e for e in own if e], fmt=style, label=f"SCR, {label}, M = 2")
    axes.axhline(1, color="0.7", lw=0.8)
    axes.set(xlabel="N, attributes of equal weight", ylabel="share delivered (target = 1)", ylim=(-0.05, 1.1))
    axes.set_xticks(sizes)
    axes.legend(fontsize="small")
    return figure


def distances() -> Figure | None:
    """Total variation of the next token's exact law from the target's, over the bound."""
    base = distance("base")
    if base is None:
        return None
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    bounds = read("first-tokens")[0]["bounds"]
    for k in range(1, len(enumerated()[0]["chunks"]) + 1):
        own = [distance(f"k={k} M={m:g}") for m in bounds]
        _bars(axes, bounds, [e for e in own if e], fmt="o-", label=f"k = {k}")
    axes.axhline(base.value, color="0.4", ls="--", lw=1, label="the base itself")
    axes.set(xscale="log", xlabel="M, the bound", ylabel="total variation from the target", ylim=(0, None))
    _plain_ticks(axes.xaxis, BOUND_TICKS)
    axes.legend(fontsize="small")
    return figure


def _front(cost: bool) -> Figure | None:
    _, runs = read("front")
    if not runs:
        return None
    figure = Figure(figsize=(6.8, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (method, colour) in enumerate(METHODS.items()):
        own = sorted((name for name in runs if name.split()[0] == method), key=_weight)
        traits = [ratio(runs[name], trait) for name in own]
        if not own:
            continue
        x = [_forwards(runs[name]) if cost else perplexity(runs[name]) for name in own]
        sides = {"xerr": [[e.value - e.low for e in x], [e.high - e.value for e in x]]} if not cost else {}
        spread = [[e.value - e.low for e in traits], [e.high - e.value for e in traits]]
        values = [e.value * (1 + 0.01 * (index - len(METHODS) / 2) if cost else 1) for e in x]  # side by side
        axes.errorbar(values, [e.value for e in traits], spread, fmt="o-", color=colour, capsize=2, ms=4, lw=1,
                      label=method, **sides)  # fmt: skip
        for name, place, height in zip(own, values, traits, strict=True):
            axes.annotate(f" {name.partition(' ')[2]}", (place, height.value), fontsize=7, color=colour)
    axes.set(xlabel="forwards a token" if cost else "perplexity under the base", ylabel="mean P(pole), E S T P")
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis, (1, 2, 3, 5, 10, 20) if cost else (2, 3, 4, 6, 8, 12, 20, 30))
    axes.legend(fontsize="x-small")
    return figure


def _weight(name: str) -> float:
    return float(name.partition(" ")[2] or 0)


def _forwards(rows: Rows) -> Estimate:
    return ratio(rows, lambda row: row["calls"] * row["tokens"], lambda row: row["tokens"])


def negative() -> Figure | None:
    """P(E) and perplexity of both ways to take E away."""
    _, runs = read("negative")
    if not any("E=-" in name for name in runs):
        return None
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for target, colour in TARGETS.items():
        for (way, sign), marker in zip(WAYS.items(), ("o-", "s--"), strict=True):
            of_sizes = {float(name.split(sign)[1]): name for name in runs if f"{target} T=1,{sign}" in name}
            sizes, own = sorted(of_sizes), [of_sizes[size] for size in sorted(of_sizes)]
            if own:
                first = ratio(runs["geometric T=1"], lambda row: row["traits"]["EI"])
                traits = [first, *(ratio(runs[name], lambda row: row["traits"]["EI"]) for name in own)]
                how = {"fmt": marker, "color": colour, "label": f"{target}, {way}"}
                _bars(panels[0], [0, *sizes], traits, **how)
                nats = [perplexity(runs["geometric T=1"]), *(perplexity(runs[name]) for name in own)]
                _bars(panels[1], [0, *sizes], nats, **how)
    panels[0].set(xlabel="size of the weight", ylabel="P(E) by the judge")
    panels[1].set(xlabel="size of the weight", ylabel="perplexity under the base", yscale="log")
    _plain_ticks(panels[1].yaxis, (2, 3, 4, 5, 6, 8))
    panels[0].legend(fontsize=6)
    return figure


def empty() -> Figure | None:
    """How often an arithmetic row is empty, by weights."""
    _, runs = read("rows")
    if not runs:
        return None
    figure = Figure(figsize=(7.4, 3.2), layout="constrained")
    axes = figure.subplots()
    names = list(runs)
    for index, (key, label) in enumerate(
        {"empty": "of the vocabulary", "empty_nucleus": "of the draft's nucleus"}.items()
    ):
        own = [ratio(runs[name], lambda row, key=key: row[key], lambda row: row["tokens"]) for name in names]
        spread = [[e.value - e.low for e in own], [e.high - e.value for e in own]]
        axes.barh([i + 0.35 * index for i in range(len(names))], [e.value for e in own], 0.33, xerr=spread, label=label)
    axes.set_yticks([i + 0.18 for i in range(len(names))], [name.removeprefix("rows ") for name in names], fontsize=8)
    axes.set(xlabel="share of positions without any token of positive score", xlim=(0, 1.05))
    axes.legend(fontsize="small")
    return figure


def values() -> Figure | None:
    """The paper's Figure 4: the best value so far over trials."""
    histories = {path.stem: tuned(path) for path in sorted(RESULTS.glob("tune-*.jsonl"))}
    histories = {name: trials for name, trials in histories.items() if trials}
    if not histories:
        return None
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, trials in histories.items():
        best = [max(row["value"] for row in trials[: n + 1]) for n in range(len(trials))]
        line = axes.step(range(len(trials)), best, where="post", label=name.removeprefix("tune-"))[0]
        axes.plot(range(len(trials)), [row["value"] for row in trials], ".", color=line.get_color(), ms=3)
    axes.set(xlabel="adjustments", ylabel="value on the half tuned on")
    axes.legend(fontsize="small")
    return figure


PICTURES: dict[str, Callable[[], Figure | None]] = {
    "delivered": delivered, "bound": bound, "distances": distances, "attributes": attributes,
    "front": lambda: _front(False), "cost": lambda: _front(True), "negative": negative, "empty": empty,
    "values": values,
}  # fmt: skip
