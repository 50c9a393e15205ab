from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from results import HOSTILE, cells, write_results
from stages.conftest import Line

from malaria_ray import cli
from malaria_ray.errors import ConfigError, DirectoryError, NotCompleteError, QueryError
from malaria_ray.runtime import storage
from malaria_ray.schema import METRICS, PATIENTS, PREDICTIONS, VIEWS
from malaria_ray.stages import evaluate, query
from malaria_ray.stages.views import catalog, connect, open_results


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two models' results on the same images, one of them with files in quarantine."""
    folder = tmp_path_factory.mktemp("query")
    first = write_results(folder / "first", cells(), bad=("bad/1.png", "bad/2.png"), archive=folder / "archive")
    second = write_results(folder / "second", cells(scores_seed=9), archive=folder / "archive", model="vgg19-frozen")
    for results in (first, second):
        evaluate.run(evaluate.Config(results=str(results), n_resamples=100))
    return str(first), str(second)


def ask(directories: tuple[str, ...], *, example: str | None = None, sql: str = "") -> pd.DataFrame:
    config = query.Config(results_and_sql=directories if example else (*directories, sql), example=example)
    return connect(open_results(config.directories)).sql(config.sql).df()


def test_views_have_the_columns_that_schema_prints(two: tuple[str, str]):
    for name, view in VIEWS.items():
        described = ask(two, sql=f"DESCRIBE {name}")
        assert described["column_name"].tolist() == view.names
        types = {"VARCHAR": "string", "INTEGER": "int32", "DOUBLE": "double", "FLOAT": "float", "BOOLEAN": "bool"}
        types |= {"TINYINT": "int8", "VARCHAR[]": str(pa.list_(pa.string()))}
        assert [types[type_] for type_ in described["column_type"]] == [str(column.type) for column in view.columns]
    outcomes = set(ask(two, sql="SELECT DISTINCT outcome FROM cells WHERE outcome IS NOT NULL")["outcome"])
    assert all(f"'{outcome}'" in dict(zip(view.names, view.columns, strict=True))["outcome"].meaning
               for outcome in outcomes)  # fmt: skip


@pytest.mark.parametrize("format_", ["table", "csv"])
@pytest.mark.parametrize("is_there", [True, False], ids=["made anew", "gone"])
def test_results_that_are_opened_again_while_they_are_asked_are_not_told_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
    format_: query.Format,
    is_there: bool,
):
    results = write_results(tmp_path / "results", cells())
    only_asks = query._check_only_asks

    def slowly(*given: Any) -> None:
        only_asks(*given)
        if is_there:
            success = results / "_SUCCESS.json"
            success.write_text(json.dumps(json.loads(success.read_text()) | {"finished_at": "later"}))
        else:
            shutil.rmtree(results)

    monkeypatch.setattr(query, "_check_only_asks", slowly)
    sql = "SELECT count(*) FROM predictions"
    with pytest.raises((DirectoryError, NotCompleteError), match="results "):
        query.run(query.Config(results_and_sql=(str(results), sql), format=format_))
    assert capsysbinary.readouterr().out == b""


def predictions_of(results: str) -> pd.DataFrame:
    return pq.read_table(f"{results}/predictions").to_pandas()


def test_every_example_says_what_it_answers_and_runs_on_real_results(line: Line, copy_of):
    results = str(copy_of(line.results))
    evaluate.run(evaluate.Config(results=results, against=str(line.results), n_resamples=100))
    examples = query.example_queries()
    assert len(examples) >= 12
    for name, sql in examples.items():
        assert re.match(r"-- .{20,}\.", sql.replace("\n-- ", " ")), name
        answer = ask((results,), example=name)
        assert answer.columns[0] == "results", name
    assert len(ask((results,), example="positives-per-patient")) == 24
    assert ask((results,), example="split-leakage").empty


def test_counts_per_patient_equal_pandas(two: tuple[str, str]):
    answer = ask(two, example="positives-per-patient")
    for results in two:
        found = answer[answer["results"] == Path(results).name].set_index("patient_id").sort_index()
        expected = predictions_of(results).groupby("patient_id")["predicted_label"].agg(["size", "sum", "mean"])
        assert found["n_cells"].tolist() == expected["size"].tolist()
        assert found["n_parasitized"].tolist() == expected["sum"].tolist()
        assert found["parasitized_fraction"].tolist() == pytest.approx(expected["mean"].tolist())


def test_false_positives_are_counted_for_uninfected_patients_only(two: tuple[str, str]):
    answer = ask(two[:1], example="false-positives-per-uninfected-patient").set_index("patient_id")
    table = predictions_of(two[0])
    expected = table[table["patient_id"].str.startswith("C")].groupby("patient_id")["predicted_label"].sum()
    assert answer["n_false_positive"].sort_index().tolist() == expected.tolist()
    assert answer["n_false_positive"].sum() > 0


def test_the_least_certain_come_first(two: tuple[str, str]):
    answer = ask(two[:1], example="least-certain")
    table = predictions_of(two[0])
    nearest = (table["score"].astype(float) - 0.5).abs().sort_values()
    assert answer["distance"].tolist() == pytest.approx(nearest.head(100).tolist())
    assert answer["image_id"][0] == table["image_id"][nearest.index[0]]


def test_the_review_queue_is_that_of_evaluate(line: Line):
    evaluate.run(evaluate.Config(results=str(line.results), n_resamples=100))
    answer = ask((str(line.results),), example="review-queue")
    table = pq.read_table(f"{line.results}/review").to_pandas()
    expected = table[table["needs_review"]].sort_values("rank").head(100)
    assert 0 < len(answer) == len(expected)
    assert answer["image_id"].tolist() == expected["image_id"].tolist()
    assert answer["reasons"].tolist() == [", ".join(reasons) for reasons in expected["reasons"]]


def test_the_differences_of_two_models_are_a_table_like_the_others(two: tuple[str, str], copy_of):
    results = str(copy_of(Path(two[0])))
    config = query.Config(results_and_sql=(results,), example="model-differences")
    with pytest.raises(QueryError, match=r"no table differences in .*; run 'malaria-ray evaluate --against OTHER_"):
        query.run(config)
    assert "no table differences" in catalog(open_results([results])[0])
    evaluate.run(evaluate.Config(results=results, against=two[1], n_resamples=100))
    answer = ask((results,), example="model-differences").set_index("metric")
    table = pq.read_table(f"{results}/differences").to_pandas().set_index("metric")
    assert answer["difference"].to_dict() == pytest.approx(table["difference"].to_dict(), nan_ok=True)
    assert answer["against_model"].unique().tolist() == ["vgg19-frozen"]
    is_beyond = (table["ci_low"] > 0) | (table["ci_high"] < 0)
    assert answer["is_beyond_chance"].fillna(False).to_dict() == is_beyond[answer.index].to_dict()
    assert "VIEW differences" in catalog(open_results([results])[0])


def test_likely_label_errors_are_the_surest_wrong_calls(two: tuple[str, str]):
    answer = ask(two[:1], example="likely-label-errors")
    table = predictions_of(two[0])
    wrong = table[table["label"] != table["predicted_label"]]
    assert set(answer["image_id"]) == set(wrong["image_id"])
    assert answer["contradiction"].tolist() == pytest.approx(
        (wrong["label"] - wrong["score"]).abs().sort_values(ascending=False).tolist()
    )


def test_two_models_disagree_where_their_calls_differ(two: tuple[str, str]):
    answer = ask(two, example="model-disagreement")
    both = predictions_of(two[0]).merge(predictions_of(two[1]), on="image_id", suffixes=("", "_other"))
    different = both[both["predicted_label"] != both["predicted_label_other"]]
    assert set(answer["image_id"]) == set(different["image_id"])
    assert answer["difference"].is_monotonic_decreasing
    assert ask(two[:1], example="model-disagreement").empty


def test_models_disagree_only_about_images_of_one_content(tmp_path: Path):
    """As compare pairs them: by name and content."""
    some = cells(40)
    first = write_results(tmp_path / "first", some)
    digests = predictions_of(str(first))["content_digest"].where(some.index != 0, "other bytes")
    others = some.assign(score=1 - some["score"], content_digest=digests)
    second = write_results(tmp_path / "second", others, archive=tmp_path / "first-archive")
    answer = ask((str(first), str(second)), example="model-disagreement")
    assert sorted(answer["image_id"]) == sorted(some["image_id"][1:])
    for results in (first, second):  # of an older version
        file = results / "predictions/part-00000.parquet"
        pq.write_table(pq.read_table(file).drop_columns(["content_digest"]), file)
    assert len(ask((str(first), str(second)), example="model-disagreement")) == 40


def test_labels_and_patients_of_disagreements_are_those_that_either_knows(tmp_path: Path):
    some = cells(40)
    unknown = some.assign(label=pd.array([pd.NA] * len(some), "Int8"), patient_id=None)
    first = write_results(tmp_path / "first", unknown)
    others = some.assign(score=1 - some["score"])
    second = write_results(tmp_path / "second", others, archive=tmp_path / "first-archive")
    answer = ask((str(first), str(second)), example="model-disagreement").set_index("image_id")
    known = some.set_index("image_id").loc[answer.index]
    assert answer["label"].tolist() == known["label"].tolist()
    assert answer["patient_id"].tolist() == known["patient_id"].tolist()


def test_drift_is_the_population_stability_index_over_ten_bins(two: tuple[str, str]):
    answer = ask(two, example="drift").set_index("results")
    shares = [
        np.maximum(np.histogram(predictions_of(one)["score"], bins=10, range=(0, 1))[0] / 240, 1e-4) for one in two
    ]
    index = float(np.sum((shares[1] - shares[0]) * np.log(shares[1] / shares[0])))
    assert answer["stability_index"]["first"] == 0
    assert answer["stability_index"]["second"] == pytest.approx(index, rel=1e-3)
    moved = predictions_of(two[1])["predicted_label"].mean() - predictions_of(two[0])["predicted_label"].mean()
    assert answer["share_moved"]["second"] == pytest.approx(moved)


def test_worst_calibrated_patients_come_first(two: tuple[str, str]):
    answer = ask(two[:1], example="worst-calibrated-patients")
    held_out = cells()[cells()["split"] == "test"].astype({"score": float})
    table = held_out.groupby("patient_id")[["score", "label"]].mean()
    errors = (table["score"] - table["label"]).abs().sort_values(ascending=False)
    assert answer["patient_id"][0] == errors.index[0]
    assert answer["error"].abs().tolist() == pytest.approx(errors.tolist())


def test_the_histogram_counts_every_cell_once(two: tuple[str, str]):
    answer = ask(two, example="score-histogram")
    assert answer["n_cells"].sum() == 480
    for split, of_split in cells().groupby("split"):
        one = answer[(answer["results"] == "first") & (answer["split"] == split)]
        expected = np.histogram(of_split["score"].astype(float), bins=20, range=(0, 1))[0]
        assert one["n_cells"].tolist() == [n for n in expected.tolist() if n]
        assert (one["n_uninfected"] + one["n_parasitized"]).tolist() == one["n_cells"].tolist()


def test_quarantine_and_metrics_are_answered(two: tuple[str, str]):
    assert ask(two, example="quarantine-by-reason")["n_files"].tolist() == [2]
    metrics = ask(two, example="metrics-by-split")
    expected = pq.read_table(f"{two[0]}/metrics").to_pandas().query("level == 'cell' and metric == 'accuracy'")
    found = metrics[(metrics["metric"] == "accuracy") & (metrics["results"] == "first")].set_index("split")["value"]
    assert found.to_dict() == expected.set_index("split")["value"].to_dict()


def test_the_threshold_sweep_at_a_half_is_the_metrics(two: tuple[str, str]):
    sweep = ask(two[:1], example="threshold-sweep")
    at_half = sweep[np.isclose(sweep["threshold"], 0.5)].set_index("split")
    metrics = pq.read_table(f"{two[0]}/metrics").to_pandas().set_index(["split", "metric"])["value"]
    for split in ("val", "test"):
        assert at_half["sensitivity"][split] == pytest.approx(metrics[split, "sensitivity"])
        assert at_half["specificity"][split] == pytest.approx(metrics[split, "specificity"])


def test_duplicates_and_leaking_splits_are_found(tmp_path: Path):
    some = cells(40)
    some.loc[:1, "patient_id"] = "P1"
    some.loc[0, "split"], some.loc[1, "split"] = "train", "test"
    results = write_results(tmp_path / "results", some)
    assert ask((str(results),), example="duplicates").empty
    leaks = ask((str(results),), example="split-leakage")
    assert leaks["id"].tolist() == ["P1"]
    table = predictions_of(str(results))
    table.loc[1, "content_digest"] = table.loc[0, "content_digest"]
    storage.write_table(storage.locate(results / "predictions/part-00000.parquet"), as_predictions(table))
    twice = ask((str(results),), example="duplicates")
    assert twice["n_copies"].tolist() == [2]
    assert twice["first_image"][0] == min(table["image_id"][:2])


def as_predictions(frame: pd.DataFrame) -> pa.Table:
    return pa.Table.from_pandas(frame, schema=PREDICTIONS.arrow_schema(), preserve_index=False)


def test_cells_have_the_split_that_the_run_gave_them(two: tuple[str, str]):
    found = ask(two[:1], sql="SELECT image_id, split, outcome FROM cells").set_index("image_id")
    table = predictions_of(two[0])
    assert found["split"].to_dict() == cells().set_index("image_id")["split"].to_dict()
    true_positives = ((table["label"] == 1) & (table["predicted_label"] == 1)).sum()
    assert (found["outcome"] == "true positive").sum() == true_positives


def test_bytes_that_the_run_was_trained_or_tuned_on_are_never_held_out(tmp_path: Path):
    some = cells(6).assign(split=["train", "val", "test", "test", "test", None], patient_id=list("AABBCA"))
    results = write_results(tmp_path / "results", some, has_images=False)
    table = predictions_of(str(results))
    digests = table["content_digest"].tolist()
    splits = pq.read_table(results / "model/splits.parquet").to_pandas()
    splits.loc[2, "content_digest"] = digests[0]  # one image stands in training and test
    pq.write_table(pa.Table.from_pandas(splits), results / "model/splits.parquet")
    table["content_digest"] = [digests[0], "other bytes", digests[0], digests[3], digests[1], digests[5]]
    storage.write_table(storage.locate(results / "predictions/part-00000.parquet"), as_predictions(table))
    found = ask((str(results),), sql="SELECT image_id, split, knows_patient FROM cells").set_index("image_id")
    found = found.loc[table["image_id"]]
    assert found["split"].tolist() == ["train", "unseen", "train", "test", "val", "unseen"]
    assert found["knows_patient"].tolist() == [True, True, False, False, False, True]


def test_catalog_gives_plain_duckdb_the_same_tables_wherever_the_directory_is(
    two: tuple[str, str], tmp_path: Path, copy_of, monkeypatch: pytest.MonkeyPatch
):
    script = catalog(open_results(two[:1])[0])
    assert two[0] not in script.replace(f"'{Path(two[0]).parent}", "")  # the source archive may be named, files not
    monkeypatch.chdir(copy_of(Path(two[0])))
    connection = duckdb.connect()
    connection.execute(script)
    assert connection.sql("SELECT count(*), sum(score) FROM predictions").fetchall() == [
        (240, pytest.approx(float(predictions_of(two[0])["score"].astype(float).sum())))
    ]
    assert connection.sql("SELECT count(*) FROM cells").fetchall() == [(240,)]
    assert connection.sql("SELECT count(*) FROM metrics").fetchall()[0][0] > 0


def test_the_same_on_an_object_store(two: tuple[str, str], s3):
    for file in Path(two[0]).rglob("*"):
        if file.is_file():
            s3.upload_file(str(file), "cells-bucket", f"run[1]/{file.relative_to(two[0])}")
    local = ask(two[:1], example="positives-per-patient")
    remote = ask(("s3://cells-bucket/run[1]",), example="positives-per-patient")
    assert remote.drop(columns="results").equals(local.drop(columns="results"))
    sql = "SELECT results, sum(score) AS s FROM predictions GROUP BY ALL"
    query.run(
        query.Config(
            results_and_sql=("s3://cells-bucket/run[1]", two[1], sql),
            format="parquet",
            output="s3://cells-bucket/new/answer.parquet",
        )
    )
    written = s3.get_object(Bucket="cells-bucket", Key="new/answer.parquet")["Body"].read()
    sums = pq.read_table(BytesIO(written)).to_pandas().set_index("results")["s"]
    assert sums["run[1]"] == pytest.approx(predictions_of(two[0])["score"].astype(float).sum())
    assert sums["second"] == pytest.approx(predictions_of(two[1])["score"].astype(float).sum())


def test_answers_come_as_csv_json_and_parquet(two: tuple[str, str], tmp_path: Path, capfdbinary):
    sql = "SELECT image_id, score FROM predictions ORDER BY image_id"
    expected = predictions_of(two[0]).sort_values("image_id")
    readers = {
        "csv": lambda data: pd.read_csv(BytesIO(data)),
        "json": lambda data: pd.DataFrame(json.loads(data)),
        "parquet": lambda data: pq.read_table(BytesIO(data)).to_pandas(),
    }
    for kind, read in readers.items():
        query.run(query.Config(results_and_sql=(two[0], sql), format=kind))
        sys.stdout.flush()
        frame = read(capfdbinary.readouterr().out)
        assert frame["image_id"].tolist() == expected["image_id"].tolist()
        assert frame["score"].to_numpy(float) == pytest.approx(expected["score"].to_numpy(float), abs=1e-6)
        target = tmp_path / "new" / f"answer.{kind}"
        query.run(query.Config(results_and_sql=(two[0], sql), format=kind, output=str(target)))
        assert read(target.read_bytes()).equals(frame)


def test_a_table_shows_ids_whole_and_says_what_it_leaves_out(two: tuple[str, str], capsys: pytest.CaptureFixture[str]):
    sql = "SELECT image_id FROM predictions ORDER BY image_id"
    query.run(query.Config(results_and_sql=(two[0], sql), max_rows=3))
    out = capsys.readouterr().out
    assert "3 of 240 rows" in out
    assert sorted(predictions_of(two[0])["image_id"])[2] in out


def test_columns_of_one_name_are_told_apart_in_the_table_as_in_files(two: tuple[str, str], capfd):
    sql = (
        "SELECT first.score, other.score, first.label, first.image_id FROM predictions AS first JOIN predictions AS "
        "other USING (image_id) WHERE first.results <> other.results ORDER BY ALL LIMIT 1"
    )
    query.run(query.Config(results_and_sql=(*two, sql), format="csv"))
    sys.stdout.flush()
    written = pd.read_csv(StringIO(capfd.readouterr().out))
    assert written.columns.tolist() == ["score", "score_1", "label", "image_id"]
    query.run(query.Config(results_and_sql=(*two, sql)))
    heading, row = (re.findall(r"[\w./]+", text) for text in capfd.readouterr().out.splitlines()[1:4:2])
    assert heading == written.columns.tolist()
    assert [float(value) for value in row[:3]] == pytest.approx(written.iloc[0, :3].tolist(), abs=1e-5)
    assert row[3] == written["image_id"][0]


def test_rows_of_too_many_columns_have_a_line_for_each_value(two: tuple[str, str], capsys: pytest.CaptureFixture[str]):
    query.run(query.Config(results_and_sql=(two[0], "SELECT * FROM cells ORDER BY image_id"), max_rows=2))
    out = capsys.readouterr().out
    table = predictions_of(two[0]).sort_values("image_id").head(2)
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert [value for name, value in lines if name == "image_id"] == table["image_id"].tolist()
    assert [float(value) for name, value in lines if name == "score"] == pytest.approx(table["score"], rel=1e-5)
    assert "row 1" in out
    assert "row 2" in out
    assert f"2 of {len(predictions_of(two[0])):,} rows" in out


def test_hostile_names_do_not_reach_the_terminal_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    some = cells(len(HOSTILE))
    some["image_id"] = [f"{name}{i}.png" for i, name in enumerate(HOSTILE)]
    results = write_results(tmp_path / "it's [a] *results*", some)
    query.run(query.Config(results_and_sql=(str(results), "SELECT image_id FROM predictions")))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "\\u202egnp.exe" in out
    assert ask((str(results),), sql="SELECT image_id FROM predictions").size == len(HOSTILE)


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("SELECT * FROM prediction", "no table prediction; allowed are runs, predictions,"),
        ("SELECT scores FROM predictions", 'column "scores" not found'),
        ("SELEC 1", "syntax error"),
        (" -- not yet", "the SQL holds no statement"),
        ("COPY (SELECT 1 AS a) TO '{results}/predictions/part-00000.parquet'", "COPY writes files; give the SELECT"),
        ("SELECT 1; EXPORT DATABASE '{results}/predictions'", "EXPORT writes files"),
    ],
)
def test_wrong_sql_is_one_clear_line(two: tuple[str, str], sql: str, said: str, capsys: pytest.CaptureFixture[str]):
    before = storage.record_of(storage.locate(two[0]) / "predictions/part-00000.parquet")
    assert cli.main(["query", two[0], sql.replace("{results}", two[0])]) == 1
    assert storage.record_of(storage.locate(two[0]) / "predictions/part-00000.parquet") == before
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said.lower() in lines[0].lower()


def test_the_last_of_several_statements_is_the_answer(two: tuple[str, str]):
    sql = "SET TimeZone = 'UTC'; CREATE TABLE mine AS FROM predictions LIMIT 3; SELECT image_id FROM mine"
    assert ask((two[0],), sql=sql).shape == (3, 1)


def test_a_table_that_is_not_there_is_told_with_what_makes_it(tmp_path: Path):
    results = write_results(tmp_path / "results", cells(20))
    with pytest.raises(QueryError, match="malaria-ray evaluate"):
        query.run(query.Config(results_and_sql=(str(results), "SELECT * FROM metrics")))
    (results / "model" / "splits.parquet").unlink()
    with pytest.raises(QueryError, match=r"splits is missing.*malaria-ray verify"):
        query.run(query.Config(results_and_sql=(str(results), "SELECT * FROM cells")))
    assert ask((str(results),), sql="SELECT * FROM predictions").shape[0] == 20


def test_older_tables_get_nulls_and_newer_ones_are_refused(tmp_path: Path):
    results = write_results(tmp_path / "results", cells(20))
    file = results / "model" / "splits.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["content_digest"]), file)
    assert ask((str(results),), sql="SELECT content_digest FROM splits")["content_digest"].isna().all()
    assert set(ask((str(results),), sql="SELECT split FROM cells")["split"]) == {"train", "val", "test"}
    table = pq.read_table(file)
    pq.write_table(table.replace_schema_metadata({"malaria_ray.schema_version": "99"}), file)
    with pytest.raises(DirectoryError, match="schema version 99"):
        ask((str(results),), sql="SELECT 1")


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ((), ConfigError, "give one or several results directories"),
        (("FIRST",), ConfigError, "then the SQL"),
        (("FIRST", "FIRST", "SELECT 1"), ConfigError, "given twice"),
        (("/nowhere", "SELECT 1"), NotCompleteError, "is not there"),
    ],
)
def test_wrong_directories_are_one_clear_line(two: tuple[str, str], arguments, error, said):
    with pytest.raises(error, match=said):
        query.run(query.Config(results_and_sql=tuple(two[0] if value == "FIRST" else value for value in arguments)))


def test_columns_carry_their_meaning_and_unit_in_the_footer(two: tuple[str, str]):
    schema = pq.read_schema(f"{two[0]}/metrics/part-00000.parquet")
    assert schema.names == METRICS.names
    assert schema.field("ci_low").metadata[b"description"].startswith(b"lower end of the 95 % interval")
    footer = duckdb.sql(f"SELECT decode(key), decode(value) FROM parquet_kv_metadata('{two[0]}/predictions/*.parquet')")
    assert ("malaria_ray.schema_version", "1") in footer.fetchall()


def sums_of(results: str) -> tuple[int, int, int, int]:
    """Rows, labels, calls, and the scores in whole 2^-24, as integers, which all engines add alike."""
    table = pq.read_table(f"{results}/predictions").to_pandas()
    whole = np.floor(table["score"].astype(float) * 2**24).astype(int).sum()
    return len(table), int(table["label"].sum()), int(table["predicted_label"].sum()), int(whole)


_SUMS = "SELECT count(*), sum(label), sum(predicted_label), sum(CAST(floor(score * 16777216D) AS BIGINT)) FROM "


def test_pandas_polars_and_duckdb_read_the_same_sums(two: tuple[str, str]):
    import polars

    files = f"{two[0]}/predictions/*.parquet"
    pandas = pd.read_parquet(f"{two[0]}/predictions")
    assert pandas.equals(pq.read_table(f"{two[0]}/predictions").to_pandas())
    whole = (polars.col("score").cast(polars.Float64) * 2**24).floor().cast(polars.Int64)
    columns = (polars.len(), polars.col("label"), polars.col("predicted_label").cast(polars.Int64), whole)
    pola = polars.scan_parquet(files).select(columns[0], *(column.sum() for column in columns[1:])).collect()
    assert pola.row(0) == sums_of(two[0])
    duck = _SUMS.replace("16777216D", "16777216::DOUBLE") + f"'{files}'"
    assert duckdb.sql(duck).fetchall() == [sums_of(two[0])]


def test_spark_reads_the_same_sums_and_columns(two: tuple[str, str], tmp_path: Path):
    if shutil.which("java") is None:
        reason = "java is not here: apt-get install default-jre-headless"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    folders = [f"{one}/predictions" for one in two] + [f"{two[0]}/{table.name}" for table in (METRICS, PATIENTS)]
    command = [sys.executable, str(Path(__file__).with_name("spark_sums.py")), _SUMS + "rows", *folders]
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"HOME": str(tmp_path)})
    *predictions, metrics, patients = json.loads(said.stdout.splitlines()[-1])
    assert [tuple(found["answer"]) for found in predictions] == [sums_of(one) for one in two]
    assert {tuple(found["columns"]) for found in predictions} == {tuple(PREDICTIONS.names)}
    for found, table in ((metrics, METRICS), (patients, PATIENTS)):
        assert found["columns"] == table.names
        assert found["answer"] == [pq.read_table(f"{two[0]}/{table.name}").num_rows]


@pytest.mark.parametrize("example", ["model-disagreement", "drift"])
def test_an_example_that_compares_results_needs_two(two: tuple[str, str], example: str):
    with pytest.raises(ConfigError, match=f"--example {example} compares results; give two directories or more"):
        query.run(query.Config(results_and_sql=two[:1], example=example))
