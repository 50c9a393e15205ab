"""audit: labels that are likely wrong, by the scores of models that have not learnt from them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pandas as pd
import pyarrow as pa
from rich.table import Table as RichTable
from tyro.conf import Positional

from malaria_ray.errors import DatasetError, QueryError
from malaria_ray.runtime import storage
from malaria_ray.runtime.terminal import console, printable
from malaria_ray.schema import LABEL_AUDIT, RESEARCH_ONLY
from malaria_ray.stages.views import absent_views, connect, open_results
from malaria_ray.statistics.audit import label_audit, metrics_with_and_without

log = logging.getLogger("malaria_ray")

_N_SHOWN = 10
_SHOWN = ("accuracy", "sensitivity", "specificity", "precision", "f1", "roc_auc")

# The mean over folds or seeds of a model, of those alone that have neither learnt from the image nor been chosen by it.
_OUT_OF_FOLD = """
    SELECT image_id, content_digest, any_value(label) AS label, any_value(patient_id) AS patient_id, model,
           avg(score) AS score
    FROM cells WHERE label IS NOT NULL AND split NOT IN ('train', 'val')
    GROUP BY image_id, content_digest, model ORDER BY image_id
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Lists the images whose label is contradicted by models that have not learnt from them, as the folds of a
    cross-validation are; says what the metrics are with and without these images.
    """

    results: Positional[tuple[str, ...]]
    """Directories made by 'malaria-ray screen', of one archive; folds of one model count as one."""
    file: str = "label_audit.parquet"
    """Parquet file to write; replaced where it is there."""


def run(config: Config) -> None:
    """Writes the table and prints its head. Raises: `QueryError`, `DatasetError` where no image can be audited."""
    opened = open_results(config.results)
    if (line := absent_views(opened).get("splits") or absent_views(opened).get("predictions")) is not None:
        raise QueryError(line)
    of_models = connect(opened).sql(_OUT_OF_FOLD).df()
    images = ["image_id", "content_digest"]
    cells = of_models.pivot(index=images, columns="model", values="score").dropna()
    if cells.empty:
        raise DatasetError(
            "no labelled image was scored out of fold by every model: audit results of the images that their runs held "
            "out, the folds of 'train --folds', say"
        )
    rows = of_models.drop_duplicates(images).set_index(images).loc[cells.index].reset_index()
    scores = {str(model): cells[model].to_numpy() for model in cells.columns}
    label = rows["label"].astype(int)
    found = label_audit(rows["image_id"], label, scores, patient_id=rows["patient_id"])
    table = pa.Table.from_pandas(found, schema=LABEL_AUDIT.arrow_schema(), preserve_index=False)
    storage.write_table(storage.locate(config.file), table)
    is_left_out = rows["image_id"].isin(found["image_id"])
    metrics = metrics_with_and_without(label, cells.mean(axis=1).to_numpy(), is_left_out, threshold=0.5)
    _print_report(found, metrics, n=len(rows), models=list(scores))
    log.info("label audit: %s", config.file)


def _print_report(found: pd.DataFrame, metrics: pd.DataFrame, *, n: int, models: list[str]) -> None:
    out = console()
    table = RichTable("image_id", "patient_id", "label", "mean score", "models against", title="least credible labels")
    for row in found.head(_N_SHOWN).itertuples():
        against = f"{row.n_models_against} of {row.n_models}"
        table.add_row(
            printable(str(row.image_id)),
            printable(str(row.patient_id)),
            str(row.label),
            f"{row.score_mean:.4f}",
            against,
        )
    out.print(table)
    both = RichTable("metric", f"all {n:,}", f"without {len(found):,}", title=f"mean of {', '.join(models)}")
    of = metrics.set_index("metric")
    for name in _SHOWN:
        both.add_row(name, f"{of['value'][name]:.4f}", f"{of['value_without'][name]:.4f}")
    out.print(both)
    out.print(
        f"{len(found):,} of {n:,} labels are likely wrong, or hard for these models; the truth lies between the two "
        f"columns. {RESEARCH_ONLY}"
    )
