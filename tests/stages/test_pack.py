from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from stages.conftest import IMAGE_SIZE, Line, content
from stages.test_screen import predictions_of, screen_of

from malaria_ray.archives import open_archive
from malaria_ray.archives.listing import list_archive
from malaria_ray.archives.reading import read_files
from malaria_ray.errors import ArchiveError, DirectoryError, InvariantError, TooManyBadImagesError
from malaria_ray.schema import PACKED
from malaria_ray.stages import ingest, pack, verify


def pack_of(archive: Path, packed: Path, **flags) -> pd.DataFrame:
    pack.run(pack.Config(archive=str(archive), packed=str(packed), **{"part_mb": 1, **flags}))
    return pq.read_table(packed / "images").to_pandas().set_index("image_id")


@pytest.fixture
def folder(line: Line, tmp_path: Path) -> Path:
    """Forty cells and what lies about in folders; one of the files can never be read."""
    root = tmp_path / "cells"
    with zipfile.ZipFile(line.archive) as archive:
        archive.extractall(root, members=archive.namelist()[:40])
    (root / "Thumbs.db").write_bytes(bytes.fromhex("d0cf11e0a1b11ae1"))
    (root / "empty.png").write_bytes(b"")
    os.mkfifo(root / "pipe.png")
    return root


def test_packed_archive_gives_the_same_scores(line: Line, tmp_path: Path):
    packed = pack_of(line.archive, tmp_path / "packed")
    assert list(packed.reset_index().columns) == PACKED.names
    with zipfile.ZipFile(line.archive) as archive:
        assert packed["image"].to_dict() == {name: archive.read(name) for name in archive.namelist()}
    of_packed = screen_of(tmp_path / "packed", tmp_path / "results", line.run)
    pd.testing.assert_frame_equal(of_packed, predictions_of(line.results))
    verify.run(verify.Config(directory=str(tmp_path / "packed")))


def test_what_was_packed_anew_since_it_was_opened_is_not_listed(line: Line, folder: Path, tmp_path: Path):
    pack_of(line.archive, tmp_path / "packed")
    archive = open_archive(str(tmp_path / "packed"))
    pack_of(folder, tmp_path / "packed", overwrite=True)
    with pytest.raises(DirectoryError, match=r"listing.parquet is not the file that was written"):
        list_archive(archive)


def test_every_file_is_one_row_also_what_cannot_be_read(folder: Path, tmp_path: Path):
    packed = pack_of(folder, tmp_path / "packed")
    assert len(packed) == 43
    assert packed["status"].value_counts().to_dict() == {"ok": 42, "unreadable": 1}
    assert packed.loc["pipe.png", ["image", "content_digest"]].isna().all()
    reasons = {}
    for source in (folder, tmp_path / "packed"):
        ingest.run(ingest.Config(archive=str(source), dataset=f"{source}-dataset", image_size=IMAGE_SIZE))
        quarantine = pq.read_table(f"{source}-dataset/quarantine").to_pandas().set_index("image_id")
        reasons[source.name] = quarantine[["reason", "detail"]].to_dict("index")
    assert reasons["packed"] == reasons["cells"]
    assert {image_id: row["reason"] for image_id, row in reasons["packed"].items()} == {
        "Thumbs.db": "not_an_image",
        "empty.png": "empty_file",
        "pipe.png": "unreadable",
    }


def test_second_run_changes_nothing_and_other_flags_are_refused(folder: Path, tmp_path: Path):
    pack_of(folder, tmp_path / "packed")
    before = content(tmp_path / "packed")
    pack_of(folder, tmp_path / "packed")
    assert content(tmp_path / "packed") == before
    with pytest.raises(DirectoryError, match="part_mb was 1, is now 2"):
        pack_of(folder, tmp_path / "packed", part_mb=2)


def test_unfinished_packing_goes_on_and_reads_again_only_what_failed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pack, "part_bounds", lambda listing, _: [(0, 20), (20, 20), (40, listing.num_rows - 40)])
    with pytest.raises(TooManyBadImagesError, match="1 of 43 files cannot be read"):
        pack_of(folder, tmp_path / "packed", max_bad_fraction=0.0)
    parts = sorted((tmp_path / "packed/images").iterdir())
    written = {part.name: part.stat().st_mtime_ns for part in parts}
    [record] = (tmp_path / "packed").glob("_work/*/records/part-00001.parquet.json")
    record.unlink()
    packed = pack_of(folder, tmp_path / "packed")
    assert len(packed) == 43
    again = {part.name for part in parts if part.stat().st_mtime_ns != written[part.name]}
    assert again == {"part-00001.parquet", "part-00002.parquet"}  # without a record, and that of the pipe
    verify.run(verify.Config(directory=str(tmp_path / "packed")))


def test_changed_bytes_are_found(folder: Path, tmp_path: Path):
    packed = pack_of(folder, tmp_path / "packed")
    listing = list_archive(open_archive(str(tmp_path / "packed")))
    part = tmp_path / "packed/images/part-00000.parquet"
    data = bytearray(part.read_bytes())
    victim = packed["image"].dropna().iloc[3]
    data[data.index(victim) + 40] ^= 1
    part.write_bytes(data)
    found = dict(zip(listing["image_id"].to_pylist(), read_files(listing), strict=True))
    bad = {name: data.reason for name, data in found.items() if not isinstance(data, bytes)}
    assert sorted(bad.values()) == ["checksum_mismatch", "unreadable"]
    with pytest.raises(InvariantError, match=r"images/part-00000.parquet was changed"):
        verify.run(verify.Config(directory=str(tmp_path / "packed")))


def test_parts_are_cut_by_size(folder: Path):
    listing = list_archive(open_archive(str(folder)))
    bounds = pack.part_bounds(listing, 20_000)
    assert sum(n for _, n in bounds) == listing.num_rows
    assert [start for start, _ in bounds][1:] == [start + n for start, n in bounds][:-1]
    for start, n in bounds:
        sizes = listing["n_bytes"].slice(start, n).to_pylist()
        assert sum(sizes[:-1]) < 20_000 + max(sizes)


def test_packed_archive_may_be_moved(folder: Path, tmp_path: Path):
    pack_of(folder, tmp_path / "packed")
    was = list_archive(open_archive(str(tmp_path / "packed"))).drop_columns(["container"])
    (tmp_path / "packed").rename(tmp_path / "moved")
    listing = list_archive(open_archive(str(tmp_path / "moved")))
    assert listing.drop_columns(["container"]).equals(was)
    assert sum(isinstance(data, bytes) for data in read_files(listing)) == 42


def test_a_dataset_is_not_packed(line: Line, tmp_path: Path):
    with pytest.raises(ArchiveError, match="is a dataset already; pack takes archives of image files"):
        pack_of(line.dataset, tmp_path / "packed")
