"""Measures of texts that need no judge: likeness to a reference, perplexity, variety, length.

Knows texts, references and a model that scores them. As a judge (`judging.Judge`) it writes a number per text; what a
table shows of many texts is `tables`' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from mpg.evaluate.answers import describe_models
from mpg.evaluate.judging import OnScore
from mpg.evaluate.tasks import Item
from mpg.extras import install
from mpg.model import Model
from mpg.paper.scoring import token_logprobs

NEED = install("evaluate")


class Metrics:
    """Measures of a text, every one by the package that is known for it.

    bleu             sacrebleu's of the sentence, over 100, in [0, 1]
    rouge1           rouge-score's F1 of single words, stemmed
    bertscore        bert-score's F1, where its model is given
    nll, nll_tokens  natural log, under a scoring model behind the item's prompt, and over how many tokens: a table
                     shows exp(sum of nll / sum of tokens)
    distinct1, distinct2  different words, and pairs of them, over all
    words            how many

    Without a reference the first three are missing, and what a text without words has none of.
    """

    name = "metrics"

    def __init__(self, perplexity: tuple[str, Model], bertscore: str | Path | None = None) -> None:
        """perplexity: a name and a model, whose base scores. bertscore: the folder of a model for BERTScore"""
        try:
            from rouge_score.rouge_scorer import RougeScorer
            from sacrebleu.metrics import BLEU
        except ImportError as error:
            raise ImportError(f"metrics need sacrebleu and rouge-score: {NEED}") from error
        self._bleu, self._rouge = BLEU(effective_order=True), RougeScorer(["rouge1"], use_stemmer=True)
        self._bert = None if bertscore is None else _bert_scorer(Path(bertscore))
        self.has_bertscore = self._bert is not None
        self.scoring, self._model = perplexity
        self.criteria: tuple[str, ...] = ("bleu", "rouge1", *(["bertscore"] if self._bert else []))
        self.criteria += ("nll", "nll_tokens", "distinct1", "distinct2", "words")
        self.signatures = {
            "bleu": f"sacrebleu {self._bleu_signature()}",
            "rouge1": f"rouge-score {version('rouge-score')}, rouge1 F1, use_stemmer=True",
            "bertscore": f"bert-score {self._bert.hash}" if self._bert else "not run: no model was given",
            "perplexity": f"under {self.scoring}, behind the prompt",
        }
        self.identity: dict[str, Any] = {"judge": self.name, "signatures": self.signatures}
        self.identity["scoring"] = describe_models(self._model, ())["models"]

    def score(self, asked: Sequence[tuple[Item, str]], on_score: OnScore) -> list[str]:
        """Scores of answers, see `judging.Judge`; perplexities of some texts at a time."""
        for first in range(0, len(asked), 16):
            batch = asked[first : first + 16]
            likelihoods = self._likelihoods(batch)
            berts = self._bert_scores(batch)
            for index, (item, text) in enumerate(batch):
                words = text.split()
                pairs = list(pairwise(words))
                reference = item.reference
                scores: dict[str, float | None] = {
                    "bleu": None if reference is None else self._bleu.sentence_score(text, [reference]).score / 100,
                    "rouge1": None if reference is None else self._rouge.score(reference, text)["rouge1"].fmeasure,
                    **({"bertscore": berts[index]} if self._bert else {}),
                    **dict(zip(("nll", "nll_tokens"), likelihoods[index], strict=True)),
                    "distinct1": len(set(words)) / len(words) if words else None,
                    "distinct2": len(set(pairs)) / len(pairs) if pairs else None,
                    "words": len(words),
                }
                on_score(first + index, {k: None if v is None else round(v, 6) for k, v in scores.items()}, {})
        return []

    def _bleu_signature(self) -> str:
        self._bleu.sentence_score("a", ["a"])  # which counts the references
        return str(self._bleu.get_signature())

    def _likelihoods(self, batch: Sequence[tuple[Item, str]]) -> list[tuple[float | None, float | None]]:
        """-log p(text | prompt) and the number of tokens."""
        tokenizer: Any = self._model.tokenizer
        texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for _, text in batch]
        rows = [index for index, text in enumerate(texts) if text]
        found: list[tuple[float | None, float | None]] = [(None, None)] * len(batch)
        if rows:
            prompts = [self._model.encode(batch[row][0].prompt) for row in rows]
            logprobs = token_logprobs(self._model.models, ("base",), prompts, [texts[row] for row in rows])[0].sum(1)
            for row, logprob in zip(rows, logprobs.tolist(), strict=True):
                found[row] = (-logprob, float(len(texts[row])))
        return found

    def _bert_scores(self, batch: Sequence[tuple[Item, str]]) -> list[float | None]:
        found: list[float | None] = [None] * len(batch)
        rows = [index for index, (item, text) in enumerate(batch) if item.reference is not None and text.strip()]
        if self._bert and rows:
            texts, references = [batch[row][1] for row in rows], [batch[row][0].reference for row in rows]
            for row, score in zip(rows, self._bert.score(texts, references)[2].tolist(), strict=True):
                found[row] = score
        return found


def _bert_scorer(folder: Path) -> Any:
    """bert-score's scorer with the model in a folder, at its last layer."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"bertscore: expected the folder of a model, got {str(folder)!r}")
    try:
        from bert_score import BERTScorer
    except ImportError as error:
        raise ImportError("BERTScore needs bert-score: pip install bert-score") from error
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    scorer = BERTScorer(model_type=str(folder), num_layers=config.num_hidden_layers, device="cpu")
    tokenizer = scorer._tokenizer  # where its files do not say how much it takes, the model does
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    return scorer
