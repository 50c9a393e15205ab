"""What the benchmarks measure on and with: archives of any size, a run of the article's network, bare loops, tables."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from malaria_ray.runtime import outputs, storage
from malaria_ray.schema import HISTORY, SPLITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NIH = Path(__file__).parents[3] / "shared" / "data" / "nih_cell_images_dev.zip"
N_PROCESSES = os.cpu_count() or 1
IMAGE_SIZE = 125


def parser(what: str | None) -> argparse.ArgumentParser:
    """The flags that all benchmarks share."""
    made = argparse.ArgumentParser(description=what)
    made.add_argument(
        "--archive", type=Path, default=NIH, help="zip of cell images; synthetic ones where it is not there"
    )
    made.add_argument("--run", type=Path, help="a trained run; by default the article's cnn with random weights")
    made.add_argument("--n", type=int, help="only so many images")
    made.add_argument("--rounds", type=int, default=1)
    made.add_argument("--out", type=Path, default=Path("out/bench"), help="where JSON and plots are written")
    return made


def archive_of(path: Path, n: int | None, folder: Path) -> Path:
    """`n` images of a zip as a zip, several copies of each where it has fewer; the zip itself where n is None."""
    if not path.exists():
        return synthetic_archive(folder / "cells.zip", n or 5000, side=140)
    if n is None:
        return path
    target = folder / f"cells-{n}.zip"
    with zipfile.ZipFile(path) as given, zipfile.ZipFile(target, "w") as taken:
        names = [name for name in given.namelist() if name.lower().endswith(".png")]
        names = names[:: max(1, len(names) // n)]
        for i in range(n):
            copy, at = divmod(i, len(names))
            name = names[at].replace(".png", f"_copy{copy}.png") if copy else names[at]
            taken.writestr(name, given.read(names[at]))
    return target


def synthetic_archive(path: Path, n: int, *, side: int) -> Path:
    """A zip of n PNGs `side` pixels wide and high; 200 pictures, each under many names."""
    import cv2

    from malaria_ray.cells.synthetic import synthetic_cells

    pictures = []
    for name, data in synthetic_cells(n_patients=20, n_cells_per_patient=10, seed=11):
        pixels = cv2.resize(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), (side, side))
        pictures.append((name.removesuffix(".png"), cv2.imencode(".png", pixels)[1].tobytes()))
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(n):
            name, data = pictures[i % len(pictures)]
            archive.writestr(f"{name}_{i:07d}.png", data)
    return path


def untrained_run(folder: Path, *, image_size: int = IMAGE_SIZE) -> Path:
    """A finished run directory of the article's cnn with random weights: an image costs what it costs a trained one.

    In a process of its own, so that TensorFlow's threads and memory are not in the measurement.
    """
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_write_run, (folder, image_size))


def _write_run(folder: Path, image_size: int) -> Path:
    from malaria_ray.models.building import build_trainable
    from malaria_ray.models.export import to_onnx, with_features
    from malaria_ray.statistics.calibration import Calibration
    from malaria_ray.statistics.novelty import Novelty
    from malaria_ray.statistics.validation import Validation

    model = build_trainable("cnn", image_size=image_size)
    described = with_features(model)
    n_features = described.outputs[1].shape[-1]
    run = storage.locate(str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder / "model.keras")
    (folder / "model.onnx").write_bytes(to_onnx(described))
    calibration = Calibration(temperature=1.5, threshold=0.5, specificity=None, n=1, n_patients=1)
    validation = Validation(calibration=calibration, rates=None, rates_missing="the network is untrained")
    storage.write_json(run / "validation.json", validation.to_dict())
    novelty = Novelty(
        means=np.zeros((2, n_features), np.float32), whitening=np.eye(n_features, dtype=np.float32), threshold=1.0
    )
    storage.write_bytes(run / "novelty.npz", novelty.to_bytes())
    storage.write_json(run / "config.json", {"stage": "train", "identity": {}, "config": {"model": "cnn"}})
    storage.write_table(run / "splits.parquet", SPLITS.arrow_schema().empty_table())
    storage.write_table(run / "history.parquet", HISTORY.arrow_schema().empty_table())
    names = ("model.keras", "model.onnx", "splits.parquet", "history.parquet", "validation.json", "novelty.npz")
    digest = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()[:8]
    outputs.finish(
        run,
        counts={},
        files={name: storage.record_of(run / name) for name in names},
        timings={},
        run_id=f"untrained-{digest}",
        model="cnn",
        threshold=0.5,
        image_size=image_size,
    )
    return folder


def bare_rate(share: Callable[..., int], arguments: Sequence[Any]) -> float:
    """Images per second of `share(*arguments, index, n_processes)` on all cores, one process each; their start and one
    small call are not counted.
    """
    with get_context("spawn").Pool(N_PROCESSES) as pool:
        jobs = [(*arguments, index, N_PROCESSES) for index in range(N_PROCESSES)]
        pool.starmap(share, [(*job, True) for job in jobs], chunksize=1)  # warm: imported, opened
        begun = time.monotonic()
        n = sum(pool.starmap(share, jobs, chunksize=1))
        return n / (time.monotonic() - begun)


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="malaria_ray-bench-") as folder:
        yield Path(folder)


def start_ray() -> float:
    """Starts a local Ray; returns the seconds it took."""
    import logging

    import ray

    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    begun = time.monotonic()
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="CRITICAL")
    return time.monotonic() - begun


def report(
    name: str, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], out: Path, **more: Any
) -> None:
    """Prints a Markdown table and writes it, with the machine, as JSON."""
    rows = [list(row) for row in rows]
    print(f"\n### {title}\n")
    print("| " + " | ".join(columns) + " |")
    print("| " + " | ".join("---" for _ in columns) + " |")
    for row in rows:
        print("| " + " | ".join(_cell(value) for value in row) + " |")
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "title": title,
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {"cpus": os.cpu_count(), "load_before": LOAD, "platform": platform.platform()},
        "columns": list(columns),
        "rows": rows,
        **more,
    }
    (out / f"{name}.json").write_text(json.dumps(content, indent=1, default=str) + "\n")
    print(f"\n{out / name}.json", flush=True)


LOAD = os.getloadavg()[0]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) < 20 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def bar_plot(name: str, title: str, labels: Sequence[str], values: Sequence[float], unit: str, out: Path) -> None:
    """A plot of one number for each way, best on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.45 * len(labels) + 1.1), layout="constrained")
    axes = figure.add_subplot()
    order = np.argsort(values)
    bars = axes.barh([labels[i] for i in order], [values[i] for i in order], color="#4878a8")
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    save(figure, out / f"{name}.svg")


def save(figure: Figure, path: Path) -> None:
    """Writes the plot as SVG; the same numbers give the same bytes."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "malaria_ray"}):
        figure.savefig(path, metadata={"Date": None})
