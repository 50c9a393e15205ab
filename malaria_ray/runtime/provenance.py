"""Where an output comes from: code, packages, machine."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any

import malaria_ray

_PACKAGES = (
    "ray",
    "keras",
    "tensorflow",
    "tensorflow-cpu",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "pandas",
    "pyarrow",
    "opencv-python-headless",
    "scikit-learn",
)


@cache
def code_digest() -> str:
    """First 16 hex digits of the SHA-256 over the package's own source files, in order of their names."""
    root = Path(malaria_ray.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def provenance() -> dict[str, Any]:
    """Version and digest of the code, versions of the packages that numbers depend on, Python, operating system,
    command.
    """
    return {
        "malaria_ray": malaria_ray.__version__,
        "code_digest": code_digest(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
