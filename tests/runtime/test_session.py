"""The Ray that a command starts on one machine, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from malaria_ray.errors import ConfigError
from malaria_ray.runtime import session
from malaria_ray.runtime.session import ray_session

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


_A_NODE_JOINS = """
import subprocess, sys, time
import ray
from malaria_ray.runtime.session import is_room_made, room_for

ray.init(address="local", num_cpus=1, include_dashboard=False)
print("at first:", is_room_made(2, cpus=1, within_s=1))
join = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--block", "--disable-usage-stats"]
join.append("--address=" + ray.get_runtime_context().gcs_address)
node = subprocess.Popen(join, stdout=subprocess.DEVNULL)
print("with a node:", is_room_made(2, cpus=1, within_s=120), room_for(cpus=1))
deadline = time.monotonic() + 30
while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
    time.sleep(0.1)
print("left free:", ray.available_resources()["CPU"])
node.terminate()
node.wait()  # while its head is there: without it takes 50 s to end
ray.shutdown()
"""


def test_tasks_beside_actors_that_hold_all_cpus_do_not_start_a_process_each():
    """Ray's default ends a worker after 1 s where actors hold the CPUs; a new one takes 1 s of a CPU that scores."""
    own = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    run = [sys.executable, "-c", _WRITES_BETWEEN_BLOCKS]
    told = subprocess.run(run, env=own, capture_output=True, text=True, check=True).stdout
    assert "processes: 1" in told


def test_room_is_waited_for_until_a_node_joins():
    own = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    run = [sys.executable, "-c", _A_NODE_JOINS]
    told = subprocess.run(run, env=own, capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == ["at first: False", "with a node: True 2", "left free: 2.0"]


def test_without_room_for_its_logs_no_ray_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Its workers would die and be started for ever."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(session, "_ROOM_BYTES", 1 << 60)
    said = rf"{tmp_path} has [0-9.]+ MB of free room, Ray needs [0-9]+ MB .* name another folder by RAY_TMPDIR"
    with pytest.raises(ConfigError, match=said), ray_session():
        pass
    assert not ray.is_initialized()
