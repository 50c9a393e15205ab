"""ingest against two bare OpenCV processes on the same files in one run: python -m tests.benchmarks.ingest [ZIP]."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import zipfile
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import ray

from malaria_ray.runtime import storage
from malaria_ray.stages import ingest

NIH = Path(__file__).parents[3] / "shared" / "data" / "nih_cell_images_dev.zip"
N_PROCESSES, IMAGE_SIZE, N_ROUNDS = 2, 125, 3


def decode_share(archive: str, share: int) -> int:
    """The bare work of one process: read, decode, resize every N-th member; nothing is kept or written."""
    cv2.setNumThreads(1)
    with zipfile.ZipFile(archive) as members:
        names = members.namelist()[share::N_PROCESSES]
        for name in names:
            pixels = cv2.imdecode(np.frombuffer(members.read(name), np.uint8), cv2.IMREAD_COLOR_RGB)
            cv2.resize(pixels, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_CUBIC)
    return len(names)


def bare_rate(archive: str) -> float:
    """Images per second of the processes together, their start not counted."""
    with get_context("spawn").Pool(N_PROCESSES) as pool:
        pool.map(time.sleep, [0.5] * N_PROCESSES)  # all are up and have imported OpenCV
        begun = time.monotonic()
        n = sum(pool.starmap(decode_share, [(archive, share) for share in range(N_PROCESSES)], chunksize=1))
        return n / (time.monotonic() - begun)


def ingest_rate(archive: str, folder: str) -> float:
    """Images per second of ingest's parallel part, which also hashes, checks, compresses and writes."""
    ingest.run(ingest.Config(archive=archive, dataset=folder, image_size=IMAGE_SIZE, overwrite=True))
    timings = storage.read_json(storage.locate(folder) / "_SUCCESS.json")["timings"]
    return float(timings["decode_images_per_second"])


def main() -> None:
    archive = sys.argv[1] if len(sys.argv) > 1 else str(NIH)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as folder:
        ingest_rate(archive, f"{folder}/dataset")  # Ray's workers are up and warm after this
        rows = [(bare_rate(archive), ingest_rate(archive, f"{folder}/dataset")) for _ in range(N_ROUNDS)]
    ray.shutdown()
    print("\ntwo bare OpenCV processes   ingest, Ray warm   ratio")
    for bare, ours in rows:
        print(f"{bare:20,.0f} img/s {ours:16,.0f} img/s {ours / bare:7.2f}")


if __name__ == "__main__":
    main()
