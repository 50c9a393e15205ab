"""audit: labels that are likely wrong, by the scores of runs that were not trained on the image."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import tyro
from rich.table import Table as RichTable
from rich.text import Text
from tyro.conf import Positional
from upath import UPath

from malaria_ray.cells.copies import is_copy
from malaria_ray.errors import ConfigError, DatasetError
from malaria_ray.runtime import outputs, storage
from malaria_ray.runtime.terminal import console, number, printable
from malaria_ray.schema import AUDIT_METRICS, LABEL_AUDIT, RESEARCH_ONLY, Label
from malaria_ray.stages.views import Results, check_cells, open_results, reading
from malaria_ray.statistics.audit import label_audit, likely_wrong, mean_score, metrics_with_and_without

log = logging.getLogger("malaria_ray")

MEAN = "mean"
"""`results` of the rows of audit_metrics for the models' mean score."""

_N_SHOWN = 10
_SHOWN = ("accuracy", "sensitivity", "specificity", "roc_auc", "average_precision")

_OUT_OF_FOLD = """
    SELECT image_id, content_digest, patient_id, label, score, run_id, results, knows_patient
    FROM cells
    WHERE label IS NOT NULL AND split NOT IN ('train', 'val')
    ORDER BY image_id, content_digest, results
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Finds labels that are likely wrong (confident learning). Each image is judged by the scores of the runs that were
    not trained on it: one results directory audits what its run held out, those of all folds the whole data set.
    """

    results_and_audit: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="RESULTS [RESULTS …] AUDIT")]
    """Directories made by 'malaria-ray screen', then the directory to write."""
    overwrite: bool = False
    """Delete an audit that is there and begin again."""

    def __post_init__(self) -> None:
        if len(self.results_and_audit) < 2:
            raise ConfigError("give one or several results directories, then the directory to write the audit to")


@outputs.one_writer()
def run(config: Config) -> None:
    """Writes label_audit/ and audit_metrics/ and prints them in short; does nothing where that is done.

    Raises: `DatasetError` where no label can be audited, `ConfigError`, `DirectoryError`.
    """
    started = time.monotonic()
    opened = open_results(config.results_and_audit[:-1])
    path = storage.locate(config.results_and_audit[-1])
    check_cells(opened)
    identity = {one.name: _records(one) for one in opened}
    claim = outputs.claim(
        path,
        stage="audit",
        config=config,
        identity=identity,
        overwrite=config.overwrite,
        inputs=config.results_and_audit[:-1],
    )
    if claim is None:
        log.info("%s is finished; nothing to do", path)
    else:
        with reading(opened) as connection:
            found = connection.sql(_OUT_OF_FOLD).df()
        _audit(found, opened, claim, started)
    _print_report(path, outputs.check_complete(path, "audit"))


def _records(one: Results) -> dict[str, str]:
    return {
        name: record["sha256"]
        for name, record in one.success["files"].items()
        if name.startswith("predictions/") or name == "model/splits.parquet"
    }


def _audit(found: pd.DataFrame, opened: Sequence[Results], claim: outputs.Claim, started: float) -> None:
    _check(found)
    images = found.groupby("image_id").agg(
        label=("label", "first"), patient_id=("patient_id", "first"), content_digest=("content_digest", "first")
    )
    by_results = found.pivot(index="image_id", columns="results", values="score").loc[images.index]
    label = images["label"].to_numpy(np.int64)
    scores = {str(name): by_results[name].to_numpy(np.float32) for name in by_results}
    _, mean = mean_score(label, scores)
    is_doubted = likely_wrong(label, scores)
    table = label_audit(images.index, label, scores, patient_id=images["patient_id"])
    is_counted = ~is_copy(images).to_numpy()
    common = float(np.mean([float(one.success["threshold"]) for one in opened if one.name in scores]))
    of_mean = metrics_with_and_without(label[is_counted], mean[is_counted], is_doubted[is_counted], threshold=common)
    metrics = [of_mean.assign(results=MEAN, model=None, threshold=common)]
    for one in opened:
        if one.name not in scores:
            continue
        has_score, threshold = is_counted & ~np.isnan(scores[one.name]), float(one.success["threshold"])
        metrics.append(
            metrics_with_and_without(
                label[has_score], scores[one.name][has_score], is_doubted[has_score], threshold=threshold
            ).assign(results=one.name, model=one.success["model"], threshold=threshold)
        )
    claim.begin()
    path = claim.path
    files: dict[str, storage.FileRecord] = {}
    for kind, frame in ((LABEL_AUDIT, table), (AUDIT_METRICS, pd.concat(metrics))):
        rows = pa.Table.from_pandas(frame[kind.names], schema=kind.arrow_schema(), preserve_index=False)
        files |= outputs.write_table(path, f"{kind.name}/{storage.part_name(0)}", rows, stage="audit")
    counts = {
        "n_audited": len(images),
        "n_likely_wrong": len(table),
        "n_scores": len(found),
        "n_scores_of_known_patients": int(found["knows_patient"].sum()),
        "n_results": len(scores),
    }
    outputs.finish(path, counts=counts, files=files, timings={"seconds": round(time.monotonic() - started, 3)})


def _check(found: pd.DataFrame) -> None:
    """Raises: `DatasetError` where there is nothing to audit or a score or label is none, `ConfigError` where two
    results have the scores of one run for one image.
    """
    if found.empty:
        raise DatasetError(
            "no labelled image was scored by a run that was not trained on it: nothing can be audited; give results of "
            "runs that held images out, those of all folds for the whole data set"
        )
    scores = found["score"].astype(np.float64)
    if (bad := ~scores.between(0, 1)).any():
        row = found[bad].iloc[0]
        raise DatasetError(
            f"{bad.sum():,} scores are no numbers in 0..1, the first {row['score']} of {row['image_id']!r} in "
            f"{row['results']}: 'malaria-ray verify' says whether the file was changed; screen anew"
        )
    for column, what in (("content_digest", "contents"), ("label", "labels")):
        several = found.groupby("image_id")[column].nunique()
        if len(several := several[several > 1]):
            raise DatasetError(
                f"{len(several):,} images have several {what} in these results, the first {several.index[0]!r}: give "
                "results of one archive"
            )
    if (twice := found.duplicated(["image_id", "run_id"])).any():
        row = found[twice].iloc[0]
        raise ConfigError(
            f"run {row['run_id']} scored {row['image_id']!r} in two of these results: give the scores of a run once"
        )


def _print_report(path: UPath, success: dict[str, Any]) -> None:
    counts, out = success["counts"], console()
    audit = outputs.read_folder(path, success, LABEL_AUDIT.name).to_pandas()
    metrics = outputs.read_folder(path, success, AUDIT_METRICS.name).to_pandas()
    shown = RichTable("results", "metric", "all", "without", title="metrics with and without likely wrong labels")
    for name, rows in metrics.groupby("results", sort=False):
        of = rows.set_index("metric")
        for metric in _SHOWN:
            row = of.loc[metric]
            cells = (
                f"{number(row['value'])} ({row['n']:,})",
                f"{number(row['value_without'])} ({row['n_without']:,})",
            )
            shown.add_row(printable(str(name)), metric, *cells)
    out.print(shown)
    if len(audit):
        table = RichTable("image", "label", "mean score", "models against", title="the least credible labels")
        for row in audit.head(_N_SHOWN).itertuples():
            against = f"{row.n_models_against} of {row.n_models}"
            image = Text(printable(str(row.image_id)))
            table.add_row(image, Label(row.label).name, f"{row.score_mean:.4f}", against)
        out.print(table)
    out.print(
        f"{len(audit):,} of {counts['n_audited']:,} labels are likely wrong; all in {LABEL_AUDIT.name}/. Models and "
        "labels disagree there, and either may be wrong: look at them before a label is changed. Metrics without them "
        "flatter the models, whose own doubts chose what is left out.",
        soft_wrap=True,
    )
    if known := counts["n_scores_of_known_patients"]:
        out.print(
            f"{known:,} of {counts['n_scores']:,} scores are of runs that were trained or tuned on other images of the "
            "patient (split by image, or new images of a known patient); scores of patients new to the run say more.",
            soft_wrap=True,
        )
    out.print(RESEARCH_ONLY)
