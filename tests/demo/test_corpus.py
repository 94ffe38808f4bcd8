"""The written corpus, its judge and the shipped models."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from longer import long
from mpg.demo import corpus, judge

MODELS = Path(corpus.__file__).parent / "models"
POLES = tuple(corpus.SENTENCES)


def shown_poles(text: str) -> set[str]:
    """Poles with a marker in `text`, found by plain containment of words: no pattern shared with the judge."""
    words = " ".join(re.findall(r"[a-z]+", text.lower()))
    return {
        pole for pole, markers in corpus.MARKERS.items() if any(f" {marker} " in f" {words} " for marker in markers)
    }


def every_reading(text: str) -> list[str]:
    """All texts that the choices in `text` allow."""
    choice = re.search(r"\{([^{}]*)\}", text)
    if choice is None:
        return [text]
    head, tail = text[: choice.start()], text[choice.end() :]
    return [reading for option in choice[1].split("|") for reading in every_reading(head + option + tail)]


def test_corpus_has_many_topics_questions_and_sentences():
    assert len(set(corpus.TOPICS)) >= 30
    assert len(set(corpus.QUESTION_TEMPLATES)) >= 10
    assert set(POLES) == set("EISNTFJP")
    assert all(len(set(templates)) >= 8 for templates in corpus.SENTENCES.values())


def test_no_marker_belongs_to_two_poles():
    markers = [marker for pole in POLES for marker in corpus.MARKERS[pole]]
    assert len(markers) == len(set(markers))


@pytest.mark.parametrize("pole", POLES)
def test_every_sentence_shows_its_own_pole_and_no_other(pole):
    for template in corpus.SENTENCES[pole]:
        for topic in corpus.TOPICS:
            for text in every_reading(re.sub(r"[\[\]]", "", template).replace("{topic}", topic)):
                assert shown_poles(text) == {pole}, text


def test_openings_show_no_pole():
    for opening in corpus.OPENINGS:
        for topic in corpus.TOPICS:
            assert not shown_poles(opening.replace("{topic}", topic))


@pytest.mark.parametrize("trait", corpus.TRAITS)
def test_judge_tells_the_poles_of_held_out_pairs_apart(trait):
    rng = random.Random(0)
    pairs = [corpus.preference_pair(rng, trait, corpus.HELD_OUT_QUESTIONS) for _ in range(300)]
    assert sum(judge.score_traits(chosen)[trait] > 0 for _, chosen, _ in pairs) >= 0.99 * len(pairs)
    assert sum(judge.score_traits(rejected)[trait] < 0 for _, _, rejected in pairs) >= 0.99 * len(pairs)
    for _, chosen, rejected in pairs:
        a, b = judge.score_traits(chosen), judge.score_traits(rejected)
        assert all(a[other] == b[other] for other in corpus.TRAITS if other != trait)


def test_judge_counts_whole_phrases_in_any_case():
    scores = judge.score_traits("OUT LOUD, and everyone laughs. Alone.")
    assert scores["E"] == pytest.approx(0.51083, abs=1e-5)  # log(2.5 / 1.5): "laughs" is not "laugh"
    assert scores["S"] == scores["T"] == scores["J"] == 0.0


def test_the_same_seed_writes_the_same_text():
    def write(seed: int) -> list[tuple[str, ...]]:
        rng = random.Random(seed)
        return [corpus.neutral(rng), *(corpus.preference_pair(rng, trait) for trait in corpus.TRAITS)]

    assert write(5) == write(5)
    assert write(5) != write(6)


def test_answers_show_the_poles_asked_for_in_their_order():
    text = " ".join(corpus.sentences(random.Random(0), "the trip", "PTI"))
    assert "the trip" in text.lower()
    sentences = re.split(r"(?<=[.?]) ", text)
    assert [shown_poles(sentence) for sentence in sentences] == [set(), {"P"}, {"T"}, {"I"}]


def test_training_never_meets_a_held_out_or_demo_question():
    train, held_out = ({q.text for q in qs} for qs in (corpus.TRAIN_QUESTIONS, corpus.HELD_OUT_QUESTIONS))
    assert not train & held_out
    assert len(held_out) >= 100
    assert set(corpus.DEMO_QUESTIONS) <= held_out
    rng = random.Random(0)
    drawn = {corpus.neutral(rng)[0] for _ in range(3000)} | {corpus.preference_pair(rng, "E")[0] for _ in range(3000)}
    assert drawn <= train


def test_training_meets_every_topic_and_every_question_template():
    assert {q.topic for q in corpus.TRAIN_QUESTIONS} == set(corpus.TOPICS)
    asked = {q.text.replace(q.topic, "{topic}") for q in corpus.TRAIN_QUESTIONS}
    assert asked == set(corpus.QUESTION_TEMPLATES)


def test_models_folder_stays_under_three_megabytes():
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) < 3_000_000


@long  # of models that are what they were; tests/demo/test_traits.py samples them
def test_every_adapter_raises_its_own_trait():
    base = AutoModelForCausalLM.from_pretrained(MODELS, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODELS, padding_side="left")
    model = PeftModel.from_pretrained(base, MODELS / "adapters" / "E", adapter_name="E")
    for trait in corpus.TRAITS[1:]:
        model.load_adapter(MODELS / "adapters" / trait, adapter_name=trait)
    model.eval()
    chats = [[{"role": "user", "content": question.text}] for question in corpus.HELD_OUT_QUESTIONS[:40]]
    prompts = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt", return_dict=True)

    def mean_scores() -> dict[str, float]:
        torch.manual_seed(0)
        with torch.inference_mode():
            output = model.generate(**prompts, max_new_tokens=96, do_sample=True, top_k=0)
        texts = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        scores = [judge.score_traits(text) for text in texts]
        return {trait: sum(score[trait] for score in scores) / len(scores) for trait in corpus.TRAITS}

    with model.disable_adapter():
        before = mean_scores()
    for trait in corpus.TRAITS:
        model.set_adapter(trait)
        assert mean_scores()[trait] > before[trait] + 0.3, trait
