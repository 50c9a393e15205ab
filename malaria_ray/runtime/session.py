"""The Ray session of a command: the cluster at RAY_ADDRESS when set, a local Ray otherwise."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.data import DataContext

from malaria_ray.errors import ConfigError


@contextmanager
def ray_session() -> Iterator[None]:
    """Joins or starts Ray; ends what it started. A session that is already there (a test's, a job's) is used and left."""
    if ray.is_initialized():
        _configure_data()
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    # Workers warn about the accelerator override of GPU-less tasks with every start; the default changes in a later Ray.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        if address:
            ray.init(address=address, logging_level=logging.WARNING)
        else:
            ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"RAY_ADDRESS={address}" if address else "a local Ray"
        raise ConfigError(f"{where} could not be reached: {error}; unset RAY_ADDRESS to run on this machine") from error
    try:
        _configure_data()
        yield
    finally:
        ray.shutdown()


def n_cpus() -> int:
    """CPUs of the cluster, at least 1."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _configure_data() -> None:
    context = DataContext.get_current()
    context.enable_progress_bars = False  # our own progress counts images, not blocks
    context.use_datasource_v2 = False  # 0.3 s instead of 17-27 s for a small Parquet (STACK.md)
    context.print_on_execution_start = False
    if not sys.stderr.isatty():
        context.enable_rich_progress_bars = False
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.WARNING)
