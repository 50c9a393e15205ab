"""Results directories written without Ray or a model, for tests of what reads them: any names, scores and labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from samples import noise
from upath import UPath

from malaria_ray.archives import open_archive
from malaria_ray.archives.listing import list_archive
from malaria_ray.cells.images import content_digest
from malaria_ray.runtime import outputs, storage
from malaria_ray.schema import HISTORY, LISTING, PREDICTIONS, QUARANTINE, SPLITS, Table
from malaria_ray.stages import screen
from malaria_ray.statistics.validation import learn_from_validation

HOSTILE = (
    "<script>alert(1)<",
    "</script><img src=x onerror=alert(2)>",
    "quote\"'`&amp;&lt;",
    "line\nbreak\ttab\x1b[31mred",
    "\u202egnp.exe\u202c",
    "{{ 7*7 }}{% raw %}",
    "=cmd()",
    "é한\U0001f9a0",
    "x" * 150 + "/" + "y" * 146,
)
"""Names that break pages, terminals and spreadsheets; `/` is a folder."""


def cells(n: int = 240, *, n_patients: int = 12, seed: int = 3, scores_seed: int | None = None) -> pd.DataFrame:
    """Cells of healthy (C…) and infected (P…) patients in all three splits, with scores that are mostly right.

    Columns image_id, patient_id, label, score, split. Splits are by patient.
    """
    rng = np.random.default_rng([seed])
    patient = rng.integers(n_patients, size=n)
    is_infected = patient % 2 == 1
    label = (is_infected & (rng.random(n) < 0.8)).astype(int)
    rng = np.random.default_rng([seed if scores_seed is None else scores_seed, 1])
    score = np.clip(np.where(label == 1, 0.75, 0.25) + rng.normal(0, 0.2, n), 0, 1).astype(np.float32)
    return pd.DataFrame(
        {
            "image_id": [f"{'Parasitized' if y else 'Uninfected'}/cell_{i:05d}.png" for i, y in enumerate(label)],
            "patient_id": [f"{'P' if p % 2 else 'C'}{p}" for p in patient],
            "label": label,
            "score": score,
            "split": [("train", "val", "test", "test")[p % 4 if p > 3 else p] for p in patient],
        }
    )


def write_results(
    results: Path,
    of: pd.DataFrame,
    *,
    bad: tuple[str, ...] = (),
    archive: Path | None = None,
    model: str = "cnn",
    is_synthetic: bool = False,
    has_images: bool = True,
    has_validation: bool = False,
    part_rows: int = 1_000_000,
    split_by: str = "patient",
) -> Path:
    """A finished results directory over cells as `cells` gives them; `bad` are names in quarantine. The images are
    written to `archive`, by default a folder beside it; without images it is an archive that is gone. A column
    content_digest makes copies. With validation its model has learnt from the validation cells. Predictions are
    written in the order given, in parts of `part_rows`.
    """
    archive = archive or results.with_name(f"{results.name}-archive")
    images = {name: noise(i) if has_images else name.encode() for i, name in enumerate(of["image_id"])}
    images |= dict.fromkeys(bad, b"not an image")
    for name, data in images.items() if has_images else ():
        (archive / name).parent.mkdir(parents=True, exist_ok=True)
        (archive / name).write_bytes(data)
    path = UPath(results)
    config = screen.Config(source=str(archive), results=str(results), model="run")
    identity = {"archive": str(archive), "run_id": f"{model}-1", "engine": "onnx", "split": "all", "threshold": 0.5}
    with outputs.one_writer():
        outputs.claim(path, stage="screen", config=config, identity=identity, overwrite=False).begin()
    predictions = of.assign(
        predicted_label=(of["score"] >= 0.5).astype(int),
        width=26,
        height=30,
        content_digest=of.get("content_digest", [content_digest(images[name]) for name in of["image_id"]]),
        model=model,
        run_id=f"{model}-1",
        raw_score=of["score"],
        novelty=0.5,
        quality_flags=pd.Series([[] for _ in of["image_id"]], of.index, dtype=object),
    )
    quarantine = pd.DataFrame(
        {
            "image_id": list(bad),
            "stage": "screen",
            "reason": "not_an_image",
            "detail": [f"begins with {name[:20]}" for name in bad],
            "n_bytes": 12,
            "content_digest": content_digest(b"not an image"),
        }
    )
    history = pd.DataFrame([dict.fromkeys(HISTORY.names, 0.5 / epoch) | {"epoch": epoch} for epoch in (1, 2, 3)])
    listing = list_archive(open_archive(str(archive))) if has_images else _listing_of(of, archive)
    files = {
        "listing.parquet": storage.write_table(path / "listing.parquet", listing),
        "quarantine/part-00000.parquet": _write(path / "quarantine/part-00000.parquet", QUARANTINE, quarantine),
        "model/splits.parquet": _write(path / "model/splits.parquet", SPLITS, predictions.dropna(subset="split")),
        "model/history.parquet": _write(path / "model/history.parquet", HISTORY, history),
    }
    for number, first in enumerate(range(0, max(1, len(predictions)), part_rows)):
        name = f"predictions/{storage.part_name(number)}"
        files[name] = _write(path / name, PREDICTIONS, predictions.iloc[first : first + part_rows])
    trained = {"model": model, "split_by": split_by, "epochs": 3, "seed": 42, "dataset": "dataset"}
    storage.write_json(path / "model" / "config.json", {"stage": "train", "identity": {}, "config": trained})
    storage.write_json(path / "model" / "SUCCESS.json", {"image_size": 32, "best": {"epoch": 2.0}})
    names = ["config.json", "SUCCESS.json"]
    if has_validation:
        names.append("validation.json")
        of_val = predictions[(of["split"] == "val") & of["label"].notna()].drop_duplicates("content_digest")
        validation = learn_from_validation(of_val, specificity=None)
        storage.write_json(path / "model" / "validation.json", validation.to_dict())
    for name in names:
        files[f"model/{name}"] = storage.record_of(path / "model" / name)
    counts: dict[str, Any] = {
        "n_files": len(images),
        "n_scored": len(of),
        "n_quarantined": len(bad),
        "quarantine_reasons": {"not_an_image": len(bad)} if bad else {},
        "n_called_parasitized": int(predictions["predicted_label"].sum()),
    }
    outputs.finish(
        path,
        counts=counts,
        files=files,
        timings={},
        run_id=f"{model}-1",
        model=model,
        threshold=0.5,
        is_synthetic=is_synthetic,
    )
    return results


def record(results: Path, name: str) -> None:
    """Takes a file as it is now for the one that screening wrote."""
    path = UPath(results)
    success = storage.read_json(path / outputs.SUCCESS)
    success["files"][name] = storage.record_of(path / name)
    storage.write_json(path / outputs.SUCCESS, success)


def _listing_of(of: pd.DataFrame, archive: Path) -> pa.Table:
    """The listing of a folder that was there once."""
    known = of.sort_values("image_id").assign(key=range(len(of)), n_bytes=1, container=str(archive), method="file")
    frame = known.reindex(columns=LISTING.names)
    return pa.Table.from_pandas(frame, schema=LISTING.arrow_schema(), preserve_index=False)


def _write(path: UPath, table: Table, frame: pd.DataFrame) -> storage.FileRecord:
    arrow = pa.Table.from_pandas(frame[table.names], schema=table.arrow_schema(), preserve_index=False)
    return storage.write_table(path, arrow)
