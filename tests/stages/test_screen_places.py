"""The whole command on archives in other packings and places: the scores of the folder, bit by bit."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
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

from malaria_ray import cli
from malaria_ray.runtime import storage


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


def test_a_signed_url_leaves_no_secret_and_may_be_signed_anew(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """A screening that stopped goes on by an address with a new signature; no file of it holds either."""
    archive = Path(shutil.copy(line.archive, tmp_path / "cells.zip"))
    with zipfile.ZipFile(archive, "a") as cells:
        cells.writestr("Thumbs.db", "no image")
    results = tmp_path / "results"

    def screened(secret: str, *more: str) -> int:
        url = f"{site.url}/cells.zip?Signature={secret}".replace("http://", "http://me:pass-word@")
        command = ["screen", url, str(results), "--model", str(line.run), *more]
        monkeypatch.setattr(sys, "argv", ["malaria-ray", *command])
        return cli.main(command)

    with serve(Site({"/cells.zip": archive.read_bytes()}, secret="secret-1")) as site:
        assert screened("secret-0") == 1
        assert screened("secret-1", "--max-bad-fraction", "0") == 1
        site.secret = "secret-2"
        assert screened("secret-2") == 0
    timings = storage.read_json(storage.locate(str(results / "_SUCCESS.json")))["timings"]
    assert timings["images_scored"] == 0
    told = "".join(capsys.readouterr())
    assert f"{site.url}/cells.zip" in told
    for file in (file for file in results.rglob("*") if file.is_file()):
        told += file.read_bytes().decode(errors="replace")
        if file.suffix == ".parquet":
            table = pq.read_table(file)
            told += f"{table.schema.metadata} {table.to_pylist()}"
    assert f"{site.url}/cells.zip" in pq.read_table(results / "listing.parquet")["container"].to_pylist()
    assert not re.findall("secret-.|pass-word", told)


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
