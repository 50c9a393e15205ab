"""Random kill -9 of the driver, of actors and of whole nodes until a screening is finished, then its proof:

    python -m tests.benchmarks.torture --kills 20 [--n 20000] [--seed 1]

On the test bed of cluster/local.sh (root and iproute2): a head and two workers, each a `ray start` of its own. The
driver is a Ray job on the head, submitted again whenever it ended without results. A killed node is replaced by a new
one. Should an archive be finished before the kills are used up, it is screened again into another directory. Ends with
status 1 where an image is missing or doubled, or scores differ from those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from malaria_ray.runtime import outputs, storage
from malaria_ray.stages import ledger
from tests.benchmarks import material

sys.path.insert(0, str(Path(__file__).parents[1]))
from cluster.bed import Bed, bed, needs

SIDE = 32
STALLED_S = 900


def pids(cluster: Bed, node: int, pattern: str) -> list[int]:
    """Processes of a node whose command line matches."""
    name = f"{cluster.folder.name}-{node}"
    listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
    found = []
    for pid in map(int, listed.split()):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if re.search(pattern, line):
            found.append(pid)
    return found


class Torture:
    def __init__(self, cluster: Bed, archive: Path, run: Path, folder: Path, n: int, kills: int, seed: int):
        self.cluster, self.archive, self.model, self.folder = cluster, archive, run, folder
        self.n, self.kills, self.rng = n, kills, random.Random(seed)
        self.workers = [1, 2]
        self.next_worker = 3
        self.log: list[dict[str, Any]] = []
        self.submissions = 0
        self.begun = time.monotonic()

    def say(self, what: str, **more: Any) -> None:
        line = {"at_s": round(time.monotonic() - self.begun, 1), "what": what, **more}
        self.log.append(line)
        print(json.dumps(line), flush=True)

    def n_done(self, results: Path) -> int:
        if (results / "_SUCCESS.json").exists():
            return self.n
        try:
            committed = ledger.committed_files(outputs.work_of(storage.locate(str(results)), "screen"))
            return sum(pq.read_metadata(file.path).num_rows for file in committed.values())
        except OSError:
            return self.n  # published just now

    def submit(self, results: Path, *flags: str) -> subprocess.Popen[str]:
        self.submissions += 1
        command = ["screen", str(self.archive), str(results), "--model", str(self.model), "--num-actors", "2", *flags]
        return self.cluster.start("submit", "--", *command)

    def kill(self, results: Path) -> bool:
        """One random kill; False where there was nothing of the kind to kill just then."""
        kind = self.rng.choice(["driver", "actor", "actor", "node"])
        node = self.rng.choice(self.workers)
        if kind == "node":
            self.cluster.script("kill-node", str(node))
            self.workers.remove(node)
        else:
            where = 0 if kind == "driver" else node
            pattern = r"malaria_ray screen" if kind == "driver" else r"ray::MapWorker"
            found = pids(self.cluster, where, pattern)
            if not found:
                return False
            for pid in found if kind == "driver" else [self.rng.choice(found)]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    return False
        self.say(f"killed {kind}", node=0 if kind == "driver" else node, done=self.n_done(results), of=self.n)
        if kind == "node":
            self.cluster.script("add-node")
            self.workers.append(self.next_worker)
            self.next_worker += 1
        return True

    def screen_under_kills(self, results: Path, kills_left: int) -> int:
        """Until the results are finished; returns the kills that were made."""
        made, process, last = 0, None, time.monotonic()
        wait_s, wait_rows, at_done = self.rng.uniform(2, 30), self.n // 12, 0
        while not (results / "_SUCCESS.json").exists():
            if time.monotonic() - last > STALLED_S:
                raise SystemExit(f"no kill and no end in {STALLED_S} s: it hangs")
            if process is None or process.poll() is not None:
                if process is not None and process.returncode == 0:
                    break
                if process is not None:
                    tail = process.communicate()[0].strip().splitlines()[-1:]
                    self.say("the driver ended", status=process.returncode, line=" ".join(tail)[:200])
                process = self.submit(results)
            time.sleep(0.5)
            done = self.n_done(results)
            is_time = time.monotonic() - last > wait_s or done - at_done > wait_rows
            if made < kills_left and is_time and self.kill(results):
                made += 1
                last, at_done = time.monotonic(), done
                # In a third of the cases soon: while Ray starts, restores or plans. Else after some progress.
                wait_s = self.rng.choice([self.rng.uniform(1, 15), 180, 180])
        output = process.communicate(timeout=600)[0] if process else ""
        self.say("finished", directory=results.name, line=output.strip().splitlines()[-1][:200] if output else "")
        return made

    def check(self, results: Path, expected: dict[str, float]) -> None:
        status, output = self.cluster.client("verify", str(results))
        if status:
            raise SystemExit(f"verify: {output[-500:]}")
        rows = storage.read_table(storage.locate(str(results / "predictions")))
        found = dict(zip(rows["image_id"].to_pylist(), rows["score"].to_pylist(), strict=True))
        if len(found) != rows.num_rows or found != expected:
            raise SystemExit(f"{rows.num_rows:,} rows, {len(found):,} images, or other scores than undisturbed")
        self.say("exact", directory=results.name, images=len(found))

    def summary(self) -> dict[str, Any]:
        killed = Counter(line["what"].removeprefix("killed ") for line in self.log if line["what"].startswith("killed"))
        return {
            "images": self.n,
            "kills": sum(killed.values()),
            "killed": dict(killed),
            "submissions": self.submissions,
            "screenings": sum(line["what"] == "exact" for line in self.log),
            "seconds": round(time.monotonic() - self.begun),
        }


def main(arguments: list[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--kills", type=int, default=20)
    flags.add_argument("--n", type=int, default=20_000)
    flags.add_argument("--seed", type=int, default=1)
    flags.add_argument("--out", type=Path, default=Path("out/bench"))
    given = flags.parse_args(arguments)
    if reason := needs():
        raise SystemExit(f"no test bed here: {reason}")
    given.out.mkdir(parents=True, exist_ok=True)
    with material.scratch() as folder:
        run = material.untrained_run(folder / "run", image_size=SIDE)
        archive = material.synthetic_archive(folder / "cells.zip", given.n, side=SIDE)
        with bed(2, number=7) as cluster:
            torture = Torture(cluster, archive, run, folder, given.n, given.kills, given.seed)
            try:
                undisturbed = folder / "undisturbed"
                output = torture.submit(undisturbed).communicate(timeout=1200)[0]
                if not (undisturbed / "_SUCCESS.json").exists():
                    raise SystemExit(output[-1000:])
                rows = storage.read_table(storage.locate(str(undisturbed / "predictions")))
                expected = dict(zip(rows["image_id"].to_pylist(), rows["score"].to_pylist(), strict=True))
                torture.say("undisturbed run ended", images=len(expected))
                made = attempts = 0
                while made < given.kills:
                    results = folder / f"results-{attempts}"
                    made += torture.screen_under_kills(results, given.kills - made)
                    torture.check(results, expected)
                    attempts += 1
            finally:
                summary = torture.summary()
                content = {"summary": summary, "seed": given.seed, "log": torture.log}
                (given.out / "torture.json").write_text(json.dumps(content, indent=1) + "\n")
                print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    main()
