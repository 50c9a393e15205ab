"""demo: the whole line on a small archive, on this machine. The one module that runs stages one after the other."""

from __future__ import annotations

import logging
import time
import zipfile
from dataclasses import dataclass
from io import BytesIO

from tyro.conf import Positional
from upath import UPath

from malaria_ray.cells.synthetic import synthetic_cells
from malaria_ray.errors import ConfigError
from malaria_ray.runtime import storage
from malaria_ray.runtime.seeds import check_seed
from malaria_ray.runtime.session import ray_session
from malaria_ray.runtime.terminal import console
from malaria_ray.schema import RESEARCH_ONLY, Split
from malaria_ray.stages import evaluate, ingest, report, screen, train, verify

log = logging.getLogger("malaria_ray")

# The article's network has to see over a thousand different cells before it finds parasites at all: with these, at half
# the article's side, it does after some eight epochs (val_accuracy 0.9); with 800 cells at full side it never did.
_N_PATIENTS, _N_CELLS_PER_PATIENT = 48, 40
_SYNTHETIC_IMAGE_SIZE, _IMAGE_SIZE = 64, 125


@dataclass(frozen=True, kw_only=True)
class Config:
    """Runs ingest, train, screen, evaluate, report and verify on a small synthetic archive, or on --archive."""

    directory: Positional[str] = "demo"
    """Directory to write, made if missing."""
    archive: str | None = None
    """A real archive instead of a synthetic one."""
    patients: tuple[str, ...] = ()
    """Patient mapping files of that archive."""
    epochs: int = 16
    """Epochs at most."""
    seed: int = 42
    """Seed of the cells, the split and the training."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ConfigError(f"--epochs {self.epochs}: give 1 epoch or more")
        check_seed(self.seed)


def run(config: Config) -> None:
    begun = time.monotonic()
    folder = storage.locate(config.directory)
    archive = config.archive
    if archive is None:
        archive = str(_synthetic_archive(folder / f"archive-{config.seed}.zip", config.seed))
    dataset, run_path, results = (str(folder / name) for name in ("dataset", "run", "results"))
    image_size = _SYNTHETIC_IMAGE_SIZE if config.archive is None else _IMAGE_SIZE
    with ray_session():
        log.info("1/6 ingest: %s → %s", archive, dataset)
        ingest.run(ingest.Config(archive=archive, dataset=dataset, patients=config.patients, image_size=image_size))
        log.info("2/6 train: %s → %s", dataset, run_path)
        train.run(
            train.Config(
                dataset=dataset,
                run=run_path,
                model="cnn",
                epochs=config.epochs,
                patience=0,
                batch_size=32,
                seed=config.seed,
            )
        )
        log.info("3/6 screen: the test split of %s → %s", dataset, results)
        screen.run(screen.Config(source=dataset, results=results, model=run_path, split=Split.test))
        log.info("4/6 evaluate: %s", results)
        evaluate.run(evaluate.Config(results=results))
        log.info("5/6 report: %s", results)
        report.run(report.Config(results=results))
        log.info("6/6 verify")
        for made in (dataset, run_path, results):
            verify.run(verify.Config(directory=made))
    _print_where(folder, is_synthetic=config.archive is None, seconds=time.monotonic() - begun)


def _synthetic_archive(path: UPath, seed: int) -> UPath:
    """A zip of synthetic cells in the official layout; the same seed gives the same bytes."""
    if not path.exists():
        buffer = BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, data in synthetic_cells(
                n_patients=_N_PATIENTS, n_cells_per_patient=_N_CELLS_PER_PATIENT, seed=seed
            ):
                archive.writestr(zipfile.ZipInfo(name), data)
        storage.write_bytes(path, buffer.getvalue())
    return path


def _print_where(folder: UPath, *, is_synthetic: bool, seconds: float) -> None:
    out = console()
    out.print(f"\nThe whole line took {seconds:.0f} s. Look at:")
    for name, what in (
        ("results/report/index.html", "all of it on one page, in a browser"),
        ("dataset/samples.png", "cells of both classes"),
        ("dataset/manifest.parquet", "one row per file of the archive, good or bad"),
        ("run/learning_curves.png", "accuracy and loss by epoch"),
        ("results/predictions", "a score for each image"),
        ("results/metrics", "the metrics above, with intervals"),
        ("results/patients", "what was counted for each patient"),
    ):
        out.print(f"  {folder / name}  {what}")
    if is_synthetic:
        out.print("The cells are SYNTHETIC: these figures say that the software works, nothing about malaria.")
    out.print(RESEARCH_ONLY)
