"""`mpg serve` as a process: its signals, its start and its end, and what documents show of it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
import torch
from typer.testing import CliRunner

from longer import IS_LONG, long
from mpg.app.cli import arguments
from mpg.app.cli.command import app
from mpg.app.cli.serve import _name
from mpg.serve import process
from serving import started, wait_for

TEXT = "/v1/completions"
BODY = {"model": "E", "prompt": [5, 6, 7], "max_tokens": 60, "seed": 3, "sampler": "direct", "n": 16}


def http_process(process):
    """The one without models."""
    children = psutil.Process(process.pid).children()
    [found] = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    return found


def is_gone(url):
    """Whether nobody listens there any more; what lost its models to a signal takes a moment for that."""
    try:
        return not httpx.get(f"{url}/health")
    except httpx.ConnectError:
        return True
    except httpx.TransportError:
        return False


def post(url, **fields):
    return httpx.post(f"{url}{TEXT}", json={**BODY, **fields}, timeout=60)


def texts_of(answer):
    """Of all choices of an answer, streamed or not."""
    if not answer.text.startswith("data: "):
        return [choice["text"] for choice in answer.json()["choices"]]
    texts = [""] * BODY["n"]
    for line in answer.text.splitlines():
        for choice in json.loads(line.removeprefix("data: "))["choices"] if line.startswith("data: {") else ():
            texts[choice["index"]] += choice["text"]
    return texts


def all_are_in(url, answers):
    """Whether every request has been answered or has choices that run or wait."""
    text = httpx.get(f"{url}/metrics").text
    held = sum(float(found) for found in re.findall(r"^mpg_(?:rows|queue_size) (\S+)", text, re.MULTILINE))
    return held > BODY["n"] * (sum(not answer.done() for answer in answers) - 1)


@long
def test_sigterm_loses_no_answer_and_exits_0_and_a_killed_server_serves_again():
    """The latter in the long form."""
    with started("--grace", "50", "--max-rows", "4") as (process, url), ThreadPoolExecutor(4) as pool:
        page = httpx.get(re.search(r"a playground at (\S+)", process.said)[1])
        assert page.headers["content-type"].startswith("text/html") and "<html" in page.text
        wanted = texts_of(post(url))
        assert not any("torch" in place.path for place in http_process(process).memory_maps())
        answers = [pool.submit(post, url, stream=index % 2 == 1) for index in range(4)]
        wait_for(lambda: all_are_in(url, answers))
        process.send_signal(signal.SIGTERM)
        assert [texts_of(answer.result()) for answer in answers] == [wanted] * 4
        assert {json.loads(line)["level"] for line in process.logged} == {"INFO"}  # all of it is JSON
        assert process.wait(60) == 0
    port = url.rsplit(":", 1)[1]
    if IS_LONG:
        with started("--port", port) as (process, again):
            assert again == url and post(url, n=1).status_code == 200
            process.kill()
            process.wait()
            wait_for(lambda: is_gone(url))
        with started("--port", port) as (process, _):
            http_process(process).kill()
            assert process.wait(60) == 2
            assert process.logged[-1] == "mpg: the process that serves HTTP has ended with status -9\n"
    with started("--port", port, "--grace", "0", "--max-rows", "1") as (process, again), ThreadPoolExecutor(4) as pool:
        assert texts_of(post(again)) == wanted
        answers = [pool.submit(post, url) for _ in range(4)]
        wait_for(lambda: all_are_in(url, answers))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        statuses = [answer.result().status_code for answer in answers]
        assert set(statuses) <= {200, 503} and 503 in statuses  # what outlasts the grace is told so
        assert process.wait(60) == 0


def test_models_that_are_loaded_anew_are_loaded_as_the_first_ones(monkeypatch):
    loads = []
    monkeypatch.setattr(process, "serve", lambda settings, host, port, *both: loads.extend(both))
    options = ["--merge-adapters", "--allow-other-base", "--dtype", "float64", "--device", "cpu", "--port", "0"]
    assert CliRunner().invoke(app, ["serve", *options]).exit_code == 0
    model = loads[0]()
    again = loads[1](model.recipe, model.models)
    for loaded in (model, again):
        assert loaded.recipe.merge_adapters and loaded.recipe.allow_other_base
        assert loaded.models.dtype == torch.float64
    assert loaded.models.attribute_names == model.models.attribute_names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "host: expected a loopback address"),
        (["--models", "nowhere"], "models: expected"),
        (["--set", "temperature=hot"], "temperature: expected a number"),
        (["--max-rows", "0"], "max_rows: expected"),
        (["--attribute-folder", "nowhere"], "attribute_folder: expected a folder"),
    ],
)
def test_mistakes_on_the_command_line_are_told_before_anything_is_loaded(arguments, message):
    done = CliRunner().invoke(app, ["serve", *arguments])
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("nowhere.invalid", "host: expected an address of this machine, got 'nowhere.invalid': "),
        ("a..b", "host: expected an address of this machine, got 'a..b': "),
        ("192.0.2.1", "host, port: expected an address of this machine and a port that is free, got '192.0.2.1', "),
        ("127.0.0.1", "host, port: expected an address of this machine and a port that is free, got '127.0.0.1', "),
    ],
)
def test_where_nothing_can_listen_is_told_on_one_line_before_anything_is_loaded(host, message, monkeypatch):
    monkeypatch.setattr(process, "serve", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(app, ["serve", "--allow-open", "--host", host, "--port", port])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"mpg: {message}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("threads", "cores", "kept"), [(8, 8, 7), (4, 8, 4), (2, 2, 1), (1, 1, 1)])
def test_torch_leaves_a_core_to_the_handlers(monkeypatch, threads, cores, kept):
    told = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    arguments.leave_a_core()
    assert told == [kept]


def test_a_core_is_left_before_layers_are_timed(monkeypatch):
    order = []
    monkeypatch.setattr(arguments, "leave_a_core", lambda: order.append("left"))
    monkeypatch.setattr(arguments, "load", lambda *models, **how: order.append("loaded"))
    monkeypatch.setattr(process, "serve", lambda limits, host, port, load, reload: load())
    CliRunner().invoke(app, ["serve", "--port", "0"])
    assert order == ["left", "loaded"]


def test_one_line_says_where_clients_ask_and_where_the_playground_is(capsys):
    process.say("http://[::1]:8000")
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(r"serving at (http://\S+)/v1", line)[1] == "http://[::1]:8000"
    assert re.search(r"playground at (http://\S+)$", line)[1] == "http://[::1]:8000/"


def test_the_combination_is_called_as_what_holds_it():
    names = {"demo": "demo", "a/Llama-3.2-1B": "Llama-3.2-1B", "a/mine.yaml": "mine", "a/b/": "b", "/": "mpg"}
    assert {models: _name(models) for models in names} == names


@pytest.mark.parametrize("name", ["base", "E", "warm", "other"])
def test_no_other_model_is_called_as_the_combination(tmp_path, name):
    """Else requests could not ask for it."""
    recipe = tmp_path / f"{name}.yaml"
    recipe.write_text("base: base\nattributes: {E: adapters/E}\npresets: {warm: {E: 1}}\n")
    assert _name(str(recipe)) == ("other" if name == "other" else "mpg")
