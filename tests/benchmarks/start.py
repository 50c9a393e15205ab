"""From nothing to the first scored image, broken down: python -m tests.benchmarks.start [--run RUN].

Each number is from a new process with a new local Ray, mean of --rounds.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import material
from tests.benchmarks.decoding import alone


def imports() -> float:
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", "import malaria_ray.stages.screen"], check=True)
    return time.monotonic() - begun


def parts(run: Path) -> dict[str, float]:
    """What single things cost in a session that has done nothing else before."""
    import ray

    found = {"ray.init": material.start_ray()}

    def engine(path: str) -> float:
        begun = time.monotonic()
        from malaria_ray.models.engines import open_engine
        from malaria_ray.stages import scorers  # noqa: F401 - what the actor imports

        open_engine("ncnn", Path(path).read_bytes(), n_threads=1, batch_size=64)
        return time.monotonic() - begun

    begun = time.monotonic()
    inside = ray.get(ray.remote(engine).remote(str(run / "model.onnx")))
    found["a first task: its process, imports, the network opened"] = time.monotonic() - begun
    found["  of it imports and the network"] = inside
    ray.data.DataContext.get_current().enable_progress_bars = False
    begun = time.monotonic()
    ray.data.range(2, override_num_blocks=2).map_batches(lambda batch: batch).take_all()
    found["a first Ray Data job that does nothing"] = time.monotonic() - begun
    ray.shutdown()
    return found


def first_image(archive: Path, folder: Path, run: Path) -> dict[str, Any]:
    from malaria_ray.runtime import storage
    from malaria_ray.runtime.session import ray_session
    from malaria_ray.stages import screen

    results = folder / f"results-{time.monotonic_ns()}"
    begun = time.monotonic()
    with ray_session():
        seconds = time.monotonic() - begun
        screen.run(screen.Config(source=str(archive), results=str(results), model=str(run)))
    timings = storage.read_json(storage.locate(str(results)) / "_SUCCESS.json")["timings"]
    return {"ray.init": seconds, **timings}


def main(arguments: list[str] | None = None) -> None:
    flags = material.parser(__doc__).parse_args(arguments)
    rounds: list[dict[str, float]] = []
    with material.scratch() as folder:
        archive = material.archive_of(flags.archive, flags.n or 2000, folder)
        run = flags.run or material.untrained_run(folder / "run")
        for _ in range(flags.rounds):
            found = alone(first_image, archive, folder, run)
            rounds.append(
                {
                    "import of the stage": imports(),
                    "listing of the archive": found["listing_s"],
                    **alone(parts, run),
                    "screen: ray.init returned → first block begun by an actor": found["first_block_begun_s"],
                    "screen: ray.init returned → first image scored": found["first_image_scored_s"],
                    "screen: last image scored → results published": found["publishing_s"],
                    f"screen: all of {archive.stem}, ray.init not counted": found["total_s"],
                }
            )
    rows = [(name, float(np.mean([found[name] for found in rounds]))) for name in rounds[0]]
    title = f"Time to the first scored image, {material.N_PROCESSES} cores"
    material.report("start", title, ["what", "seconds"], rows, flags.out, rounds=rounds)
    labels, values = [name for name, _ in rows], [seconds for _, seconds in rows]
    material.bar_plot("start", title, labels, values, "seconds", flags.out)


if __name__ == "__main__":
    main()
