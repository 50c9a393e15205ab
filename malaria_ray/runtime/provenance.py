"""Where an output comes from: code, packages, machine."""

from __future__ import annotations

import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any

import malaria_ray
from malaria_ray.runtime.facts import installed_version, source_digest

PACKAGES = (
    "ray",
    "keras",
    "tensorflow",
    "tensorflow-cpu",
    "ncnn",
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
    return source_digest(Path(malaria_ray.__file__).parent)


def provenance() -> dict[str, Any]:
    """Version and digest of the code, versions of the packages that numbers depend on, Python, operating system,
    command.
    """
    return {
        "malaria_ray": malaria_ray.__version__,
        "code_digest": code_digest(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := installed_version(name))},
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
