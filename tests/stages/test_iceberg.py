"""Predictions in an Iceberg table, on a real Ray: written by Ray Data, read by pyiceberg and by DuckDB."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pyiceberg.catalog
import pytest
from pyiceberg.utils.config import Config
from results import cells, write_results
from stages.conftest import Line
from upath import UPath

from malaria_ray.errors import ConfigError
from malaria_ray.runtime import iceberg
from malaria_ray.stages import screen, verify


def rows_of(results: Path, catalog: str | None = None) -> pd.DataFrame:
    table = iceberg.open_iceberg(UPath(results), catalog).scan().to_arrow()
    return table.to_pandas().sort_values(["run_id", "image_id"], ignore_index=True)


def predictions_of(results: Path) -> pd.DataFrame:
    return pq.read_table(results / "predictions").to_pandas().sort_values("image_id", ignore_index=True)


def test_rows_are_read_back_by_pyiceberg_and_duckdb_and_a_rerun_changes_nothing(tmp_path: Path):
    results = write_results(tmp_path / "it's #1 [of] results", cells())
    assert iceberg.upsert_predictions(UPath(results))
    table = iceberg.open_iceberg(UPath(results))
    written, snapshot = rows_of(results), table.current_snapshot().snapshot_id
    pd.testing.assert_frame_equal(written, predictions_of(results), check_dtype=False)
    asked = "SELECT count(*), sum(predicted_label), count(DISTINCT image_id) FROM predictions"
    answer = table.scan().to_duckdb("predictions").sql(asked).fetchall()
    assert answer == [(240, predictions_of(results)["predicted_label"].sum(), 240)]
    assert "P(parasitized)" in table.schema().find_field("score").doc

    assert not iceberg.upsert_predictions(UPath(results))
    assert iceberg.open_iceberg(UPath(results)).current_snapshot().snapshot_id == snapshot


def test_screen_writes_the_table_and_again_where_the_results_were_finished_before(line: Line, tmp_path: Path):
    flags = {"source": str(line.dataset), "model": str(line.run), "split": "test", "table_format": "iceberg"}
    results = tmp_path / "results"
    screen.run(screen.Config(**flags, results=str(results)))
    snapshot = iceberg.open_iceberg(UPath(results)).current_snapshot().snapshot_id
    pd.testing.assert_frame_equal(rows_of(results), predictions_of(results), check_dtype=False)
    screen.run(screen.Config(**flags, results=str(results)))
    assert iceberg.open_iceberg(UPath(results)).current_snapshot().snapshot_id == snapshot
    verify.run(verify.Config(directory=str(results)))
    shutil.rmtree(results / "iceberg")
    screen.run(screen.Config(**flags, results=str(results)))
    assert len(rows_of(results)) == len(predictions_of(results))


def test_results_share_a_table_by_a_configured_catalog_and_replace_rows_of_their_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYICEBERG_CATALOG__SHARED__URI", f"sqlite:///{tmp_path}/shared.db")
    monkeypatch.setenv("PYICEBERG_CATALOG__SHARED__WAREHOUSE", str(tmp_path / "warehouse"))
    monkeypatch.setattr(pyiceberg.catalog, "_ENV_CONFIG", Config())  # read when pyiceberg is imported
    first = write_results(tmp_path / "first", cells(), archive=tmp_path / "archive")
    # Half of the images again by the same run, scored otherwise (a new threshold, say), and another run's.
    again = write_results(tmp_path / "again", cells(scores_seed=9).head(120), archive=tmp_path / "archive")
    other = write_results(tmp_path / "other", cells(), archive=tmp_path / "archive", model="vgg19-frozen")
    for results in (first, again, other):
        assert iceberg.upsert_predictions(UPath(results), catalog="shared")
        assert not iceberg.upsert_predictions(UPath(results), catalog="shared")
    found = rows_of(first, "shared").set_index(["run_id", "image_id"])["score"]
    assert len(found) == 480
    assert found.index.is_unique
    replaced = predictions_of(again).set_index("image_id")["score"]
    kept = predictions_of(first).set_index("image_id")["score"].drop(replaced.index)
    assert found["cnn-1"][replaced.index].tolist() == replaced.tolist()
    assert found["cnn-1"][kept.index].tolist() == kept.tolist()
    assert found["vgg19-frozen-1"].tolist() == predictions_of(other)["score"].tolist()


def test_rows_deleted_by_others_come_back(tmp_path: Path):
    results = write_results(tmp_path / "results", cells(40))
    iceberg.upsert_predictions(UPath(results))
    iceberg.open_iceberg(UPath(results)).delete("label = 1")
    assert len(rows_of(results)) < 40
    assert iceberg.upsert_predictions(UPath(results))
    assert len(rows_of(results)) == 40


def test_zero_predictions_write_nothing(tmp_path: Path):
    results = write_results(tmp_path / "results", cells(4).head(0), bad=("a.png",))
    assert not iceberg.upsert_predictions(UPath(results))


def test_what_cannot_work_is_one_line_before_anything_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    local = UPath(tmp_path)
    iceberg.check_iceberg(local, None, "a.b")
    with pytest.raises(ConfigError, match="give a namespace and a name"):
        iceberg.check_iceberg(local, None, "predictions")
    with pytest.raises(ConfigError, match="--iceberg-catalog NAME"):
        iceberg.check_iceberg(UPath("memory://results"), None, "a.b")
    with pytest.raises(ConfigError, match="the Iceberg catalog nowhere cannot be opened"):
        iceberg.check_iceberg(local, "nowhere", "a.b")
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "pyiceberg.catalog", None)
    with pytest.raises(ConfigError, match=r"pip install 'malaria-ray\[iceberg\]'"):
        iceberg.check_iceberg(local, None, "a.b")
