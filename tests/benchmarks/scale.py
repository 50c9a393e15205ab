"""Nodes, hours and money for 1 M, 100 M and 1 B images, from measured costs of one image.

    python -m tests.benchmarks.scale               the tables of cluster/README.md
    python -m tests.benchmarks.scale write         the same, put into cluster/README.md
    python -m tests.benchmarks.scale simulate      each row against a simulation of blocks, nodes and lost machines
    python -m tests.benchmarks.scale measure RUN   what the driver costs an image, by real screenings of empty files

What is measured stands in `MEASURED`, what is bought in `PRICES`; every other figure is computed from these two.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

README = Path(__file__).parents[2] / "cluster" / "README.md"


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of one core or of the one driver; rates in images a second unless named otherwise."""

    decode: float
    score: dict[str, float]
    efficiency: float  # of a screening under Ray against bare processes that do the same
    listing: float
    publish: float
    dispatch: float  # blocks a second that one driver hands out
    driver_bytes: float  # resident memory of the driver an image
    image_bytes: float
    source: dict[str, str]


MEASURED = Costs(
    decode=2_290,
    score={"cnn": 398, "vgg19-finetuned": 16},
    efficiency=0.92,
    listing=98_765,
    publish=181_818,
    dispatch=100,
    driver_bytes=1_298,
    image_bytes=13_000,
    source={
        "decode": "OpenCV, decode and resize to 125 × 125, one of two processes (tests.benchmarks, 2026-11-25)",
        "score": "ncnn, float32, one of two processes (tests.benchmarks; VGG-19 as screened, 2026-11-28)",
        "efficiency": "a screening in steady state against two bare processes (tests.benchmarks.screening, 2026-11-28)",
        "listing": "100,000 empty files of a zip against 20,000 (scale measure, 2026-11-25)",
        "publish": "100,000 empty files against 20,000 (scale measure, 2026-11-25)",
        "dispatch": "?? assumed; 3.9 were reached by two actors that did the work too",
        "driver_bytes": "100,000 empty files against 20,000 (scale measure, 2026-11-25)",
        "image_bytes": "the NIH crops",
    },
)

# US dollars an hour, on demand, as remembered of the vendors' lists; nobody looked them up: check before you order.
PRICES_OF = "2026-11, from memory, to be checked"
SPOT = 0.4  # of the price on demand; moves by the hour


@dataclass(frozen=True, kw_only=True)
class Machine:
    name: str
    cores: int  # physical: a vCPU of c7a and m7a is one, of c6i or n2 it is half of one
    memory_gb: int
    network_gbit: float  # that it keeps up, not the peak
    dollars: float


MACHINES = {
    machine.name: machine
    for machine in (
        Machine(name="c7a.8xlarge", cores=32, memory_gb=64, network_gbit=12.5, dollars=1.642),
        Machine(name="m7a.large", cores=2, memory_gb=8, network_gbit=0.8, dollars=0.116),
        Machine(name="r7a.4xlarge", cores=16, memory_gb=128, network_gbit=6.25, dollars=1.217),
    )
}
GET_DOLLARS = 0.4e-6  # one request to S3 for one object; a PUT is 5e-6


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What is rented for a number of images, and how they are parted: a run is a job, with a driver on the head."""

    n_images: int
    n_workers: int
    worker: str
    head: str
    run_images: int
    n_at_once: int  # runs, each with its share of the actors

    @property
    def n_runs(self) -> int:
        return math.ceil(self.n_images / self.run_images)


FLEETS = (
    Fleet(n_images=10**6, n_workers=1, worker="c7a.8xlarge", head="m7a.large", run_images=10**6, n_at_once=1),
    Fleet(n_images=10**8, n_workers=10, worker="c7a.8xlarge", head="r7a.4xlarge", run_images=5 * 10**6, n_at_once=5),
    Fleet(n_images=10**9, n_workers=40, worker="c7a.8xlarge", head="r7a.4xlarge", run_images=5 * 10**6, n_at_once=8),
)
START_S = 240.0  # until machines that were asked for have pulled the image and joined (2 to 5 min)
BLOCK_IMAGES = 512
NETWORK_SHARE = 0.5  # of a link that many small range requests fill
HEAD_SHARE = 0.5  # of the head's memory that one driver may take


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a screening takes. Times in seconds."""

    core_hours: float
    start_s: float
    driver_s: float  # listing and publishing, while a run's share of the workers waits
    compute_s: float
    network_s: float
    dispatch_s: float
    dollars_spot: float

    @property
    def scoring_s(self) -> float:
        """All three go on at the same time: the slowest decides."""
        return max(self.compute_s, self.network_s, self.dispatch_s)

    @property
    def total_s(self) -> float:
        return self.start_s + self.driver_s + self.scoring_s

    @property
    def bottleneck(self) -> str:
        parts = {
            "starting machines": self.start_s,
            "driver (listing, publishing)": self.driver_s,
            "cores": self.compute_s,
            "network": self.network_s,
            "driver (handing out blocks)": self.dispatch_s,
        }
        return max(parts, key=lambda name: parts[name] if name not in _BESIDE or parts[name] == self.scoring_s else 0)


_BESIDE = ("cores", "network", "driver (handing out blocks)")


def seconds_an_image(model: str, costs: Costs = MEASURED) -> float:
    """Of one core, decoding and scoring one after the other, under Ray."""
    return (1 / costs.decode + 1 / costs.score[model]) / costs.efficiency


def plan(fleet: Fleet, model: str, costs: Costs = MEASURED) -> Plan:
    worker, head = MACHINES[fleet.worker], MACHINES[fleet.head]
    n, cores = fleet.n_images, fleet.n_workers * worker.cores
    core_s = n * seconds_an_image(model, costs)
    needed, given = fleet.n_at_once * fleet.run_images * costs.driver_bytes, head.memory_gb * 1e9 * HEAD_SHARE
    if needed > given:
        raise ValueError(f"{fleet}: its drivers need {needed / 1e9:,.0f} GB, the head has {given / 1e9:,.0f} for them")
    made = Plan(
        core_hours=core_s / 3600,
        start_s=START_S,
        driver_s=(n / costs.listing + n / costs.publish) / fleet.n_at_once,
        compute_s=core_s / cores,
        network_s=n * costs.image_bytes * 8 / (fleet.n_workers * worker.network_gbit * 1e9 * NETWORK_SHARE),
        dispatch_s=n / BLOCK_IMAGES / costs.dispatch / fleet.n_at_once,
        dollars_spot=0.0,
    )
    hours = made.total_s / 3600
    dollars = hours * (head.dollars + fleet.n_workers * worker.dollars * SPOT)
    return Plan(**{**vars(made), "dollars_spot": dollars})


def simulate(fleet: Fleet, model: str, *, seed: int, costs: Costs = MEASURED, losses_per_node_hour: float = 0.05,
             spread: float = 0.3) -> float:  # fmt: skip
    """Seconds until the last block is scored, block by block.

    Every core takes the next block that is left. The time of a block is log-normal (`spread`: standard deviation of its
    logarithm), nodes join between half and one and a half `START_S`, a driver hands out a block at a time, and nodes
    are lost at random; the blocks in work there are done again, and a new node comes after `START_S`.
    """
    rng = np.random.default_rng([seed, fleet.n_images])
    cores, mean_s = MACHINES[fleet.worker].cores, BLOCK_IMAGES * seconds_an_image(model, costs)
    times = iter(())
    left, hand_out_s = math.ceil(fleet.n_images / BLOCK_IMAGES), 1 / costs.dispatch / fleet.n_at_once
    free: list[tuple[float, int]] = []  # (when, node) of each core
    dies: dict[int, float] = {}
    n_nodes = 0

    def join(at: float) -> None:
        nonlocal n_nodes
        dies[n_nodes] = at + rng.exponential(3600 / losses_per_node_hour)
        for _ in range(cores):
            heapq.heappush(free, (at, n_nodes))
        n_nodes += 1

    for _ in range(fleet.n_workers):
        join(START_S * rng.uniform(0.5, 1.5))
    driver_free = last = 0.0
    replaced: set[int] = set()
    while left:
        at, node = heapq.heappop(free)
        if at >= dies[node]:
            if node not in replaced:
                replaced.add(node)
                join(dies[node] + START_S)
            continue
        driver_free = max(at, driver_free) + hand_out_s
        took = next(times, None)
        if took is None:
            times = iter(mean_s * rng.lognormal(-(spread**2) / 2, spread, 100_000))
            took = next(times)
        ends = driver_free + took
        heapq.heappush(free, (ends, node))
        if ends <= dies[node]:
            left, last = left - 1, max(last, ends)
    return last


def mean_simulated(fleet: Fleet, model: str) -> float:
    """Of twenty nodes at least: where there are few, chance decides when they come and whether one is lost."""
    return float(np.mean([simulate(fleet, model, seed=seed) for seed in range(max(1, 20 // fleet.n_workers))]))


def count(n: int) -> str:
    return {10**6: "1 M", 10**8: "100 M", 10**9: "1 B"}[n]


def duration(seconds: float) -> str:
    return f"{seconds / 60:,.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def inputs_table(costs: Costs = MEASURED) -> str:
    scores = ", ".join(f"{model} {rate:,g}" for model, rate in costs.score.items())
    rows = [
        ("decode and resize, images/s a core", f"{costs.decode:,g}", "decode"),
        ("score, images/s a core", scores, "score"),
        ("under Ray, of bare processes", f"{costs.efficiency:.0%}", "efficiency"),
        ("driver: listing, images/s", f"{costs.listing:,g}", "listing"),
        ("driver: publishing, images/s", f"{costs.publish:,g}", "publish"),
        ("driver: blocks handed out a second", f"{costs.dispatch:,g}", "dispatch"),
        ("driver: memory an image", f"{costs.driver_bytes:,g} B", "driver_bytes"),
        ("archive: size of an image", f"{costs.image_bytes:,g} B", "image_bytes"),
    ]
    lines = ["| measured | value | how |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {value} | {costs.source[key]} |" for name, value, key in rows)])


def plan_table(costs: Costs = MEASURED) -> str:
    lines = [
        "| images | model | workers (spot), head | runs, at once | core hours | scoring | in all | $ | bottleneck |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for fleet in FLEETS:
        for model in costs.score:
            made = plan(fleet, model, costs)
            cells = [
                count(fleet.n_images),
                model,
                f"{fleet.n_workers} × {fleet.worker}, {fleet.head}",
                f"{fleet.n_runs}, {fleet.n_at_once}",
                f"{made.core_hours:,.1f}",
                duration(made.scoring_s),
                duration(made.total_s),
                f"{made.dollars_spot:,.2f}",
                made.bottleneck,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def prices_table() -> str:
    lines = ["| machine | cores | memory | $ an hour on demand |", "| --- | --- | --- | --- |"]
    for machine in MACHINES.values():
        lines.append(f"| {machine.name} | {machine.cores} | {machine.memory_gb} GB | {machine.dollars} |")
    return "\n".join([*lines, f"\nPrices: {PRICES_OF}. Spot is taken for {SPOT:.0%} of them."])


def tables() -> dict[str, str]:
    """By the name of the mark between which each stands in the README."""
    return {"measured": inputs_table(), "plan": plan_table(), "prices": prices_table()}


def with_tables(text: str) -> str:
    """The README with its tables computed anew."""
    for name, table in tables().items():
        pattern = rf"(<!-- scale: {name} -->\n).*?(<!-- end -->)"
        if not re.search(pattern, text, re.DOTALL):
            raise SystemExit(f"{README} has no place for the table {name!r}")
        text = re.sub(pattern, lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL)
    return text


def print_simulations() -> None:
    print("images  model            computed   simulated, 5 % of nodes lost an hour   ratio")
    for fleet in FLEETS:
        for model in MEASURED.score:
            made = plan(fleet, model)
            simulated = mean_simulated(fleet, model)
            computed = made.start_s + made.scoring_s
            print(
                f"{count(fleet.n_images):6}  {model:15}  {duration(computed):>8}   {duration(simulated):>9} "
                f"{simulated / computed:30.2f}"
            )


def measure(run: str, sizes: tuple[int, int] = (20_000, 100_000)) -> None:
    """Screens archives of empty files: they end in quarantine at once, so that what is left is listing, handing out
    blocks and publishing. The slope between two sizes is the cost of an image, without what is fixed.
    """
    found = []
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(f"{folder}/empty.zip", "w") as archive:
                for index in range(n):
                    archive.writestr(f"P{index // 1000}/C{index // 1000}P{index // 1000}_cell_{index}.png", b"")
            command = [sys.executable, "-m", "malaria_ray", "screen", f"{folder}/empty.zip", f"{folder}/results"]
            command += ["--model", run, "--max-bad-fraction", "1"]
            process = subprocess.Popen(command)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise SystemExit(f"{' '.join(command)} ended with {status}")
            timings = json.loads(Path(f"{folder}/results/_SUCCESS.json").read_bytes())["timings"]
            publish_s = timings["total_s"] - timings["listing_s"] - timings["ray_start_s"] - timings["scoring_s"]
            found.append((n, timings["listing_s"], timings["scoring_s"], publish_s, usage.ru_maxrss * 1024))
            print(f"{n:,} files: {timings}, driver at most {usage.ru_maxrss / 1e3:,.0f} MB", flush=True)
    (n_1, *first), (n_2, *second) = found
    listing, scoring, publish, memory = ((b - a) / (n_2 - n_1) for a, b in zip(first, second, strict=True))
    print(f"listing:      {1 / listing:,.0f} images/s" if listing > 0 else "listing: too fast to see")
    print(f"publish:      {1 / publish:,.0f} images/s" if publish > 0 else "publish: too fast to see")
    print(f"dispatch:     {1 / scoring / BLOCK_IMAGES:,.1f} blocks/s with the actors' own work on empty files in it")
    print(f"driver_bytes: {memory:,.0f}")


def main(arguments: list[str]) -> None:
    match arguments:
        case []:
            print("\n\n".join(tables().values()))
        case ["write"]:
            README.write_text(with_tables(README.read_text()))
        case ["simulate"]:
            print_simulations()
        case ["measure", run, *sizes]:
            measure(run, *([tuple(int(size) for size in sizes)] if sizes else []))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
