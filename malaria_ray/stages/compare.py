"""compare: two or more results directories side by side, on the images that they share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from rich.markup import escape
from rich.table import Table as RichTable
from tyro.conf import Positional

from malaria_ray.errors import ConfigError, QueryError
from malaria_ray.runtime.terminal import console, printable
from malaria_ray.schema import RESEARCH_ONLY
from malaria_ray.stages.views import Results, absent_views, connect, open_results
from malaria_ray.statistics.intervals import paired_bootstrap_over_patients
from malaria_ray.statistics.metrics import COUNTS, cell_metrics

_SHOWN = (
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
    SELECT first.image_id, first.label, coalesce(first.patient_id, other.patient_id) AS patient_id,
           first.score AS score, other.score AS other_score,
           first.predicted_label AS called, other.predicted_label AS other_called,
           first.split NOT IN ('train', 'val') AND other.split NOT IN ('train', 'val') AS is_held_out
    FROM cells AS first JOIN cells AS other USING (image_id)
    WHERE first.results = $first AND other.results = $other
    AND first.content_digest IS NOT DISTINCT FROM other.content_digest
    ORDER BY image_id
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compares each results directory with the first: differences of metrics with paired intervals, disagreements."""

    results: Positional[tuple[str, ...]]
    """Two or more directories made by 'malaria-ray screen', the one to compare with first."""
    n_resamples: int = 1000
    """Resamples of the bootstrap over patients."""
    seed: int = 42
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        if len(self.results) < 2:
            raise ConfigError(f"{len(self.results)} results directories were given; give two or more")
        if self.n_resamples < 100:
            raise ConfigError(f"--n-resamples {self.n_resamples}: at least 100 are needed for a 95 % interval")


def run(config: Config) -> None:
    """Prints one table for each directory but the first."""
    first, *others = opened = open_results(config.results)
    if (line := absent_views(opened).get("splits") or absent_views(opened).get("predictions")) is not None:
        raise QueryError(line)
    connection = connect(opened)
    for other in others:
        shared = connection.sql(_SHARED, params={"first": first.name, "other": other.name}).df()
        _print_pair(first, other, shared, config)
    console().print(RESEARCH_ONLY)


def differences(cells: pd.DataFrame, first: Results, other: Results, config: Config) -> pd.DataFrame:
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
        n_resamples=config.n_resamples,
        seed=config.seed,
    )
    table = pd.DataFrame({"first": values, "other": other_values})
    table["difference"] = table["other"] - table["first"]
    table[["ci_low", "ci_high"]] = [intervals[str(name)] for name in table.index]
    return table


def _print_pair(first: Results, other: Results, shared: pd.DataFrame, config: Config) -> None:
    out = console()
    names = [escape(f"{printable(one.name)} ({one.success['run_id']})") for one in (first, other)]
    if shared.empty:
        raise QueryError(
            f"{first.path} and {other.path} share no image of the same name and content; compare results of one archive"
        )
    differ = shared[shared["called"] != shared["other_called"]]
    labelled = shared[shared["label"].notna()]
    held_out = labelled[labelled["is_held_out"]]
    cells, of = (held_out, "held-out cells") if len(held_out) else (labelled, "cells, none of them held out by both")
    if len(cells):
        table = RichTable("metric", *names, "difference", "95 % interval", title=f"{len(cells):,} shared {of}")
        table.columns[0].no_wrap = True
        rows = differences(cells, first, other, config)
        for name in _SHOWN:
            row = rows.loc[name]
            digits = ",.0f" if name in COUNTS else ".4f"
            interval = "" if np.isnan(row["ci_low"]) else f"{row['ci_low']:+.4f} to {row['ci_high']:+.4f}"
            moved = f"{row['difference']:+{digits}}"
            table.add_row(name, f"{row['first']:{digits}}", f"{row['other']:{digits}}", moved, interval)
        out.print(table)
    else:
        out.print("No shared image has a label, so there are no metrics to compare.")
    out.print(
        f"{len(differ):,} of {len(shared):,} shared images are called differently; the scores differ by "
        f"{(shared['other_score'] - shared['score']).mean():+.4f} on average.",
        soft_wrap=True,
    )
    out.print(
        f"malaria-ray query {first.path} {other.path} --example model-disagreement lists them.",
        markup=False,
        soft_wrap=True,
    )
