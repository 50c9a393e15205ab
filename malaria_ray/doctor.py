"""doctor: is this cluster safe and fit to run on? One line a check, the remedy beside each fault."""

from __future__ import annotations

import logging
import os
import shlex
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass

from malaria_ray.errors import ClusterError, ConfigError
from malaria_ray.runtime import jobs
from malaria_ray.runtime.checks import Finding, check_nodes
from malaria_ray.runtime.terminal import console

log = logging.getLogger("malaria_ray")

_REMEDY_OPEN = (
    "anybody who reaches it can run code there: set RAY_AUTH_MODE=token and a token on every node (KubeRay: "
    "authOptions), restart, and do not use it before"
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Checks a cluster: the token, and by a task on every node versions, storage, model, memory, clocks, devices."""

    address: str | None = None
    """http address of the dashboard, checked from here, the nodes by a job; by default RAY_ADDRESS if it is http,
    or without it RAY_API_SERVER_ADDRESS; else Ray is joined, that of RAY_ADDRESS or of this machine."""
    storage: str | None = None
    """Folder or URL that every node must be able to write and read."""
    model: str | None = None
    """Run whose model every node must see."""
    min_object_store_mb: int = 128
    """Object store that every node must have at least."""
    max_clock_skew_s: float = 2.0
    """Seconds that clocks may be apart."""

    def __post_init__(self) -> None:
        if self.address is not None:
            jobs.check_address(self.address)
        if self.min_object_store_mb < 1 or not self.max_clock_skew_s > 0:
            raise ConfigError(
                f"--min-object-store-mb {self.min_object_store_mb} --max-clock-skew-s {self.max_clock_skew_s}: "
                "both must be positive"
            )


def run(config: Config) -> int:
    """Prints the findings. Returns 0 where all is well. Raises: `ClusterError` with the number of faults."""
    if (url := _outside(config)) is not None:
        return _run_from_outside(config, url)
    _report(_from_inside(config))
    return 0


def _outside(config: Config) -> str | None:
    """The dashboard to ask; None where Ray itself is to be joined, as a job on the cluster does."""
    if config.address is not None:
        return config.address
    ray_address = os.environ.get("RAY_ADDRESS")
    if ray_address and urllib.parse.urlsplit(ray_address).scheme in ("http", "https"):
        return ray_address
    return None if ray_address else os.environ.get("RAY_API_SERVER_ADDRESS")


def check_token(url: str) -> Finding:
    """Whether an address refuses a client without a token. Raises: `ClusterError` where nobody answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the address itself, not a proxy's answer
    try:
        with opener.open(f"{url.rstrip('/')}/api/jobs/", timeout=30):
            return Finding("token", f"{url} lets in a client without a token", _REMEDY_OPEN)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return Finding("token", f"{url} refuses a client without a token")
        return Finding("token", f"{url} answers {error.code} instead of 401", "give the address of a Ray dashboard")
    except OSError as error:
        raise ClusterError(f"nobody answers at {url}: {error}; check the address and the port forward") from error


def _run_from_outside(config: Config, url: str) -> int:
    """The token from here, where a stranger would stand; then the rest as a job, where the nodes are."""
    finding = check_token(url)
    _report([finding])
    arguments = ["doctor", "--min-object-store-mb", str(config.min_object_store_mb)]
    arguments += ["--max-clock-skew-s", str(config.max_clock_skew_s)]
    for name in ("storage", "model"):
        if value := getattr(config, name):
            arguments += [f"--{name}", value]
    client = jobs.connect(url)
    # Without our tree: what the nodes have installed themselves is to be seen.
    job_id, _ = jobs.submit_or_join(client, jobs.entrypoint(arguments), submission_id=None, working_dir=None)
    log.info("%s at %s: malaria-ray %s", job_id, url, shlex.join(arguments))
    return jobs.follow(client, job_id)


def _from_inside(config: Config) -> list[Finding]:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    from malaria_ray.runtime import facts, nodes, provenance
    from malaria_ray.runtime.session import ray_session

    with ray_session():
        gcs_address = ray.get_runtime_context().gcs_address
        is_open = facts.lets_in_without_token(gcs_address)
        found = nodes.gather(packages=list(provenance.PACKAGES), storage_url=config.storage, model=config.model)
        return [
            Finding("token (Ray)", f"{gcs_address} lets in a client without a token", _REMEDY_OPEN)
            if is_open
            else Finding("token (Ray)", f"{gcs_address} refuses a client without a token"),
            *check_nodes(
                found,
                storage=config.storage,
                model=config.model,
                min_object_store=config.min_object_store_mb * 10**6,
                max_clock_skew_s=config.max_clock_skew_s,
            ),
        ]


def _report(findings: list[Finding]) -> None:
    """Raises: `ClusterError` where one is a fault."""
    out = console()
    for finding in findings:
        out.print(f"{finding.level:6}{finding.check}: {finding.found}", soft_wrap=True)
        if finding.remedy:
            out.print(f"      → {finding.remedy}", soft_wrap=True)
    n_faults = sum(finding.is_fault for finding in findings)
    if n_faults:
        raise ClusterError(f"{n_faults} {'fault' if n_faults == 1 else 'faults'}; the remedies stand above")
