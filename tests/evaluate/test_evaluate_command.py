"""`mpg evaluate`: from the demo's models to a table, again, interrupted, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from typer.testing import CliRunner

from full_disk import small_files
from longer import long
from mpg.app.cli.command import app
from mpg.demo import MODELS
from mpg.evaluate.records import Records
from mpg.evaluate.tasks import MBTI_TASKS, read_items, split
from mpg.paper.methods import METHODS

for package in ("openai", "sacrebleu", "rouge_score", "sklearn"):
    pytest.importorskip(package, reason="needs mpg[evaluate]")

MBTI = '{"style": 4, "thought": 3, "behaviour": 2, "naturalness": 3}'
PLAY = '{"profile_relevance": 4, "persona_match": 3, "humanlikeness": 2}'
SHORT = ("--max-new-tokens", 5, "--limit", 2)


@pytest.fixture
def run(data, tmp_path):
    def run(command, *arguments, **how):
        device = ["--device", os.environ.get("MPG_DEVICE", "cpu"), "--out", str(tmp_path / "out")]
        given = ["evaluate", command, "--data", str(data), *device, *map(str, arguments)]
        return CliRunner().invoke(app, given, **how)

    return run


@pytest.fixture(scope="session")
def specialised(tmp_path_factory):
    """The demo's base with its adapter J merged in, and adapters of the original."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("specialised")
    shutil.copytree(MODELS, folder, ignore=shutil.ignore_patterns("model.safetensors", "mpg.yaml"), dirs_exist_ok=True)
    base = AutoModelForCausalLM.from_pretrained(MODELS)
    PeftModel.from_pretrained(base, MODELS / "adapters/J").merge_and_unload().save_pretrained(folder)
    return folder


def files_of(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_table_of_mbti_from_answers_that_are_judged_and_kept(run, endpoint, own_judge, tmp_path):
    server = endpoint(MBTI)
    command = (
        "mbti", "--type", "ESTJ", "--methods", "base,dpo-single,scr-specialized", *SHORT, "--seeds", 2,
        "--judge", f"{server.url}#m", "--judge", f"classifier:{own_judge}", "--reference", "dpo-single",
    )  # fmt: skip
    done = run(*command)
    assert done.exit_code == 0, done.stderr
    table, out = done.stdout, tmp_path / "out"
    assert "scr-specialized: method: 'scr-specialized' needs a specialised base" in done.stderr
    assert table == (out / "table.md").read_text()
    for title in ("# MBTI: ESTJ", "## Evaluated by m", "## Evaluated by own", "## Measured", "## Multiple choice"):
        assert f"{title}\n" in table
    assert "| base | 4.000 | 3.000 | 2.000 | 3.000 | 3.000 |" in table and "+0.000 [+0.000, +0.000]" in table
    assert (
        "- replies with every score: 100.0 %" in table and "of held-out answers whose pole it tells: EI 1.00" in table
    )
    assert "## Evaluated by an endpoint" not in table
    sections = json.loads((out / "table.json").read_text())["sections"]
    laws = sections[-1]["rows"]  # of which none is dpo-single
    assert [row["method"] for row in laws] == ["base", "geometric", "arithmetic"]
    assert [row["cells"]["All"]["difference"] is None for row in laws] == [True, False, False]
    assert "Overall: - dpo-single |" in table and "All: - base |" in table and "All: - dpo-single" not in table
    assert len((out / "ESTJ/answers/dpo-single.jsonl").read_text().splitlines()) == 1 + 5 * 2 * 4
    asked, before = len(server.requests), files_of(out)
    again = run(*command)
    assert (again.exit_code, again.stdout, len(server.requests)) == (0, table, asked)
    assert files_of(out) == before
    shown = CliRunner().invoke(app, ["evaluate", "overall", f"ESTJ={out}"]).stdout
    assert shown.startswith("| method | ESTJ, evaluated by own | ESTJ, evaluated by m |")
    assert "| scr-specialized | not run | not run |" in shown


def test_a_table_of_role_play_compares_with_the_references(run, endpoint, tmp_path):
    done = run("roleplay", "--weights", "E=1,T=1", "--methods", "base,pp,scr", *SHORT, "--set", "gamma=1.5")
    assert done.exit_code == 0, done.stderr
    assert "| base | not run | not run | not run | not run | not run |  |" in done.stdout
    assert "| method | BLEU | ROUGE-1 | BERTScore | PPL | words | distinct-1 | distinct-2 | PPL, 95 % |" in done.stdout
    assert "| method | tok/s | s/sequence | forwards/token | reject rate | s/sequence, 95 % |" in done.stdout
    assert re.search(r"^\| base \| [\d.]+ \| [\d.]+ \| 1.000 \| - \| [\d.]+ \[[\d.]+, [\d.]+\]", done.stdout, re.M)
    assert re.search(r"^- on .+, batches of 16$", done.stdout, re.M)
    server = endpoint(PLAY)
    command = ("roleplay", "--weights", "E=1,T=1", "--methods", "base,pp,scr", *SHORT, "--set", "gamma=1.5")
    others = ("--judge", f"{server.url}#m", "--judge", f"{server.url}#n")
    done = run(*command, *others, "--reference", "pp")
    assert "| scr | 4.000 | 3.000 | 2.000 | 3.000 | 3.000 [3.000, 3.000] | +0.000 [+0.000, +0.000] |" in done.stdout
    assert "| m and n | PR | 6 | missing | 0.000 |" in done.stdout.partition("## Agreement between judges")[2]
    assert any("He bakes bread." in request["messages"][0]["content"] for request in server.requests)
    shown = CliRunner().invoke(app, ["evaluate", "overall", f"Role-Play={tmp_path / 'out'}", "--methods", "scr,pp"])
    assert shown.stdout.splitlines()[0] == "| method | Role-Play, evaluated by m | Role-Play, evaluated by n |"
    assert [line.split()[1] for line in shown.stdout.splitlines()[2:]] == ["scr", "pp"]
    told = CliRunner().invoke(
        app, ["evaluate", "overall", f"Role-Play={tmp_path / 'out'}", "--methods", "scr", "--json"]
    )
    assert json.loads(told.stdout)[0]["cells"]["Role-Play, evaluated by m"]["value"] == 3.0


@long  # all methods, with two judges
@pytest.mark.parametrize("command", [("mbti", "--type", "ESTJ"), ("roleplay", "--weights", "E=1,T=1")], ids=str)
def test_all_methods_and_two_judges_make_the_papers_tables_and_again_the_same(
    command, run, endpoint, specialised, tmp_path
):
    is_mbti, out, picture = command[0] == "mbti", tmp_path / "out", tmp_path / "plot.png"
    reply = MBTI if is_mbti else PLAY
    server, other = endpoint(reply, *[reply.replace("4", f"{1 + n % 5}") for n in range(4000)]), endpoint(reply)
    command += ("--models", specialised, "--anchor", MODELS, "--seeds", 2, "--set", "tries=4", "--set", "empty=base")
    command += ("--judge", f"{server.url}#one", "--judge", f"{other.url}#two", "--plot", picture, *SHORT)
    done = run(*command)
    assert done.exit_code == 0, done.stderr
    table = json.loads((out / "table.json").read_text())
    sections = {section["title"]: section for section in table["sections"]}
    judges = ["Evaluated by one", "Evaluated by two"]
    assert [*sections] == [*judges, "Measured", "Efficiency", *["Multiple choice"] * is_mbti]
    criteria = ["Sty", "Tho", "Beh", "Nat", "Avg"] if is_mbti else ["PR", "PM", "HI", "Avg"]
    columns = [f"{of} {name}" for of in ("QA", "MCQA", "16P") for name in criteria] + ["Overall"]
    for title in judges:
        assert sections[title]["columns"] == (columns if is_mbti else criteria)
        assert sections[title]["key"] == sections[title]["columns"][-1]
    for title in (*judges, "Measured", "Efficiency"):
        rows = {row["method"]: row for row in sections[title]["rows"]}
        assert [*rows] == [*METHODS] and not any(row["reason"] for row in rows.values())
        for method, row in rows.items():
            lacks = {column for column in sections[title]["columns"] if column not in row["cells"]}
            assert lacks == ({"reject rate"} if title == "Efficiency" and "rs" not in method and "scr" not in method
                             else {"BERTScore"} if title == "Measured" else set())  # fmt: skip
            assert all(cell["low"] <= cell["value"] <= cell["high"] for cell in row["cells"].values())
    texts = {
        method: [row["text"] for row in map(json.loads, file.read_text().splitlines()[1:])]
        for method in METHODS
        for file in out.rglob(f"answers/{method}.jsonl")
    }
    for method in ("base", "pp", "scr"):
        assert texts[method] != texts[f"{method}-specialized"]
    agreed = {row["criterion"]: row for row in table["agreement"]}
    assert list(agreed) == (["style", "thought", "behaviour", "naturalness"] if is_mbti else
                            ["profile_relevance", "persona_match", "humanlikeness"])  # fmt: skip
    num_texts = sum(len(rows) for rows in texts.values())
    first = next(iter(agreed.values()))
    assert (first["judges"], first["texts"]) == (["one", "two"], num_texts) and first["mean_absolute_difference"] > 0
    assert "## Agreement between judges" in done.stdout and "| one and two | " in done.stdout
    assert [len(panel["points"]) for panel in table["tradeoff"]] == [len(METHODS)] * 2
    asked, before, drawn = len(server.requests), files_of(out), picture.read_bytes()
    assert run(*command).stdout == done.stdout
    assert (len(server.requests), files_of(out), picture.read_bytes()) == (asked, before, drawn)
    overall = ["evaluate", "overall", f"T={out}", "--methods", "base-specialized,scr-specialized", "--plot"]
    shown = CliRunner().invoke(app, [*overall, str(tmp_path / "again.png")]).stdout.splitlines()
    assert (tmp_path / "again.png").stat().st_size > 10_000
    assert shown[0] == "| method | T, evaluated by one | T, evaluated by two |"
    assert [line.split()[1] for line in shown[2:]] == ["base-specialized", "scr-specialized"]
    assert "not run" not in "".join(shown)


def test_several_types_are_averaged(run, data, own_judge, tmp_path):
    (data / "mbti/questions/qa_ESTP.json").write_text((data / "mbti/questions/qa_ESTJ.json").read_text())
    recipe = tmp_path / "mpg.yaml"
    adapters = {pole: str(MODELS / "adapters" / name) for pole, name in zip("ESTJP", "ESTJJ", strict=True)}
    options = {"sampler": "token-rs", "tries": 8}  # which no method asked for takes, and nobody gave
    recipe.write_text(json.dumps({"base": str(MODELS), "attributes": adapters, "options": options}))
    command = ("mbti", "--models", recipe, "--type", "ESTJ", "--type", "ESTP", "--methods", "base", "--tasks", "qa")
    done = run(*command, *SHORT, "--judge", f"classifier:{own_judge}")
    assert done.exit_code == 0, done.stderr
    assert "# MBTI: ESTJ, ESTP" in done.stdout and "| method | EI | SN | TF | JP | Avg |" in done.stdout
    assert {folder.name for folder in (tmp_path / "out").iterdir() if folder.is_dir()} == {"ESTJ", "ESTP"}
    done = run(*command, "--max-new-tokens", 5, "--limit", 1, "--out", tmp_path / "one")
    sections = json.loads((tmp_path / "one/table.json").read_text())["sections"]
    measured = next(section for section in sections if section["title"] == "Measured")
    texts = [(tmp_path / f"one/{name}/answers/base.jsonl").read_text().splitlines()[1] for name in ("ESTJ", "ESTP")]
    assert len({json.loads(text)["text"] for text in texts}) == 2
    perplexity = measured["rows"][0]["cells"]["PPL"]  # of one question, which two types ask: nothing to resample
    assert perplexity["low"] == perplexity["high"]


def test_a_judge_that_fails_leaves_a_table_of_the_others(run, endpoint, own_judge, tmp_path):
    server = endpoint(MBTI, (401, '{"error": {"message": "no such key"}}'))
    command = ("mbti", "--type", "ESTJ", "--methods", "base", "--tasks", "qa,mcqa", *SHORT, "--concurrency", 1)
    judges = ("--judge", f"{server.url}#m", "--judge", f"classifier:{own_judge}", "--key-env", "MY_KEY")
    done = run(*command, *judges)
    assert done.exit_code == 2
    assert f"mpg: judge: m at {server.url} refused the key in MY_KEY: AuthenticationError" in done.stderr
    assert "| base | 4.000 | 3.000 | 2.000 | 3.000 | 3.000 | missing | " in done.stdout
    assert "## Evaluated by own" in done.stdout and "| base | 0." in done.stdout
    file = tmp_path / "out/ESTJ/answers/base.jsonl"
    rows = file.read_text().splitlines()
    file.write_text("".join(row.replace('"text": "', '"text": "Now ') + "\n" for row in rows))
    done = run(*command, *judges)
    assert f"| base |{' missing |' * 12}  |" in done.stdout  # what was scored was another text


def test_an_endpoint_that_is_down_ends_the_command_after_the_table_however_few_the_texts(run, endpoint, tmp_path):
    command = ("mbti", "--type", "ESTJ", "--tasks", "qa", *SHORT, "--methods")
    down, server = "http://127.0.0.1:9/v1", endpoint(MBTI, (503, ""))
    done = run(*command, "base", "--judge", f"{down}#m", "--judge", f"{server.url}#n", "--concurrency", 1)
    assert done.exit_code == 2 and "| base | missing |" in done.stdout and "| base | 4.000 |" in done.stdout
    wanted = (
        f"mpg: judge: 2 answers got no reply of m, at last: {down}: APIConnectionError: Connection error.; the same"
    )
    assert done.stderr.startswith(wanted) and done.stderr.count("\n") == 1
    assert f"; judge: 1 answers got no reply of n, at last: {server.url}: InternalServerError" in done.stderr
    server.replies = [MBTI]
    assert run(*command, "base", "--judge", f"{server.url}#n").exit_code == 0
    done = run(*command, "base,pp,mod", "--judge", f"{down}#m")  # two texts each
    assert done.exit_code == 2 and f"mpg: judge: m at {down} failed 5 times in a row, at last: APIConn" in done.stderr


def test_replies_that_say_too_little_are_missing_in_the_table_and_never_0(run, endpoint):
    beyond = MBTI.replace("4", "9").replace("3", "5")  # its other scores count
    server = endpoint(MBTI, beyond, MBTI[:30], "I cannot")
    command = ("mbti", "--type", "ESTJ", "--methods", "base", "--tasks", "mcqa", "--max-new-tokens", 5)
    done = run(*command, "--judge", f"{server.url}#m", "--concurrency", 1)
    assert done.exit_code == 0, done.stderr
    assert "| base | 4.000 | 4.000 | 2.000 | 4.000 | 3.000 |" in done.stdout
    assert "- replies with every score: 25.0 %" in done.stdout and len(server.requests) == 4


def test_a_disk_that_fills_ends_the_command_and_later_the_same_command_goes_on(run, endpoint, tmp_path):
    server = endpoint(MBTI + " so" * 700)
    command = ("mbti", "--type", "ESTJ", "--methods", "base", "--tasks", "qa", *SHORT, "--judge", f"{server.url}#m")
    for size, place in ((1000, "ESTJ/answers/base.jsonl"), (3000, "replies/m-")):
        with small_files(size):
            done = run(*command, "--concurrency", 1)
        assert (done.exit_code, done.stdout) == (2, "")
        wanted = f"mpg: out: expected a file that can be written, got {tmp_path}/out/{place}"
        assert done.stderr.startswith(wanted) and "File too large; the rows that are there are whole" in done.stderr
    kept = files_of(tmp_path / "out")
    done = run(*command)
    assert done.exit_code == 0, done.stderr
    assert "| base | 4.000 | 3.000 | 2.000 | 3.000 | 3.000 |" in done.stdout
    assert all(files_of(tmp_path / "out")[name].startswith(content) for name, content in kept.items())
    assert len(server.requests) == 3  # the reply that was not kept was asked for again


def test_where_no_method_can_answer_the_table_says_why(run):
    done = run("mbti", "--type", "ESTJ", "--methods", "base-specialized", "--tasks", "qa")
    assert done.exit_code == 0, done.stderr
    assert "- base-specialized: not run: method: 'base-specialized' needs a specialised base" in done.stdout


def test_answers_that_no_model_has_room_for_are_refused_before_anything_is_written(run, tmp_path):
    for command in (("mbti", "--type", "ESTJ"), ("roleplay", "--weights", "E=1")):
        done = run(*command, "--methods", "base,dpo-single", "--max-new-tokens", 100_000)
        assert (done.exit_code, done.stdout) == (2, "")
        assert re.match(r"mpg: max_new_tokens: the model has 256 positions .* expected at most \d+, got 1", done.stderr)
    assert not (tmp_path / "out").exists()


def test_held_out_questions_are_those_of_the_reporting_side(run, data, tmp_path):
    done = run("mbti", "--type", "ESTJ", "--methods", "base", "--max-new-tokens", 2, "--held-out")
    assert done.exit_code == 0, done.stderr
    rows = (tmp_path / "out/ESTJ/answers/base.jsonl").read_text().splitlines()[1:]
    items = split(read_items(data, MBTI_TASKS, "ESTJ", on_problem=pytest.fail))[1]
    assert sorted(json.loads(row)["item"] for row in rows) == sorted(item.id for item in items)


def test_the_folder_of_other_items_is_refused_by_the_argument_that_chose_them(run, data, tmp_path):
    command = ("mbti", "--type", "ESTJ", "--methods", "base", "--tasks", "mcqa,qa", "--max-new-tokens", 2)
    assert run(*command, "--limit", 4).exit_code == 0
    before = files_of(tmp_path / "out")
    file = tmp_path / "out/ESTJ/answers/base.jsonl"
    wanted = f"mpg: out: expected a file of its own, but {file} holds another job: "
    for arguments, message in (
        (("--limit", 1), "limit is 4, asked is 1"),
        (("--limit", 4, "--held-out"), "held_out is False, asked is True"),
        (("--limit", 4, "--tasks", "qa,mcqa"), "tasks is ['mcqa', 'qa'], asked is ['qa', 'mcqa']"),
    ):
        done = run(*command, *arguments)
        assert (done.exit_code, done.stdout, done.stderr) == (2, "", f"{wanted}its items are others ({message})\n")
    assert run(*command, "--limit", 9).exit_code == 0  # of the same items
    (data / "mbti/questions/qa_ESTJ.json").write_text(json.dumps([{"instruction": "Why?", "output": "So."}]))
    for limit, message in ((4, ""), (9, " (limit is 4, asked is 9)")):
        done = run(*command, "--limit", limit)
        assert (done.exit_code, done.stderr) == (2, f"{wanted}its items are others{message}\n")
    assert files_of(tmp_path / "out") == before


def test_a_task_without_a_held_out_question_is_refused(run, data):
    tuned = split(read_items(data, ["qa"], "ESTJ", on_problem=pytest.fail))[0]
    rows = [{"instruction": item.question, "output": item.reference} for item in tuned]
    (data / "mbti/questions/qa_ESTJ.json").write_text(json.dumps(rows))
    done = run("mbti", "--type", "ESTJ", "--methods", "base", "--tasks", "mcqa,qa", *SHORT, "--held-out")
    assert done.exit_code == 2
    assert done.stderr == "mpg: held_out: expected questions of qa on the side that is held out, got none\n"


def test_what_is_no_item_is_told_and_the_rest_is_done(run, data):
    file = data / "mbti/questions/qa_ESTJ.json"
    file.write_text(json.dumps([{"instruction": "Why?"}, *json.loads(file.read_text())]))
    done = run("mbti", "--type", "ESTJ", "--methods", "base", "--tasks", "qa", *SHORT)
    assert done.exit_code == 0
    assert f"left out: {file}, entry 1: output: expected text, got None" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mbti", "--type", "ESTP"), "type: expected an attribute for each pole of ESTP; .* got E, S, T, J, and no P"),
        (("mbti", "--type", "ESJT"), "type: expected four poles such as ESTP, got 'ESJT'"),
        (
            ("mbti", "--type", "ESTJ", "--type", "ESTP", "--weights", "E=1"),
            "weights: expected none beside several types",
        ),
        (("mbti", "--type", "ESTJ", "--tasks", "qa,roleplay"), "tasks: expected some of qa, mcqa, 16p, got 'roleplay'"),
        (("mbti", "--weights", "E=1", "--tasks", "qa"), "type: expected one of ESTJ .*, got None"),
        (("mbti", "--type", "ESTJ", "--methods", "base,best"), "methods: expected some of base, .*, got 'best'"),
        (("mbti", "--type", "ESTJ", "--methods", "base,base"), "methods: expected each once, got 'base,base'"),
        (("mbti", "--type", "ESTJ", "--type", "ESTJ"), "type: expected each once, got ESTJ, ESTJ"),
        (("mbti", "--type", "ESTJ", "--plot", "x.png"), "plot: expected a --judge, whose scores are drawn, got none"),
        (
            ("mbti", "--type", "ESTJ", "--plot", "x.txt", "--judge", "http://a/v1#m"),
            "plot: expected a file that ends in one of",
        ),
        (("mbti", "--type", "ESTJ", "--reference", "best"), "reference: expected one of base, .*, got 'best'"),
        (("mbti", "--type", "ESTJ", "--choices", "words"), "choices: expected one of texts, letters, got 'words'"),
        (
            ("mbti", "--type", "ESTJ", "--judge", "gpt"),
            "judge: expected classifier, classifier:FOLDER or an endpoint's",
        ),
        (("mbti", "--type", "ESTJ", "--judge", "http://a/v1"), "judge: expected classifier, .* got 'http://a/v1'"),
        (
            ("mbti", "--type", "ESTJ", "--judge", "http://a/v1#m", "--judge", "http://b/v1#m"),
            "judge: .* names, got m, m",
        ),
        (
            ("mbti", "--type", "ESTJ", "--set", "gama=2"),
            "gama: expected an option that methods leave open; did you mean",
        ),
        (("mbti", "--type", "ESTJ", "--set", "target=base"), "target: expected an option that methods leave open"),
        (("roleplay",), "models: expected attributes profile and personality; .* got E, S, T, J, and no profile"),
        (
            ("roleplay", "--weights", "E=1", "--judge", "classifier"),
            "judge: expected an endpoint's URL#MODEL, as class",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_wrong_is_said_on_one_line_before_anything_is_loaded(arguments, message, run, monkeypatch, tmp_path):
    monkeypatch.setattr("mpg.app.cli.arguments.load", None)
    done = run(*arguments)
    assert done.exit_code == 2
    assert re.match(f"mpg: {message}", done.stderr.splitlines()[-1]), done.stderr
    assert not (tmp_path / "out").exists()


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(run, endpoint, monkeypatch, tmp_path):
    """Real signals to this process: in the middle of the answers, and while a reply is waited for."""
    server, is_over = endpoint(MBTI, MBTI, 60.0), threading.Event()
    command = ("mbti", "--type", "ESTJ", "--methods", "base", "--tasks", "qa,mcqa", *SHORT, "--batch-size", 1)
    command += ("--judge", f"{server.url}#m", "--concurrency", 1)
    answers, scores = (tmp_path / "out/ESTJ" / name / "base.jsonl" for name in ("answers", "scores/m"))
    append = Records.append

    def append_and_interrupt(records, row):
        append(records, row)
        if len(records.rows) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    def interrupt_at_the_third_request():
        while not is_over.wait(0.01):
            if len(server.requests) == 3 and scores.exists() and len(scores.read_text().splitlines()) == 1 + 2:
                os.kill(os.getpid(), signal.SIGINT)
                return

    with monkeypatch.context() as patched:
        patched.setattr(Records, "append", append_and_interrupt)
        done = run(*command)
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "")
    answered = answers.read_text()
    assert len(answered.splitlines()) == 1 + 2 and not server.requests
    watcher = threading.Thread(target=interrupt_at_the_third_request)
    watcher.start()
    try:
        done = run(*command)
    finally:
        is_over.set()
        watcher.join()
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "")
    assert answers.read_text().startswith(answered) and len(answers.read_text().splitlines()) == 1 + 4
    scored = scores.read_text()
    assert len(scored.splitlines()) == 1 + 2
    server.replies = [MBTI]
    done = run(*command)
    assert done.exit_code == 0 and "| base | 4.000 |" in done.stdout
    assert scores.read_text().startswith(scored) and len(scores.read_text().splitlines()) == 1 + 4
    assert len(server.requests) == 3 + 2  # the reply that was not waited for was asked for again


@long  # starts a process of its own
def test_an_interrupted_run_stops_at_once_and_goes_on_later(run, endpoint, data, tmp_path):
    server = endpoint(MBTI, MBTI, 900.0)
    arguments = ["evaluate", "mbti", "--data", data, "--out", tmp_path / "out", "--type", "ESTJ", "--methods", "base"]
    arguments += ["--tasks", "qa,mcqa", *SHORT, "--judge", f"{server.url}#m", "--concurrency", 1, "--device", "cpu"]
    unignore = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{unignore}; from mpg.__main__ import main; sys.exit(main())"
    running = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    ends_at = time.monotonic() + 600
    while len(server.requests) < 3:
        assert time.monotonic() < ends_at and running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    assert (running.communicate(timeout=300)[0], running.returncode) == ("", 130)
    kept = (tmp_path / "out/ESTJ/scores/m/base.jsonl").read_text().splitlines()
    assert len(kept) == 1 + 2
    server.replies = [MBTI]
    done = run("mbti", *map(str, arguments[6:]))
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "out/ESTJ/scores/m/base.jsonl").read_text().splitlines()[:3] == kept
    assert len(server.requests) == 3 + 2


def test_a_table_that_is_not_there_or_torn_is_named(tmp_path):
    (tmp_path / "table.json").write_text("{")
    for place, message in (
        (tmp_path / "none", "expected a file that can be read"),
        (tmp_path, "line 1: expected JSON"),
    ):
        done = CliRunner().invoke(app, ["evaluate", "overall", f"MBTI={place}"])
        assert done.exit_code == 2 and done.stderr.startswith("mpg: tables: ") and message in done.stderr


def test_without_the_extra_the_command_that_helps_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    done = run("mbti", "--type", "ESTJ", "--methods", "base", *SHORT)
    assert done.exit_code == 2 and "pip install --no-build-isolation -e '.[evaluate]'" in done.stderr
    monkeypatch.setitem(sys.modules, "openai", None)
    done = run("mbti", "--type", "ESTJ", "--methods", "base", *SHORT, "--judge", "http://127.0.0.1:9/v1#m")
    assert done.exit_code == 2 and "pip install --no-build-isolation -e '.[evaluate]'" in done.stderr
