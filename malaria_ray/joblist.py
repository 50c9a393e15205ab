"""jobs: what was submitted to a cluster and what became of it."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from rich.table import Table

from malaria_ray.runtime import jobs
from malaria_ray.runtime.redaction import without_secrets
from malaria_ray.runtime.terminal import console


@dataclass(frozen=True, kw_only=True)
class Config:
    """Lists the jobs of a cluster, the newest first."""

    address: str | None = None
    """http address of the cluster's dashboard; by default RAY_API_SERVER_ADDRESS, RAY_ADDRESS or this machine."""


def run(config: Config) -> None:
    table = Table("submission id", "state", "exit", "begun (UTC)", "seconds", "command")
    for job in jobs.jobs_of(jobs.connect(config.address)):
        table.add_row(
            job.submission_id,
            str(job.status.value).lower(),
            str(jobs.exit_status(job)) if job.status.is_terminal() else "",
            _at(job.start_time),
            f"{(job.end_time - job.start_time) / 1000:,.0f}" if job.start_time and job.end_time else "",
            without_secrets(job.entrypoint.removeprefix("python -m malaria_ray ")),
        )
    console().print(table)


def _at(milliseconds: int | None) -> str:
    if not milliseconds:
        return ""
    return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
