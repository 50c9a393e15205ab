"""What 'compare' says of runs: validation of each, test data where results are given too, folds pooled, one figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table as RichTable
from upath import UPath

from malaria_ray.errors import ConfigError, DatasetError
from malaria_ray.runtime import outputs, storage
from malaria_ray.runtime.terminal import console, folded, number, printable
from malaria_ray.schema import Label
from malaria_ray.stages.pictures import runs_figure
from malaria_ray.stages.views import check_cells, open_results, reading
from malaria_ray.statistics.intervals import Interval, bootstrap_over_patients
from malaria_ray.statistics.metrics import cell_metrics

_OF_CALLS = ("accuracy", "sensitivity", "specificity", "precision", "f1")
_OF_SCORES = ("roc_auc",)
_SHOWN = (*_OF_CALLS, *_OF_SCORES)
_OF_FOLD = ("fold", "init_from")  # of a run's identity, what differs between the folds of one cross-validation


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished run. `test`: image_id, patient_id, label, score and predicted_label of its test split, None where no
    results of it are given.
    """

    name: str
    success: dict[str, Any]
    identity: dict[str, Any]
    history: pd.DataFrame
    test: pd.DataFrame | None


def compare_runs(urls: Sequence[str], *, n_resamples: int, seed: int) -> bytes:
    """Prints the tables of the runs among `urls`, the others being results of theirs; returns their figure, PNG.

    Raises as `open_runs` does.
    """
    runs = open_runs(urls)
    out = console()
    out.print(_validation_table(runs))
    if any(run.test is not None for run in runs):
        out.print(_test_table(runs, n_resamples=n_resamples, seed=seed))
    curves = {run.name: run.history for run in runs}
    tests = {run.name: run.test for run in [*runs, *pooled(runs)] if run.test is not None}
    scores = {name: test for name, test in tests.items() if test["label"].nunique() == len(Label)}
    return runs_figure(curves, scores)


def open_runs(urls: Sequence[str]) -> list[Run]:
    """The runs among directories at local paths or URLs, each with the test scores of its results among them.

    Raises: `ConfigError` where a directory or the results of a run are given twice, or results belong to none of the
    runs; `DatasetError` where results have no test data; `NotCompleteError`, `DirectoryError`.
    """
    paths = [storage.locate(url) for url in urls]
    if len({str(path) for path in paths}) < len(paths):
        raise ConfigError(f"{', '.join(urls)}: one directory is given twice; give each once")
    of_runs = [path for path in paths if outputs.stage_of(path) != "screen"]
    runs = {path: outputs.check_complete(path, "train") for path in of_runs}
    results: dict[str, UPath] = {}
    for path in paths:
        if path in runs:
            continue
        run_id = str(outputs.check_complete(path, "screen")["run_id"])
        if run_id not in {success["run_id"] for success in runs.values()}:
            raise ConfigError(f"{path} are results of {run_id}, which is none of the runs given; give that run too")
        if run_id in results:
            raise ConfigError(f"{results[run_id]} and {path} are results of one run, {run_id}; give one of them")
        results[run_id] = path
    tests = {run_id: _test_scores(path) for run_id, path in results.items()}
    return [
        Run(
            name=name,
            success=success,
            identity=outputs.read_config(path, "train")["identity"],
            history=outputs.read_written(path, success, "history.parquet").to_pandas(),
            test=tests.get(success["run_id"]),
        )
        for name, (path, success) in zip(storage.short_names(list(runs)), runs.items(), strict=True)
    ]


def pooled(runs: Sequence[Run]) -> list[Run]:
    """The folds of each cross-validation that have results, as one run whose test cells are those of all its folds."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.identity.get("fold") and run.test is not None:
            n_folds = run.identity["fold"].rpartition(" ")[2]
            rest = {name: value for name, value in run.identity.items() if name not in _OF_FOLD}
            groups.setdefault(repr((n_folds, sorted(rest.items(), key=str))), []).append(run)
    validations = [folds for folds in groups.values() if len(folds) > 1]
    return [
        Run(
            name=name,
            success=folds[0].success,
            identity=folds[0].identity,
            history=pd.concat([run.history for run in folds]),
            test=pd.concat([run.test for run in folds]).drop_duplicates("image_id"),
        )
        for name, folds in zip(_pooled_names(validations), validations, strict=True)
    ]


def _pooled_names(validations: Sequence[Sequence[Run]]) -> list[str]:
    """How many folds of which model; where several would have one name, also what differs in their identities."""
    identities = [folds[0].identity for folds in validations]
    names = [
        f"{len({run.identity['fold'] for run in folds})} of {identity['fold'].rpartition(' ')[2]} folds of "
        f"{identity['model']}"
        for folds, identity in zip(validations, identities, strict=True)
    ]
    unique = []
    for name, identity in zip(names, identities, strict=True):
        alike = [other for other, its_name in zip(identities, names, strict=True) if its_name == name]
        differing = [
            f"{key} {identity.get(key, 'unknown')}"
            for key in sorted({key for other in alike for key in other} - set(_OF_FOLD))
            if len({repr(other.get(key, "unknown")) for other in alike}) > 1
        ]
        unique.append(", ".join([name, *differing]))
    return unique


def _test_scores(path: UPath) -> pd.DataFrame:
    """The labelled cells of the run's test split in results of it. Raises: `DatasetError` where there is none."""
    opened = open_results([str(path)])
    check_cells(opened)
    with reading(opened) as connection:
        test: pd.DataFrame = connection.sql(
            "SELECT image_id, patient_id, label, score, predicted_label FROM cells "
            "WHERE split = 'test' AND label IS NOT NULL AND NOT is_copy ORDER BY image_id"
        ).df()
    if test.empty:
        raise DatasetError(
            f"{path} has no labelled cell of the test split of its run, so nothing can be compared; screen the data "
            "set that the run was trained on, or leave these results out"
        )
    return test


def _validation_table(runs: Sequence[Run]) -> RichTable:
    table = RichTable("run", "model", "split by", "epoch", "accuracy", "loss", "ROC AUC", "trained", "minutes",
                      title="Validation, best epoch; trained: millions of parameters")  # fmt: skip
    for run in runs:
        best, fold = run.success["best"], run.identity.get("fold")
        table.add_row(
            printable(run.name),
            run.success["model"],
            run.identity["split_by"] + (f", fold {fold}" if fold else ""),
            f"{best['epoch']:.0f} of {len(run.history)}",
            *(f"{best[name]:.4f}" for name in ("val_accuracy", "val_loss", "val_roc_auc")),
            f"{run.success['parameters']['trainable'] / 1e6:.1f}",
            f"{run.history['seconds'].sum() / 60:.1f}",
        )
    return folded(table)


def _test_table(runs: Sequence[Run], *, n_resamples: int, seed: int) -> RichTable:
    table = RichTable("run", "cells", *_SHOWN, title="Test split, 95 % intervals over patients")
    for run in [*runs, *pooled(runs)]:
        if run.test is None:
            continue
        values, intervals = _test_metrics(run.test, n_resamples=n_resamples, seed=seed)
        shown = [number(values[name]) + _interval(*intervals[name]) for name in _SHOWN]
        table.add_row(printable(run.name), f"{len(run.test):,}", *shown)
    return folded(table)


def _test_metrics(test: pd.DataFrame, *, n_resamples: int, seed: int) -> tuple[dict[str, float], dict[str, Interval]]:
    """Those of calls are taken from the calls: each of several folds has a threshold of its own."""
    label, values, intervals = test["label"].to_numpy(np.int64), dict[str, float](), dict[str, Interval]()
    for column, names in (("predicted_label", _OF_CALLS), ("score", _OF_SCORES)):
        score = test[column].to_numpy(np.float32)
        found = cell_metrics(label, score, threshold=0.5)
        ends = bootstrap_over_patients(
            label, score, test["patient_id"], threshold=0.5, n_resamples=n_resamples, seed=seed
        )
        values |= {name: found[name] for name in names}
        intervals |= {name: ends[name] for name in names}
    return values, intervals


def _interval(low: float, high: float) -> str:
    return "" if np.isnan(low) else f"\n{low:.3f}–{high:.3f}"
