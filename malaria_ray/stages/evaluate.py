"""evaluate: the predictions of a results directory become metrics and a table of patients."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from rich.table import Table as RichTable
from tyro.conf import Positional
from upath import UPath

from malaria_ray.cells.copies import is_copy
from malaria_ray.errors import ConfigError, DatasetError
from malaria_ray.runtime import outputs, storage
from malaria_ray.runtime.provenance import code_digest
from malaria_ray.runtime.seeds import check_seed
from malaria_ray.runtime.terminal import console, number
from malaria_ray.schema import CURVES, DIFFERENCES, METRICS, PATIENTS, RESEARCH_ONLY, REVIEW, Call, Label, Split, Table
from malaria_ray.stages.comparison import Pair, check_labels, metrics_table, pair_of
from malaria_ray.stages.views import Results, check_cells, copies_line, known_patients_line, open_results, reading
from malaria_ray.statistics.intervals import Interval, bootstrap_over_patients
from malaria_ray.statistics.metrics import calibration_curve, cell_metrics, precision_recall_curve, roc_curve
from malaria_ray.statistics.patients import call_metrics, patient_counts, patient_metrics
from malaria_ray.statistics.review import review
from malaria_ray.statistics.validation import Validation

log = logging.getLogger("malaria_ray")

UNSEEN = "unseen"
"""Split of images that the run knew nothing of."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Computes metrics with intervals where the images have labels, and what was counted for each patient."""

    results: Positional[str]
    """Directory made by 'malaria-ray screen'."""
    against: str | None = None
    """Other results of the same images: these minus those, with paired intervals, go to differences/."""
    n_resamples: int = 1000
    """Resamples of the bootstrap over patients."""
    seed: int = 42
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.n_resamples < 100:
            raise ConfigError(f"--n-resamples {self.n_resamples}: at least 100 are needed for a 95 % interval")


@outputs.one_writer()
def run(config: Config) -> None:
    """Writes metrics/ and patients/ into the results directory and prints the report; computes nothing that is there
    already by the same code. Raises: `DirectoryError` where a table that screening writes is missing.
    """
    *against, opened = open_results([*([config.against] if config.against else []), config.results])
    results, success = opened.path, opened.success
    check_cells([opened])
    marker = results / "metrics" / outputs.SUCCESS
    identity = {
        "predictions": outputs.digests_in(success, "predictions"),
        "threshold": success["threshold"],
        "n_resamples": config.n_resamples,
        "seed": config.seed,
        "code_digest": code_digest(),
    }
    with reading([opened]) as connection:
        if marker.exists() and storage.read_json(marker)["identity"] == identity:
            log.info("%s is evaluated; nothing to do", results)
        else:
            outputs.check_written(results, success, "predictions", "model")
            outputs.hold_finished(results, "screen", success)
            storage.remove(marker)
            known = connection.sql("SELECT image_id, split FROM cells").df()
            files = _evaluate(config, opened, known.set_index("image_id")["split"])
            outputs.check_held(results)
            storage.write_json(marker, {"identity": identity, "files": files})
        notices = [line(connection, opened) for line in (known_patients_line, copies_line)]
    evaluated = storage.read_json(marker)
    _print_report(
        outputs.read_folder(results, evaluated, "metrics").to_pandas(),
        outputs.read_folder(results, evaluated, "patients").to_pandas(),
        success,
        notices=[notice for notice in notices if notice is not None],
    )
    for theirs in against:
        _compare(config, opened, theirs)


def _compare(config: Config, ours: Results, theirs: Results) -> None:
    """Writes differences/ and prints it. Raises: `DatasetError` where no image of both has a label."""
    for one in (theirs, ours):
        outputs.check_written(one.path, one.success, "predictions", "model")
    with reading([theirs, ours]) as connection:
        check_labels(connection)
        pair = pair_of(connection, theirs, ours, n_resamples=config.n_resamples, seed=config.seed)
    if pair.metrics is None:
        raise DatasetError(f"{ours.path} and {theirs.path} share no labelled image; --against compares by labels")
    results = ours.path
    outputs.hold_finished(results, "screen", ours.success)
    storage.remove(results / DIFFERENCES.name)
    written = pa.Table.from_pandas(_difference_rows(pair), schema=DIFFERENCES.arrow_schema(), preserve_index=False)
    files = outputs.write_table(results, f"{DIFFERENCES.name}/{storage.part_name(0)}", written, stage="screen")
    storage.write_json(results / DIFFERENCES.name / outputs.SUCCESS, {"files": files})
    console().print(metrics_table(pair))


def _difference_rows(pair: Pair) -> pd.DataFrame:
    ours, theirs, metrics = pair.other.success, pair.first.success, pair.metrics
    assert metrics is not None
    rows = metrics.rename(columns={"other": "value", "first": "against_value"}).rename_axis("metric").reset_index()
    return rows.assign(
        model=ours["model"],
        run_id=ours["run_id"],
        against_model=theirs["model"],
        against_run_id=theirs["run_id"],
        n=len(pair.cells),
        is_held_out=pair.is_held_out,
    )[DIFFERENCES.names]


def _evaluate(config: Config, opened: Results, split: pd.Series) -> dict[str, storage.FileRecord]:
    """Writes the tables. `split`: of each image, by image_id (index)."""
    results, success = opened.path, opened.success
    predictions = storage.concat(storage.read_table(file) for file in opened.files("predictions")).to_pandas()
    predictions["split"] = predictions["image_id"].map(split)
    cells = predictions[~is_copy(predictions, "split")]
    threshold = float(success["threshold"])
    validation = _validation(results)
    patients = pd.DataFrame(columns=PATIENTS.names)
    if len(predictions):
        patients = patient_counts(
            cells["patient_id"],
            cells["label"],
            cells["score"],
            threshold=threshold,
            split=cells["split"],
            parasitized=_parasitized(results),
            rates=validation.rates if validation else None,
        )
    rows: list[dict[str, Any]] = []
    curves: list[pd.DataFrame] = []
    for split, labelled in cells[cells["label"].notna()].groupby("split"):
        of_split = patients[(patients["split"] == split) & patients["label"].notna()]
        rows += _metric_rows(labelled, of_split, str(split), threshold=threshold, config=config)
        curves.append(_curves(labelled).assign(split=split))
    made: list[tuple[Table, pd.DataFrame]] = [
        (METRICS, pd.DataFrame(rows, columns=METRICS.names).assign(model=success["model"])),
        (CURVES, pd.concat([pd.DataFrame(columns=CURVES.names), *curves]).assign(model=success["model"])),
        (PATIENTS, patients),
    ]
    if validation is not None and len(predictions):
        made.append((REVIEW, _review(predictions, patients, validation)))
    outputs.check_held(results)
    storage.remove(results / REVIEW.name)
    files: dict[str, storage.FileRecord] = {}
    for table, frame in made:
        written = pa.Table.from_pandas(frame[table.names], schema=table.arrow_schema(), preserve_index=False)
        files |= outputs.write_table(results, f"{table.name}/{storage.part_name(0)}", written, stage="screen")
    return files


def _parasitized(results: UPath) -> set[str]:
    """The patients with a parasitized cell in the run's data set; their cells here may all be uninfected."""
    splits = storage.read_table(results / "model" / "splits.parquet", columns=["patient_id", "label"]).to_pandas()
    return set(splits.loc[splits["label"] == Label.parasitized, "patient_id"].dropna())


def _validation(results: UPath) -> Validation | None:
    """What the run learnt from its validation cells; None in results of a run that has not."""
    file = results / "model" / "validation.json"
    return Validation.from_dict(storage.read_json(file)) if file.exists() else None


def _curves(cells: pd.DataFrame) -> pd.DataFrame:
    label, score, n = cells["label"].to_numpy(np.int64), cells["score"].to_numpy(np.float32), len(cells)
    roc, precision_recall = roc_curve(label, score), precision_recall_curve(label, score)
    bins = calibration_curve(label, score)
    return pd.concat(
        pd.DataFrame({"curve": name, "x": x, "y": y, "threshold": threshold, "n": of})
        for name, x, y, threshold, of in (
            ("roc", roc["false_positive_rate"], roc["sensitivity"], roc["threshold"], n),
            (
                "precision_recall",
                precision_recall["sensitivity"],
                precision_recall["precision"],
                precision_recall["threshold"],
                n,
            ),
            ("calibration", bins["mean_score"], bins["observed_share"], math.nan, bins["n"]),
        )
    )


def _review(predictions: pd.DataFrame, patients: pd.DataFrame, validation: Validation) -> pd.DataFrame:
    """The review table, the first to look at first; scores and calls as they stand in the predictions."""
    calls = predictions[["patient_id", "split"]].merge(patients, on=["patient_id", "split"], how="left")["call"]
    table = review(
        predictions["image_id"],
        predictions["raw_score"],
        calibration=validation.calibration,
        quality_flags=predictions["quality_flags"].tolist(),
        is_novel=predictions["novelty"] > 1,
        patient_id=predictions["patient_id"],
        patient_call=calls,
    )
    table = table.assign(score=predictions["score"], predicted_label=predictions["predicted_label"])
    return table.sort_values(["rank", "image_id"], na_position="last")


def _metric_rows(
    cells: pd.DataFrame, patients: pd.DataFrame, split: str, *, threshold: float, config: Config
) -> list[dict[str, Any]]:
    """Rows of the metrics table for the labelled cells and patients of one split; the model's name is added by the
    caller.
    """
    label, score = cells["label"].to_numpy(np.int64), cells["score"].to_numpy(np.float32)
    values = cell_metrics(label, score, threshold=threshold)
    intervals = bootstrap_over_patients(
        label,
        score,
        cells["patient_id"],
        threshold=threshold,
        n_resamples=config.n_resamples,
        seed=config.seed,
    )
    rows = _rows(values, intervals, split=split, level="cell", n=len(cells), threshold=threshold)
    if patients.empty:
        return rows
    of_patients = patient_metrics(patients)
    intervals = bootstrap_over_patients(
        patients["label"].to_numpy(np.int64),
        patients["parasitized_fraction"].to_numpy(np.float64),
        patients["patient_id"],
        threshold=threshold,
        n_resamples=config.n_resamples,
        seed=config.seed,
    )
    ranked = {name: intervals[name] for name in ("roc_auc", "average_precision")}
    if patients["call"].notna().any():
        of_patients |= call_metrics(patients)
    for name, value in of_patients.items():
        n = len(patients)
        if name == "sensitivity":
            n = int(of_patients["n_patients_parasitized"])
        elif name == "specificity" or name.startswith("false_positive_rate"):
            n = int(of_patients["n_patients_uninfected"])
        rows += _rows({name: value}, ranked, split=split, level="patient", n=n, threshold=threshold)
    return rows


def _rows(
    values: dict[str, float], intervals: dict[str, Interval], *, split: str, level: str, n: int, threshold: float
) -> list[dict[str, Any]]:
    undefined = (math.nan, math.nan)
    return [
        {
            "model": None,
            "split": split,
            "level": level,
            "metric": name,
            "value": _or_null(value),
            "ci_low": _or_null(intervals.get(name, undefined)[0]),
            "ci_high": _or_null(intervals.get(name, undefined)[1]),
            "n": n,
            "threshold": threshold,
        }
        for name, value in values.items()
    ]


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value


_SHOWN = ("accuracy", "sensitivity", "specificity", "precision", "f1", "f1_weighted", "roc_auc")


def _print_report(
    metrics: pd.DataFrame, patients: pd.DataFrame, success: dict[str, Any], *, notices: Sequence[str]
) -> None:
    """What the article prints, by split: metrics, the classification report and the confusion matrix."""
    out = console()
    cells = metrics[metrics["level"] == "cell"]
    if cells.empty:
        out.print("No image has a label, so there are no metrics; patients/ has what was counted for each patient.")
    splits = [split for split in (*Split, UNSEEN) if (cells["split"] == split).any()]
    if splits:
        out.print(_metrics_table(cells, splits, success))
    for split in [split for split in splits if split in (Split.test, UNSEEN)] or splits[-1:]:
        out.print(_classification_report(cells[cells["split"] == split].set_index("metric")["value"], split))
    for notice in notices:
        out.print(notice, soft_wrap=True)
    out.print(f"{_patients_line(patients)}; their parasitized fraction is no parasitaemia. {RESEARCH_ONLY}")


def _patients_line(patients: pd.DataFrame) -> str:
    """How many patients there are and what they are called, by what the model knows of their cells."""
    of_each = []
    for split in (*Split, UNSEEN):
        calls = patients.loc[patients["split"] == split, "call"]
        if len(calls):
            said = ", ".join(f"{call} {(calls == call).sum():,}" for call in Call)
            of_each.append(f"{len(calls):,} {split}" + (f" (called {said})" if calls.notna().any() else ""))
    unknown = len(patients) and patients["call"].isna().all()
    return (
        f"{patients['patient_id'].nunique():,} patients in patients/"
        + (f", by split: {', '.join(of_each)}" if of_each else "")
        + ("; none is called, the run's rates of error are not known" if unknown else "")
    )


def _metrics_table(cells: pd.DataFrame, splits: Sequence[str], success: dict[str, Any]) -> RichTable:
    """Metrics by row, splits by column, with their intervals."""
    title = f"{success['model']}, by cell, 95 % intervals over patients" + (
        " (synthetic)" if success["is_synthetic"] else ""
    )
    of_split = {split: cells[cells["split"] == split].set_index("metric") for split in splits}
    table = RichTable("metric", *(f"{split} ({rows['n'].iloc[0]:,})" for split, rows in of_split.items()), title=title)
    for name in _SHOWN:
        table.add_row(
            name,
            *(
                number(rows["value"][name]) + _interval(rows["ci_low"][name], rows["ci_high"][name])
                for rows in of_split.values()
            ),
        )
    return table


def _classification_report(value: pd.Series, split: str) -> RichTable:
    """Precision, recall and F1 of each class and its row of the confusion matrix."""
    report = RichTable(
        "label",
        "precision",
        "recall",
        "f1",
        "called uninfected",
        "called parasitized",
        title=f"{split} split",
    )
    for label, precision, recall, f1, uninfected, parasitized in (
        (
            Label.uninfected,
            "precision_uninfected",
            "recall_uninfected",
            "f1_uninfected",
            "n_true_negative",
            "n_false_positive",
        ),
        (Label.parasitized, "precision", "sensitivity", "f1", "n_false_negative", "n_true_positive"),
    ):
        rates = (number(value[name]) for name in (precision, recall, f1))
        report.add_row(label.name, *rates, f"{value[uninfected]:,.0f}", f"{value[parasitized]:,.0f}")
    return report


def _interval(low: float, high: float) -> str:
    return "" if pd.isna(low) else f" ({low:.3f} – {high:.3f})"
