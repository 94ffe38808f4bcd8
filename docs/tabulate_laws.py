"""The exact law of every sampler on one small example: writes the table in laws.md, and laws.png.

Knows what to compare and how to print it. The models are the tests' fakes, the loops are those that generate text.

    python docs/tabulate_laws.py
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests" / folder) for folder in ("decode", "ops", "proof")]

from fakes import FakeModels, enumerate_sampler, total_variation  # noqa: E402
from laws import Law, target_law  # noqa: E402
from mpg.decode import SAMPLERS  # noqa: E402
from mpg.decode.batch import Batch  # noqa: E402
from mpg.options import Options  # noqa: E402
from replaying import enumerate_branches  # noqa: E402

VOCAB_SIZE, NUM_TOKENS, CHUNK_SIZE = 4, 4, 4
PROMPT = (1, 0, 3, 1)
WEIGHTS = {"E": 0.5, "T": 0.5}  # sum 1: what SCR makes of any pair of equal weights
SIGNED_WEIGHTS = {"E": 0.9, "T": -0.6}
OTHER_NUM_TOKENS = 3
MIXTURE = {"target": "arithmetic"}
WHOLE_TEXTS = {"target": "arithmetic", "mixture_span": "sequence"}  # what seq-rs, which scores whole texts, aims at
TARGETS = ("arithmetic", "geometric")
BOUNDS = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 100.0)
BEGIN, END = "<!-- laws: written by docs/tabulate_laws.py -->", "<!-- end of laws -->"


@dataclass(frozen=True)
class Figures:
    """One sampler against one target.

    bias              total variation between its law over whole texts and the target's
    delivered         its mean combined log-ratio, placed between the base's (0) and the target's (1)
    tokens_per_round  tokens of a text / expected rounds
    """

    bias: float
    delivered: float
    tokens_per_round: float


def example() -> FakeModels:
    """Four-token models. For the merged adapter stands what it approximates, the geometric mean, with some noise."""
    models = FakeModels(VOCAB_SIZE, tuple(WEIGHTS), others={"draft": 0.3}, spread=0.5, seed=0)
    merged = sum(alpha * models.logits[name].log_softmax(-1) for name, alpha in WEIGHTS.items())
    models.logits["merged"] = merged + 0.1 * models.logits["E"].roll(1, 0)
    return models


def samplers() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of the table: its name and options; the target is still to be added."""
    yield "base", {"sampler": "direct", "target": "base"}
    yield "direct", {"sampler": "direct"}
    drafts = {"reference": "reference", "small model": "model", "merged": "merged", "lookup": "lookup"}
    for (name, draft), verify in itertools.product(drafts.items(), ("block", "token")):
        yield f"exact, {name}, {verify}", {"sampler": "exact", "draft": draft, "verify": verify}
    for bound in BOUNDS:
        yield f"scr, M = {bound:g}", {"sampler": "scr", "initial_bound": bound}
    for bound in (2.0, 10.0):
        yield f"token-rs, M = {bound:g}", {"sampler": "token-rs", "initial_bound": bound}


def measure(models: FakeModels, target: str, options: dict[str, Any]) -> Figures:
    """Enumerate one sampler and compare it with its target."""
    law, rounds = enumerate_law(models, **{"target": target, **options})
    wanted = target_law(models, PROMPT, NUM_TOKENS, WEIGHTS, target=target)
    base = target_law(models, PROMPT, NUM_TOKENS, WEIGHTS, target="base")
    zero, one = mean_log_ratio(models, base), mean_log_ratio(models, wanted)
    delivered = (mean_log_ratio(models, law) - zero) / (one - zero)
    return Figures(total_variation(law, wanted), delivered, NUM_TOKENS / rounds)


def enumerate_law(models: FakeModels, **options: Any) -> tuple[Law, float]:
    """The law of a sampler over texts of NUM_TOKENS tokens, and its expected number of rounds.

    With a token mixture, and the bound still at M_0, a round depends on nothing but the text before it: so every
    branch of one round of the production loop is walked after every text, and the rounds are chained.
    """
    chunk = {"chunk_size": CHUNK_SIZE} if options["sampler"] in ("exact", "scr") else {}
    checked = Options.of({**options, "temperature": 1.0, "top_p": 1.0, **chunk})
    reached, rounds = {(): 1.0}, 0.0
    law: Law = {}
    while reached:
        text = min(reached, key=len)
        prob = reached.pop(text)
        rounds += prob
        for branch_prob, longer in _walk_round(models, checked, text):
            into = law if len(longer) == NUM_TOKENS else reached
            into[longer] = into.get(longer, 0.0) + prob * branch_prob
    return law, rounds


def _walk_round(models: FakeModels, options: Options, text: tuple[int, ...]) -> Iterator[tuple[float, tuple[int, ...]]]:
    prompt = (*PROMPT, *text)

    def run(decide: Any, width: int) -> list[tuple[int, ...]]:
        weights = torch.tensor([list(WEIGHTS.values())] * width, dtype=torch.float64)
        seeds = torch.zeros(width, dtype=torch.int64)
        batch = Batch([prompt] * width, [NUM_TOKENS - len(text)] * width, weights, seeds, ())
        sampler = SAMPLERS[options.sampler](models, tuple(WEIGHTS), options)
        sampler.start(models.open([prompt] * width, sampler.roles, batch.capacity), batch, decide)
        sampler.round()
        assert not (batch.unusable | batch.empty).any()
        ends = zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True)
        return [tuple(row[len(PROMPT) : length]) for row, length in ends]

    return enumerate_branches(run)


def other_rows(models: FakeModels) -> Iterator[str]:
    """What a round's prefix does not determine, and so is enumerated whole, on texts of one token less.

    A row a case: the weights, then the bias to the row's target of the base, of the arithmetic target with a draw a
    token, and of the sampler.
    """
    exact = {"sampler": "exact", "draft": "reference", "chunk_size": OTHER_NUM_TOKENS}
    seq_rs = {"sampler": "seq-rs", "tries": 2, "initial_bound": 2.0}
    for name, weights, target, options in (
        ("direct, anchored", SIGNED_WEIGHTS, {"target": "anchored"}, {"sampler": "direct"}),
        ("exact, anchored", SIGNED_WEIGHTS, {"target": "anchored"}, exact),
        ("direct, mixture_span 2", WEIGHTS, {**MIXTURE, "mixture_span": 2}, {"sampler": "direct"}),
        ("exact, mixture_span 2", WEIGHTS, {**MIXTURE, "mixture_span": 2}, exact),
        ("exact, mixture_span sequence", WEIGHTS, WHOLE_TEXTS, exact),
        ("seq-rs, M = 2, 2 tries", WEIGHTS, WHOLE_TEXTS, seq_rs),
    ):
        asked = MIXTURE if options is seq_rs else target  # it has no such option
        unwarped = {"temperature": 1.0, "top_p": 1.0}
        law = enumerate_sampler(models, PROMPT, OTHER_NUM_TOKENS, weights, **asked, **options, **unwarped)
        laws = [
            target_law(models, PROMPT, OTHER_NUM_TOKENS, weights, **t) for t in ({"target": "base"}, MIXTURE, target)
        ]
        biases = (total_variation(law, laws[2]) for law in (*laws[:2], law))
        yield "| " + " | ".join([name, _spell(weights), *(f"{b:.3f}" if b > 1e-12 else "0" for b in biases)]) + " |"


def _spell(weights: dict[str, float]) -> str:
    return ", ".join(f"{name} {alpha:g}" for name, alpha in weights.items())


def mean_log_ratio(models: FakeModels, law: Law) -> float:
    """E sum_t sum_i alpha_i (log pi_i - log anchor) under a law over texts."""
    return sum(
        prob * alpha * float((models.log_row(name, prefix) - models.log_row("anchor", prefix))[text[i]])
        for text, prob in law.items()
        for i, prefix in enumerate((*PROMPT, *text[:i]) for i in range(NUM_TOKENS))
        for name, alpha in WEIGHTS.items()
    )


def mean_divergence(models: FakeModels) -> float:
    """KL(attribute || base) of one row, averaged over attributes and rows."""
    base = models.logits["base"].log_softmax(-1)
    rows = [models.logits[name].log_softmax(-1) for name in WEIGHTS]
    return sum(float((row.exp() * (row - base)).sum(-1).mean()) for row in rows) / len(rows)


def table_row(name: str, figures: list[Figures]) -> str:
    cells = [
        cell
        for f in figures
        for cell in (f"{f.bias:.3f}" if f.bias > 1e-12 else "0", f"{f.delivered + 0:.2f}", f"{f.tokens_per_round:.2f}")
    ]
    return f"| {' | '.join([name, *cells])} |"


def table_of(models: FakeModels, measured: dict[str, list[Figures]]) -> str:
    columns = [f"{target}: {figure}" for target in TARGETS for figure in ("bias", "delivered", "tokens a round")]
    return "\n".join([
        f"V = {VOCAB_SIZE}, {NUM_TOKENS} tokens, k = {CHUNK_SIZE}, weights "
        f"{_spell(WEIGHTS)}; an attribute is "
        f"{mean_divergence(models):.2f} nats a token (KL) from the base.",
        "",
        f"| {' | '.join(['sampler', *columns])} |",
        f"|---|{'---:|' * len(columns)}",
        *(table_row(name, figures) for name, figures in measured.items()),
        "",
        f"Other targets, on texts of {OTHER_NUM_TOKENS} tokens. A bias is that to the row's own target; of seq-rs,",
        "which scores whole texts, this is the arithmetic one with mixture_span sequence.",
        "",
        "| sampler | weights | bias of the base | of arithmetic, a draw a token | of the sampler |",
        "|---|---|---:|---:|---:|",
        *other_rows(models),
    ])  # fmt: skip


def draw(measured: dict[str, list[Figures]], path: Path) -> None:
    from matplotlib.figure import Figure  # the table does without

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = figure.subplots(1, len(TARGETS), sharex=True, sharey=True)
    for column, (axes, target) in enumerate(zip(panels, TARGETS, strict=True)):
        scr = [figures[column] for name, figures in measured.items() if name.startswith("scr")]
        axes.plot([f.tokens_per_round for f in scr], [f.bias for f in scr], "o-", color="C1", ms=4, label="scr, over M")
        for bound, f in zip(BOUNDS, scr, strict=True):
            axes.annotate(f" {bound:g}", (f.tokens_per_round, f.bias), fontsize=7)
        for kind, marker, colour in (("exact", "s", "C0"), ("direct", "D", "C2"), ("base", "x", "0.4")):
            points = [figures[column] for name, figures in measured.items() if name.startswith(kind)]
            label = "exact, every draft" if kind == "exact" else kind
            axes.plot(
                [f.tokens_per_round for f in points], [f.bias for f in points], marker, color=colour, ms=5, label=label
            )
        axes.axhline(0, color="0.8", zorder=0)
        axes.set(title=f"{target} target", xlabel="tokens a round")
    panels[0].set_ylabel("bias (total variation)")
    panels[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    models, page = example(), HERE / "laws.md"
    measured = {name: [measure(models, target, options) for target in TARGETS] for name, options in samplers()}
    before, after = page.read_text().split(BEGIN)[0], page.read_text().split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{table_of(models, measured)}\n\n{END}{after}")
    draw(measured, HERE / "laws.png")


if __name__ == "__main__":
    main()
