"""The line on real cells: a part of the NIH/NLM set, where ../shared/data is beside the checkout."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from stages.conftest import IMAGE_SIZE

from malaria_ray.archives import open_archive
from malaria_ray.archives.listing import list_archive
from malaria_ray.archives.patients import patient_rule
from malaria_ray.stages import evaluate, ingest, screen, train, verify

DATA = Path(__file__).parents[3] / "shared" / "data"
ARCHIVE = DATA / "nih_cell_images_dev.zip"
MAPPINGS = tuple(str(DATA / f"patientid_cellmapping_{label}.csv") for label in ("parasitized", "uninfected"))

pytestmark = pytest.mark.skipif(not ARCHIVE.exists(), reason=f"{ARCHIVE.name} is not in ../shared/data")


def test_the_whole_archive_is_listed_with_its_labels_and_patients():
    rule = patient_rule(MAPPINGS, None)
    listing = list_archive(open_archive(str(ARCHIVE)), patients=rule.of_file, pattern=rule.pattern).to_pandas()
    assert len(listing) == 10_678
    assert listing["label"].value_counts().to_dict() == {0: 5_575, 1: 5_103}
    assert listing["patient_id"].nunique() == 81
    assert listing["patient_id"].notna().all()


def test_names_and_mapping_files_give_the_same_patients():
    rule = patient_rule(MAPPINGS, None)
    by_name = list_archive(open_archive(str(ARCHIVE)))
    by_mapping = list_archive(open_archive(str(ARCHIVE)), patients=rule.of_file, pattern=rule.pattern)
    assert by_name["patient_id"].equals(by_mapping["patient_id"])


def test_the_line_on_every_sixth_real_cell(tmp_path: Path):
    with zipfile.ZipFile(ARCHIVE) as whole, zipfile.ZipFile(tmp_path / "some.zip", "w") as some:
        for name in whole.namelist()[::6]:
            some.writestr(name, whole.read(name))
    paths = {name: str(tmp_path / name) for name in ("dataset", "run", "of_dataset", "of_zip")}
    ingest.run(
        ingest.Config(
            archive=str(tmp_path / "some.zip"), dataset=paths["dataset"], patients=MAPPINGS, image_size=IMAGE_SIZE
        )
    )
    train.run(train.Config(dataset=paths["dataset"], run=paths["run"], model="cnn", epochs=8, batch_size=16))
    screen.run(screen.Config(source=paths["dataset"], results=paths["of_dataset"], model=paths["run"]))
    screen.run(
        screen.Config(source=str(tmp_path / "some.zip"), results=paths["of_zip"], model=paths["run"], patients=MAPPINGS)
    )
    of_dataset, of_zip = (pq.read_table(f"{paths[name]}/predictions") for name in ("of_dataset", "of_zip"))
    assert of_dataset.equals(of_zip)
    evaluate.run(evaluate.Config(results=paths["of_zip"]))
    metrics = pq.read_table(f"{paths['of_zip']}/metrics").to_pandas().set_index(["split", "level", "metric"])
    # Small crops and few of them: well above chance is all that is asked here; README.md has what the real run gives.
    assert metrics.loc[("test", "cell", "roc_auc"), "value"] > 0.75
    low, high = metrics.loc[("test", "cell", "roc_auc"), ["ci_low", "ci_high"]].astype(float)
    assert np.isfinite([low, high]).all()
    for path in paths.values():
        verify.run(verify.Config(directory=path))
