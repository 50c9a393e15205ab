"""The Ray session of a command: the cluster at RAY_ADDRESS when set, a local Ray otherwise."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import ray
import ray.exceptions
from ray.data import DataContext
from ray.util.placement_group import placement_group, remove_placement_group

from malaria_ray.errors import ConfigError, MalariaRayError
from malaria_ray.runtime.quiet import stderr_silenced
from malaria_ray.runtime.terminal import stop_on_sigterm

log = logging.getLogger("malaria_ray")

_ROOM_BYTES = 100 * 10**6  # of a session's logs, some 10 MB, and of what is spilled to the disk
_KEPT_IDLE_MS = "60000"  # where actors hold the CPUs Ray ends other workers after 1 s; the next block started one anew
# A task on a node that no packet reaches any more is given up after both, by Ray after 5 + 2 minutes. Its servers take
# one ping a minute at most.
_PING_EVERY_MS, _PING_TIMEOUT_MS = "65000", "30000"


@contextmanager
def ray_session() -> Iterator[None]:
    """Joins or starts Ray; ends what it started. A session that is already there (a test's, a job's) is used and left.

    Raises: `ConfigError` where the cluster cannot be reached; a `MalariaRayError` of a task or actor as it was
    raised there.
    """
    is_ours = not ray.is_initialized()
    if is_ours:
        _start()
    else:
        gc.collect()  # a job that failed in it keeps its actors, and all CPUs with them, until its error is collected
    try:
        _configure_data()
        yield
    except ray.exceptions.RayError as error:
        if (cause := _own_error(error)) is not None:
            raise cause from error
        raise
    finally:
        if is_ours:
            ray.shutdown()


def n_cpus() -> int:
    """CPUs of the cluster, at least 1."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def room_for(*, cpus: int = 0, gpus: float = 0) -> int:
    """How many processes of so many CPUs and GPUs, not none of both, fit on the cluster's nodes, were they empty."""
    return _room(_nodes(), cpus, gpus)


def cpus_for_each_of(n: int, *, gpus: int = 0) -> int:
    """The most CPUs that each of `n` processes can have at once, at least 1: no process spans nodes."""
    nodes = _nodes()
    most = int(max((node.get("CPU", 0) for node in nodes), default=1))
    return next((cpus for cpus in range(most, 1, -1) if _room(nodes, cpus, gpus) >= n), 1)


def may_grow() -> bool:
    """Whether nodes may join that are not there yet: those of a cluster; a Ray started for one command has its own."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def is_room_made(n: int, *, cpus: int, gpus: int = 0, within_s: float) -> bool:
    """Asks the cluster for room for `n` processes of so many CPUs and GPUs, as an autoscaler hears it; whether there is
    in time.
    """
    group = placement_group([_needs(cpus, gpus)] * n)
    try:
        return bool(group.wait(within_s))
    finally:
        remove_placement_group(group)


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _room(nodes: list[dict[str, float]], cpus: int, gpus: float) -> int:
    needs = _needs(cpus, gpus)
    fitting = (min(node.get(name, 0) / n for name, n in needs.items()) for node in nodes)
    return sum(int(n + 1e-9) for n in fitting)  # of one GPU five processes of 0.2, though 1 // 0.2 is 4


def _needs(cpus: int, gpus: float) -> dict[str, float]:
    """Resources of one process as Ray names them, without those that it needs none of."""
    return {name: n for name, n in (("CPU", cpus), ("GPU", gpus)) if n}


def _start() -> None:
    address = os.environ.get("RAY_ADDRESS")
    is_debug = log.isEnabledFor(logging.DEBUG)
    level = logging.INFO if is_debug else logging.CRITICAL
    for name in (
        "ray",
        "ray.data",
        "ray.train",
    ):  # what matters is said by the stages, in images and patients
        logging.getLogger(name).setLevel(level)
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # else every start warns that its default will change
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", _KEPT_IDLE_MS)
    os.environ.setdefault("RAY_grpc_client_keepalive_time_ms", _PING_EVERY_MS)
    os.environ.setdefault("RAY_grpc_client_keepalive_timeout_ms", _PING_TIMEOUT_MS)
    if not is_debug:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else C++ tells the terminal what it retries by itself
    options: dict[str, Any] = {"address": address, "logging_level": level, "log_to_driver": is_debug}
    if not address:
        _check_room()
        options |= {"address": "local", "include_dashboard": False}
    try:
        with nullcontext() if is_debug else stderr_silenced():  # a fault is raised, the rest is C++'s start-up chatter
            ray.init(**options)
    except SystemExit:  # how the handlers of SIGTERM end that Ray sets meanwhile, which also print where its C++ was
        raise KeyboardInterrupt from None
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"RAY_ADDRESS={address}" if address else "a local Ray"
        raise ConfigError(f"{where} could not be reached: {error}; unset RAY_ADDRESS to run on this machine") from error
    finally:
        stop_on_sigterm()


def _check_room() -> None:
    """Raises: `ConfigError` where Ray has no room for its logs and sockets: its workers would die and be started again
    for ever.
    """
    folder = os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", tempfile.gettempdir()))
    try:
        free = shutil.disk_usage(folder).free
    except OSError:  # Ray makes it, or says why not
        return
    if free < _ROOM_BYTES:
        raise ConfigError(
            f"{folder} has {free / 1e6:.1f} MB of free room, Ray needs {_ROOM_BYTES / 1e6:.0f} MB for its logs and "
            "what does not fit into memory; free some, or name another folder by RAY_TMPDIR"
        )


def _configure_data() -> None:
    context = DataContext.get_current()
    context.enable_progress_bars = False  # our own progress counts images, not blocks
    context.use_datasource_v2 = False  # 0.3 s instead of 17-27 s for a small Parquet (STACK.md)
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # else an error of ours comes in one of Ray's that has lost it


def _own_error(error: BaseException | None) -> MalariaRayError | None:
    """The error of ours that a chain of Ray's wrappers holds; None where there is none."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MalariaRayError) and not isinstance(error, ray.exceptions.RayError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None
