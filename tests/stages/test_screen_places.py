"""The whole command on archives in other packings and places: the scores of the folder, bit by bit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from servers import FaultyProxy, Site, faulty, serve
from stages.conftest import Line
from stages.test_screen import predictions_of, screen_of


@pytest.fixture(scope="module")
def packings(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The line's archive as a folder, two tar shards and two Parquet files."""
    root = tmp_path_factory.mktemp("packings")
    for kind in ("folder", "tars", "parquets"):
        (root / kind).mkdir()
    with zipfile.ZipFile(line.archive) as archive:
        archive.extractall(root / "folder")
        names = archive.namelist()
        for part in range(2):
            mine = names[part::2]
            with tarfile.open(root / "tars" / f"{part}.tar", "w") as tar:
                for name in mine:
                    tar.add(root / "folder" / name, name)
            images = [{"bytes": archive.read(name), "path": name} for name in mine]
            pq.write_table(pa.table({"image": images}), root / "parquets" / f"{part}.parquet", row_group_size=50)
    return root


@pytest.mark.parametrize("kind", ["folder", "tars", "parquets"])
def test_scores_do_not_depend_on_the_packing(line: Line, packings: Path, tmp_path: Path, kind: str):
    pd.testing.assert_frame_equal(
        screen_of(packings / kind, tmp_path / "results", line.run), predictions_of(line.results), check_exact=True
    )


def test_zip_behind_http_gives_the_same_scores(line: Line, tmp_path: Path):
    with serve(Site({"/cells.zip": line.archive.read_bytes()})) as site:
        found = screen_of(f"{site.url}/cells.zip", tmp_path / "results", line.run)
        assert all(range_ for range_ in site.gets())
    pd.testing.assert_frame_equal(found, predictions_of(line.results), check_exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "tars", "parquets", "zip"])
def test_scores_from_an_s3_that_fails_now_and_then(line: Line, packings: Path, tmp_path: Path, s3: Any, kind: str):
    """The command as a user runs it, its Ray and all, behind a proxy that spoils every fifth read."""
    files = [line.archive] if kind == "zip" else [file for file in (packings / kind).rglob("*") if file.is_file()]
    for file in files:
        name = "cells.zip" if kind == "zip" else str(file.relative_to(packings / kind))
        s3.put_object(Bucket="cells-bucket", Key=f"in/{name}", Body=file.read_bytes())
    url = "s3://cells-bucket/in" + ("/cells.zip" if kind == "zip" else "")
    options = {"read_timeout": 5, "retries": {"max_attempts": 2}}
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with faulty(FaultyProxy(s3.meta.endpoint_url, share=0.2, chance=random.Random(kind), hang_s=6)) as proxy:
        environment |= {"AWS_ENDPOINT_URL": proxy.url, "FSSPEC_S3": json.dumps({"config_kwargs": options})}
        call = ["malaria_ray", "screen", url, str(tmp_path / "results"), "--model", str(line.run)]
        done = subprocess.run([sys.executable, "-m", *call], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert any(proxy.done), "something was spoilt"
    found = predictions_of(tmp_path / "results")
    pd.testing.assert_frame_equal(found, predictions_of(line.results), check_exact=True)
