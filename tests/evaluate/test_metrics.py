"""Measures that need no judge, and choices by log-probability, each against another way to get the same number."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from longer import long
from mpg.demo import MODELS
from mpg.evaluate.choices import Choice, accuracy, choice_of, choose, write_choices
from mpg.evaluate.judging import write_scores
from mpg.evaluate.metrics import Metrics
from mpg.evaluate.tasks import Item, deal_options
from mpg.paper.scoring import token_logprobs

ITEM = Item("qa:1", "qa", "What do you like?", "1", reference="I like the cats and the dogs.")
QUIET, LOUD = "stay in", "go out"
CHOICES = [
    Item("mcqa:1", "mcqa", "", "1", options={"I": QUIET, "E": LOUD}, about={"dimension": "EI", "stem": "You"}),
    Item("mcqa:2", "mcqa", "", "2", options={"T": "think", "F": "feel"}, about={"dimension": "TF", "stem": "Do you"}),
]


@pytest.fixture(scope="module")
def metrics(model):
    pytest.importorskip("sacrebleu", reason="needs mpg[evaluate]")
    pytest.importorskip("rouge_score", reason="needs mpg[evaluate]")
    return Metrics(("the demo's base", model))


def measured(metrics, *texts, item=ITEM):
    rows = {}
    metrics.score([(item, text) for text in texts], lambda index, scores, _: rows.update({index: scores}))
    return [rows[index] for index in range(len(texts))]


def test_measures_are_those_of_their_packages_and_of_a_count_by_hand(metrics, model):
    same, other, none = measured(metrics, ITEM.reference, "the cat likes the cat", "")
    assert same["bleu"] == pytest.approx(1) and same["rouge1"] == 1
    # words of 5 and of 7, stemmed: "the" twice, "cat", "like" are shared
    assert other["rouge1"] == pytest.approx(2 * (4 / 5) * (4 / 7) / (4 / 5 + 4 / 7), abs=1e-6)
    assert 0 < other["bleu"] < 0.2
    assert (other["words"], other["distinct1"], other["distinct2"]) == (5, 0.6, 0.75)
    assert none == {
        "bleu": 0, "rouge1": 0, "nll": None, "nll_tokens": None, "distinct1": None, "distinct2": None, "words": 0
    }  # fmt: skip
    alone = measured(metrics, "the cat", item=Item("16p:1", "16p", "Why?", "1"))[0]
    assert alone["bleu"] is alone["rouge1"] is None and alone["nll"] > 0
    prompt = model.encode(ITEM.prompt)
    text = model.tokenizer("the cat likes the cat", add_special_tokens=False)["input_ids"]
    nll = 0.0
    for end in range(len(text)):  # token by token
        row = token_logprobs(model.models, ("base",), [[*prompt, *text[:end]]], [[text[end]]])
        nll -= float(row.sum())
    assert (other["nll"], other["nll_tokens"]) == (pytest.approx(nll, abs=1e-3), len(text))


def test_what_was_measured_with_is_told(metrics):
    assert metrics.signatures["bleu"].startswith("sacrebleu nrefs:1|case:mixed|eff:yes|tok:13a|smooth:exp|version:")
    assert metrics.signatures["rouge1"].endswith("rouge1 F1, use_stemmer=True")
    assert metrics.signatures["bertscore"] == "not run: no model was given"
    assert metrics.signatures["perplexity"] == "under the demo's base, behind the prompt"
    assert "bertscore" not in metrics.criteria


def test_measures_of_many_texts_are_those_of_each_alone_and_resume(metrics, tmp_path):
    texts = [f"I like {number} cats" + " and dogs" * (number % 3) for number in range(20)]
    assert measured(metrics, *texts)[17] == pytest.approx(measured(metrics, texts[17])[0], abs=1e-4)
    answers = [{"item": "qa:1", "seed": seed, "attribute": "", "text": text} for seed, text in enumerate(texts)]
    first = write_scores(tmp_path / "scores", metrics, [ITEM], {}, answers[:2])[0]
    assert write_scores(tmp_path / "scores", metrics, [ITEM], {}, answers[:3])[0][:2] == first


def test_bertscore_needs_a_models_folder(model, tmp_path):
    with pytest.raises(ValueError, match="bertscore: expected the folder of a model, got "):
        Metrics(("base", model), tmp_path)


@long  # imports bert-score
def test_bertscore_is_that_of_a_local_model(model, tmp_path):
    pytest.importorskip("bert_score", reason="needs bert-score")
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "i", "like", "the", "cats", "and", "dogs", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    BertModel(BertConfig(vocab_size=len(words), **size)).save_pretrained(tmp_path)
    metrics = Metrics(("base", model), tmp_path)
    same, other, none = measured(metrics, ITEM.reference, "dogs", "")
    assert same["bertscore"] == pytest.approx(1, abs=1e-4) and other["bertscore"] < 1 and none["bertscore"] is None
    assert "_L2_" in metrics.signatures["bertscore"]


@pytest.fixture(scope="module")
def law():
    """log p of a text behind a prompt under the geometric target, by transformers and PEFT in double precision."""
    base = AutoModelForCausalLM.from_pretrained(MODELS, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(MODELS)
    adapted = PeftModel.from_pretrained(base, MODELS / "adapters/E", "E")
    adapted.load_adapter(MODELS / "adapters/T", "T")

    @torch.no_grad()
    def law(prompt, text, weights):
        told = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)[
            "input_ids"
        ]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([[*told, *ids]])
        with adapted.disable_adapter():
            row = own = adapted(tokens).logits.log_softmax(-1)
        for name, weight in weights.items():
            adapted.set_adapter(name)
            row = row + weight * (adapted(tokens).logits.log_softmax(-1) - own)
        row = row.log_softmax(-1)[0, len(told) - 1 : -1]
        return row[range(len(ids)), ids].sum().item()

    return law


def test_options_get_their_log_probability_under_the_combined_law(model, law):
    weights = {"E": 1, "T": -0.5}
    for item, choice in zip(CHOICES, choose(model, CHOICES, weights), strict=True):
        for pole, text in item.options.items():
            assert choice.logprobs[pole] == pytest.approx(law(item.about["stem"], text, weights), abs=1e-3)
            assert choice.lengths[pole] == len(text)
    found = [choose(model, CHOICES[:1], weights, way="letters", seed=seed)[0] for seed in range(8)]
    for order in ("IE", "EI"):
        lines = "\n".join(f"{'AB'[at]}.{CHOICES[0].options[pole]}" for at, pole in enumerate(order))
        prompt = f"You\n{lines}\nAnswer with A or B alone."
        wanted = {pole: law(prompt, "AB"[at], weights) for at, pole in enumerate(order)}
        assert any(choice.logprobs == pytest.approx(wanted, abs=1e-3) for choice in found)


def test_one_seed_deals_letters_in_one_order_and_texts_have_none(model):
    def found(way, seed):
        return choose(model, CHOICES, target="base", way=way, seed=seed)

    assert found("letters", 3) == found("letters", 3)
    assert found("texts", 0) == found("texts", 1)


def test_the_larger_log_probability_per_character_is_chosen_and_poles_are_counted():
    choices = [
        Choice("a", "EI", {"E": -4.0, "I": -3.0}, {"E": 8, "I": 4}),
        Choice("b", "EI", {"E": -4.0, "I": -3.0}, {"E": 4, "I": 4}),
        Choice("c", "TF", {"T": -1.0, "F": -math.inf}, {"T": 1, "F": 1}),
    ]
    assert [choice.chosen for choice in choices] == ["E", "I", "T"]
    assert accuracy(choices, ("E", "S", "F")) == {"E": 0.5, "S": None, "F": 0}


def test_choices_resume_and_are_not_those_of_other_weights(model, tmp_path):
    rows = write_choices(tmp_path / "file", model, CHOICES, "E=1", way="letters", seeds=(0, 1))
    assert [(row["item"], row["seed"]) for row in rows] == [("mcqa:1", 0), ("mcqa:1", 1), ("mcqa:2", 0), ("mcqa:2", 1)]
    for row in rows:
        [item] = [item for item in CHOICES if item.id == row["item"]]
        assert row["option_order"] == [*deal_options(item, row["seed"]).options]
    whole = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(whole[: whole.rindex(b"{") + 9])
    again = write_choices(tmp_path / "file", model, CHOICES, "E=1", way="letters", seeds=(0, 1))
    assert [choice_of(row).chosen for row in again] == [choice_of(row).chosen for row in rows] and again[:3] == rows[:3]
    with pytest.raises(ValueError, match=r"holds another job: weights is \{'E': 1.0\}, asked is \{'E': 2.0\}"):
        write_choices(tmp_path / "file", model, CHOICES, "E=2", way="letters")


def test_an_option_that_the_law_excludes_is_kept_as_that(model, tmp_path, monkeypatch):
    excluded = Choice("mcqa:1", "EI", {"I": -math.inf, "E": -1.0}, {"I": 1, "E": 1})
    monkeypatch.setattr("mpg.evaluate.choices.choose", lambda *_, **__: [excluded])
    for _ in range(2):
        [row] = write_choices(tmp_path / "file", model, CHOICES[:1], "E=1")
        assert row["logprobs"] == {"I": None, "E": -1.0} and choice_of(row) == excluded


def test_what_cannot_be_chosen_from_is_refused(model):
    with pytest.raises(ValueError, match="items: expected two options of every item, got 0 of qa:1"):
        choose(model, [ITEM], target="base")
    with pytest.raises(ValueError, match="way: expected one of texts, letters, got 'words'"):
        choose(model, CHOICES, target="base", way="words")
    with pytest.raises(ValueError, match="the arithmetic target needs a positive sum"):
        choose(model, CHOICES, {"E": -1}, target="arithmetic")
