"""What the report draws: each function asks the views for numbers and gives charts with their words."""

from __future__ import annotations

from dataclasses import dataclass

import duckdb
import numpy as np
import pandas as pd
from markupsafe import Markup

from malaria_ray.runtime.terminal import printable
from malaria_ray.stages.charts import Axis, Series, histogram, line_chart
from malaria_ray.statistics.metrics import calibration_curve, cell_metrics, precision_recall_curve, roc_curve

_MAX_PATIENTS = 200  # more cannot be told apart on a page
_PATIENTS = ((0, "uninfected", "one"), (1, "with a parasitized cell", "two"), (None, "no label", "three"))
_EDGES = [i / 20 for i in range(21)]
_HISTOGRAM = """
    SELECT least(floor(score * 20), 19)::INT AS bin, label, count(*) AS n,
           count(*) FILTER (score >= $threshold::FLOAT) AS n_called FROM cells
    WHERE $split IS NULL OR (split = $split AND label IS NOT NULL AND NOT is_copy) GROUP BY ALL
"""


@dataclass(frozen=True)
class Figure:
    """A chart, the words below it, and the numbers of it as a table where they are few."""

    title: str
    chart: Markup
    caption: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def of_cells(connection: duckdb.DuckDBPyConnection, *, split: str | None, threshold: float) -> list[Figure]:
    """The scores' histogram and, of labelled cells, ROC, precision-recall and calibration; none without cells."""
    figures = _score_histogram(connection, split, threshold)
    if split is None:
        return figures
    labelled = "SELECT label, score FROM cells WHERE split = $split AND label IS NOT NULL AND NOT is_copy"
    columns = connection.sql(labelled, params={"split": split}).to_arrow_table()
    label, score = columns["label"].to_numpy(), columns["score"].to_numpy()
    values = cell_metrics(label, score, threshold=threshold)
    for figure in (_roc(label, score, values, threshold), _precision_recall(label, score, values, threshold)):
        if figure is not None:
            figures.append(figure)
    return [*figures, _calibration(label, score, values)]


def _roc(label: np.ndarray, score: np.ndarray, values: dict[str, float], threshold: float) -> Figure | None:
    curve = roc_curve(label, score)
    if curve.empty:
        return None
    false_positive_rate = 1 - values["specificity"]
    return _lines(
        "ROC curve",
        f"Area under the curve {values['roc_auc']:.4f}. The dot is the threshold {threshold:g}: sensitivity "
        f"{values['sensitivity']:.4f} at a false positive rate of {false_positive_rate:.4f}.",
        [
            Series(name="chance", x=[0, 1], y=[0, 1], style="faint"),
            Series(name="model", x=curve["false_positive_rate"], y=curve["sensitivity"]),
            _dot(false_positive_rate, values["sensitivity"], threshold),
        ],
        x=Axis(label="false positive rate (1 − specificity)"),
        y=Axis(label="sensitivity"),
    )


def _precision_recall(
    label: np.ndarray, score: np.ndarray, values: dict[str, float], threshold: float
) -> Figure | None:
    curve, share = precision_recall_curve(label, score), float(label.mean())
    if curve.empty:
        return None
    dots = [_dot(values["sensitivity"], values["precision"], threshold)] if np.isfinite(values["precision"]) else []
    return _lines(
        "Precision and recall",
        f"Average precision {values['average_precision']:.4f}; calling everything parasitized would have a precision "
        f"of {share:.4f}, the dashed line.",
        [
            Series(name="chance", x=[0, 1], y=[share, share], style="faint"),
            # Steps, whose area is the average precision: between two thresholds there is no better one.
            Series(name="model", x=np.repeat(curve["sensitivity"], 2)[:-1], y=np.repeat(curve["precision"], 2)[1:]),
            *dots,
        ],
        x=Axis(label="recall (sensitivity)"),
        y=Axis(label="precision"),
    )


def _calibration(label: np.ndarray, score: np.ndarray, values: dict[str, float]) -> Figure:
    bins = calibration_curve(label, score)
    cells = [f"{n:,} cells" for n in bins["n"]]
    return _lines(
        "Calibration",
        "Of cells with a score of 0.8, 80 % should be parasitized: on the dashed line. Expected calibration error "
        f"{values['expected_calibration_error']:.4f}.",
        [
            Series(name="perfect", x=[0, 1], y=[0, 1], style="faint"),
            Series(name="model", x=bins["mean_score"], y=bins["observed_share"], has_dots=True, notes=cells),
        ],
        x=Axis(label="mean score"),
        y=Axis(label="share labelled parasitized"),
        columns=("score", "cells", "mean score", "share labelled parasitized"),
        rows=tuple(
            (f"{low:.3f} – {high:.3f}", f"{n:,.0f}", f"{mean:.3f}", f"{observed:.3f}")
            for low, high, n, mean, observed in bins.to_numpy()
        ),
    )


def _dot(x: float, y: float, threshold: float) -> Series:
    note = f"threshold {threshold:g}"
    return Series(name=note, x=[x], y=[y], style="two", has_line=False, has_dots=True, notes=[note])


def _lines(
    title: str,
    words: str,
    series: list[Series],
    *,
    x: Axis,
    y: Axis,
    columns: tuple[str, ...] = (),
    rows: tuple[tuple[str, ...], ...] = (),
) -> Figure:
    """A line chart without legend, its words, its numbers."""
    return Figure(title, line_chart(title, words, series, x=x, y=y, has_legend=False), words, columns, rows)


def _score_histogram(connection: duckdb.DuckDBPyConnection, split: str | None, threshold: float) -> list[Figure]:
    found = connection.execute(_HISTOGRAM, {"split": split, "threshold": threshold}).fetchall()
    if not found:
        return []
    groups: list[tuple[str, str, list[int]]] = []
    for label, name, style in ((0, "uninfected", "one"), (1, "parasitized", "two"), (None, "no label", "three")):
        counts = [0] * 20
        for b, value, n, _ in found:
            counts[b] += n if value == label else 0
        if any(counts):
            groups.append((name, style, counts))
    n_all, n_called = sum(n for _, _, n, _ in found), sum(n for _, _, _, n in found)
    words = f"{n_all:,} cells in bins of 0.05; {n_called:,} have a score of the threshold {threshold:g} or above."
    rows = tuple(
        (f"{_EDGES[b]:.2f} – {_EDGES[b + 1]:.2f}", *(f"{counts[b]:,}" for _, _, counts in groups)) for b in range(20)
    )
    chart = histogram("Scores", words, _EDGES, groups, x=Axis(label="score, P(parasitized)"))
    return [Figure("Scores", chart, words, ("score", *(name for name, _, _ in groups)), rows)]


_CURVES = (("train", "training", "one"), ("val", "validation", "two"))


def of_training(connection: duckdb.DuckDBPyConnection, *, best_epoch: int) -> list[Figure]:
    """Loss and accuracy by epoch."""
    history = connection.execute("SELECT * FROM history ORDER BY epoch").df()
    if history.empty:
        return []
    best = history[history["epoch"] == best_epoch].iloc[0]
    figures = []
    for name, meaning in (
        ("loss", "mean binary cross-entropy"),
        ("accuracy", "share of images on the right side of 0.5"),
    ):
        lines = [_of_epochs(history, f"{split}_{name}", which, style) for split, which, style in _CURVES]
        values = history[[f"train_{name}", f"val_{name}"]].to_numpy()
        low, high = (0.0, float(np.nanmax(values))) if name == "loss" else (float(np.nanmin(values)), 1.0)
        words = (
            f"{name.capitalize()} ({meaning}) over {len(history)} epochs. The kept epoch {best_epoch} has "
            f"{best[f'val_{name}']:.4f} on validation, {best[f'train_{name}']:.4f} on training images."
        )
        title = f"{name.capitalize()} by epoch"
        epochs = Axis(
            label="epoch", low=float(history["epoch"].min()), high=float(history["epoch"].max()), is_whole=True
        )
        chart = line_chart(
            title,
            words,
            lines,
            x=epochs,
            y=Axis(label=name, low=low, high=high if high > low else low + 1),
            marks=[(float(best_epoch), f"kept: {best_epoch}")],
        )
        figures.append(Figure(title, chart, words))
    return figures


def _of_epochs(history: pd.DataFrame, column: str, name: str, style: str) -> Series:
    x, y = history["epoch"], history[column]
    notes = [f"epoch {epoch}, {name}: {value:.4f}" for epoch, value in zip(x, y, strict=True)]
    return Series(name=name, x=x, y=y, style=style, has_dots=True, notes=notes)


def of_patients(connection: duckdb.DuckDBPyConnection, *, split: str | None) -> Figure | None:
    """Each patient's parasitized fraction with its interval, from the lowest to the highest; at most 200 patients of a
    split.
    """
    patients = connection.execute(
        "SELECT * FROM patients WHERE split = $split ORDER BY parasitized_fraction, patient_id", {"split": split}
    ).df()
    if patients.empty:
        return None
    n = len(patients)
    shown = patients.iloc[np.unique(np.linspace(0, n - 1, min(n, _MAX_PATIENTS)).round().astype(int))]
    shown = shown.assign(place=np.arange(1, len(shown) + 1))
    series = []
    for label, name, style in _PATIENTS:
        rows = shown[shown["label"].isna() if label is None else shown["label"].eq(label).fillna(False)]
        if len(rows):
            series.append(
                Series(
                    name=name,
                    x=rows["place"],
                    y=rows["parasitized_fraction"],
                    low=rows["ci_low"],
                    high=rows["ci_high"],
                    style=style,
                    has_line=False,
                    has_dots=True,
                    notes=[
                        f"{printable(str(row.patient_id))}: {row.n_parasitized:,} of {row.n_cells:,} cells, "
                        f"{row.parasitized_fraction:.3f} ({row.ci_low:.3f} – {row.ci_high:.3f})"
                        for row in rows.itertuples()
                    ],
                )
            )
    of = f"{n:,} patients" if len(shown) == n else f"{len(shown)} of {n:,} patients, evenly chosen,"
    words = (
        f"{of} by their cells of the {split} split, from the lowest to the highest share called parasitized, with "
        f"95 % Wilson intervals. The median patient has {patients['parasitized_fraction'].median():.3f}. It is no "
        "parasitaemia."
    )
    chart = line_chart(
        "Parasitized fraction of each patient",
        words,
        series,
        x=Axis(label="patients, ordered", low=0, high=len(shown) + 1),
        y=Axis(label="parasitized fraction"),
        width=860,
        x_ticks=False,
    )
    return Figure("Parasitized fraction of each patient", chart, words)
