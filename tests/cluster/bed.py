"""A real cluster in network namespaces for tests: `cluster/local.sh`, and what tests ask of it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
S3_SECRET = secrets.token_hex(20)  # of the object store: searched for where it must not stand


def needs() -> str | None:
    """Why there can be no bed here; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip"):
        return "network namespaces need iproute2"
    probe = "mrprobe"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode:
        return "this machine allows no network namespaces"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


@dataclass(frozen=True)
class Bed:
    """`script` runs cluster/local.sh, `client` starts malaria-ray as a client with the token."""

    folder: Path
    environment: dict[str, str]

    def script(self, *arguments: str, check: bool = True, **environment: str) -> str:
        command = [str(ROOT / "cluster/local.sh"), *arguments]
        done = subprocess.run(
            command, env={**self.environment, **environment}, capture_output=True, text=True, check=False, timeout=400
        )
        if check and done.returncode:
            raise AssertionError(f"local.sh {arguments} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """`malaria-ray …` on the bed's network, not waited for."""
        settings = [f"{name}={value}" for name, value in environment.items()]
        command = [str(ROOT / "cluster/local.sh"), "run", "--", "env", *settings, "python", "-m", "malaria_ray"]
        return subprocess.Popen(
            [*command, *arguments], env=self.environment, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def client(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """(exit status, output) of `malaria-ray …` on the bed's network."""
        process = self.start(*arguments, **environment)
        output = process.communicate(timeout=400)[0]
        return process.returncode, output

    def http_status(self, path: str, *headers: str, body: str | None = None) -> int:
        """What the dashboard answers to a client that sends these headers; a POST where there is a body."""
        curl = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", *(part for h in headers for part in ("-H", h))]
        if body is not None:
            curl += ["-H", "Content-Type: application/json", "--data", body]
        return int(self.script("run", "--", *curl, f"http://{self.environment['BED_NET']}.10:8265{path}"))

    def listed(self, what: str, *arguments: str) -> list[dict[str, Any]]:
        """What `ray list nodes | actors` says."""
        found = self.script("run", "--", "ray", "list", what, "--format", "json", "--limit", "1000", *arguments)
        rows: list[dict[str, Any]] = json.loads(found[found.index("[") :])
        return rows

    def scorers_on(self) -> set[str]:
        """Addresses of the nodes that ever had a scoring actor."""
        return self.actors_on("Scorer")

    def actors_on(self, class_name: str, *arguments: str) -> set[str]:
        """Addresses of the nodes that have, or had, an actor of a class with that in its name."""
        address = {node["node_id"]: node["node_ip"] for node in self.listed("nodes")}
        actors = self.listed("actors", *arguments)
        return {address[a["node_id"]] for a in actors if class_name in a["class_name"] and a["node_id"]}

    def alive(self) -> list[str]:
        """Addresses of the nodes that Ray counts as alive."""
        return sorted(node["node_ip"] for node in self.listed("nodes", "--filter", "state=ALIVE"))


@contextmanager
def bed(n_workers: int, *, number: int, **environment: str) -> Iterator[Bed]:
    """A head and `n_workers` workers; `number` makes its folder, namespaces and addresses its own."""
    folder = Path(f"/tmp/mrt{number}-{os.getpid()}")
    settings = {
        **os.environ, "BED": str(folder), "BED_NET": f"10.213.{100 + number}", "PYTHON": sys.executable, **environment,
    }  # fmt: skip
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        settings.pop(name, None)
    made = Bed(folder, settings)
    try:
        made.script("up", str(n_workers))
        yield made
    finally:
        made.script("down", check=False)


def wait_for(what: str, is_so, *, process: subprocess.Popen[str] | None = None, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"ended before {what}: {process.communicate()[0][-3000:]}")
        if time.monotonic() > deadline:
            raise AssertionError(f"no {what} in {timeout_s} s")
        time.sleep(0.1)
