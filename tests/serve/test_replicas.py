"""Replicas behind a front: in this process, as files of Ray Serve say it, and in the long form on Ray."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from typer.testing import CliRunner

from longer import long
from mpg.app.cli.command import app
from mpg.demo import MODELS
from mpg.serve import deploy
from mpg.serve.settings import Settings

pytest.importorskip("ray", reason="needs mpg[ray]")

from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.schema import ServeDeploySchema

from mpg.serve import replicas
from mpg.serve.replicas import Front, Replica, session_of

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "How was your weekend?"}]
BODY = {"model": "E=1", "messages": MESSAGES, "max_tokens": 8, "seed": 3, "sampler": "direct"}


class Handle:
    """Replicas of this process, as Ray's handle has them; `failure` is raised behind so many messages."""

    def __init__(self, replica, failure=None, behind=0):
        self.replica, self.failure, self.behind, self.sessions = replica, failure, behind, []

    def options(self, *, stream, session_id):
        self.sessions.append(session_id)
        return self

    @property
    def answer(self):
        return self

    async def remote(self, scope, body):
        count = 0
        async for messages in self.replica.answer(scope, body):
            for message in messages:
                if self.failure is not None and count == self.behind:
                    raise self.failure
                count += 1
                yield [message]


@pytest.fixture(autouse=True)
def log(monkeypatch):
    """That of the process stays as it is."""
    monkeypatch.setattr(replicas, "log_to", lambda stream: None)


@pytest.fixture(scope="module")
def replica():
    found = Replica("demo", {"device": "cpu", "dtype": "float64"}, {}, Settings(name="demo"))
    yield found
    found.engine.stop()


def ask(front, method, path, body=None, **headers):
    """What a front answers."""

    async def answer(scope, receive, send):
        await (await front(None))(scope, receive, send)

    async def call():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(answer), base_url="http://somewhere") as client:
            return await client.request(method, path, json=body, headers=headers)

    return asyncio.run(call())


def test_a_front_answers_as_a_server_does(replica):
    handle = Handle(replica)
    front = Front(Settings(), handle)
    whole = ask(front, "POST", CHAT, BODY, **{"x-request-id": "mine"})
    assert whole.headers.get_list("x-request-id") == ["mine"] and whole.json()["id"] == "chatcmpl-mine"
    text = whole.json()["choices"][0]["message"]["content"]
    expected = replica.engine.model.generate(MESSAGES, weights="E=1", max_new_tokens=8, seed=3, sampler="direct")
    assert text == expected.text
    streamed = ask(front, "POST", CHAT, {**BODY, "stream": True})
    lines = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
    chunks = [json.loads(line) for line in lines[:-1]]
    assert lines[-1] == "[DONE]" and len(chunks) > 2
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
    assert ask(front, "POST", CHAT, {**BODY, "tools": [{}]}).status_code == 400
    assert ask(front, "GET", "/health").json()["status"] == "ready"
    assert handle.sessions[0] == handle.sessions[1] != "" and handle.sessions[-1] == ""
    ask(front, "GET", "/metrics", **{"X-Session-ID": "own"})
    assert handle.sessions[-1] == "own"


def test_a_front_refuses_before_a_replica_is_asked(replica):
    handle = Handle(replica)
    front = Front(Settings(api_keys=("key",), hosts=("localhost",), max_body=500), handle)
    assert ask(front, "POST", CHAT, BODY, Host="elsewhere").status_code == 403
    assert ask(front, "POST", CHAT, BODY, Host="localhost:8000").status_code == 401
    long = {**BODY, "messages": MESSAGES * 30}
    assert ask(front, "POST", CHAT, long, Host="localhost", Authorization="Bearer key").status_code == 413
    assert handle.sessions == []
    assert ask(front, "POST", CHAT, BODY, Host="localhost", Authorization="Bearer key").status_code == 200


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (ActorDiedError(), 503, "replica_gone"),
        (DeploymentUnavailableError(None), 503, "replica_gone"),
        (BackPressureError(num_queued_requests=9, max_queued_requests=9), 429, "queue_full"),
    ],
)
def test_what_a_replica_cannot_answer_may_be_tried_again(replica, failure, status, code):
    for behind in (0, 1):  # a head alone is no answer
        front = Front(Settings(), Handle(replica, failure, behind))
        for stream in (False, True):
            found = ask(front, "POST", CHAT, {**BODY, "stream": stream})
            assert found.status_code == status and found.json()["error"]["code"] == code
            assert found.headers["retry-after"] == "1"
    cut = ask(Front(Settings(), Handle(replica, failure, 3)), "POST", CHAT, {**BODY, "stream": True})
    *_, told, done = [line for line in cut.text.splitlines() if line]
    assert json.loads(told[6:])["error"]["code"] == code and done == "data: [DONE]"


def test_a_call_that_is_ended_gives_its_rows_up(replica, monkeypatch):
    given_up, cancel = [], replica.engine.cancel

    def record(jobs):
        given_up.extend(job for job in jobs if not job.is_over)
        cancel(jobs)

    monkeypatch.setattr(replica.engine, "cancel", record)

    async def leave():
        scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "http_version": "1.1",
                 "headers": [(b"content-type", b"application/json")]}  # fmt: skip
        answer = replica.answer(scope, json.dumps({**BODY, "stream": True, "max_tokens": 90, "n": 16}).encode())
        assert (await anext(answer))[0]["status"] == 200
        await answer.aclose()
        while replica.engine.groups:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(leave(), 60))
    assert given_up


def test_other_attributes_are_read_beside_a_running_replica(replica, tmp_path):
    known = replica.engine.model.models.attribute_names
    asyncio.run(replica.reconfigure({"attributes": {}}))
    before = replica.engine.model
    asyncio.run(replica.reconfigure({"attributes": {"mine": str(MODELS / "adapters" / "E")}}))
    assert replica.engine.model.models.attribute_names == (*known, "mine")
    front = Front(Settings(), Handle(replica))
    texts = [ask(front, "POST", CHAT, {**BODY, "model": name}).json()["choices"] for name in ("E=1", "mine")]
    assert texts[0][0]["message"] == texts[1][0]["message"]
    with pytest.raises(ValueError, match="user_config: expected attributes alone, got adapters"):
        asyncio.run(replica.reconfigure({"adapters": {}}))
    with pytest.raises((ValueError, OSError)):
        asyncio.run(replica.reconfigure({"attributes": {"none": str(tmp_path)}}))
    replica.check_health()
    asyncio.run(replica.reconfigure({"attributes": {}}))
    assert replica.engine.model.models.attribute_names == known == before.models.attribute_names


def test_models_that_cannot_be_loaded_fail_the_replica(tmp_path):
    with pytest.raises(RuntimeError, match="the engine has failed"):
        Replica(str(tmp_path), {"device": "cpu"}, {}, Settings())


def told(**fields):
    return session_of(json.dumps(fields).encode())


def test_requests_of_one_conversation_have_one_session():
    system = {"role": "system", "content": "Be brief."}
    answer, more = {"role": "assistant", "content": "Fine."}, {"role": "user", "content": "And then?"}
    first = told(messages=[system, *MESSAGES], model="E")
    assert first == told(messages=[system, *MESSAGES, answer, more], model="T")
    assert len({first, told(messages=MESSAGES), told(messages=[system, more])}) == 3
    long = "a" * 300
    assert told(prompt=long) == told(prompt=f"{long} and on") == told(prompt=[long, "other"]) != told(prompt="b")
    assert told(prompt=[1, 2]) == told(prompt=[[1, 2]]) != told(prompt=[1, 3])
    assert told(messages=[system]) and told(messages=[1])
    for body in (b"", b"\xff", b"[]", b"{}", b'{"prompt": ""}', b'{"prompt": 3}', b'{"messages": []}', b"[" * 10**5):
        assert session_of(body) == ""


def show(*arguments):
    done = CliRunner().invoke(app, ["serve", *arguments])
    assert done.exit_code == 0, done.stderr
    return yaml.safe_load(done.stdout)


def test_files_are_those_of_rays_schema(monkeypatch):
    how = ["--max-rows", "16", "--device", "cpu", "--set", "chunk_size=4", "--grace", "5"]
    scale = ["--replicas", "2", "--max-replicas", "4", "--gpus-per-replica", "1"]
    kuberay = show("--print-config", "kuberay", "--models", "/models/mine", "--image", "here/mpg:1", *how, *scale)
    pods = kuberay["spec"]["rayClusterConfig"]
    [worker] = pods["workerGroupSpecs"]
    assert pods["enableInTreeAutoscaling"] is True
    assert (kuberay["kind"], worker["minReplicas"], worker["maxReplicas"]) == ("RayService", 2, 4)
    [container] = worker["template"]["spec"]["containers"]
    assert container["image"] == "here/mpg:1" and container["resources"]["limits"]["nvidia.com/gpu"] == 1
    inner = yaml.safe_load(kuberay["spec"]["serveConfigV2"])
    assert inner["http_options"]["host"] == "0.0.0.0" and "hosts" not in inner["applications"][0]["args"]
    for file in (inner, show("--print-config", "serve", *how, *scale)):
        [application] = ServeDeploySchema.model_validate(file).applications
        [replica] = application.deployments
        assert replica.autoscaling_config["max_replicas"] == 4 and replica.ray_actor_options.num_gpus == 1
        assert application.args["options"] == {"chunk_size": 4} and "api_keys" not in application.args
        monkeypatch.setenv("MPG_API_KEY", "secret")
        front = deploy.build(application.args)
        settings, engines = front._bound_deployment.init_args
        assert settings.api_keys == ("secret",) and settings.max_rows == 16 and settings.grace == 5
        built = engines._bound_deployment
        assert built.name == replica.name and built.init_args[1] == {"device": "cpu"}
        monkeypatch.delenv("MPG_API_KEY")
    with pytest.raises(ValueError, match="api_keys: expected some, or MPG_API_KEY"):
        deploy.build(inner["applications"][0]["args"])
    assert deploy.build({**inner["applications"][0]["args"], "allow_open": True})


@pytest.mark.parametrize("port", [8000, 9000])
def test_the_manifest_has_kuberays_fields_and_the_ports_that_its_services_and_probes_look_for(port):
    how = ["--models", "/models/mine", "--port", str(port), "--gpus-per-replica", "2", "--max-replicas", "3"]
    manifest = show("--print-config", "kuberay", *how)
    jsonschema = pytest.importorskip("jsonschema", reason="comes with mpg[ray]")
    jsonschema.validate(manifest, json.loads((Path(__file__).parent / "rayservice.json").read_text()))
    spec = manifest["spec"]
    assert yaml.safe_load(spec["serveConfigV2"])["http_options"] == {"host": "0.0.0.0", "port": port}
    pods = [spec["rayClusterConfig"]["headGroupSpec"], *spec["rayClusterConfig"]["workerGroupSpecs"]]
    head, worker = (pod["template"]["spec"]["containers"] for pod in pods)
    found = [{one["name"]: one["containerPort"] for one in pod[0]["ports"]} for pod in (head, worker)]
    assert found == [{"gcs-server": 6379, "dashboard": 8265, "client": 10001, "serve": port}, {"serve": port}]
    assert not {"livenessProbe", "readinessProbe"} & {*head[0], *worker[0]}  # KubeRay's own ask Ray and port "serve"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--print-config", "kuberay", "--port", "0"], "port: expected one above 0 in a file, got 0"),
        (["--replicas", "2", "--max-replicas", "1"], "max_replicas: expected at least the 2 replicas, got 1"),
        (["--replicas", "2", "--admin-key", "k"], "admin_key, attribute_folder: expected none beside replicas"),
        (["--print-config", "helm"], "print_config: expected one of serve, kuberay, got 'helm'"),
        (["--replicas", "2", "--host", "0.0.0.0"], "host: expected a loopback address without api_key"),
        (["--replicas", "2", "--models", "/nowhere"], "models: expected"),
    ],
)
def test_what_replicas_cannot_have_is_refused(arguments, message):
    done = CliRunner().invoke(app, ["serve", *arguments])
    assert done.exit_code == 2 and message in done.stderr
    with pytest.raises(ValueError, match="replicas: expected 1 at least, got 0"):
        deploy.Scale(replicas=0)
    with pytest.raises(ValueError, match="max_row: expected an argument of deployment"):
        deploy.deployment(max_row=3)


def test_without_ray_the_command_that_installs_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert show("--print-config", "serve")
    done = CliRunner().invoke(app, ["serve", "--replicas", "2"])
    assert done.exit_code == 2
    assert "ray: expected it installed: pip install --no-build-isolation -e '.[ray]'" in done.stderr


@contextmanager
def started(*arguments):
    """The command with a Ray of its own, and the address that it says it serves at."""
    command = [sys.executable, "-m", "mpg", "serve", "--device", "cpu", "--dtype", "float64", "--port", "0", *arguments]
    environment = {**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        lines = []
        found = next(
            filter(
                None, (re.search(r"serving at (http://\S+)/v1", lines.append(line) or line) for line in process.stderr)
            ),
            None,
        )
        assert found, "".join(lines)
        threading.Thread(target=process.stderr.read, daemon=True).start()  # else a full pipe stops it
        yield process, found[1]
    finally:
        process.terminate()
        status = process.wait(120)
    assert status == 0


def actors_of(process):
    found = [child for child in psutil.Process(process.pid).children(recursive=True) if child.is_running()]
    return [child for child in found if "ServeReplica:mpg:Replica" in " ".join(child.cmdline())]


@long
def test_a_replica_that_is_killed_under_load_costs_retries_alone_and_returns(capsys):
    rng, seconds, statuses = random.Random(0), [], Counter()
    with started("--replicas", "2") as (process, url):
        body = {**BODY, "max_tokens": 16}
        expected = httpx.post(f"{url}{CHAT}", json=body, timeout=300).json()["choices"][0]["message"]["content"]
        for own in "abcdefgh":  # all of a conversation's requests were one replica's
            head = {"x-session-id": own}
            count = counted(url, head)
            for _ in range(3):
                assert httpx.post(f"{url}{CHAT}", json=body, headers=head, timeout=300).status_code == 200
            assert counted(url, head) == count + 3
        first = actors_of(process)
        assert len(first) == 2
        [killed] = rng.sample(first, 1)

        def ask_on(number):
            begun_at = time.monotonic()
            messages = [{"role": "user", "content": f"{number}"}, *MESSAGES]
            while True:
                found = httpx.post(f"{url}{CHAT}", json={**body, "messages": messages}, timeout=300)
                statuses[found.status_code] += 1
                if found.status_code == 200:
                    seconds.append(time.monotonic() - begun_at)
                    return
                assert found.status_code in (429, 503), found.text
                time.sleep(float(found.headers["retry-after"]))

        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(ask_on, number) for number in range(200)]
            while sum(answer.done() for answer in answers) < 50:
                time.sleep(0.05)
            killed.kill()
            for answer in answers:
                answer.result()
        ends_at = time.monotonic() + 300
        while len(again := actors_of(process)) < 2 or killed in again:
            assert time.monotonic() < ends_at
            time.sleep(0.5)
        assert httpx.post(f"{url}{CHAT}", json=body, timeout=300).json()["choices"][0]["message"]["content"] == expected
    with capsys.disabled():
        seconds.sort()
        p50, p99 = seconds[len(seconds) // 2], seconds[int(len(seconds) * 0.99)]
        print(f"\n{dict(statuses)}, seconds with retries p50 {p50:.2f}, p99 {p99:.2f}")
    assert len(seconds) == 200


@long
def test_a_file_deploys_and_its_attributes_change_beside_requests(monkeypatch):
    import ray
    from ray import serve

    from mpg.batch.cluster import connect

    port = deploy.free_port("127.0.0.1")
    file = show(
        "--print-config", "serve", "--device", "cpu", "--dtype", "float64", "--replicas", "2", "--port", str(port)
    )
    monkeypatch.setenv("RAY_ADDRESS", "local")
    connect()
    try:
        serve.start(http_options=file["http_options"])
        client = serve.context._get_global_client()  # what `serve deploy` asks through a dashboard
        url = f"http://127.0.0.1:{port}"

        def deploy_it(is_there):
            client.deploy_apps(ServeDeploySchema.model_validate(file))
            ends_at = time.monotonic() + 600
            while not is_there():
                assert time.monotonic() < ends_at
                time.sleep(0.1)

        def known():
            answer = httpx.get(f"{url}/v1/models", timeout=300)
            return [model["id"] for model in answer.json()["data"]] if answer.status_code == 200 else []

        deploy_it(lambda: "E" in known() and len(actors_of(psutil.Process())) == 2)
        assert "mine" not in known()
        first = {actor.pid for actor in actors_of(psutil.Process())}
        adapter = str(MODELS / "adapters" / "E")
        file["applications"][0]["deployments"][0]["user_config"]["attributes"]["mine"] = adapter
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(httpx.post, f"{url}{CHAT}", json=BODY, timeout=300) for _ in range(30)]
            deploy_it(lambda: all("mine" in known() for _ in range(8)))  # of either replica
            assert {answer.result().status_code for answer in answers} == {200}
        assert {actor.pid for actor in actors_of(psutil.Process())} == first  # in place
        assert httpx.post(f"{url}{CHAT}", json={**BODY, "model": "mine"}, timeout=300).status_code == 200
    finally:
        serve.shutdown()
        ray.shutdown()


def counted(url, headers):
    """Chats that the replica of a session has answered."""
    text = httpx.get(f"{url}/metrics", headers=headers, timeout=300).text
    return sum(float(n) for n in re.findall(rf'^mpg_requests_total{{.*"{CHAT}".*"200".*}} (\S+)', text, re.MULTILINE))
