"""`doctor` on real nodes: a sound cluster is called sound; of a node with every fault at once each fault is named."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster.bed import ROOT, Bed, bed

from malaria_ray.runtime import storage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Runs on the bad node only, in a mount namespace of its own: its own empty folder where the others share one, a
# read-only one, no model, 64 MB of /dev/shm.
FAULTS = """#!/bin/sh -e
mount -t tmpfs none {shared}
mount --bind {readonly} {readonly}
mount -o remount,bind,ro {readonly}
mount -t tmpfs none {models}
mount -t tmpfs -o size=64m none /dev/shm
exec "$@"
"""

# What every Python of the bad node does first: its clock is 30 s ahead, and it says that it is another Python.
SITE = """import platform, time
platform.python_version = lambda: "3.11.99"
time.time = lambda real=time.time: real() + 30
"""


@dataclass(frozen=True)
class Patient:
    """A cluster before and after a node with faults joined: exit status and report of doctor, by storage."""

    before: tuple[int, str]
    after: tuple[int, str]
    after_readonly: tuple[int, str]


def fake_run(folder: Path) -> Path:
    """What `train` leaves, as far as doctor reads it."""
    run = folder / "models/run"
    record = storage.FileRecord(bytes=5, rows=0, sha256="")
    storage.write_bytes(storage.locate(str(run / "model.onnx")), b"model")
    record = storage.record_of(storage.locate(str(run / "model.onnx")))
    storage.write_json(storage.locate(str(run / "config.json")), {"stage": "train", "identity": {}})
    storage.write_json(storage.locate(str(run / "_SUCCESS.json")), {"files": {"model.onnx": record}})
    return run


@pytest.fixture(scope="module")
def patient(network: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Patient]:
    folder = tmp_path_factory.mktemp("doctor")
    places = {name: folder / name for name in ("shared", "readonly", "models", "packages")}
    for place in places.values():
        place.mkdir()
    run = fake_run(folder)
    # Another numpy and another Ray by their metadata (Ray itself lets in none of another version), and another
    # malaria_ray by one line.
    for name in ("numpy", "ray"):
        (places["packages"] / f"{name}-0.0.1.dist-info").mkdir()
        (places["packages"] / f"{name}-0.0.1.dist-info/METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.1\n"
        )
    (places["packages"] / "sitecustomize.py").write_text(SITE)
    shutil.copytree(ROOT / "malaria_ray", places["packages"] / "malaria_ray")
    (places["packages"] / "malaria_ray/schema.py").open("a").write("# another version\n")
    faults = folder / "faults.sh"
    faults.write_text(FAULTS.format(**places))
    faults.chmod(0o755)

    def doctor(cluster: Bed, storage_name: str) -> tuple[int, str]:
        return cluster.client("doctor", "--storage", str(places[storage_name]), "--model", str(run))

    with bed(1, number=2) as cluster:
        before = doctor(cluster, "shared")
        cluster.script(
            "add-node", NODE_WRAPPER=f"unshare --mount {faults}", NODE_PYTHONPATH=str(places["packages"]),
            NODE_ARGUMENTS="--num-gpus=1", OBJECT_STORE_MB="80",
        )  # fmt: skip
        yield Patient(before, doctor(cluster, "shared"), doctor(cluster, "readonly"))


def test_a_sound_cluster_is_called_sound(patient: Patient):
    status, report = patient.before
    assert status == 0, report
    assert "FAULT" not in report
    assert "http://10.213.102.10:8265 refuses a client without a token" in report
    assert "10.213.102.10:6379 refuses a client without a token" in report
    assert "written and read by all" in report
    assert "is the same file on all" in report


@pytest.mark.parametrize(
    "fault",
    [
        "Python: 3.11.",
        "ray: 2.",
        "numpy: 2.",
        "malaria_ray: ",
        "storage: 10.213.102.1",
        "model: 10.213.102.12",
        "object store: 10.213.102.12",
        "/dev/shm: 10.213.102.12",
        "clocks: 10.213.102.12",
        "devices: 10.213.102.12",
    ],
)
def test_each_fault_of_a_node_is_found_and_has_a_remedy(patient: Patient, fault: str):
    status, report = patient.after
    assert status == 1, report
    lines = report.splitlines()
    [index] = [i for i, line in enumerate(lines) if line.startswith(f"FAULT {fault}")]
    assert lines[index + 1].startswith("      → "), report


def test_what_is_the_same_on_all_nodes_is_no_fault(patient: Patient):
    _, report = patient.after
    assert "FAULT pyarrow: " not in report
    assert "ok    token (Ray): " in report


def test_storage_that_a_node_cannot_write_is_found(patient: Patient):
    status, report = patient.after_readonly
    assert status == 1
    assert "FAULT storage: 10.213.102.12" in report
    assert "cannot write: OSError" in report


def test_a_cluster_without_a_token_is_refused(network: None):
    with bed(0, number=3, NODE_WRAPPER="env RAY_AUTH_MODE=disabled") as cluster:
        status, report = cluster.client("doctor")
        assert status == 1
        assert "FAULT token: http://10.213.103.10:8265 lets in a client without a token" in report
        assert "RAY_AUTH_MODE=token" in report
        head = cluster.script(
            "run", "--", "env", "RAY_AUTH_MODE=disabled", "python", "-c",
            "from malaria_ray.runtime.facts import lets_in_without_token as open; print(open('10.213.103.10:6379'))",
        )  # fmt: skip
        assert head.strip().endswith("True")


def test_nodes_with_certificates_of_a_private_ca_work_together_and_shut_out_who_has_none(network: None, tmp_path: Path):
    nodes = ["head=10.213.104.10", "node=10.213.104.11"]
    subprocess.run([str(ROOT / "cluster/tls.sh"), str(tmp_path), *nodes], check=True, capture_output=True)
    tls = {"RAY_USE_TLS": "1", "RAY_TLS_CA_CERT": str(tmp_path / "ca.crt")}

    def certificate(name: str) -> dict[str, str]:
        return {
            "RAY_TLS_SERVER_CERT": str(tmp_path / f"{name}.crt"),
            "RAY_TLS_SERVER_KEY": str(tmp_path / f"{name}.key"),
        }

    with bed(0, number=4, **tls, **certificate("head")) as cluster:
        cluster.script("add-node", **certificate("node"))
        status, report = cluster.client("doctor")
        assert status == 0, report
        assert "on 2 nodes" in report
        ask = "from ray._raylet import GcsClient; GcsClient('10.213.104.10:6379').internal_kv_keys(b'', None)"
        for settings, is_let_in in (({}, True), ({"RAY_USE_TLS": "0"}, False)):
            environment = [f"{name}={value}" for name, value in settings.items()]
            command = ["run", "--", "timeout", "60", "env", *environment, "python", "-c", ask + "; print('let in')"]
            assert cluster.script(*command, check=False).strip().endswith("let in") == is_let_in
