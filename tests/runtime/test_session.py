"""The Ray that a command starts on one machine, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

_WRITES_BETWEEN_BLOCKS = """
import os, time
import ray
from malaria_ray.runtime.session import ray_session

@ray.remote(num_cpus=0.9)
class Actor:
    def is_there(self):
        return True

@ray.remote(num_cpus=0.05)
def write():
    return os.getpid()

with ray_session():
    n = int(ray.cluster_resources()["CPU"])
    actors = [Actor.remote() for _ in range(n)]
    ray.get([actor.is_there.remote() for actor in actors])
    found = set()
    for _ in range(4):
        found.add(ray.get(write.remote()))
        time.sleep(2.5)
    print("processes:", len(found))
"""


def test_tasks_beside_actors_that_hold_all_cpus_do_not_start_a_process_each():
    """Ray's default ends a worker after 1 s where actors hold the CPUs; a new one takes 1 s of a CPU that scores."""
    own = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    run = [sys.executable, "-c", _WRITES_BETWEEN_BLOCKS]
    told = subprocess.run(run, env=own, capture_output=True, text=True, check=True).stdout
    assert "processes: 1" in told
