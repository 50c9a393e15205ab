"""One test bed for all cluster tests: a head and three workers, S3 beside them, and directories made on it."""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster.bed import S3_SECRET, Bed, bed, needs, wait_for

from malaria_ray.cells.synthetic import synthetic_cells


@pytest.fixture(scope="session")
def network() -> None:
    if reason := needs():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster(network: None) -> Iterator[Bed]:
    s3 = {
        "AWS_ENDPOINT_URL": "http://10.213.101.1:9000", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": S3_SECRET,
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    with bed(3, number=1, **s3) as made:
        yield made


@dataclass(frozen=True)
class Line:
    folder: Path
    archive: Path
    large: Path
    dataset: Path
    run: Path


def write_archive(path: Path, *, n_patients: int, n_cells_per_patient: int, n_copies: int = 1) -> Path:
    """Synthetic cells; copies of one cell are images of their own (drawing one takes longer than scoring it)."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in synthetic_cells(n_patients=n_patients, n_cells_per_patient=n_cells_per_patient, seed=7):
            for copy in range(n_copies):
                archive.writestr(name.replace(".png", f"_{copy}.png"), data)
    return path


@pytest.fixture(scope="session")
def line(cluster: Bed, tmp_path_factory: pytest.TempPathFactory) -> Line:
    """An archive, and what jobs made of it: a dataset, and a run trained by two workers on two nodes."""
    folder = tmp_path_factory.mktemp("line")
    made = Line(
        folder,
        write_archive(folder / "cells.zip", n_patients=24, n_cells_per_patient=10),
        write_archive(folder / "many.zip", n_patients=24, n_cells_per_patient=10, n_copies=30),
        folder / "dataset",
        folder / "run",
    )
    for command in (
        ["ingest", str(made.archive), str(made.dataset), "--image-size", "32"],
        ["train", str(made.dataset), str(made.run), "--model", "cnn", "--epochs", "2", "--batch-size", "16",
         "--num-workers", "2"],
    ):  # fmt: skip
        status, output = cluster.client("submit", "--", *command)
        assert status == 0, output
    return made


@pytest.fixture(scope="session")
def s3(cluster: Bed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an empty bucket on an S3 server at the bed's own address."""
    program = (
        "from moto.server import ThreadedMotoServer as S; import boto3, time; "
        "S(ip_address='10.213.101.1', port=9000, verbose=False).start(); "
        "boto3.client('s3').create_bucket(Bucket='cells'); print('ready', flush=True); time.sleep(3600)"
    )
    output = tmp_path_factory.mktemp("s3") / "log"
    with output.open("w") as log:
        server = subprocess.Popen(
            [str(Path(__file__).parents[2] / "cluster/local.sh"), "run", "--", "python", "-c", program],
            env=cluster.environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_for("S3 server", lambda: "ready" in output.read_text(), timeout_s=60)
        yield "s3://cells"
    finally:
        server.kill()
        server.wait()
