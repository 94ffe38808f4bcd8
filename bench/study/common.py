"""What the scripts of the study share: its models, its questions, and settings that are measured one by one and kept.

Knows where things lie; nothing of what is asked. Scores are committed, in bench/results/study; texts never are.
MPG_STUDY_BASE, MPG_STUDY_RESULTS and MPG_STUDY_LIMIT: another base, another folder for scores, and less of everything.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import mpg
from mpg.evaluate.records import open_records
from mpg.files import hash_files
from mpg.frontend.prompts import Prompt
from mpg.model import Model
from mpg.paper.check import score_texts
from mpg.paper.scoring import token_logprobs
from mpg.results import Result
from pairs import DIMENSIONS, mbti_pairs
from scores import RESULTS

POLES = "ESTPINFJ"
PAPERS_DRAW = {"temperature": 0.7, "top_p": 0.9}
BATCH = 16
NUM_TEXTS = 2  # to a prompt, each of a seed of its own

DATA = Path(os.environ.get("MPG_DATA", "data"))  # the paper's release
RUNS = Path(os.environ.get("MPG_STUDY", "study"))  # where train.sh put pairs and adapters
BASE = os.environ.get("MPG_STUDY_BASE", "smollm2")
LIMIT = int(os.environ["MPG_STUDY_LIMIT"]) if "MPG_STUDY_LIMIT" in os.environ else None


def limited(number: int) -> int:
    """A number of questions, texts or tokens; at most LIMIT, which shows that a script runs and measures nothing."""
    return number if LIMIT is None else min(number, LIMIT)


NEW_TOKENS = limited(40)  # of a text


def load(names: Iterable[str], base: str = BASE, **more: Any) -> Model:
    """The base, or another, with these adapters of the study, in bfloat16 on one thread."""
    torch.set_num_threads(1)
    attributes = {name: str(RUNS / "adapters" / name) for name in names}
    return mpg.load(base, attributes, dtype="bfloat16", **more)


def questions(each: int = 4) -> list[str]:
    """Questions that neither adapters nor judges were trained on, the same number of each dimension."""
    return [pair.question for of in DIMENSIONS for pair in mbti_pairs(DATA, of, "reported")[:each]][:LIMIT]


def contexts(
    model: Model, prompts: Sequence[str], prefixes: Sequence[int]
) -> Iterator[tuple[dict[str, int], list[int]]]:
    """Token ids of prompts, each with the first so many tokens of a text of the base; and which they are."""
    texts = model.generate(prompts, target="base", sampler="direct", seed=900, max_new_tokens=max(prefixes))
    for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        for n in prefixes:
            yield {"prompt": index, "prefix": n}, [*model.encode(prompt), *text.tokens[:n]]


def measure(
    name: str,
    adapters: Iterable[str],
    header: Mapping[str, Any],
    settings: Sequence[str],
    rows_of: Callable[[str], list[dict[str, Any]]],
) -> None:
    """Measure what is not yet in the file of these scores, setting by setting; a kill loses one setting.

    Raises ValueError where the file has scores of other adapters, or under another header."""
    files = {adapter: RUNS / "adapters" / adapter / "adapter_model.safetensors" for adapter in adapters}
    header = {**header, "adapters": {adapter: hash_files([file])[:12] for adapter, file in files.items()}}
    path, own = RESULTS / f"{name}.jsonl", {} if BASE == "smollm2" else {"base": BASE}
    with open_records(path, {"what": name, **header, **own}) as records:
        done = {row["setting"] for row in records.rows}
        for setting in settings:
            if setting in done:
                continue
            started_at = time.process_time()
            rows = rows_of(setting)
            records.append({"setting": setting, "of": len(rows), "rows": rows})
            print(f"{name}: {setting}: {len(rows)} rows, {time.process_time() - started_at:.0f} s", file=sys.stderr)


def write(name: str, told: Mapping[str, Any]) -> None:
    """Write what is measured in one go, as JSON."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")


def log_ratios(model: Model, attributes: Sequence[str], prompts: Sequence[Prompt], results: Sequence[Result]) -> Any:
    """log pi_i - log base of whole texts, (texts, attributes)."""
    parts = []
    for first in range(0, len(results), BATCH):
        of = slice(first, first + BATCH)
        parts.append(score_texts(model.models, attributes, *_ids(model, prompts[of], results[of])))
    return torch.cat(parts).tolist()


def surprise(model: Model, prompts: Sequence[Prompt], results: Sequence[Result]) -> list[float]:
    """-log p of whole texts under the base, in nats."""
    parts = []
    for first in range(0, len(results), BATCH):
        of = slice(first, first + BATCH)
        parts += (-token_logprobs(model.models, ("base",), *_ids(model, prompts[of], results[of]))[0].sum(1)).tolist()
    return parts


def told(result: Result) -> dict[str, Any]:
    """What a row says of how a text came."""
    costs = {"calls": result.stats["model_calls_per_token"], "depth": result.stats["depth_per_token"]}
    return {"tokens": len(result.tokens), **{name: round(value, 3) for name, value in costs.items()}}


def _ids(model: Model, prompts: Sequence[Prompt], results: Sequence[Result]) -> tuple[list[list[int]], list[Any]]:
    return [model.encode(prompt) for prompt in prompts], [result.tokens for result in results]
