"""Jobs in one process: what rows become, whatever the order, the parts and the restarts; and what is refused."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mpg
from full_disk import small_files
from jobs import OF_TIME, make_rows, make_task, run, told, write_rows
from mpg.app.cli.command import app
from mpg.batch import rows as batch_rows
from mpg.batch import worker as workers
from mpg.batch.job import begin, describe
from mpg.batch.parts import Output
from mpg.batch.rows import scan, seed_of
from mpg.batch.worker import Worker
from mpg.demo import MODELS

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def model():
    """In double precision, where a draw beside a boundary is as good as impossible."""
    return mpg.load(MODELS, device=os.environ.get("MPG_DEVICE", "cpu"), dtype="float64")


@pytest.fixture(scope="module")
def job(model, tmp_path_factory):
    """Rows, and what an undisturbed job makes of them."""
    folder = tmp_path_factory.mktemp("job")
    rows = make_rows(40)
    run(model, write_rows(folder / "rows.jsonl", rows), folder / "out")
    return rows, folder


def test_rows_are_told_in_order_and_are_what_generate_makes_of_them(model, job):
    rows, folder = job
    found = told(folder / "out")
    assert list(found) == [row["id"] for row in rows]
    for row in rows[::7]:
        seed = seed_of(row["id"], 0)
        how = {name: row[name] for name in ("weights", "max_new_tokens")}
        if not isinstance(how["weights"], dict):
            how["weights"] = model.recipe.weigh(how["weights"])
        alone = model.generate(row["prompt"], seed=seed, sampler="direct", **how)
        stats = {name: value for name, value in alone.stats.items() if name not in OF_TIME}
        assert found[row["id"]] == {
            "id": row["id"], "number": row["number"], "text": alone.text, "finish_reason": alone.finish_reason,
            "tokens": list(alone.tokens), "seed": seed, "stats": stats, "error": None,
        }  # fmt: skip


def test_texts_depend_on_no_order_and_no_restart(model, job, tmp_path, monkeypatch):
    rows, folder = job
    backwards = write_rows(tmp_path / "rows.jsonl", rows[::-1])
    write, writes = Output.write, []

    class Killed(BaseException):
        pass

    def write_one(output, number, rows):
        """As a process does that dies before its second part, however many are ready by then."""
        if writes:
            raise Killed
        writes.append(number)
        write(output, number, rows)

    with monkeypatch.context() as dying:
        dying.setattr(Output, "write", write_one)
        with pytest.raises(Killed):
            run(model, backwards, tmp_path / "out", max_rows=3)
    [first] = (tmp_path / "out").glob("part-*")
    (tmp_path / "out" / ".unfinished-1234").write_text("{")
    written, written_at = len(told(tmp_path / "out")), first.stat().st_mtime_ns
    left = run(model, backwards, tmp_path / "out")
    assert sum(chunk.count for chunk in left) == len(rows) - written
    assert first.stat().st_mtime_ns == written_at  # not done twice
    assert told(tmp_path / "out") == told(folder / "out")
    assert not list((tmp_path / "out").glob(".*"))
    assert run(model, backwards, tmp_path / "out") == []


def test_an_id_a_seed_of_its_own_and_the_jobs_seed_make_a_rows_seed(model, tmp_path):
    assert seed_of("a", 0) == seed_of("a", 0) != seed_of("b", 0)
    assert len({seed_of(1, 0), seed_of("1", 0), seed_of(1, 1)}) == 3
    rows = [{"prompt": "Hi?", "weights": "E=1", "max_new_tokens": 1, **own} for own in ({}, {"seed": 7})]
    run(model, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out", seed=3)
    assert {row_id: row["seed"] for row_id, row in told(tmp_path / "out").items()} == {0: seed_of(0, 3), 1: 7}


def test_parquet_is_read_and_written_and_a_uri_is_a_place(model, job, tmp_path):
    rows, folder = job
    for row in (some := [dict(row) for row in rows[:20]]):
        row["weights"] = json.dumps(row["weights"])[1:-1] if isinstance(row["weights"], str) else "J=-0.5,S=1"
        row["messages"] = [{"role": "user", "content": row.pop("prompt"), "name": None}]
        row |= {"share": row["number"] / 2 if row["number"] % 2 else None, "tags": ["a", str(row["number"])]}
    table = pa.Table.from_pylist(some)
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=3)
    run(model, f"file://{tmp_path}/rows.parquet", f"file://{tmp_path}/out", form="parquet")
    found = pa.concat_tables(map(pq.read_table, sorted((tmp_path / "out").glob("part-*.parquet")))).to_pylist()
    expected = told(folder / "out")
    assert [row["id"] for row in found] == [row["id"] for row in some]
    for row, asked in zip(found, some, strict=True):
        wanted = expected[row["id"]]
        assert {name: row[name] for name in ("text", "tokens", "seed", "finish_reason", "number", "error")} == {
            name: wanted[name] for name in ("text", "tokens", "seed", "finish_reason", "number", "error")
        }
        assert row["share"] == asked["share"] and json.loads(row["tags"]) == asked["tags"]
        assert dict(row["stats"])["rounds"] == wanted["stats"]["rounds"]


def test_every_row_of_parquet_is_read_once_whatever_its_groups(tmp_path):
    table = pa.table({"id": list(range(100)), "prompt": [f"text {number}" for number in range(100)]})
    for size in (1, 7, 16, 33, 100):
        pq.write_table(table, tmp_path / "rows.parquet", row_group_size=size)
        asked = scan(str(tmp_path))
        assert [row["id"] for chunk in asked.chunks for row in asked.read(chunk)] == list(range(100))


def test_bad_rows_are_rows_with_an_error_and_the_job_goes_on(model, tmp_path):
    good = {"prompt": "Hi?", "weights": "E=1", "max_new_tokens": 2}
    bad = {
        "prompt: expected one of prompt and messages, got neither": {"prompt": None},
        "prompt: expected one of prompt and messages, got prompt and messages": {"messages": [{}]},
        "prompt: expected text or a list, not empty, got 7": {"prompt": 7},
        "message 0: expected a role": {"prompt": None, "messages": [{"content": "?"}]},
        "continue_final_message=True": {
            "prompt": None, "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        },
        "weights: expected some of E, S, T, J, got 'X'": {"weights": {"X": 1}},
        "weights: expected a number for some of": {"weights": None},
        "temperature: expected a number": {"temperature": "hot"},
        "max_new_tokens: the model has 256 positions": {"max_new_tokens": 10**6},
        "seed: expected an integer": {"seed": -1},
        "sampler: expected exact, direct": {"sampler": "auto"},
        "num_return_sequences: expected one text a row": {"num_return_sequences": 3},
        "trace: expected no trace": {"trace": True},
        "contexts: expected texts by name": {"contexts": "calm"},
        "UTF-8 can hold": {"prompt": "\ud800"},
    }  # fmt: skip
    rows = [{**good, **own} for own in bad.values()]
    run(model, write_rows(tmp_path / "rows.jsonl", [*rows, good]), tmp_path / "out")
    *failed, last = told(tmp_path / "out").values()
    assert last["error"] is None and len(last["tokens"]) == 2
    for message, row in zip(bad, failed, strict=True):
        assert message in row["error"]
        assert (row["text"], row["tokens"], row["finish_reason"]) == (None, [], None)


def test_the_scheduler_stays_full_across_chunks(model, tmp_path, monkeypatch):
    """One long row in each chunk: alone at its end, where a chunk begins when the one before it is over."""
    rows = [
        {"prompt": "Hi?", "weights": "E=1", "seed": number, "max_new_tokens": 24 if number % 16 == 0 else 2,
         "eos_token_id": 0}
        for number in range(64)
    ]  # fmt: skip
    name, rounds = write_rows(tmp_path / "rows.jsonl", rows), {}
    for at_once in (1, workers.AT_ONCE):
        monkeypatch.setattr(workers, "AT_ONCE", at_once)
        rounds[at_once] = 0

        def count(self, seconds, at_once=at_once):
            rounds[at_once] += 1

        monkeypatch.setattr(workers.EngineMetrics, "round", count)
        run(model, name, tmp_path / str(at_once), max_rows=16)
    assert told(tmp_path / "1") == told(tmp_path / str(workers.AT_ONCE))
    assert rounds[workers.AT_ONCE] < 0.6 * rounds[1]


def test_rows_begin_by_length_the_longest_first(model, tmp_path, monkeypatch):
    """Of a chunk: those that share rounds are then alike, and none long is left alone at the end."""
    begun, submit = [], workers.Engine.submit

    def record(engine, jobs):
        begun.append([job.request.num_positions for job in jobs])
        submit(engine, jobs)

    monkeypatch.setattr(workers.Engine, "submit", record)
    run(model, write_rows(tmp_path / "rows.jsonl", make_rows(16)), tmp_path / "out")
    [lengths] = begun
    assert len(set(lengths)) > 3 and lengths == sorted(lengths, reverse=True)


def test_a_row_whose_workers_die_while_it_is_alone_is_a_row_with_an_error(model, job, tmp_path):
    """A chunk with it is tried twice as it is, then row by row, with no other chunk beside it."""
    rows, folder = job
    task = make_task(model, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    chunks = begin(task, describe(task, model.recipe, {}))
    deaths, sizes = 0, []

    class Mortal(Worker):
        running = 0

        async def _answer(self, some):
            nonlocal deaths
            if any(row["id"] == "row 5" for row in some):
                deaths += 1
                self.is_dead.set()
                await asyncio.sleep(60)
            sizes.append(len(some))
            Mortal.running += 1
            assert len(some) > 1 or Mortal.running == 1
            await asyncio.sleep(0)
            answers = await super()._answer(some)
            Mortal.running -= 1
            return answers

    async def run_until_death(worker):
        worker.is_dead = asyncio.Event()
        living = asyncio.gather(*map(worker.run_again, chunks))
        dying = asyncio.ensure_future(worker.is_dead.wait())
        ended, _ = await asyncio.wait([living, dying], return_when=asyncio.FIRST_COMPLETED)
        return living.result() if living in ended else None

    done = None
    while done is None:
        worker, Mortal.running = Mortal(task), 0
        done = asyncio.run(run_until_death(worker))
        worker.close()
    assert deaths == 4 and [of_chunk.errors for of_chunk in done] == [1, 0, 0]
    assert sizes.count(1) == len(rows) - 1  # none twice; the other chunks had no time to end before a death
    found, expected = told(tmp_path / "out"), told(folder / "out")
    assert "the worker died 2 times" in found.pop("row 5")["error"]
    assert found == {row_id: row for row_id, row in expected.items() if row_id != "row 5"}
    assert not list((tmp_path / "out").glob(".*"))


def test_files_that_may_grow_no_more_stop_the_job_which_goes_on_once_they_may(model, job, tmp_path):
    """By the process's own limit, the nearest to a full disk that needs no rights; test_nodes.py fills one."""
    rows, folder = job
    name = write_rows(tmp_path / "rows.jsonl", rows)
    refused = pytest.raises(ValueError, match=r"output: expected a folder that can be written, got .*File too large")
    with refused, small_files(2048):  # the job's file fits, a part does not
        run(model, name, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["job.json"]  # nothing half written
    run(model, name, tmp_path / "out")
    assert told(tmp_path / "out") == told(folder / "out")


def test_a_scan_holds_no_texts(tmp_path):
    name = write_rows(tmp_path / "rows.jsonl", [{"id": n, "prompt": "a" * 2000} for n in range(5000)])
    tracemalloc.start()
    asked = scan(name)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert os.path.getsize(name) > 10**7 and most < 4 * 2**20 + len(asked.chunks) * 1000
    assert max(chunk.count for chunk in asked.chunks) <= batch_rows.MOST


GOOD = '{"id": 1, "prompt": "a"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "input: expected rows, got none"),
        (GOOD + '{"id"', "line 2: expected JSON"),
        (GOOD + "7\n", "line 2: expected a JSON object, got 7"),
        (GOOD * 2, "line 2: id: expected another one in every row, got 1 again"),
        (GOOD + '{"prompt": "b"}', "line 2: expected an id in every row or in none"),
        (GOOD + '{"id": "2", "prompt": "b"}', "line 2: id: expected int as before it, got '2'"),
        ('{"id": 1.5, "prompt": "b"}', "line 1: id: expected text or an integer of 64 bits, got 1.5"),
        (f'{{"id": {2**63}, "prompt": "b"}}', f"line 1: id: expected text or an integer of 64 bits, got {2**63}"),
        (r'{"id": "\ud800", "prompt": "b"}', "line 1: id: expected text or an integer of 64 bits, got"),
        ('{"text_": "b"}', "input: expected prompt or messages in its rows, got the columns text_"),
        ('{"prompt": "b", "text": "c"}', "input: column 'text': expected another name"),
        (b"\xff\xfe", "line 1: expected text in UTF-8"),
    ],
)
def test_inputs_of_json_lines_that_cannot_be_are_refused(tmp_path, text, message):
    (tmp_path / "rows.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"^input: ") as refused:
        scan(str(tmp_path / "rows.jsonl"))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": [b"a"]}, "column 'prompt': expected text or a list of token ids, got binary"),
        ({"messages": ["a"]}, "column 'messages': expected a list of structs, got string"),
        ({"prompt": ["a"], "other": [b"a"]}, "column 'other': expected text, numbers, truths"),
        ({"prompt": ["a"], "id": [1.5]}, "row 1: id: expected text or an integer of 64 bits, got 1.5"),
        ({"prompt": ["a", "b"], "id": [1, 1]}, "row 2: id: expected another one"),
        ({"other": ["a"]}, "expected prompt or messages in its rows, got the columns other"),
    ],
)
def test_inputs_of_parquet_that_cannot_be_are_refused(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"^input: ") as refused:
        scan(str(tmp_path))
    assert message in str(refused.value)


def test_inputs_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "rows.csv").touch()
    (tmp_path / "rows.parquet").write_text("no Parquet")
    for name, message in [("nowhere.jsonl", "No such file"), ("rows.csv", "ends in .jsonl"), ("rows.parquet", "read")]:
        with pytest.raises(ValueError, match=r"^input: expected") as refused:
            scan(str(tmp_path / name))
        assert message in str(refused.value)
    with pytest.raises(ValueError, match="input: expected files that can be read, got nothing://there"):
        scan("nothing://there")


def test_a_changed_input_and_a_part_of_it_that_is_gone_are_refused(model, job, tmp_path):
    rows, _ = job
    name = write_rows(tmp_path / "rows.jsonl", rows)
    task = make_task(model, name, tmp_path / "out")
    write_rows(name, rows[:3])
    worker = Worker(task)
    with pytest.raises(ValueError, match="as it was when the job began, got fewer rows"):
        asyncio.run(worker.run(task.rows.chunks[-1]))
    worker.close()


def test_the_folder_of_another_job_is_refused_with_what_differs(model, job, tmp_path):
    rows, folder = job
    name = str(folder / "rows.jsonl")

    def refused(output=folder / "out", rows=name, recipe=model.recipe, **how):
        task = make_task(model, rows, output, **how)
        with pytest.raises(ValueError, match=r"^(input|output): ") as error:
            begin(task, describe(task, recipe, {}))
        return str(error.value)

    assert "options.temperature: None there, 0.5 here" in refused(options={"sampler": "direct", "temperature": 0.5})
    both = refused(seed=1, weights="E=1")
    assert "seed: 0 there, 1 here" in both and "weights: None there, 'E=1' here" in both
    assert "format: 'jsonl' there, 'parquet' here" in refused(form="parquet")
    other = write_rows(tmp_path / "rows.jsonl", rows[:-1])
    changed = refused(rows=other)
    assert changed.startswith("input: expected the rows that this job began with") and "rows: 40 there, 39" in changed
    shutil.copytree(MODELS, tmp_path / "moved")
    moved = mpg.load(tmp_path / "moved").recipe
    task = make_task(model, name, folder / "out")
    assert begin(task, describe(task, moved, {})) == []  # the same models elsewhere
    weights = tmp_path / "moved" / "adapters" / "E" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    assert "models.attributes.E.sha256" in refused(recipe=moved)
    sources = [replace(model.recipe, attributes={"calm": {"source": name, "text": "Be calm."}}) for name in "ET"]
    first, second = (describe(task, recipe, {}) for recipe in sources)
    task = make_task(model, name, tmp_path / "calm")
    begin(task, first)
    with pytest.raises(ValueError, match=r"models\.attributes\.calm\.source: 'E' there, 'T' here"):
        begin(task, second)
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "a.txt").touch()
    assert "which holds 'a.txt'" in refused(tmp_path / "others")
    assert "expected a folder, got the file" in refused(tmp_path / "others" / "a.txt")


def invoke(*arguments):
    return CliRunner().invoke(app, ["batch", *map(str, arguments)])


def test_the_command_answers_tells_how_far_it_is_and_goes_on(job, tmp_path, monkeypatch):
    _, folder = job
    monkeypatch.setattr("mpg.app.cli.batch.LINE_SECONDS", 0)
    command = [folder / "rows.jsonl", tmp_path / "out", "--local", "--set", "sampler=direct", "--dtype", "float64"]
    done = invoke(*command)
    assert (done.exit_code, done.stdout.split(";")[0]) == (0, f"{tmp_path / 'out'}: 40 of 40 rows")
    assert told(tmp_path / "out") == told(folder / "out")
    number = r"[\d.e+]+"
    lines = re.findall(rf"(\d+) of 40 rows; {number} rows/s, {number} tokens/s; \d+ s left", done.stderr)
    assert len(lines) == 3 and sorted(map(int, lines))[-1] == 40
    assert "40 of 40 rows; 0 rows/s" in invoke(*command).stdout
    other = invoke(*command, "--seed", "1")
    assert other.exit_code == 2 and "seed: 0 there, 1 here" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "sampler=auto"], "sampler: expected exact, direct"),
        (["--set", "temperature=hot"], "temperature: expected a number"),
        (["--weights", "X"], "weights: expected NAME=NUMBER"),
        (["--format", "csv"], "format: expected one of jsonl, parquet"),
        (["--models", "nowhere"], "models: expected"),
        (["--weights", "X=1"], "weights: expected some of E, S, T, J, got 'X'"),
    ],
)
def test_mistakes_on_the_command_line_are_told(job, tmp_path, arguments, message):
    _, folder = job
    done = invoke(folder / "rows.jsonl", tmp_path / "out", "--local", *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert not list(Path(tmp_path).glob("out/part-*"))


def test_without_ray_the_command_that_installs_it_is_told(job, tmp_path, monkeypatch):
    _, folder = job
    monkeypatch.setattr("mpg.app.cli.batch.find_spec", lambda name: None)
    done = invoke(folder / "rows.jsonl", tmp_path / "out")
    assert done.exit_code == 2
    assert "ray: expected it installed: pip install --no-build-isolation -e '.[ray]'" in done.stderr


def test_without_pyarrow_what_local_needs_is_told(job, tmp_path, monkeypatch):
    _, folder = job
    monkeypatch.setitem(sys.modules, "mpg.batch.job", None)
    done = invoke(folder / "rows.jsonl", tmp_path / "out", "--local")
    assert done.exit_code == 2
    assert "for --local alone: pip install --no-build-isolation pyarrow -e '.[serve]'" in done.stderr
