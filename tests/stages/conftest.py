"""One small line for all stage tests, made once on a real Ray: a synthetic archive, a dataset, a run and results."""

from __future__ import annotations

import logging
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from malaria_ray.cells.synthetic import synthetic_cells
from malaria_ray.stages import ingest, screen, train

IMAGE_SIZE = 32  # a quarter of the real side: the same code in a fraction of the time


@dataclass(frozen=True)
class Line:
    """Paths of what the stages made; tests that change something take a copy."""

    archive: Path
    dataset: Path
    run: Path
    results: Path


@pytest.fixture(scope="session", autouse=True)
def ray_on_two_cpus() -> Iterator[None]:
    # The GPU is one in the books only: it takes screen the way through GPU actors, on CPUs.
    options = {"include_dashboard": False, "logging_level": logging.ERROR, "log_to_driver": False}
    ray.init(address="local", num_cpus=2, num_gpus=1, **options)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def logged_lines(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("malaria_ray").propagate = True
    caplog.set_level(logging.INFO, "malaria_ray")


def write_archive(
    path: Path, *, n_patients: int = 24, n_cells_per_patient: int = 10, seed: int = 7, n_copies: int = 1
) -> Path:
    """Synthetic cells; copies of one cell are images of their own (drawing one takes longer than scoring it)."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in synthetic_cells(n_patients=n_patients, n_cells_per_patient=n_cells_per_patient, seed=seed):
            for copy in range(n_copies):
                archive.writestr(name if n_copies == 1 else name.replace(".png", f"_{copy}.png"), data)
    return path


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    folder = tmp_path_factory.mktemp("line")
    made = Line(write_archive(folder / "cells.zip"), folder / "dataset", folder / "run", folder / "results")
    ingest.run(ingest.Config(archive=str(made.archive), dataset=str(made.dataset), image_size=IMAGE_SIZE))
    train.run(train.Config(dataset=str(made.dataset), run=str(made.run), model="cnn", epochs=3, batch_size=16))
    screen.run(screen.Config(source=str(made.archive), results=str(made.results), model=str(made.run)))
    return made


@pytest.fixture
def copy_of(tmp_path: Path):
    """A copy of a directory that the test may spoil."""

    def copy(directory: Path) -> Path:
        return Path(shutil.copytree(directory, tmp_path / directory.name))

    return copy


def content(directory: Path) -> dict[str, bytes]:
    """Every file below a directory by its relative name."""
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}
