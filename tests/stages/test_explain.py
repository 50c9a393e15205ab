"""explain on the small line: a real trained cnn, its archive, its results."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from stages.conftest import content

from malaria_ray.errors import ArchiveError, ConfigError, DirectoryError, NotCompleteError
from malaria_ray.runtime import storage
from malaria_ray.stages import explain


def ids_of(results) -> list[str]:
    parts = storage.parts(storage.locate(str(results)) / "predictions")
    return storage.read_table(parts[0], columns=["image_id"])["image_id"].to_pylist()


def test_every_image_gets_its_heat_and_its_picture(line, tmp_path):
    names = ids_of(line.results)[:3]
    explain.run(explain.Config(results=str(line.results), image_ids=tuple(names), out=str(tmp_path / "out")))
    with np.load(tmp_path / "out" / "heatmaps.npz", allow_pickle=False) as arrays:
        assert arrays["image_id"].tolist() == names
        assert arrays["heat"].shape == (3, 32, 32)
    made = {file.name for file in (tmp_path / "out" / "overlays").iterdir()}
    assert made == {explain.file_name(name) for name in names}
    assert (tmp_path / "out" / "contact_sheet.png").stat().st_size > 1000


def test_another_call_leaves_no_picture_of_the_one_before_and_nothing_else_is_touched(line, copy_of, tmp_path):
    names = ids_of(line.results)[:2]
    for chosen in (names, names[1:]):
        explain.run(explain.Config(results=str(line.results), image_ids=tuple(chosen), out=str(tmp_path / "out")))
    assert [file.name for file in (tmp_path / "out" / "overlays").iterdir()] == [explain.file_name(names[1])]
    dataset = copy_of(line.dataset)
    before = content(dataset)
    with pytest.raises(DirectoryError, match="is not empty and was not made by 'malaria-ray explain'"):
        explain.run(explain.Config(results=str(line.results), image_ids=tuple(names), out=str(dataset)))
    assert content(dataset) == before


def test_parts_that_lie_beside_the_recorded_ones_are_not_explained(line, copy_of, tmp_path):
    results = copy_of(line.results)
    (part,) = storage.parts(storage.locate(str(results)) / "predictions")
    (name, *_) = ids_of(results)
    shutil.copy(part, results / "predictions" / "part-00009.parquet")
    explain.run(explain.Config(results=str(results), image_ids=(name,), out=str(tmp_path / "out")))
    with np.load(tmp_path / "out" / "heatmaps.npz", allow_pickle=False) as arrays:
        assert arrays["image_id"].tolist() == [name]


def test_what_cannot_be_explained_is_one_line(line, copy_of, tmp_path):
    name = ids_of(line.results)[0]
    with pytest.raises(ConfigError, match="no score of 'none.png'.*look like"):
        explain.run(explain.Config(results=str(line.results), image_ids=("none.png",)))
    with pytest.raises(NotCompleteError, match="is not there"):
        explain.run(explain.Config(results=str(line.results), image_ids=(name,), model=str(tmp_path / "gone")))
    moved = line.archive.rename(line.archive.with_suffix(".moved"))
    try:
        with pytest.raises(ArchiveError, match="cells.zip"):
            explain.run(explain.Config(results=str(line.results), image_ids=(name,)))
    finally:
        moved.rename(line.archive)
