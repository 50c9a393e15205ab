"""Screening to Parquet, side by side: python -m tests.benchmarks.screening [--n 1000] [--run RUN].

The same network (the article's cnn) and images for all, in float32 but for --engine openvino-bf16. The ceiling is
1/(1/decode + 1/network) of bare processes, one a core, with the same ONNX Runtime. Each way runs in a process of its
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

from malaria_ray.models.engines import bf16_fault
from tests.benchmarks import material
from tests.benchmarks.decoding import alone, decode_share, files_of, tf_dataset
from tests.benchmarks.material import IMAGE_SIZE, N_PROCESSES

BATCH = 64
SLOW_N = 4000  # images for the two ways through Keras, which need several times longer an image
N_FORWARD = 1600


def forward_share(model: Path, index: int, n_processes: int, is_warming: bool = False) -> int:
    """The network alone in one process: batches of random pixels through ONNX Runtime with one thread."""
    from malaria_ray.models.engines import open_engine

    engine = open_engine("onnx", model.read_bytes(), n_threads=1, batch_size=BATCH)
    n = BATCH if is_warming else N_FORWARD // n_processes // BATCH * BATCH
    pixels = np.random.default_rng([index]).integers(0, 256, (BATCH, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for _ in range(0, n, BATCH):
        engine.score(pixels)
    return n


def ceiling(archive: Path, run: Path) -> dict[str, float]:
    decode = material.bare_rate(decode_share, (archive,))
    forward = material.bare_rate(forward_share, (run / "model.onnx",))
    return {"decode": decode, "network": forward, "rate": 1 / (1 / decode + 1 / forward)}


def ours(archive: Path, folder: Path, run: Path, engine: str = "onnx") -> dict[str, Any]:
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


def daft(archive: Path, folder: Path, run: Path) -> dict[str, Any]:
    """One stage that reads, decodes and scores, in one process a core: the fastest way found in Daft."""
    import daft as library

    model = (run / "model.onnx").read_bytes()

    @library.cls(use_process=True, max_concurrency=N_PROCESSES, cpus=1)
    class Scorer:
        def __init__(self, model: bytes):
            from malaria_ray.models.engines import open_engine

            self.engine = open_engine("onnx", model, n_threads=1, batch_size=BATCH)

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


WAYS = {
    "malaria_ray screen": ours,
    "malaria_ray screen --engine openvino-bf16": partial(ours, engine="openvino-bf16"),
    "Daft, one stage, the same ONNX Runtime": daft,
    "tf.data + Keras predict": tf_keras,
    "stock Ray: read_images + Keras actor + write_parquet": stock_ray,
}


def main(arguments: list[str] | None = None) -> None:
    from zipfile import ZipFile

    flags = material.parser(__doc__).parse_args(arguments)
    if fault := bf16_fault():
        print(fault)
    ways = {name: way for name, way in WAYS.items() if "bf16" not in name or not fault}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    details: dict[str, Any] = {}
    ceilings, steady = [], []
    with material.scratch() as folder:
        archive = material.archive_of(flags.archive, flags.n, folder)
        run = flags.run or material.untrained_run(folder / "run")
        with ZipFile(archive) as members:
            members.extractall(folder / "files")
        for _ in range(flags.rounds):
            ceilings.append(ceiling(archive, run))
            for name, way in ways.items():
                details[name] = alone(way, archive, folder, run)
                rates[name].append(details[name]["rate"])
            steady.append(details["malaria_ray screen"]["steady"])
    limit = float(np.mean([found["rate"] for found in ceilings]))
    mean = {name: float(np.mean(values)) for name, values in rates.items()}
    ours_rate = float(np.mean(steady))
    rows: list[tuple[Any, ...]] = [("ceiling: 1/(1/decode + 1/network)", None, limit, 1.0, None)]
    rows.append(
        ("malaria_ray screen, steady state", details["malaria_ray screen"]["n"], ours_rate, ours_rate / limit, None)
    )
    rows += [
        (name, details[name]["n"], rate, rate / limit, mean["malaria_ray screen"] / rate) for name, rate in mean.items()
    ]
    material.report(
        "screening",
        f"Screening to Parquet, the article's cnn, {IMAGE_SIZE} × {IMAGE_SIZE}, {N_PROCESSES} cores",
        ["way", "images", "images/s", "of the ceiling", "malaria_ray is faster by"],
        rows,
        flags.out,
        ceilings=ceilings,
        rounds=rates,
        details=details,
    )
    labels = ["ceiling", "malaria_ray, steady", *mean]
    values = [limit, ours_rate, *mean.values()]
    material.bar_plot("screening", "Screening to Parquet", labels, values, "images a second", flags.out)


if __name__ == "__main__":
    main()
