"""Two or more results side by side: what they share, how the metrics differ, and the page that shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pandas as pd
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

from malaria_ray.cells.copies import is_copy
from malaria_ray.errors import DatasetError, QueryError
from malaria_ray.runtime import storage
from malaria_ray.runtime.terminal import folded, printable
from malaria_ray.runtime.terminal import number as shown
from malaria_ray.stages.charts import Axis, Series, histogram, line_chart
from malaria_ray.stages.figures import Figure
from malaria_ray.stages.galleries import Gallery, pictures
from malaria_ray.stages.pages import render, short
from malaria_ray.stages.views import Results, known_patients_said, reading
from malaria_ray.statistics.intervals import paired_bootstrap_over_patients
from malaria_ray.statistics.metrics import COUNTS, calibration_curve, cell_metrics, roc_curve

SHOWN = (
    "accuracy",
    "sensitivity",
    "specificity",
    "precision",
    "f1",
    "roc_auc",
    "average_precision",
    "matthews_correlation",
    "brier_score",
    "expected_calibration_error",
    "sensitivity_at_specificity_0.99",
    *COUNTS,
)

_SHARED = """
    SELECT first.image_id, first.content_digest, coalesce(first.label, other.label) AS label,
           coalesce(first.patient_id, other.patient_id) AS patient_id,
           first.score AS score, other.score AS other_score,
           first.predicted_label AS called, other.predicted_label AS other_called,
           first.split NOT IN ('train', 'val') AND other.split NOT IN ('train', 'val') AS is_held_out,
           first.knows_patient AS knows_patient, other.knows_patient AS other_knows_patient
    FROM cells AS first JOIN cells AS other USING (image_id)
    WHERE first.results = $first AND other.results = $other
    AND first.content_digest IS NOT DISTINCT FROM other.content_digest
    ORDER BY image_id
"""
_OF_TWO_LABELS = """
    SELECT image_id, arg_min(results, label) AS uninfected, arg_max(results, label) AS parasitized
    FROM predictions
    GROUP BY image_id, content_digest HAVING min(label) < max(label)
    ORDER BY image_id
"""
_DISAGREEMENTS = (
    (
        "{first} is right",
        "{cells} called differently whose label says what {first} says; the furthest apart first",
    ),
    (
        "{other} is right",
        "{cells} called differently whose label says what {other} says; the furthest apart first",
    ),
    ("Without a label", "shared images called differently; the furthest apart first"),
)
_MAX_PATIENTS = 20
_STYLES = ("one", "two", "three", "four", "five")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two results on the images that they share.

    `shared`: a row for each, with both scores and calls, and the label that either gives. `cells`: the labelled ones
    that both hold out, copies once; else all labelled. `metrics`: of `cells`, None without any: columns first, other,
    difference (other − first), ci_low, ci_high. `known_patients`: a line for each model that was trained or tuned on
    patients of these cells where both hold the cells out.
    """

    first: Results
    other: Results
    shared: pd.DataFrame
    cells: pd.DataFrame
    metrics: pd.DataFrame | None
    is_held_out: bool
    known_patients: list[str]

    @property
    def cells_are(self) -> str:
        return "shared held-out cells" if self.is_held_out else "shared cells, none of them held out by both"


def pair_of(
    connection: duckdb.DuckDBPyConnection, first: Results, other: Results, *, n_resamples: int, seed: int
) -> Pair:
    """Raises: `QueryError` where they share no image."""
    shared = connection.sql(_SHARED, params={"first": first.name, "other": other.name}).df()
    if shared.empty:
        raise QueryError(
            f"{first.path} and {other.path} share no image of the same name and content; compare results of one archive"
        )
    cells = _held_out(shared)
    is_held_out = bool(len(cells)) and bool(cells["is_held_out"].all())
    return Pair(
        first=first,
        other=other,
        shared=shared,
        cells=cells,
        metrics=differences(cells, first, other, n_resamples=n_resamples, seed=seed) if len(cells) else None,
        is_held_out=is_held_out,
        known_patients=_known_patients(cells, first, other) if is_held_out else [],
    )


def differences(cells: pd.DataFrame, first: Results, other: Results, *, n_resamples: int, seed: int) -> pd.DataFrame:
    """Metrics of labelled cells by name: columns first, other, difference (other − first), ci_low, ci_high."""
    label, patient = cells["label"].to_numpy(np.int64), cells["patient_id"]
    score, other_score = cells["score"].to_numpy(np.float32), cells["other_score"].to_numpy(np.float32)
    thresholds = [float(one.success["threshold"]) for one in (first, other)]
    values = cell_metrics(label, score, threshold=thresholds[0])
    other_values = cell_metrics(label, other_score, threshold=thresholds[1])
    intervals = paired_bootstrap_over_patients(
        label,
        other_score,
        score,
        patient,
        threshold=thresholds[1],
        other_threshold=thresholds[0],
        n_resamples=n_resamples,
        seed=seed,
    )
    table = pd.DataFrame({"first": values, "other": other_values})
    table["difference"] = table["other"] - table["first"]
    table[["ci_low", "ci_high"]] = [intervals[str(name)] for name in table.index]
    return table


def page(connection: duckdb.DuckDBPyConnection, pairs: Sequence[Pair], *, thumbnails: int) -> str:
    """The comparison as one HTML file, with at most `thumbnails` cells a gallery."""
    results = [pairs[0].first, *(pair.other for pair in pairs)]
    common = _common(pairs)
    galleries = [_galleries(connection, pair, thumbnails) for pair in pairs]
    images, without_image = _pictures(results, [gallery for of_pair in galleries for gallery in of_pair])
    return render(
        "comparison.html",
        models=[_model(connection, one, common, number) for number, one in enumerate(results)],
        n_common=len(common),
        is_common_held_out=bool(common["is_held_out"].all()),
        together=_together(results, common) if len(common) else [],
        pairs=[
            _section(pair, number, of_pair) for number, (pair, of_pair) in enumerate(zip(pairs, galleries, strict=True))
        ],
        images=images,
        without_image=without_image,
        is_synthetic=any(one.success.get("is_synthetic") for one in results),
    )


def shown_metrics(pair: Pair) -> list[dict[str, Any]]:
    """Rows of the table of metrics, as text: metric, first, other, difference, interval; `is_clear` without 0 in it."""
    rows: list[dict[str, Any]] = []
    if pair.metrics is None:
        return rows
    for name in SHOWN:
        row = pair.metrics.loc[name].astype(float).to_dict()
        digits = ",.0f" if name in COUNTS else ".4f"
        has_interval = not np.isnan(row["ci_low"])
        rows.append(
            {
                "metric": name,
                "first": shown(row["first"], digits),
                "other": shown(row["other"], digits),
                "difference": shown(row["difference"], f"+{digits}"),
                "interval": f"{row['ci_low']:+.4f} to {row['ci_high']:+.4f}" if has_interval else "",
                "is_clear": has_interval and (row["ci_low"] > 0 or row["ci_high"] < 0),
            }
        )
    return rows


def metrics_table(pair: Pair) -> RichTable:
    """The same rows for the terminal, and below them which model knows patients of the cells."""
    names = (f"{printable(one.name)} ({one.success['run_id']})" for one in (pair.first, pair.other))
    metric, difference, interval = (Column(name, no_wrap=True) for name in ("metric", "difference", "95 % interval"))
    table = RichTable(metric, *names, difference, interval, title=f"{len(pair.cells):,} {pair.cells_are}")
    if pair.known_patients:
        table.caption, table.caption_justify = Text("\n".join(map(printable, pair.known_patients))), "left"
    for row in shown_metrics(pair):
        table.add_row(row["metric"], row["first"], row["other"], row["difference"], row["interval"])
    return folded(table)


def check_labels(connection: duckdb.DuckDBPyConnection) -> None:
    """Raises: `DatasetError` where an image has two labels in the results."""
    found = connection.sql(_OF_TWO_LABELS).df()
    if len(found):
        row = found.iloc[0]
        raise DatasetError(
            f"{len(found):,} images have several labels in these results, the first {row['image_id']!r}: uninfected in "
            f"{row['uninfected']}, parasitized in {row['parasitized']}; give results of one archive"
        )


def _known_patients(cells: pd.DataFrame, first: Results, other: Results) -> list[str]:
    """As `views.known_patients_line`, of the cells of a pair."""
    return [
        f"{one.name}: {known_patients_said(one, n_known, f'{len(cells):,} shared held-out cells')}"
        for one, column in ((first, "knows_patient"), (other, "other_knows_patient"))
        if (n_known := int(cells[column].sum()))
    ]


def _held_out(cells: pd.DataFrame) -> pd.DataFrame:
    """The labelled cells that no model was trained on, copies once; all labelled ones where there are none."""
    labelled = cells[cells["label"].notna() & ~is_copy(cells, "is_held_out")]
    held_out = labelled[labelled["is_held_out"]]
    return held_out if len(held_out) else labelled


def _common(pairs: Sequence[Pair]) -> pd.DataFrame:
    """The labelled cells that all results have: label, score_0, score_1, …, is_held_out (by all)."""
    columns = ["image_id", "content_digest", "patient_id", "label", "score", "is_held_out"]
    common = pairs[0].shared[columns].rename(columns={"score": "score_0"})
    for number, pair in enumerate(pairs, start=1):
        theirs = pair.shared[["image_id", "label", "other_score", "is_held_out"]]
        theirs = theirs.rename(
            columns={"label": "their_label", "other_score": f"score_{number}", "is_held_out": "is_too"}
        )
        common = common.merge(theirs, on="image_id")
        common["label"] = common["label"].fillna(common.pop("their_label"))
        common["is_held_out"] &= common.pop("is_too")
    return _held_out(common)


def _model(connection: duckdb.DuckDBPyConnection, one: Results, common: pd.DataFrame, number: int) -> dict[str, Any]:
    found = connection.execute(
        "SELECT count(*), coalesce(sum(predicted_label), 0)::BIGINT FROM predictions WHERE results = $1", [one.name]
    ).fetchall()
    values: dict[str, float | None] = {}
    if len(common):
        label, score = common["label"].to_numpy(np.int64), common[f"score_{number}"].to_numpy(np.float32)
        of_cells = cell_metrics(label, score, threshold=float(one.success["threshold"]))
        values = {name: None if np.isnan(value) else value for name, value in of_cells.items()}
    training = storage.read_json(one.path / "model" / "config.json")["config"]
    return {
        "name": one.name,
        "model": one.success["model"],
        "run_id": one.success["run_id"],
        "threshold": f"{one.success['threshold']:g}",
        "engine": one.run["identity"]["engine"],
        "split": one.run["identity"]["split"],
        "split_by": training.get("split_by", ""),
        "finished": one.success["finished_at"][:10],
        "n": found[0][0],
        "n_called": found[0][1],
        "values": values,
    }


def _together(results: Sequence[Results], common: pd.DataFrame) -> list[Figure]:
    """ROC and calibration of all models on the cells that all have."""
    label = common["label"].to_numpy(np.int64)
    roc = [Series(name="chance", x=[0, 1], y=[0, 1], style="faint")]
    calibration = [Series(name="perfect", x=[0, 1], y=[0, 1], style="faint")]
    said = []
    for number, one in enumerate(results):
        score, style = common[f"score_{number}"].to_numpy(np.float32), _STYLES[number % len(_STYLES)]
        curve, bins, name = roc_curve(label, score), calibration_curve(label, score), short(printable(one.name), 22)
        if not curve.empty:
            roc.append(Series(name=name, x=curve["false_positive_rate"], y=curve["sensitivity"], style=style))
            area = cell_metrics(label, score, threshold=float(one.success["threshold"]))["roc_auc"]
            said.append(f"{printable(one.name)} {area:.4f}")
        calibration.append(
            Series(name=name, x=bins["mean_score"], y=bins["observed_share"], style=style, has_dots=True)
        )
    figures = []
    if said:
        words = f"{len(common):,} cells; areas under the curves: {', '.join(said)}."
        x, y = Axis(label="false positive rate (1 − specificity)"), Axis(label="sensitivity")
        figures.append(Figure("ROC curves", line_chart("ROC curves", words, roc, x=x, y=y), words))
    words = "Of cells with a score of 0.8, 80 % should be parasitized: on the dashed line."
    x, y = Axis(label="mean score"), Axis(label="share labelled parasitized")
    chart = line_chart("Calibration of all", words, calibration, x=x, y=y)
    return [*figures, Figure("Calibration of all", chart, words)]


def _section(pair: Pair, number: int, galleries: list[Gallery]) -> dict[str, Any]:
    shared = pair.shared
    differ = shared[shared["called"] != shared["other_called"]]
    decided = pair.cells[pair.cells["called"] != pair.cells["other_called"]]
    by_patient = shared.groupby("patient_id").agg(
        n_cells=("called", "size"), first=("called", "mean"), other=("other_called", "mean")
    )
    by_patient["difference"] = by_patient["other"] - by_patient["first"]
    moved = by_patient[by_patient["difference"] != 0]
    moved = moved.sort_values("difference", key=np.abs, ascending=False, kind="stable").head(_MAX_PATIENTS)
    return {
        "key": f"pair-{number + 1}",
        "first": pair.first.name,
        "other": pair.other.name,
        "n_shared": len(shared),
        "n_differ": len(differ),
        "n_decided": len(decided),
        "n_first_right": int((decided["label"] == decided["called"]).sum()),
        "mean_difference": float((shared["other_score"] - shared["score"]).mean()),
        "calls": [
            [int(((shared["called"] == a) & (shared["other_called"] == b)).sum()) for b in (0, 1)] for a in (0, 1)
        ],
        "metrics": shown_metrics(pair),
        "n_cells": len(pair.cells),
        "cells": pair.cells_are,
        "is_held_out": pair.is_held_out,
        "known_patients": pair.known_patients,
        "figures": [_score_differences(pair)],
        "n_patients": len(by_patient),
        "patients": moved.reset_index().to_dict("records"),
        "galleries": galleries,
    }


def _score_differences(pair: Pair) -> Figure:
    edges = [round(-1 + i / 10, 1) for i in range(21)]
    moved = pair.shared["other_score"].astype(float) - pair.shared["score"].astype(float)
    groups: list[tuple[str, str, list[int]]] = []
    for label, name, style in ((0, "uninfected", "one"), (1, "parasitized", "two"), (None, "no label", "three")):
        is_it = pair.shared["label"].isna() if label is None else pair.shared["label"].eq(label).fillna(False)
        counts = np.histogram(moved[is_it], bins=20, range=(-1, 1))[0]
        if counts.any():
            groups.append((name, style, counts.tolist()))
    words = (
        f"{len(moved):,} shared cells by the score of {printable(pair.other.name)} minus that of "
        f"{printable(pair.first.name)}, in bins of 0.1; "
        f"{100 * (moved.abs() < 0.05).mean():.1f} % differ by less than 0.05."
    )
    title = f"Scores of {printable(pair.other.name)} minus those of {printable(pair.first.name)}"
    axis = Axis(label="difference of the scores", low=-1, high=1)
    return Figure(title, histogram(title, words, edges, groups, x=axis), words)


def _galleries(connection: duckdb.DuckDBPyConnection, pair: Pair, n_each: int) -> list[Gallery]:
    names = {"first": printable(pair.first.name), "other": printable(pair.other.name), "cells": pair.cells_are}
    cells, unlabelled = pair.cells, pair.shared[pair.shared["label"].isna()]
    is_first = cells["label"] == cells["called"]
    galleries = []
    kinds = (cells[is_first], cells[~is_first], unlabelled)
    for number, ((title, meaning), of_kind) in enumerate(zip(_DISAGREEMENTS, kinds, strict=True)):
        cells = of_kind[of_kind["called"] != of_kind["other_called"]]
        if cells.empty:
            continue
        cells = cells.assign(distance=(cells["score"] - cells["other_score"]).abs())
        shown = cells.sort_values(["distance", "image_id"], ascending=[False, True]).head(n_each)
        galleries.append(
            Gallery(
                key=f"{number}",
                title=title.format(**names),
                meaning=meaning.format(**names),
                n=len(cells),
                cells=_facts(connection, pair, shown),
            )
        )
    return galleries


def _facts(connection: duckdb.DuckDBPyConnection, pair: Pair, shown: pd.DataFrame) -> list[dict[str, Any]]:
    """The cells as galleries show them, in the order given."""
    rows = connection.sql(
        "SELECT image_id, patient_id, score, predicted_label, width, height, content_digest, split FROM cells "
        "WHERE results = $results AND image_id IN (SELECT unnest($ids))",
        params={"results": pair.first.name, "ids": shown["image_id"].tolist()},
    ).to_arrow_table()
    by_name = {row["image_id"]: row for row in rows.to_pylist()}
    labels = {name: int(label) for name, label in shown.set_index("image_id")["label"].dropna().items()}
    return [
        by_name[cell.image_id]
        | {
            "label": labels.get(cell.image_id),
            "words": f"{cell.score:.3f} → {cell.other_score:.3f}",
            "facts": [
                (f"score of {pair.first.name}", f"{cell.score:.4f}"),
                (f"score of {pair.other.name}", f"{cell.other_score:.4f}"),
            ],
        }
        for cell in shown.itertuples()
    ]


def _pictures(results: Sequence[Results], galleries: list[Gallery]) -> tuple[dict[str, str], dict[str, str]]:
    """As `galleries.pictures`, from the first of the results whose archive is still there."""
    images: dict[str, str] = {}
    missing: dict[str, str] = {}
    for one in results:
        size = storage.read_json(one.path / "model" / "SUCCESS.json")["image_size"]
        with reading([one]) as connection:
            images, missing = pictures(connection, galleries, image_size=size)
        if images:
            break
    return images, missing
