"""Reading, decoding and resizing alone, side by side: python -m tests.benchmarks.decoding [--n 40000].

Each way runs in a process of its own, on the same images, all cores, after a small run of itself that starts and warms
what it needs; pixels are made and dropped. The first two read the zip, the others the same files in a folder.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

from tests.benchmarks import material
from tests.benchmarks.material import IMAGE_SIZE, N_PROCESSES

BATCH = 256
N = 40_000  # images: some seconds
SLOW_N = 3000  # images for read_images, which needs the most seconds an image: a rate needs no more


def decode_share(archive: Path, index: int, n_processes: int, is_warming: bool = False) -> int:
    """The bare work of one process: read, decode, resize every N-th member."""
    import cv2

    cv2.setNumThreads(1)
    with ZipFile(archive) as members:
        names = members.namelist()[index::n_processes][: 50 if is_warming else None]
        for name in names:
            pixels = cv2.imdecode(np.frombuffer(members.read(name), np.uint8), cv2.IMREAD_COLOR_RGB)
            cv2.resize(pixels, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_CUBIC)
    return len(names)


def bare(archive: Path, folder: Path) -> dict[str, Any]:
    return {"rate": material.bare_rate(decode_share, (archive,))}


def ours(archive: Path, folder: Path) -> dict[str, Any]:
    """The reading half of `screen`: a listing in blocks, each read, checked, hashed, decoded and resized by a task, in
    pieces as for the network.
    """
    import pyarrow as pa
    import ray

    from malaria_ray.archives import open_archive
    from malaria_ray.archives.listing import list_archive
    from malaria_ray.runtime import storage
    from malaria_ray.runtime.session import ray_session
    from malaria_ray.stages import ledger
    from malaria_ray.stages.scorers import decode_block

    def read_only(block: Any) -> Any:
        begun = time.time()
        statuses = [piece["status"] for piece in decode_block(block, image_size=IMAGE_SIZE, batch_size=BATCH)]
        status = pa.chunked_array([chunk for column in statuses for chunk in column.chunks])
        return pa.table({"status": status, "at": [(begun, time.time())] * len(status)})

    listing = list_archive(open_archive(str(archive)))
    with ray_session():
        for rows_used in (listing.slice(0, 100), listing):
            work = storage.locate(str(folder / f"work-{rows_used.num_rows}"))
            rows = max(64, min(1024, rows_used.num_rows // (4 * N_PROCESSES)))  # as screen's
            blocks = ledger.write_blocks(rows_used, work, block_rows=rows, tail_rows=0, multiple=1)
            begun = time.time()
            dataset = ray.data.read_datasource(ledger.BlockSource(blocks), override_num_blocks=len(blocks))
            dataset.context.op_resource_reservation_enabled = False  # as ingest does
            found = dataset.map_batches(read_only, batch_size=None, batch_format="pyarrow").to_pandas()
            seconds = time.time() - begun
    at = found["at"].map(tuple)
    first, last = min(begin for begin, _ in at), max(end for _, end in at)
    assert (found["status"] == "ok").all()
    return {"rate": len(found) / (last - first), "whole": len(found) / seconds}


def daft(archive: Path, folder: Path) -> dict[str, Any]:
    import daft as library
    from daft.functions import decode_image, download, resize

    def decoded(paths: list[str]) -> float:
        begun = time.monotonic()
        frame = library.from_pydict({"path": paths})
        image = decode_image(download(library.col("path")), mode="RGB")
        frame = frame.select(resize(image, IMAGE_SIZE, IMAGE_SIZE).alias("image"))
        n = 0
        for part in frame.iter_partitions():
            n += len(part)
        assert n == len(paths)
        return time.monotonic() - begun

    paths = files_of(folder)
    decoded(paths[:200])
    return {"rate": len(paths) / decoded(paths)}


def thread_pool(archive: Path, folder: Path) -> dict[str, Any]:
    """As the article does it."""
    import cv2

    def load(path: str) -> Any:
        return cv2.resize(cv2.imread(path), (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_CUBIC)

    paths = files_of(folder)
    with ThreadPoolExecutor() as pool:
        list(pool.map(load, paths[:200]))
        begun = time.monotonic()
        for _ in pool.map(load, paths):
            pass
        return {"rate": len(paths) / (time.monotonic() - begun)}


def tf_data(archive: Path, folder: Path) -> dict[str, Any]:
    def count(paths: list[str]) -> float:
        dataset = tf_dataset(paths, batch_size=BATCH)
        begun = time.monotonic()
        n = sum(len(batch) for batch in dataset)
        assert n == len(paths)
        return time.monotonic() - begun

    paths = files_of(folder)
    count(paths[:200])
    return {"rate": len(paths) / count(paths)}


def tf_dataset(paths: list[str], *, batch_size: int) -> Any:
    """uint8 batches (n, size, size, 3), as the TensorFlow guide reads image files."""
    import tensorflow as tf

    def load(path: Any) -> Any:
        pixels = tf.io.decode_png(tf.io.read_file(path), channels=3)
        pixels = tf.image.resize(pixels, (IMAGE_SIZE, IMAGE_SIZE), method="bicubic")
        return tf.cast(tf.clip_by_value(pixels, 0, 255), tf.uint8)

    dataset = tf.data.Dataset.from_tensor_slices(paths).map(load, num_parallel_calls=tf.data.AUTOTUNE)
    return dataset.batch(batch_size).prefetch(tf.data.AUTOTUNE)


def read_images(archive: Path, folder: Path) -> dict[str, Any]:
    import ray

    def count(paths: list[str]) -> float:
        begun = time.monotonic()
        dataset = ray.data.read_images(paths, size=(IMAGE_SIZE, IMAGE_SIZE), mode="RGB")
        rows = dataset.map_batches(lambda batch: {"n": [len(batch["image"])]}, batch_size=BATCH).take_all()
        assert sum(row["n"] for row in rows) == len(paths)
        return time.monotonic() - begun

    paths = files_of(folder)[:SLOW_N]
    material.start_ray()
    ray.data.DataContext.get_current().enable_progress_bars = False
    count(paths[:200])
    seconds = count(paths)
    ray.shutdown()
    return {"rate": len(paths) / seconds, "n": len(paths)}


def files_of(folder: Path) -> list[str]:
    return sorted(str(path) for path in (folder / "files").rglob("*.png"))


WAYS = {
    "bare OpenCV processes": bare,
    "malaria_ray (Ray tasks)": ours,
    "Daft": daft,
    "thread pool of the article": thread_pool,
    "tf.data": tf_data,
    "ray.data.read_images": read_images,
}


def alone(way: Any, *arguments: Any) -> Any:
    """Calls `way` in a new process, so that no library's threads disturb another."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(way, *arguments).result()


def main(arguments: list[str] | None = None) -> None:
    flags = material.parser(__doc__).parse_args(arguments)
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    more: dict[str, Any] = {}
    with material.scratch() as folder:
        archive = material.archive_of(flags.archive, flags.n or N, folder)
        with ZipFile(archive) as members:
            members.extractall(folder / "files")
        n = len(files_of(folder))
        for _ in range(flags.rounds):
            for name, way in WAYS.items():
                found = way(archive, folder) if way is bare else alone(way, archive, folder)
                rates[name].append(found["rate"])
                more[name] = found
    mean = {name: float(np.mean(values)) for name, values in rates.items()}
    material.report(
        "decoding",
        f"Read, decode and resize {n:,} images to {IMAGE_SIZE} × {IMAGE_SIZE}, {N_PROCESSES} cores",
        ["way", "images/s", "of bare", "times read_images"],
        [
            (name, rate, rate / mean["bare OpenCV processes"], rate / mean["ray.data.read_images"])
            for name, rate in mean.items()
        ],
        flags.out,
        rounds=rates,
        details=more,
        note="malaria_ray also checks CRC-32 and hashes each file; its rate is from the first task's start to the last "
        "one's end; 'whole' in details counts Ray Data's planning too, as the rates of the others do",
    )
    material.bar_plot("decoding", "Reading and decoding", list(mean), list(mean.values()), "images a second", flags.out)


if __name__ == "__main__":
    main()
