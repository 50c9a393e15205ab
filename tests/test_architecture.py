"""The import rule of ARCHITECTURE.md, read from the source files themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "malaria_ray"
FILES = sorted(PACKAGE.rglob("*.py"))

# A layer may import those to the right of it, and itself; `demo` is the one module that runs several stages.
MAY_IMPORT = {
    "cli": {"runtime", "errors", "schema"},
    "demo": {"stages", "cells", "runtime", "schema", "errors"},
    "doctor": {"runtime", "schema", "errors"},
    "joblist": {"runtime", "schema", "errors"},
    "submit": {"cli", "runtime", "schema", "errors"},
    "stages": {"archives", "models", "cells", "statistics", "runtime", "schema", "errors"},
    "archives": {"cells", "runtime", "schema", "errors"},
    "models": {"cells", "statistics", "runtime", "schema", "errors"},
    "cells": {"schema", "errors"},
    "statistics": {"schema", "errors"},
    "runtime": {"schema", "errors"},
    "schema": set(),
    "errors": {"schema"},
    "__main__": {"cli"},
    "__init__": set(),
}
# In stages/, but no stages: they have no `run` and write nothing; what several stages show is drawn and asked for here.
STAGE_HELPERS = {
    "charts",
    "comparison",
    "croissant",
    "explanations",
    "figures",
    "galleries",
    "ledger",
    "pages",
    "pictures",
    "publishing",
    "refusals",
    "run_comparison",
    "scorers",
    "views",
}


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """(module, whether at the top of the file) of every import."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, id(node) in top))
            found += [(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path):
    layer = layer_of(path)
    for module, _ in imports_of(path):
        parts = module.split(".")
        if parts[0] != "malaria_ray" or len(parts) == 1 or parts[1] == "__version__":
            continue
        assert parts[1] == layer or parts[1] in MAY_IMPORT[layer], f"{layer} must not import {module}"
        if layer == "stages" and parts[1] == "stages" and len(parts) > 2:
            assert parts[2] in STAGE_HELPERS, f"stages meet only in files: {path.name} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_ray_and_tensorflow_are_imported_only_where_they_belong(path: Path):
    layer = layer_of(path)
    for module, is_top in imports_of(path):
        library = module.split(".")[0]
        if library == "ray":
            assert layer in ("stages", "runtime", "doctor") or path.name in ("training.py", "features.py"), (
                f"{path} imports {module}"
            )
        if library in ("tensorflow", "keras"):
            assert layer == "models", f"{path} imports {module}"
            is_builder = path.name in ("cnn.py", "head.py", "vgg19.py", "augmentation.py")
            assert not is_top or is_builder, f"{path} loads {library} before it is known that this process needs it"


def test_there_is_no_utils_module():
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "common")]


def test_every_stage_has_one_config_and_one_run():
    for path in sorted((PACKAGE / "stages").glob("*.py")):
        if path.stem in STAGE_HELPERS | {"__init__"}:
            continue
        tree = ast.parse(path.read_text())
        public = {
            node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
        }
        assert {"Config", "run"} <= public, path.name
