from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from results import cells, write_results

from malaria_ray.errors import DatasetError
from malaria_ray.schema import LABEL_AUDIT
from malaria_ray.stages import audit


def test_planted_wrong_labels_are_found_among_images_that_the_models_had_not_learnt_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    true = cells(3000, n_patients=60)
    rng = np.random.default_rng(0)
    planted = rng.choice(3000, 60, replace=False)  # 2 %
    wrong = true["label"].copy()
    wrong.iloc[planted] = 1 - wrong.iloc[planted]
    directories = []
    for model, seed in (("cnn", 1), ("vgg19-frozen", 2)):
        noise = np.random.default_rng(seed).normal(0, 0.08, 3000)
        score = np.clip(np.where(true["label"] == 1, 0.85, 0.15) + noise, 0, 1).astype(np.float32)
        of = true.assign(label=wrong, score=score)
        directories.append(write_results(tmp_path / model, of, model=model, has_images=False))
    audit.run(audit.Config(results=tuple(map(str, directories)), file=str(tmp_path / "audit.parquet")))
    table = pq.read_table(tmp_path / "audit.parquet")
    assert table.schema.names == LABEL_AUDIT.names
    found = set(table["image_id"].to_pylist())
    held_out = true[true["split"] == "test"]
    assert found <= set(held_out["image_id"]), "what a model has learnt from says nothing"
    is_planted = held_out.index.isin(planted)
    hits = held_out["image_id"].isin(found) & is_planted
    recall, precision = hits.sum() / is_planted.sum(), hits.sum() / len(found)
    assert recall > 0.8
    assert precision > 0.8
    assert set(table["n_models_against"].to_pylist()) == {2}
    assert f"{len(found)} of {len(held_out):,} labels are likely wrong" in " ".join(capsys.readouterr().out.split())


def test_results_of_images_that_were_learnt_from_are_refused(tmp_path: Path):
    results = write_results(tmp_path / "results", cells().assign(split="train"), has_images=False)
    with pytest.raises(DatasetError, match="no labelled image was scored out of fold"):
        audit.run(audit.Config(results=(str(results),), file=str(tmp_path / "audit.parquet")))
    assert not (tmp_path / "audit.parquet").exists()
