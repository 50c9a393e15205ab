"""submit: any sub-command as a job on a cluster, its log followed, its exit status returned."""

from __future__ import annotations

import logging
import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from malaria_ray.errors import ConfigError
from malaria_ray.runtime import jobs

log = logging.getLogger("malaria_ray")

_NOT_SUBMITTED = ("submit", "jobs", "demo")
_PATHS = (
    *("archive", "dataset", "run", "source", "results", "directory", "packed", "results_and_audit", "directories"),
    *("model", "weights", "init_from", "patients", "against", "out", "output", "report", "figure", "storage"),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Runs a sub-command as a Ray job: malaria-ray submit -- screen s3://cells/slides s3://cells/results --model …"""

    command: Positional[tuple[str, ...]]
    """After `--`: the sub-command and its flags. Paths are absolute, or URLs, as every node sees them."""
    address: str | None = None
    """http address of the cluster's dashboard; by default RAY_API_SERVER_ADDRESS, RAY_ADDRESS or this machine."""
    submission_id: str | None = None
    """Name of the job: submitted again under the same name it is joined, not started a second time."""
    working_dir: Path | None = None
    """Tree that the job runs from, by default the one here if it holds the package; what .gitignore names is left."""
    extras: tuple[str, ...] = ()
    """Extras of the tree's pyproject.toml that nodes lack, as s3: installed for this job, at the lock's versions."""

    def __post_init__(self) -> None:
        if not self.command:
            raise ConfigError("no sub-command; write it after two dashes: malaria-ray submit -- screen …")
        if self.command[0] in _NOT_SUBMITTED:
            raise ConfigError(f"'{self.command[0]}' is not run on a cluster; submit a stage, as 'screen'")
        if self.submission_id is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.submission_id):
            raise ConfigError(
                f"--submission-id {self.submission_id!r}: allowed are letters, digits and . _ -, at most 100"
            )


def run(config: Config) -> int:
    """Submits or joins; Ctrl-C stops the job. Returns the job's exit status."""
    from malaria_ray.cli import parse  # the command knows every stage's flags: a wrong one is told before the upload

    _check_paths(config.command[0], parse(*(part for part in config.command if part != "--debug")))
    tree = config.working_dir or _tree_here()
    packages = packages_of(tree, config.extras)
    client = jobs.connect(config.address)
    job_id, is_new = jobs.submit_or_join(
        client,
        jobs.entrypoint(config.command),
        submission_id=config.submission_id,
        working_dir=tree,
        packages=packages,
    )
    log.info("%s %s at %s", "submitted" if is_new else "joined", job_id, client.get_address())
    try:
        status = jobs.follow(client, job_id)
    except KeyboardInterrupt:
        log.info("stopping %s …", job_id)
        log.info("%s: %s", job_id, jobs.stop(client, job_id))
        raise
    log.info("%s ended with exit status %d", job_id, status)
    return status


def packages_of(tree: Path | None, extras: tuple[str, ...]) -> list[str]:
    """The packages of a tree's extras, each at the version of its locks: ['s3fs==2026.9.0'].

    Raises: `ConfigError` where there is no tree, no such extra, or a package of it is not in the lock.
    """
    if not extras:
        return []
    if tree is None:
        raise ConfigError("--extras are read from pyproject.toml: submit from the tree, or give --working-dir")
    try:
        known = tomllib.loads((tree / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        lock = "".join((tree / name).read_text() for name in ("requirements-gpu.lock", "requirements.lock"))
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--extras: {tree} has no pyproject.toml with extras, or no lock ({error})") from error
    pinned = dict(re.findall(r"^([a-z0-9._-]+)==([^ ;]+)", lock, re.MULTILINE))
    found = []
    for extra in extras:
        if extra not in known:
            raise ConfigError(f"--extras {extra}: allowed are {', '.join(known)}")
        for name, inner in re.findall(r"^([a-z0-9-]+)(\[.*\])?", "\n".join(known[extra]), re.MULTILINE):
            if name not in pinned:
                raise ConfigError(f"--extras {extra}: {name} is in no lock; install it on the nodes")
            found.append(f"{name}{inner}=={pinned[name]}")
    return found


def _tree_here() -> Path | None:
    here = Path.cwd()
    return here if (here / "malaria_ray" / "__init__.py").exists() else None


def _check_paths(command: str, config: Any) -> None:
    """Raises: `ConfigError` for the first relative path. A default is none of the user's, 'imagenet' no path."""
    defaults = {field.name: field.default for field in fields(config)}
    for name in _PATHS:
        given = getattr(config, name, None)
        if given in (defaults.get(name), "imagenet") or (command, name) == ("train", "model"):
            continue
        for value in given if isinstance(given, tuple) else (given,):
            is_name = value == "nih" and name in ("archive", "source")
            if not (value.startswith("/") or "://" in value or is_name):
                raise ConfigError(
                    f"{name} {value!r} is relative: on the cluster it would lie in the job's own folder, which is "
                    "deleted with the job; give an absolute path or URL that every node sees"
                )
