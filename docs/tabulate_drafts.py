"""Tokens per round of the exact sampler for every draft and length: writes the table of one model set in drafts.md.

Knows what to run and how to print it.

    python docs/tabulate_drafts.py demo
    python docs/tabulate_drafts.py $MPG_MODELS/mbti-tiny
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import mpg
from mpg.demo import MODELS
from mpg.demo.corpus import HELD_OUT_QUESTIONS
from mpg.paper.check import PROMPTS

PAGE = Path(__file__).with_name("drafts.md")
DRAFTS = ("reference", "model", "lookup", "merged")
DRAFT_MODEL = "E"  # neither set has a smaller model: one attribute proposes what two decide
CHUNK_SIZES = range(1, 17)
WEIGHTS = {"E": 1.0, "T": 1.0}
NUM_PROMPTS = 24


def measure(model: mpg.Model, prompts: list[str], draft: str, chunk_size: int) -> tuple[float, float]:
    """out: tokens a round and depth a token, over all texts"""
    results = model.generate(prompts, weights=WEIGHTS, draft=draft, chunk_size=chunk_size, seed=0)
    num_tokens = sum(len(result.tokens) for result in results)
    rounds = sum(result.stats["rounds"] for result in results)
    depth = sum(len(result.tokens) * result.stats["depth_per_token"] for result in results)
    return num_tokens / rounds, depth / num_tokens


def main(models: str) -> None:
    torch.set_num_threads(1)
    model = mpg.load(MODELS if models == "demo" else models, draft=DRAFT_MODEL, device="cpu")
    questions = [question.text for question in HELD_OUT_QUESTIONS] if models == "demo" else list(PROMPTS)
    lines = [f"| k | {' | '.join(DRAFTS)} |", f"|---:|{'---:|' * len(DRAFTS)}"]
    for k in CHUNK_SIZES:
        figures = [measure(model, questions[:NUM_PROMPTS], draft, k) for draft in DRAFTS]
        lines.append(f"| {k} | {' | '.join(f'{tokens:.2f} ({depth:.2f})' for tokens, depth in figures)} |")
    name = Path(models).name
    begin, end = f"<!-- {name}: written by docs/tabulate_drafts.py -->", f"<!-- end of {name} -->"
    page = PAGE.read_text()
    PAGE.write_text("\n".join([page.split(begin)[0] + begin, "", *lines, "", end + page.split(end)[1]]))


if __name__ == "__main__":
    main(*sys.argv[1:])
