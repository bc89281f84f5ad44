"""Start the application on a Ray cluster, a local one or one that runs, and end it in order."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import ray
from ray import serve
from ray.exceptions import AuthenticationError
from ray.serve.exceptions import DeploymentUnavailableError

from engine.cluster.application import NAME, REPLICAS, ClusterSettings, application
from engine.errors import EngineError
from engine.serve.models.model_store import ModelSpec
from engine.serve.settings import ServeSettings

log = logging.getLogger("engine.cluster")

_POLL = 0.2
_TELLING = 5.0
"""Seconds for a replica to answer a question of this process."""

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is told to anybody about a local run
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",  # else replicas are added after tens of seconds
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}


def run(
    specs: Sequence[ModelSpec],
    settings: ServeSettings,
    cluster: ClusterSettings,
    *,
    address: str | None,
    ready: Callable[[], None],
) -> None:
    """Serve until SIGTERM or Ctrl-C; running requests then have `settings.grace` seconds. A second Ctrl-C ends at once.

    Args:
        specs: the models of each replica.
        settings: of the server; the port must not be 0.
        cluster: of the replicas.
        address: of a Ray cluster that runs; None starts one on this machine, which ends with the server.
        ready: called when the first replicas answer.

    Raises:
        EngineError: Ray cannot be reached, or no replica can start.
    """
    with _ray(address), _signals() as stop:  # in this order: Ray sets handlers of its own
        if serve.status().proxies:
            log.warning("Ray Serve runs on this cluster already: it listens where it did, not at --host and --port")
        serve.start(
            proxy_location="EveryNode" if address else "HeadOnly",
            http_options={"host": settings.host, "port": settings.port},
        )
        try:
            serve.run(application(specs, settings, cluster), name=NAME, route_prefix="/")
        except RuntimeError as error:
            serve.delete(NAME)
            raise EngineError(f"the replicas cannot start: {_last_line(error)}") from None
        ready()
        stop.wait()
        _drain(settings.grace, stop)
        serve.delete(NAME)
        if not serve.status().applications:  # no other application uses Ray Serve here: stop it, which frees the port
            serve.shutdown()  # type: ignore[no-untyped-call]


@contextmanager
def _ray(address: str | None) -> Iterator[None]:
    """A connection to Ray."""
    logging.getLogger("ray.serve").setLevel(_level())
    try:
        if address is None:
            for name, value in _ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=_level())
        else:
            ray.init(address=address, log_to_driver=False, logging_level=_level())
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        raise EngineError(f"Ray cannot be reached at {address or 'this machine'}: {_last_line(error)}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _level() -> int:
    """Of what Ray says: with --verbose all of it, else what ends the server."""
    return logging.INFO if log.isEnabledFor(logging.DEBUG) else logging.ERROR


class _Stop(threading.Event):
    """Set by the first signal; `hurry` by a second Ctrl-C."""

    hurry = False


@contextmanager
def _signals() -> Iterator[_Stop]:
    stop = _Stop()

    def end(number: int, frame: FrameType | None) -> None:
        stop.hurry = stop.is_set() and number == signal.SIGINT
        stop.set()

    before = {one: signal.signal(one, end) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _drain(grace: float, stop: _Stop) -> None:
    """Refuse new requests, and wait for the running ones."""
    handle, until = serve.get_deployment_handle(REPLICAS, app_name=NAME), time.monotonic() + grace
    while not stop.hurry:
        try:
            running = sum(handle.broadcast("drain").results(timeout_s=_TELLING))
        except (TimeoutError, ray.exceptions.RayError, DeploymentUnavailableError) as error:
            log.warning("the replicas cannot be asked what still runs: %s", error)
            return
        if not running or time.monotonic() >= until:
            return
        time.sleep(_POLL)


def _last_line(error: BaseException) -> str:
    """The end of a message that may hold a whole traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
