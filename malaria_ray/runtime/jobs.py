"""Jobs on a cluster by the Ray Jobs API: submit or join, follow the log, stop.

The token is found by Ray's own mechanism (RAY_AUTH_TOKEN_PATH, RAY_AUTH_TOKEN or ~/.ray/auth_token) and travels in a
header; it is never part of a command line, of a job's description or of a log line.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from malaria_ray.errors import ClusterError, ConfigError

log = logging.getLogger("malaria_ray")

EXCLUDED = [".venv", ".git", "data", "demo", "out", "__pycache__", ".*_cache", ".hypothesis", "*.zip", "*.parquet"]
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_ATTEMPTS, _WAIT_S, _STOP_WAIT_S = 5, 2.0, 30.0
_LOOK_EVERY_S, _DRAIN_S = 10.0, 5.0  # at the job's state beside its log; for what is left of the log of an ended job
_STOPPED_STATUS = 130  # what a shell reports of a command ended by Ctrl-C


def connect(address: str | None) -> Any:
    """A client of the Jobs API at `address`, at RAY_API_SERVER_ADDRESS or RAY_ADDRESS, or of a Ray on this machine.

    Raises: `ClusterError` where nobody answers, or the token is missing or wrong; `ConfigError` for an address that is
    no http one.
    """
    if address is not None:
        check_address(address)
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # before Ray is imported, which reads it once
    _check_token_file()
    from ray.job_submission import JobSubmissionClient

    if not log.isEnabledFor(logging.DEBUG):
        for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)
    shown = address or next((os.environ[name] for name in _ADDRESSES if os.environ.get(name)), "this machine")
    with _addressed(address), _explained(shown):
        return JobSubmissionClient(address)


def check_address(address: str) -> None:
    """Raises: `ConfigError` for an address that is no http one."""
    if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
        raise ConfigError(f"--address {address}: give the dashboard's, as http://127.0.0.1:8265")


def entrypoint(arguments: Sequence[str]) -> str:
    """The shell command that runs a sub-command on the cluster."""
    return "python -m malaria_ray " + shlex.join(arguments)


def submit_or_join(
    client: Any, command: str, *, submission_id: str | None, working_dir: Path | None, packages: Sequence[str] = ()
) -> tuple[str, bool]:
    """(id, whether it is new). A job that has the id already is joined, in whatever state it is. `packages` are
    installed on each node that the job comes to, for it alone.

    Raises: `ClusterError` where that job runs another command.
    """
    if submission_id and (job := _find(client, submission_id)):
        return _joined(job, submission_id, command), False
    runtime_env: dict[str, Any] = {}
    if working_dir is not None:
        runtime_env = {"working_dir": str(working_dir), "excludes": EXCLUDED}
    if packages:
        runtime_env["pip"] = list(packages)
    with _explained(client.get_address()):
        try:
            name: str = client.submit_job(entrypoint=command, submission_id=submission_id, runtime_env=runtime_env)
        except RuntimeError:
            # Somebody submitted the same id since we looked.
            if submission_id and (job := _find(client, submission_id)):
                return _joined(job, submission_id, command), False
            raise
        return name, True


def follow(client: Any, job_id: str, write: Callable[[str], object] = sys.stdout.write) -> int:
    """Prints the job's log until it ends; returns its exit status. A lost connection is taken up where it broke.

    Raises: `ClusterError` where the cluster cannot be reached any more; `KeyboardInterrupt` passes.
    """
    n_written, failures = 0, 0
    while True:
        skip = n_written  # a new connection tells the log from its beginning

        def show(piece: str) -> None:
            nonlocal n_written, skip, failures
            fresh, skip = piece[skip:], max(0, skip - len(piece))
            n_written, failures = n_written + len(fresh), 0
            write(fresh)
            sys.stdout.flush()

        try:
            asyncio.run(_log_to_its_end(client, job_id, show))
            job = client.get_job_info(job_id)
            if job.status.is_terminal():
                return exit_status(job)
        except Exception as error:  # requests', aiohttp's and Ray's own have no common base
            failures += 1
            if failures >= _ATTEMPTS:
                raise ClusterError(
                    f"{client.get_address()} was lost while {job_id} ran: {error}; the job may go on: join it with "
                    f"'malaria-ray submit --submission-id {job_id}' and the same command"
                ) from error
        time.sleep(_WAIT_S)


def stop(client: Any, job_id: str) -> str:
    """Asks the cluster to end a job and waits until it has ended; returns its state then."""
    with _explained(client.get_address()):
        client.stop_job(job_id)
        deadline = time.monotonic() + _STOP_WAIT_S
        while not (status := client.get_job_status(job_id)).is_terminal() and time.monotonic() < deadline:
            time.sleep(0.5)
    return str(status.value)


def jobs_of(client: Any) -> list[Any]:
    """All jobs that were submitted, the newest first."""
    with _explained(client.get_address()):
        jobs = [job for job in client.list_jobs() if job.submission_id]
    return sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)


def exit_status(job: Any) -> int:
    """The command's own exit status; 130 where it was stopped, 1 where it never ran."""
    from ray.job_submission import JobStatus

    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.status == JobStatus.STOPPED:
        return _STOPPED_STATUS
    if job.driver_exit_code is None or job.driver_exit_code < 0:
        log.info("%s: %s", job.submission_id, " ".join((job.message or "it failed").split())[-500:])
        return 1
    return int(job.driver_exit_code) or 1


def _check_token_file() -> None:
    """Ray ends the whole process, with a stack of C++, where RAY_AUTH_TOKEN_PATH names no token."""
    file = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not file or os.environ.get("RAY_AUTH_TOKEN"):
        return
    try:
        is_empty = not Path(file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"RAY_AUTH_TOKEN_PATH={file} cannot be read: {error}; name the file of the token") from error
    if is_empty:
        raise ClusterError(f"RAY_AUTH_TOKEN_PATH={file} is empty; write the cluster's token there")


def _find(client: Any, job_id: str) -> Any:
    """The job of that id; None where there is none."""
    with _explained(client.get_address()):
        return next((job for job in client.list_jobs() if job.submission_id == job_id), None)


def _joined(job: Any, job_id: str, command: str) -> str:
    if job.entrypoint != command:
        raise ClusterError(
            f"--submission-id {job_id} is taken by another command: {job.entrypoint}; choose another id, or give the "
            "same command to join it"
        )
    return job_id


async def _log_to_its_end(client: Any, job_id: str, show: Callable[[str], None]) -> None:
    """Shows the log until the cluster ends it, or the job has ended: of a killed one the cluster may go on for ever."""
    log_task = asyncio.create_task(_each_piece(client, job_id, show))
    try:
        while not log_task.done():
            await asyncio.wait({log_task}, timeout=_LOOK_EVERY_S)
            if not log_task.done() and (await asyncio.to_thread(client.get_job_status, job_id)).is_terminal():
                await asyncio.wait({log_task}, timeout=_DRAIN_S)
                break
        if log_task.done():
            log_task.result()
    finally:
        log_task.cancel()


async def _each_piece(client: Any, job_id: str, show: Callable[[str], None]) -> None:
    async for piece in client.tail_job_logs(job_id):
        show(piece)


@contextmanager
def _addressed(address: str | None) -> Iterator[None]:
    """Ray's client lets the environment win over its argument; a flag of ours must win over the environment."""
    kept = {name: os.environ.pop(name) for name in _ADDRESSES if address and name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turns what Ray's client raises into one line that says what to do."""
    import requests
    from ray.exceptions import AuthenticationError, RpcError

    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(
            f"{address} lets nobody in without its token ({str(error).splitlines()[0].split('. ')[0]}); put the token "
            "in ~/.ray/auth_token, or in a file that RAY_AUTH_TOKEN_PATH names"
        ) from error
    except (ConnectionError, RpcError, requests.exceptions.RequestException) as error:
        why = str(error).rstrip(".")
        raise ClusterError(
            f"no cluster answers at {address}: {why}; check the address (as http://127.0.0.1:8265) and the port forward"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise ClusterError(f"{address}: {error}") from error
