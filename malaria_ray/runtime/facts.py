"""What a node of a cluster is like, seen by a task on that node.

The tasks here reach a node by value and import nothing of malaria_ray but inside the functions: a node with another
version of the package, or without it, must be able to say so.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict


class NodeFacts(TypedDict):
    """One node. Sizes in bytes, times in seconds; `*_error` is None where all went well."""

    node: str
    python: str
    packages: dict[str, str | None]
    code_digest: str | None
    n_cpus_declared: float
    n_gpus_declared: float
    n_gpus_seen: int
    shm_total: int
    shm_free: int
    object_store: int
    clock_offset_s: float
    clock_doubt_s: float
    storage_error: str | None
    model_error: str | None


def source_digest(root: Path) -> str:
    """First 16 hex digits of the SHA-256 over the Python files below a folder, in order of their names."""
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def clock() -> float:
    """Seconds since 1970 by this node's clock."""
    return time.time()


def software(package_names: list[str]) -> dict[str, Any]:
    """Versions and digest of what is installed here."""
    spec = importlib.util.find_spec("malaria_ray")
    root = Path(spec.origin).parent if spec and spec.origin else None
    return {
        "python": platform.python_version(),
        "packages": {name: installed_version(name) for name in package_names},
        "code_digest": source_digest(root) if root else None,
    }


def hardware() -> dict[str, Any]:
    """Shared memory and GPUs as the operating system shows them."""
    memory = shutil.disk_usage("/dev/shm")
    n_gpus = sum(name.startswith("nvidia") and name[6:].isdigit() for name in os.listdir("/dev"))  # noqa: PTH208
    return {"shm_total": memory.total, "shm_free": memory.free, "n_gpus_seen": n_gpus}


def write_mark(folder: str, name: str) -> str | None:
    """Writes a small file; returns the error or None."""

    def write() -> None:
        from malaria_ray.runtime import storage

        storage.write_bytes(storage.locate(folder) / name, name.encode())

    return _error_of(write)


def read_marks(folder: str, names: list[str]) -> str | None:
    """Reads the files that all nodes wrote; returns the first error or None."""

    def read() -> None:
        from malaria_ray.runtime import storage

        for name in names:
            if (storage.locate(folder) / name).read_bytes() != name.encode():
                raise OSError(f"{name} has another content here")

    return _error_of(read)


def remove_marks(folder: str) -> str | None:
    """Removes the folder of those files, on a disk of this node's own too; returns the error or None."""

    def remove() -> None:
        from malaria_ray.runtime import storage

        storage.remove(storage.locate(folder))

    return _error_of(remove)


def read_model(file: str, sha256: str) -> str | None:
    """Compares a model file with its digest; returns the error or None."""

    def read() -> None:
        from malaria_ray.runtime import storage

        found = hashlib.sha256(storage.locate(file).read_bytes()).hexdigest()
        if found != sha256:
            raise OSError(f"SHA-256 is {found[:12]}… here, {sha256[:12]}… by the run")

    return _error_of(read)


def lets_in_without_token(gcs_address: str) -> bool:
    """Whether Ray's own port answers a client that has no token. In a process of its own: the mode is read once."""
    import subprocess

    program = "import sys; from ray._raylet import GcsClient; GcsClient(sys.argv[1]).internal_kv_keys(b'', None)"
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    kept |= {"RAY_AUTH_MODE": "disabled"}
    asked = [sys.executable, "-c", program, gcs_address]
    try:
        return subprocess.run(asked, env=kept, capture_output=True, timeout=60, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def installed_version(name: str) -> str | None:
    """Of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _error_of(act: Callable[[], None]) -> str | None:
    try:
        act()
    except Exception as error:  # whatever a storage client raises is the finding
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None
