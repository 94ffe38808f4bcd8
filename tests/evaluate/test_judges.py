"""Judges behind an endpoint, on loopback, and local ones: what is asked, kept, missing and refused."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

from mpg.evaluate.judges.classifier import ClassifierJudge, TraitClassifier
from mpg.evaluate.judges.endpoint import CRITERIA, EndpointJudge, read_scores
from mpg.evaluate.judging import parse_rate, write_scores
from mpg.evaluate.records import read_records
from mpg.evaluate.tasks import Item
from mpg.paper.methods import DESCRIPTIONS

GOOD = '{"style": 4, "thought": 3.5, "behaviour": 5, "naturalness": 1, "reason": "so"}'
SCORES = {"style": 4, "thought": 3.5, "behaviour": 5, "naturalness": 1}
MISSING = dict.fromkeys(SCORES)
ITEMS = [Item(f"qa:{index}", "qa", f"What of {index}?", str(index)) for index in range(12)]
HEADER = {"what": "answers", "method": "scr", "versions": {"mpg": "0"}}
ANSWERS = [{"item": item.id, "seed": 0, "attribute": "", "text": f"I go {item.id} {{$target}}"} for item in ITEMS]


@pytest.fixture
def judge(tmp_path):
    def judge(url, model="m", rubric="mbti", poles="ES", **how):
        how = {"timeout": 5, "tries": 2, "concurrency": 1, **how}
        return EndpointJudge(url, model, rubric, tuple(poles), replies=tmp_path / "replies", **how)

    return judge


def judged(judge, tmp_path, count=2, name="scores"):
    return write_scores(tmp_path / name, judge, ITEMS, HEADER, ANSWERS[:count])


@pytest.mark.parametrize("rubric", CRITERIA)
def test_a_rubric_asks_for_every_criterion_of_the_answer_it_shows(rubric, judge):
    item = Item("x", "qa", "Why ${answer}?", "q", about={"profile": "a nurse", "personality": "shy"})
    request = judge("http://127.0.0.1:1/v1", rubric=rubric)._request(item, "As $target: {1}")
    [message] = request["messages"]
    assert "As $target: {1}" in message["content"] and request["temperature"] == 0
    shown = ["a nurse", "shy"] if rubric == "roleplay" else ["Why ${answer}?", DESCRIPTIONS["E"], DESCRIPTIONS["S"]]
    assert all(text in message["content"] for text in shown)
    example = message["content"].splitlines()[-1]
    assert None not in read_scores(example, CRITERIA[rubric]).values()
    for name in CRITERIA[rubric]:
        assert f"- {name}: " in files("mpg.evaluate.judges").joinpath(f"{rubric}.txt").read_text()


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        (GOOD, SCORES),
        (f"Sure:\n```json\n{GOOD}\n```\nThat is {{all}}.", SCORES),
        (f'<think>{{"style": 1}} no {{</think>{GOOD}', SCORES),
        (GOOD.replace("4", '"4"'), SCORES),
        (GOOD.replace("4", "0"), {**SCORES, "style": None}),
        (GOOD.replace("4", "5.5"), {**SCORES, "style": None}),
        (GOOD.replace("4", "NaN"), {**SCORES, "style": None}),
        (GOOD.replace("4", "true"), {**SCORES, "style": None}),
        (GOOD.replace("4", '"good"'), {**SCORES, "style": None}),
        (GOOD.replace("4", "[4]"), {**SCORES, "style": None}),
        (GOOD.replace('"style": 4, ', ""), {**SCORES, "style": None}),
        (GOOD[:40], MISSING),
        ("", MISSING),
        ("[4, 5]", MISSING),
        ('{"a":' * 2_000, MISSING),
        (f'{{"scores": {GOOD}}}', SCORES),
        (GOOD.replace('"so"', '{"style": 2}'), SCORES),
    ],
)
def test_what_a_reply_does_not_say_is_missing_and_never_0(reply, scores):
    assert read_scores(reply, CRITERIA["mbti"]) == scores


def test_scores_and_raw_replies_are_kept_and_nothing_is_asked_twice(endpoint, judge, tmp_path, monkeypatch):
    monkeypatch.setenv("OTHER_KEY", "secret")
    server = endpoint(GOOD, "I cannot", GOOD)
    rows, failures = judged(judge(server.url, key_env="OTHER_KEY"), tmp_path, 3)
    assert [row["scores"] for row in rows] == [SCORES, MISSING, SCORES]
    assert (failures, parse_rate([row["scores"] for row in rows])) == ([], pytest.approx(2 / 3))
    assert server.requests[0]["key"] == "Bearer secret" and "secret" not in (tmp_path / "scores").read_text()
    [replies] = (tmp_path / "replies").iterdir()
    assert {row["request"]: row["reply"] for row in read_records(replies)[1]} == {
        row["request"]: reply for row, reply in zip(rows, (GOOD, "I cannot", GOOD), strict=True)
    }
    assert judged(judge(server.url), tmp_path, 3)[0] == rows  # from its file
    assert judged(judge(server.url), tmp_path, 3, "anew")[0] == rows  # from the replies
    assert len(server.requests) == 3
    again = [ANSWERS[0], {**ANSWERS[0], "seed": 1}, {**ANSWERS[1], "text": "another"}]
    write_scores(tmp_path / "scores", judge(server.url), ITEMS, HEADER, again)
    assert len(server.requests) == 4  # one text that is new
    with pytest.raises(ValueError, match=r"scores holds another job: poles is \['E', 'S'\], asked is \['E'\]"):
        judged(judge(server.url, poles="E"), tmp_path)


def test_equal_texts_are_asked_for_once_and_as_many_at_a_time_as_allowed(endpoint, judge, tmp_path):
    server = endpoint(0.05)
    rows, _ = judged(judge(server.url, concurrency=3), tmp_path, 9)
    assert len(rows) == 9 and server.most_at_once == 3
    same = [{**ANSWERS[0], "text": "new", "seed": seed} for seed in range(5)]
    assert len(write_scores(tmp_path / "same", judge(server.url), ITEMS, HEADER, same)[0]) == 5
    assert len(server.requests) == 10


@pytest.mark.parametrize("trouble", [(429, "{}"), (503, "busy"), (500, ""), b'{"id": "0", "choi', None], ids=str)
def test_what_passes_is_tried_again(trouble, endpoint, judge, tmp_path):
    server = endpoint(trouble, GOOD)
    assert judged(judge(server.url), tmp_path)[0][0]["scores"] == SCORES
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((429, '{"error": {"message": "slow down"}}'), "failed 5 times in a row, at last: RateLimitError: .*slow down"),
        ((503, "busy"), "failed 5 times in a row, at last: InternalServerError: .*"),
        ((200, '{"choices": [{"mess'), "failed 5 times in a row, at last: "),
        ((200, '{"choices": []}'), "failed 5 times in a row, at last: _NoReply: expected a chat completion"),
        (None, "failed 5 times in a row, at last: APIConnectionError"),
        (0.2, "failed 5 times in a row, at last: APITimeoutError"),
        (
            (401, '{"error": {"message": "bad key"}}'),
            "refused the key in OPENAI_API_KEY: AuthenticationError: .*bad key",
        ),
        ((403, "{}"), "refused the key in OPENAI_API_KEY"),
        ((404, '{"error": {"message": "no m"}}'), "is not there: NotFoundError: .*no m"),
        ((400, "{}"), "failed 5 times in a row, at last: BadRequestError"),
    ],
    ids=str,
)
def test_an_endpoint_that_gives_nothing_is_one_clear_error_and_what_was_scored_stays(
    reply, message, endpoint, judge, tmp_path
):
    server = endpoint(GOOD, GOOD, reply)
    timeout = 0.05 if reply == 0.2 else 5
    with pytest.raises(ValueError, match=f"judge: m at {server.url} {message}"):
        judged(judge(server.url, timeout=timeout, tries=1), tmp_path, 12)
    assert [row["scores"] for row in read_records(tmp_path / "scores")[1]] == [SCORES, SCORES]
    server.replies = [GOOD]
    assert [row["scores"] for row in judged(judge(server.url), tmp_path, 12)[0]] == [SCORES] * 12


def test_an_endpoint_that_is_down_is_named(judge, tmp_path, endpoint):
    down = judge("http://127.0.0.1:9/v1")
    for failures in (5, 6):  # the next call does not try five more
        with pytest.raises(
            ValueError, match=f"judge: m at http://127.0.0.1:9/v1 failed {failures} times in a row, at last: API"
        ):
            judged(down, tmp_path, 12)
    assert not (tmp_path / "scores").exists()


def test_one_answer_without_a_reply_is_left_out_and_asked_for_again(endpoint, judge, tmp_path):
    server = endpoint(GOOD, (503, ""), GOOD)
    rows, failures = judged(judge(server.url, tries=1), tmp_path, 3)
    assert [row["item"] for row in rows] == ["qa:0", "qa:2"]
    assert len(failures) == 1 and failures[0].startswith(f"{server.url}: InternalServerError: ")
    assert len(judged(judge(server.url), tmp_path, 3)[0]) == 3


@pytest.fixture(scope="module")
def trained():
    pytest.importorskip("sklearn", reason="needs mpg[evaluate]")
    loud, quiet = [f"party {n} crowd music" for n in range(9)], [f"book {n} silence alone" for n in range(9)]
    fair, kind = [f"logic {n} proof" for n in range(9)], [f"mercy {n} heart" for n in range(9)]
    pairs = {
        dimension: ([*first, *second], [True] * 9 + [False] * 9)
        for dimension, first, second in (("EI", loud, quiet), ("TF", fair, kind))
    }
    held_out = {"EI": (["a party", "a book"], [True, False]), "TF": (["mercy", "proof"], [True, True])}
    return TraitClassifier.train(pairs, held_out, {"data": "made up"})


def test_a_saved_classifier_scores_as_it_did_and_holds_no_word(trained, tmp_path):
    assert trained.accuracy == {"EI": 1, "TF": 0.5}
    trained.save(tmp_path / "judge")
    again = TraitClassifier.load(tmp_path / "judge")
    assert (again.accuracy, again.about) == (trained.accuracy, {"data": "made up"})
    texts = ["a crowd at a party", "silence", ""]
    for dimension, scores in trained.score(texts).items():
        assert again.score(texts)[dimension].tolist() == scores.tolist()
    assert trained.score(texts)["EI"][0] > 0.5 > trained.score(texts)["EI"][1]
    held = b"".join(file.read_bytes() for file in (tmp_path / "judge").iterdir())
    assert b"party" not in held


def test_a_classifier_scores_the_targets_poles(trained, tmp_path):
    trained.save(tmp_path / "own")
    judge = ClassifierJudge(tmp_path / "own", ("I", "T"))
    rows, failures = judged(judge, tmp_path, 4)
    assert (judge.name, judge.criteria, judge.accuracy) == ("own", ("EI", "TF"), {"EI": 1, "TF": 0.5})
    told = trained.score([answer["text"] for answer in ANSWERS[:4]])
    assert [row["scores"]["EI"] for row in rows] == pytest.approx((1 - told["EI"]).tolist(), abs=1e-6)
    assert [row["scores"]["TF"] for row in rows] == pytest.approx(told["TF"].tolist(), abs=1e-6)
    assert failures == []
    with pytest.raises(ValueError, match=r"judge: expected a judge of EI, SN in .*, got one of EI, TF"):
        ClassifierJudge(tmp_path / "own", ("I", "S"))


@pytest.mark.parametrize(
    ("name", "text"), [("judge.json", "{"), ("judge.json", "[]"), ("judge.json", "{}"), ("judge.npz", "PK")]
)
def test_a_folder_without_a_classifier_is_refused(name, text, trained, tmp_path):
    trained.save(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"judge: expected a trait judge in {tmp_path}, got "):
        TraitClassifier.load(tmp_path)
    (tmp_path / "judge.json").unlink()
    with pytest.raises(ValueError, match=r"judge: expected a file that can be read, got .*judge.json"):
        TraitClassifier.load(tmp_path)


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        (GOOD[:50], MISSING),
        (GOOD.replace("4", "6"), {**SCORES, "style": None}),
        ('{"style": 0, "thought": -1, "behaviour": 5.01, "naturalness": 1e9}', MISSING),
    ],
)
def test_a_reply_that_is_cut_short_or_beyond_the_scale_is_missing_and_neither_0_nor_clipped(
    reply, scores, endpoint, judge, tmp_path
):
    rows, failures = judged(judge(endpoint(reply).url), tmp_path)
    assert [row["scores"] for row in rows] == [scores] * 2
    assert (failures, parse_rate([row["scores"] for row in rows])) == ([], 0)
    header, *written = map(json.loads, (tmp_path / "scores").read_text().splitlines())
    assert header["judge"] == "m" and [row["scores"] for row in written] == [scores] * 2
