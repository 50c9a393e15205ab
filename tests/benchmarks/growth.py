"""Seconds an image and peak memory of all processes as the archive grows: python -m tests.benchmarks.growth [--n N …].

The article's cnn on images of 32 × 32 pixels (1.4 M parameters instead of 15.1 M), so that 300,000 end in minutes: what
Ray, the ledger and the driver cost an image weighs some ten times more here than with real images. Each size is a
`malaria-ray screen` of its own, from its start to its end, on a local Ray of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from malaria_ray.runtime import storage
from tests.benchmarks import material

SIDE = 32


class Memory(threading.Thread):
    """Samples the memory of a process and all it started: the sum of proportional set sizes, so that a page that
    several share counts once.
    """

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.process = psutil.Process(pid)
        self.session = os.getsid(pid)
        self.peak, self.samples = 0, list[tuple[float, int]]()
        self.is_over = threading.Event()

    def run(self) -> None:
        begun = time.monotonic()
        while not self.is_over.wait(1.0):
            now = sum(_pss(process) for process in self._all())
            self.samples.append((round(time.monotonic() - begun, 1), now))
            self.peak = max(self.peak, now)

    def _all(self) -> list[psutil.Process]:
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def _pss(process: psutil.Process) -> int:
    try:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def screened(archive: Path, results: Path, run: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "malaria_ray", "screen", str(archive), str(results), "--model", str(run)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    begun = time.monotonic()
    process = subprocess.Popen([*command, "--overwrite"], env=environment, start_new_session=True)
    memory = Memory(process.pid)
    memory.start()
    status = process.wait()
    seconds = time.monotonic() - begun
    memory.is_over.set()
    memory.join()
    assert status == 0
    success = storage.read_json(storage.locate(str(results)) / "_SUCCESS.json")
    return {
        "n": success["counts"]["n_files"],
        "seconds": seconds,
        "peak_bytes": memory.peak,
        "timings": success["timings"],
        "memory": memory.samples[:: max(1, len(memory.samples) // 200)],
    }


def main(arguments: list[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--n", type=int, nargs="+", default=[10_000, 100_000, 300_000])
    flags.add_argument("--out", type=Path, default=Path("out/bench"))
    given = flags.parse_args(arguments)
    found = []
    with material.scratch() as folder:
        run = material.untrained_run(folder / "run", image_size=SIDE)
        for n in given.n:
            archive = material.synthetic_archive(folder / "cells.zip", n, side=SIDE)
            found.append(screened(archive, folder / "results", run))
    base = found[-2] if len(found) > 1 else found[-1]
    rows = []
    for result in found:
        scoring = result["timings"]["scoring_s"] / result["n"]
        rows.append(
            (
                result["n"],
                1000 * scoring,
                1000 * result["seconds"] / result["n"],
                result["timings"]["steady_images_per_second"],
                result["timings"]["publishing_s"],
                result["peak_bytes"] / 1e6,
                scoring / (base["timings"]["scoring_s"] / base["n"]),
                result["peak_bytes"] / base["peak_bytes"],
            )
        )
    columns = ["images", "ms/image, scoring", "ms/image, whole command", "steady images/s", "publishing, s", "peak MB"]
    columns += [f"scoring time against {base['n']:,}", f"memory against {base['n']:,}"]
    title = f"Growth: the article's cnn at {SIDE} × {SIDE}, {material.N_PROCESSES} cores, peak PSS of all processes"
    material.report("growth", title, columns, rows, given.out, details=found)
    _plot(found, given.out)


def _plot(found: list[dict[str, Any]], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for result in found:
        axes.plot(
            *zip(*[(at, size / 1e6) for at, size in result["memory"]], strict=True), label=f"{result['n']:,} images"
        )
    axes.set_xlabel("seconds")
    axes.set_ylabel("MB, all processes")
    axes.set_ylim(bottom=0)
    axes.set_title("Memory while screening", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    material.save(figure, out / "growth.svg")


if __name__ == "__main__":
    main()
