"""The options of `serve` that are about several replicas on a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from engine.errors import EngineError, InvalidRequestError

if TYPE_CHECKING:
    from engine.cluster.application import ClusterSettings

REPLICAS = "Replicas (extra ray)"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Whether there are replicas, how many and where."""

    ray: Annotated[
        bool,
        typer.Option(
            "--ray", help="Run replicas of the server with Ray Serve, behind one address.", rich_help_panel=REPLICAS
        ),
    ] = False
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            help="A Ray cluster that runs, as auto or ray://HOST:10001.",
            show_default="a new one on this machine",
            rich_help_panel=REPLICAS,
        ),
    ] = None
    replicas: Annotated[
        int | None,
        typer.Option(
            "--replicas", min=1, help="So many replicas.", show_default="--min-replicas", rich_help_panel=REPLICAS
        ),
    ] = None
    min_replicas: Annotated[
        int, typer.Option("--min-replicas", min=1, help="At least so many.", rich_help_panel=REPLICAS)
    ] = 1
    max_replicas: Annotated[
        int | None,
        typer.Option(
            "--max-replicas",
            min=1,
            help="At most so many; they come and go with the requests.",
            show_default="--min-replicas",
            rich_help_panel=REPLICAS,
        ),
    ] = None
    target_requests: Annotated[
        float,
        typer.Option(
            "--target-requests",
            help="Requests, running and waiting, that each replica is meant to have between those two numbers.",
            rich_help_panel=REPLICAS,
        ),
    ] = 16.0
    downscale_delay: Annotated[
        float,
        typer.Option(
            "--downscale-delay",
            help="Seconds of too few requests after which a replica is ended.",
            rich_help_panel=REPLICAS,
        ),
    ] = 300.0
    replica_cpus: Annotated[
        float | None,
        typer.Option(
            "--replica-cpus",
            help="Processor cores that each replica takes, and threads it computes with.",
            show_default="--threads, else 1",
            rich_help_panel=REPLICAS,
        ),
    ] = None
    replica_gpus: Annotated[
        float | None,
        typer.Option(
            "--replica-gpus",
            help="The GPU that each replica takes, or a part of it; at most 1.",
            show_default="1 with --device cuda, else 0",
            rich_help_panel=REPLICAS,
        ),
    ] = None
    router: Annotated[
        str,
        typer.Option(
            "--router",
            help="Give a request to the replica that has read most of it before (prefix), or as Ray does (least-busy).",
            rich_help_panel=REPLICAS,
        ),
    ] = "prefix"

    def settings(self, *, device: str, threads: int | None) -> ClusterSettings:
        """What the application is made with.

        Args:
            device: that the replicas compute on.
            threads: that the user asked for.

        Raises:
            EngineError: Ray is not installed.
            InvalidRequestError: options that contradict each other, or a value outside its range.
        """
        if find_spec("ray") is None:
            raise EngineError('--ray needs Ray Serve: pip install "gguf-engine[ray]"')
        if self.replicas is not None and (self.max_replicas is not None or self.min_replicas != 1):
            raise InvalidRequestError("give --replicas, or --min-replicas and --max-replicas, not both")
        from engine.cluster.application import ClusterSettings

        least = self.replicas or self.min_replicas
        on_gpu = device.startswith("cuda")
        return ClusterSettings(
            min_replicas=least,
            max_replicas=self.replicas or self.max_replicas or least,
            target_requests=self.target_requests,
            downscale_delay=self.downscale_delay,
            cpus=self.replica_cpus if self.replica_cpus is not None else float(threads or 1),
            gpus=self.replica_gpus if self.replica_gpus is not None else float(on_gpu),
            router=self.router,
        )
