"""How logits processors see the combined row: one call a row, with every token before it and nothing else.

A processor has transformers' protocol, processor(input_ids (1, L), scores (1, V)) -> scores (1, V), and gets normalised
log-probabilities. Knows no target and no draft; which processors a request has is `conventions`' to say.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpg.decode.batch import Batch


def process_rows(batch: Batch, log_rows: Tensor, drafted: Tensor, num_wanted: Tensor) -> Tensor:
    """What the processors of each sequence make of its rows.

    log_rows:   (B, P, V) log-probabilities, the rows behind the last P prefixes of `drafted`
    drafted:    (B, D) int64, tokens after the committed ones, D >= P - 1
    num_wanted: (B,) int64 in 0..P, rows of each sequence that a token may still be drawn from

    out: (B, P, V), not normalised; -inf throughout where nothing is left

    A history holds the sequence's own tokens alone: no padding, nothing of its neighbours, and no drafted token that
    the row before it excludes. Behind such a token, beyond `num_wanted`, and where a row is empty or unusable already,
    rows stay as they are: no text leads there. Waits for the device.

    Raises ValueError for a processor that returns NaN, +inf or another shape.
    """
    assert batch.processors is not None
    largest = log_rows.amax(-1)  # (B, P)
    lengths, counts = torch.stack([batch.lengths, num_wanted]).tolist()
    is_usable = largest.isfinite().tolist()
    processed = log_rows.clone()
    num_before = drafted.shape[1] - log_rows.shape[1] + 1  # drafted tokens before the first row
    for b, processor in enumerate(batch.processors):
        if processor is None:
            continue
        history = torch.cat([batch.tokens[b, : lengths[b]], drafted[b]])[None]
        for p in range(counts[b]):
            if not is_usable[b][p]:
                break
            row = processed[b, p]
            scores = processor(history[:, : lengths[b] + num_before + p], row[None])
            if not isinstance(scores, Tensor) or scores.shape != (1, len(row)):
                got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise ValueError(f"logits_processor: expected scores (1, {len(row)}) from every processor, got {got}")
            processed[b, p] = scores[0]
            if p + 1 < counts[b] and processed[b, p, drafted[b, num_before + p]] == -torch.inf:
                break
    if (processed.isnan() & ~log_rows.isnan() | (processed == torch.inf) & (log_rows != torch.inf)).any():
        raise ValueError("logits_processor: expected finite scores or -inf from every processor, got NaN or +inf")
    return processed
