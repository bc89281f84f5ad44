"""Front and replicas as one application of Ray Serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from engine.cluster.front import Front
from engine.cluster.replica import Replica
from engine.config import EngineConfig
from engine.errors import InvalidRequestError
from engine.serve.models.model_store import ModelNames, ModelSpec, name_of
from engine.serve.settings import ServeSettings

T = TypeVar("T")

NAME = "gguf-engine"
REPLICAS = "replica"
ROUTERS: dict[str, str | None] = {"prefix": "engine.cluster.router:PrefixRouter", "least-busy": None}
"""Ways to choose a replica; None is Ray's own, the less busy one of two."""

_ON_HEAD = {"node:__internal_head__": 0.001}
"""Ray's name for the machine that the cluster began with and ends with: no other one's loss takes the front along."""


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """How many replicas there are, where, and how requests are given to them.

    Attributes:
        min_replicas: at least so many run.
        max_replicas: at most so many run; more than min_replicas: as many as the requests need.
        target_requests: requests, running and waiting, for each replica, that the number of replicas aims at.
        downscale_delay: seconds of too few requests after which a replica is ended.
        cpus: processor cores for each replica.
        gpus: GPUs for each replica, or the part of one; at most 1, as a replica does not compute on several.
        router: a key of ROUTERS.

    Raises:
        InvalidRequestError: a value outside its range.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    target_requests: float = 16.0
    downscale_delay: float = 300.0
    cpus: float = 1.0
    gpus: float = 0.0
    router: str = "prefix"

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise InvalidRequestError(
                f"{self.min_replicas} to {self.max_replicas} replicas; allowed: at least 1, and no fewer at most"
            )
        if not self.target_requests > 0:
            raise InvalidRequestError(f"target_requests is {self.target_requests}; allowed: more than 0")
        for name in ("downscale_delay", "cpus", "gpus"):
            if not getattr(self, name) >= 0:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; allowed: at least 0")
        if self.gpus > 1:
            raise InvalidRequestError(
                f"gpus is {self.gpus:g} for each replica; allowed: at most 1, as a replica computes on one GPU; "
                "for more GPUs run more replicas"
            )
        if self.router not in ROUTERS:
            raise InvalidRequestError(f"router is {self.router!r}; allowed: {', '.join(ROUTERS)}")


def application(specs: Sequence[ModelSpec], settings: ServeSettings, cluster: ClusterSettings) -> Any:
    """What serve.run() takes.

    Args:
        specs: the models of each replica.
        settings: of the server.
        cluster: of the replicas.
    """
    options: dict[str, Any] = {
        "name": REPLICAS,
        **_resources(cluster),
        "max_ongoing_requests": 100_000,  # a replica refuses by itself what its queue has no room for
        "graceful_shutdown_timeout_s": settings.grace,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 30.0,
    }
    if cluster.max_replicas > cluster.min_replicas:
        options["autoscaling_config"] = AutoscalingConfig(
            min_replicas=cluster.min_replicas,
            max_replicas=cluster.max_replicas,
            target_ongoing_requests=cluster.target_requests,
            upscale_delay_s=2.0,
            downscale_delay_s=cluster.downscale_delay,
            look_back_period_s=max(1.0, min(15.0, cluster.downscale_delay)),
        )
    else:
        options["num_replicas"] = cluster.min_replicas
    if ROUTERS[cluster.router] is not None:
        chosen: dict[str, Any] = {"request_router_class": ROUTERS[cluster.router]}
        if len(specs) > 1:
            chosen["request_routing_stats_period_s"] = 1.0  # seconds after which the router knows what a replica closed
        options["request_router_config"] = RequestRouterConfig(**chosen)
    specs = [_within(spec, cluster) for spec in specs]
    replicas = serve.deployment(**options)(Replica).bind(specs, settings)

    def build() -> Front:
        return Front(specs, settings, serve.get_deployment_handle(REPLICAS, app_name=NAME))

    front = serve.deployment(
        name="front",
        ray_actor_options={"num_cpus": 0, "resources": _ON_HEAD},
        max_ongoing_requests=settings.max_connections,
        graceful_shutdown_timeout_s=settings.grace,
        max_surge_percent=100,  # in an update the new one takes requests before the old one stops
    )(serve.ingress(build)())
    return front.bind(replicas)


def _resources(cluster: ClusterSettings) -> dict[str, Any]:
    """What Ray reserves for each replica: a placement group on one machine, whose first bundle is for its process.

    One bundle today. A replica that computes on several cards needs one more for each further card here, and the range
    of `ClusterSettings.gpus`.
    """
    first = {name: amount for name, amount in (("CPU", cluster.cpus), ("GPU", cluster.gpus)) if amount}
    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": cluster.cpus, "num_gpus": cluster.gpus}}
    if first:  # Ray has no empty bundles
        options |= {"placement_group_bundles": [first], "placement_group_strategy": "STRICT_PACK"}
    return options


def _within(spec: ModelSpec, cluster: ClusterSettings) -> ModelSpec:
    """A model that computes with as many threads as a replica has cores, where its settings do not say otherwise."""
    threads = spec.settings.get("threads") or max(1, round(cluster.cpus))
    return replace(spec, settings={**spec.settings, "threads": threads})


def build(arguments: dict[str, Any]) -> Any:
    """The application of a configuration file, for `serve deploy` and KubeRay; its name there must be NAME.

    Args:
        arguments: `models`, a list of sources or of objects with `name`, `source`, `aliases` and `settings`, the
            arguments of LLM(); `server`, attributes of ServeSettings; `replicas`, attributes of ClusterSettings. All
            may be left out.

    Raises:
        InvalidRequestError: an unknown name, or a value outside its range.
    """
    unknown = set(arguments) - {"models", "server", "replicas"}
    if unknown:
        raise InvalidRequestError(f"unknown arguments {sorted(unknown)}; allowed: models, replicas, server")
    specs = [
        _of(ModelSpec, "models", one) if isinstance(one, dict) else ModelSpec(name_of(one), one)
        for one in arguments.get("models") or [None]
    ]
    ModelNames(specs)  # refuses here what a replica would refuse, and so do the next lines
    for spec in specs:
        _of(EngineConfig, f"settings of {spec.name}", spec.settings)
    settings = _of(ServeSettings, "server", arguments.get("server") or {})
    return application(specs, settings, _of(ClusterSettings, "replicas", arguments.get("replicas") or {}))


def _of(kind: Callable[..., T], place: str, given: dict[str, Any]) -> T:
    """A dataclass of fields in a configuration file, where tuples are lists."""
    try:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
    except TypeError as error:
        raise InvalidRequestError(f"{place}: {str(error).split(') ')[-1].removeprefix(kind.__name__)}") from None
