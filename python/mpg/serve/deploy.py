"""The server as an application of Ray Serve, and the files that tell clusters to run it. Knows no model, no request."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from threading import Event
from typing import Any

import yaml

from mpg.extras import install
from mpg.options import a_number
from mpg.serve.settings import Settings

REPLICA, FRONT = "Replica", "Front"
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
FRONT_REQUESTS = 4096  # that one front has under way
KEY = "MPG_API_KEY"
APPLICATION = "mpg"
PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}  # of the head, as Ray has them by default
FILES = ("serve", "kuberay")  # that there are


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How many replicas there are and what each has.

    replicas      how many, or how few where max_replicas says how many at most: Ray then starts and ends some as
                  requests queue up
    cpus, gpus    of each
    """

    replicas: int = 1
    max_replicas: int | None = None
    cpus: float = 1
    gpus: float = 0

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError(f"replicas: expected 1 at least, got {self.replicas}")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas: expected at least the {self.replicas} replicas, got {self.max_replicas}")
        for name in ("cpus", "gpus"):
            a_number(0)(name, getattr(self, name))

    def options(self, settings: Settings, attributes: Mapping[str, str]) -> dict[str, Any]:
        """What Ray Serve is to know of the replicas, in its files and beside them."""
        number: dict[str, Any] = {"num_replicas": self.replicas}
        if self.max_replicas is not None:
            number = {"autoscaling_config": {"min_replicas": self.replicas, "max_replicas": self.max_replicas,
                                             "target_ongoing_requests": settings.max_rows}}  # fmt: skip
        return {
            "name": REPLICA, **number,
            "max_ongoing_requests": 2 * settings.max_rows,  # more than these go to another replica
            "max_queued_requests": settings.max_queue,
            "user_config": {"attributes": dict(attributes)},
            "request_router_config": {"request_router_class": ROUTER},
            "graceful_shutdown_timeout_s": settings.grace, "health_check_period_s": 5, "health_check_timeout_s": 30,
            "ray_actor_options": {"num_cpus": self.cpus, "num_gpus": self.gpus},
        }  # fmt: skip


def deployment(
    models: str = "demo",
    *,
    scale: Scale | None = None,
    attributes: Mapping[str, str] | None = None,
    load: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    allow_open: bool = False,
    **limits: Any,
) -> Any:
    """The application for `ray.serve.run`: `mpg serve` in replicas.

    models:     a set's name, or a recipe or folder that every node has in this place
    scale:      default one replica
    attributes: {name: folder} beside those of the models
    load:       arguments of `mpg.load`
    options:    before those of the recipe
    allow_open: whether to serve without a key: api_keys, or MPG_API_KEY of the environment
    limits:     fields of `Settings`

    Raises ValueError for what is refused when a server starts, and without a key.
    """
    try:
        from ray import serve

        from mpg.serve.replicas import Front, Replica
    except ImportError as error:
        raise ValueError(f"{error.name}: expected it installed: {install('ray')}") from None

    settings = read_settings(limits)
    if not (settings.api_keys or settings.hosts or allow_open):
        raise ValueError(f"api_keys: expected some, or {KEY} in the environment; allow_open=True serves without")
    own = (scale or Scale()).options(settings, attributes or {})
    replicas = serve.deployment(Replica).options(**own).bind(models, dict(load or {}), dict(options or {}), settings)
    front = serve.deployment(Front).options(
        name=FRONT, max_ongoing_requests=FRONT_REQUESTS, graceful_shutdown_timeout_s=settings.grace,
        ray_actor_options={"num_cpus": 0},
    )  # fmt: skip
    return front.bind(settings, replicas)


def build(arguments: dict[str, Any]) -> Any:
    """`deployment` as the files of Ray Serve call it."""
    return deployment(**arguments)


def told(settings: Settings) -> dict[str, Any]:
    """What arguments of `deployment` say settings that are not the defaults, but for keys.

    Raises ValueError for what replicas cannot have: each would have it for itself.
    """
    if settings.admin_key or settings.attribute_folders:
        raise ValueError("admin_key, attribute_folder: expected none beside replicas, whose attributes are deployed")
    default = vars(Settings())
    found = {name: value for name, value in vars(settings).items() if name != "api_keys" and value != default[name]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def read_settings(limits: Mapping[str, Any]) -> Settings:
    """The settings that arguments mean. Raises ValueError for what replicas cannot have, and as `Settings` does."""
    for name in limits:
        if name not in vars(Settings()):
            raise ValueError(f"{name}: expected an argument of deployment or a field of Settings")
    keys = limits.get("api_keys") or [key for key in [os.environ.get(KEY)] if key]
    settings = Settings(**{**limits, "api_keys": tuple(keys), "hosts": tuple(limits.get("hosts", ()))})
    told(settings)
    return settings


@dataclass(frozen=True)
class Config:
    """What the files say.

    arguments  of `deployment`, beside models and scale. Keys are none of them: the cluster's environment has these
    image      of containers, with mpg and its extra ray
    """

    models: str
    scale: Scale
    arguments: Mapping[str, Any]
    host: str
    port: int
    image: str

    def text(self, kind: str) -> str:
        """A file for `serve deploy` ("serve"), or for `kubectl apply` where KubeRay is ("kuberay")."""
        if not self.port:
            raise ValueError("port: expected one above 0 in a file, got 0")
        tree = self._serve() if kind == "serve" else self._kuberay()
        return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)

    def _serve(self) -> dict[str, Any]:
        limits = {name: value for name, value in self.arguments.items() if name in vars(Settings())}
        own = self.scale.options(read_settings(limits), {})
        return {
            "http_options": {"host": self.host, "port": self.port},
            "applications": [
                {
                    "name": APPLICATION, "route_prefix": "/", "import_path": "mpg.serve.deploy:build",
                    "args": {"models": self.models, **self.arguments}, "deployments": [own],
                }
            ],
        }  # fmt: skip

    def _kuberay(self) -> dict[str, Any]:
        """One pod a replica, as each has the models in its memory."""
        scale, most = self.scale, self.scale.max_replicas or self.scale.replicas
        # pods are called by the names of services
        arguments = {name: value for name, value in self.arguments.items() if name != "hosts"}
        everywhere = replace(self, arguments=arguments, host="0.0.0.0")
        port = {"serve": self.port}  # by these names KubeRay makes services, and probes that ask Ray's own ports
        key = {"name": KEY, "valueFrom": {"secretKeyRef": {"name": APPLICATION, "key": "api-key", "optional": True}}}

        def pod(name: str, cpus: float, gpus: float, ports: Mapping[str, int]) -> dict[str, Any]:
            has = {"cpu": f"{max(cpus, 1):g}", **({"nvidia.com/gpu": ceil(gpus)} if gpus else {})}
            own = {
                "name": name, "image": self.image, "env": [key], "resources": {"limits": has, "requests": has},
                "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
            }  # fmt: skip
            return {"spec": {"containers": [own]}}

        return {
            "apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {"name": APPLICATION},
            "spec": {
                "serveConfigV2": yaml.dump(everywhere._serve(), sort_keys=False),
                "rayClusterConfig": {
                    "enableInTreeAutoscaling": most > scale.replicas,
                    "headGroupSpec": {
                        "rayStartParams": {"num-cpus": "0"}, "template": pod("ray-head", 2, 0, {**PORTS, **port}),
                    },
                    "workerGroupSpecs": [
                        {
                            "groupName": "replicas", "replicas": scale.replicas, "minReplicas": scale.replicas,
                            "maxReplicas": most, "rayStartParams": {},
                            "template": pod("ray-worker", scale.cpus, scale.gpus, port),
                        }
                    ],
                },
            },
        }  # fmt: skip


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as it reads, and what is there twice twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, text: str) -> yaml.Node:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def run(application: Any, scale: Scale, host: str, port: int, on_ready: Callable[[], None]) -> None:
    """Serve on the cluster that this machine is of, or on a Ray of its own, until SIGTERM or SIGINT.

    Raises ValueError where the replicas cannot start, and for a cluster that serves something already.
    """
    from mpg.batch.cluster import check_room, connect

    is_alone = connect()
    import ray
    from ray import serve

    try:
        check_room("replicas", scale.replicas, scale.cpus, scale.gpus, is_alone)
        if found := sorted(serve.status().applications):  # which would end with these
            wanted = "a cluster that serves nothing yet"
            raise ValueError(f"replicas: expected {wanted}, got {', '.join(found)}; 'serve shutdown' ends what runs")
        try:
            serve.start(http_options={"host": host, "port": port})
            serve.run(application, name=APPLICATION, route_prefix="/")
            ended = Event()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: ended.set())
            on_ready()
            ended.wait()
        finally:
            serve.shutdown()
    except RuntimeError as error:
        raise ValueError(f"replicas: they cannot start: {str(error).strip().splitlines()[-1]}") from error
    finally:
        ray.shutdown()


def free_port(host: str) -> int:
    """A port that nobody listens at."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as found:
        return int(found.getsockname()[1])


def place(models: str) -> str:
    """Models as replicas on this machine's cluster find them, wherever they run."""
    return str(Path(models).absolute()) if Path(models).exists() else models
