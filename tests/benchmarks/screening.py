"""Screening to Parquet, side by side: python -m tests.benchmarks.screening [--n 1000] [--run RUN].

The same network (the article's cnn) and images for all, in float32. The ceiling is 1/(1/decode + 1/network) of bare
processes, one a core, with the same engine. Each way runs in a process of its
own after a small run of itself; the rate counts from the first call to the last file written, the start of Ray or of an
interpreter not.
"""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import material
from tests.benchmarks.decoding import alone, decode_share, files_of, tf_dataset
from tests.benchmarks.material import IMAGE_SIZE, N_PROCESSES

BATCH = 64
SLOW_N = 4000  # images for the two ways through Keras, which need several times longer an image
N_FORWARD = 6400
_opened: dict[str, Any] = {}


def forward_share(model: Path, name: str, index: int, n_processes: int, is_warming: bool = False) -> int:
    """The network alone in one process: batches of random pixels through the engine `name` with one thread."""
    from malaria_ray.models.engines import open_engine

    if name not in _opened:  # by the warming call, so that its seconds do not count
        _opened[name] = open_engine(name, model.read_bytes(), n_threads=1, batch_size=BATCH)
    engine = _opened[name]
    n = BATCH if is_warming else N_FORWARD // n_processes // BATCH * BATCH
    pixels = np.random.default_rng([index]).integers(0, 256, (BATCH, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for _ in range(0, n, BATCH):
        engine.score(pixels)
    return n


def ceiling(archive: Path, run: Path, engine: str) -> dict[str, float]:
    decode = material.bare_rate(decode_share, (archive,))
    forward = material.bare_rate(forward_share, (run / "model.onnx", engine))
    return {"decode": decode, "network": forward, "rate": 1 / (1 / decode + 1 / forward)}


def ours(archive: Path, folder: Path, run: Path, engine: str) -> dict[str, Any]:
    from malaria_ray.runtime import storage
    from malaria_ray.runtime.session import ray_session
    from malaria_ray.stages import screen

    small = material.archive_of(archive, 256, folder)
    with ray_session():
        for source in (small, archive):
            results = folder / f"results-{engine}-{source.stem}"
            begun = time.monotonic()
            screen.run(
                screen.Config(source=str(source), results=str(results), model=str(run), engine=engine, batch_size=BATCH)
            )
            seconds = time.monotonic() - begun
    success = storage.read_json(storage.locate(str(results)) / "_SUCCESS.json")
    n = success["counts"]["n_files"]
    shutil.rmtree(results)
    timings = success["timings"]
    return {"rate": n / seconds, "steady": timings["steady_images_per_second"], "n": n, "timings": timings}


def stock_ray(archive: Path, folder: Path, run: Path) -> dict[str, Any]:
    """The recipe of Ray's documentation for batch inference: read_images, an actor with Keras, write_parquet. One actor
    of one CPU: with two, none would be left to read.
    """
    import ray

    class Predictor:
        def __init__(self) -> None:
            import keras

            self.model = keras.saving.load_model(run / "model.keras", compile=False)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return {"path": batch["path"], "score": self.model.predict(batch["image"], verbose=0)[:, 0]}

    def screened(paths: list[str], target: Path) -> float:
        begun = time.monotonic()
        dataset = ray.data.read_images(paths, size=(IMAGE_SIZE, IMAGE_SIZE), mode="RGB", include_paths=True)
        dataset = dataset.map_batches(
            Predictor, batch_size=BATCH, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=1
        )
        dataset.write_parquet(str(target))
        return time.monotonic() - begun

    paths = files_of(folder)[:SLOW_N]
    material.start_ray()
    ray.data.DataContext.get_current().enable_progress_bars = False
    screened(paths[:128], folder / "stock-warm")
    seconds = screened(paths, folder / "stock")
    ray.shutdown()
    return {"rate": len(paths) / seconds, "n": len(paths)}


def tf_keras(archive: Path, folder: Path, run: Path) -> dict[str, Any]:
    import keras
    import pandas as pd

    model = keras.saving.load_model(run / "model.keras", compile=False)

    def screened(paths: list[str], target: Path) -> float:
        begun = time.monotonic()
        scores = model.predict(tf_dataset(paths, batch_size=BATCH), verbose=0)[:, 0]
        pd.DataFrame({"path": paths, "score": scores}).to_parquet(target)
        return time.monotonic() - begun

    paths = files_of(folder)[:SLOW_N]
    screened(paths[:128], folder / "tf-warm.parquet")
    return {"rate": len(paths) / screened(paths, folder / "tf.parquet"), "n": len(paths)}


def daft(archive: Path, folder: Path, run: Path, engine: str) -> dict[str, Any]:
    """One stage that reads, decodes and scores, in one process a core: the fastest way found in Daft."""
    import daft as library

    model = (run / "model.onnx").read_bytes()

    @library.cls(use_process=True, max_concurrency=N_PROCESSES, cpus=1)
    class Scorer:
        def __init__(self, model: bytes):
            from malaria_ray.models.engines import open_engine

            self.engine = open_engine(engine, model, n_threads=1, batch_size=BATCH)

        @library.method.batch(return_dtype=library.DataType.float32(), batch_size=4 * BATCH)
        def score(self, paths: Any) -> Any:
            import cv2

            cv2.setNumThreads(1)
            names = paths.to_pylist()
            pixels = np.empty((len(names), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
            for i, name in enumerate(names):
                data = np.frombuffer(Path(name).read_bytes(), np.uint8)
                image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)
                pixels[i] = cv2.resize(image, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_CUBIC)
            return library.Series.from_numpy(self.engine.score(pixels))

    def screened(paths: list[str], target: Path) -> float:
        begun = time.monotonic()
        frame = library.from_pydict({"path": paths})
        frame = frame.with_column("score", Scorer(model).score(library.col("path")))
        frame.write_parquet(str(target))
        return time.monotonic() - begun

    paths = files_of(folder)
    screened(paths[:256], folder / "daft-warm")
    return {"rate": len(paths) / screened(paths, folder / "daft"), "n": len(paths)}


ENGINES = {"ncnn": "ncnn", "onnx": "ONNX Runtime alone"}
WAYS = {
    **{f"malaria_ray screen, {named}": partial(ours, engine=engine) for engine, named in ENGINES.items()},
    **{f"Daft, one stage, our {named}": partial(daft, engine=engine) for engine, named in ENGINES.items()},
    "tf.data + Keras predict": tf_keras,
    "stock Ray: read_images + Keras actor + write_parquet": stock_ray,
}
FIRST = next(iter(WAYS))


def main(arguments: list[str] | None = None) -> None:
    from zipfile import ZipFile

    flags = material.parser(__doc__).parse_args(arguments)
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    details: dict[str, Any] = {}
    ceilings: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    steady: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    with material.scratch() as folder:
        archive = material.archive_of(flags.archive, flags.n, folder)
        run = flags.run or material.untrained_run(folder / "run")
        with ZipFile(archive) as members:
            members.extractall(folder / "files")
        for _ in range(flags.rounds):
            for engine, of_engine in ceilings.items():
                of_engine.append(ceiling(archive, run, engine))
            for name, way in WAYS.items():
                details[name] = alone(way, archive, folder, run)
                rates[name].append(details[name]["rate"])
            for engine, of_engine in steady.items():
                of_engine.append(details[f"malaria_ray screen, {ENGINES[engine]}"]["steady"])
    limits = {engine: float(np.mean([one["rate"] for one in found])) for engine, found in ceilings.items()}
    mean = {name: float(np.mean(values)) for name, values in rates.items()}
    rows: list[tuple[Any, ...]] = []
    for engine, named in ENGINES.items():
        rate = float(np.mean(steady[engine]))
        rows.append((f"ceiling: 1/(1/decode + 1/network), {named}", None, limits[engine], 1.0, None))
        rows.append((f"malaria_ray screen, {named}, steady state", None, rate, rate / limits[engine], None))
    for name, rate in mean.items():
        limit = next((limits[engine] for engine, named in ENGINES.items() if name.endswith(named)), None)
        rows.append((name, details[name]["n"], rate, limit and rate / limit, mean[FIRST] / rate))
    material.report(
        "screening",
        f"Screening to Parquet, the article's cnn, {IMAGE_SIZE} × {IMAGE_SIZE}, {N_PROCESSES} cores",
        ["way", "images", "images/s", "of its ceiling", f"{FIRST} is faster by"],
        rows,
        flags.out,
        ceilings=ceilings,
        rounds=rates,
        details=details,
    )
    labels = ["ceiling with ncnn", "malaria_ray screen, ncnn, steady", *mean]
    values = [limits["ncnn"], float(np.mean(steady["ncnn"])), *mean.values()]
    material.bar_plot("screening", "Screening to Parquet", labels, values, "images a second", flags.out)


if __name__ == "__main__":
    main()
