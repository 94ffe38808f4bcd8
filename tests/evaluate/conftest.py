"""A folder laid out as the paper's data release, with a few items of our own."""

from __future__ import annotations

import json

import pytest

QA = ["How do you spend a free evening?", "What makes a good plan?", "How do you meet a stranger?"]
CHOICES = [
    ("On a free day you", "J", "plan every hour", "P", "see what comes"),
    ("Which word do you prefer?", "T", "Logic", "F", "Mercy"),
    ("Which word do you prefer?", "I", "Quiet", "E", "Company"),
    ("You would rather", "S", "trust what you see", "N", "guess what could be"),
]
PLAYS = [("He bakes bread.", "He is calm."), ("She sails.", "She laughs a lot.")]


@pytest.fixture
def data(tmp_path):
    questions, roleplay = tmp_path / "data/mbti/questions", tmp_path / "data/roleplay"
    questions.mkdir(parents=True)
    roleplay.mkdir()
    qa = [{"instruction": question, "input": " ", "output": f" {question} I go out."} for question in QA]
    (questions / "qa_ESTJ.json").write_text(json.dumps(qa))
    mcqa = {
        str(number): {"question": f"{stem}:\\nA.{one}\\nB.{other}", "A": pole, "B": opposite}
        for number, (stem, pole, one, opposite, other) in enumerate(CHOICES, 1)
    }
    (questions / "mcqa.json").write_text(json.dumps(mcqa))
    agree = {"1": {"rewritten_en": "Do you like crowds?", "dimension": "E/I", "category": "E"}}
    (questions / "16personalities.json").write_text(json.dumps(agree))
    plays = [
        {"profile": profile, "personality": personality, "reference_answer": f"Hi, {profile}"}
        for profile, personality in PLAYS
    ]
    (roleplay / "test.jsonl").write_text("".join(json.dumps(play) + "\n" for play in plays))
    return tmp_path / "data"
