"""From places to pixels: the same cells from wherever the files lie, and a status for what cannot be read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import samples
from samples import zip_of
from servers import Site, closed_url, serve

from malaria_ray.archives import containers, open_archive, reading
from malaria_ray.archives.listing import list_archive
from malaria_ray.archives.reading import read_cells, read_files
from malaria_ray.cells.crops import crop_pixels
from malaria_ray.cells.images import content_digest, decode, resize
from malaria_ray.errors import ArchiveError, ModelError

FILES = {
    "cell_images/Parasitized/C51AP12thinF_1.png": samples.good_files()["png-rgb"],
    "cell_images/Parasitized/C51AP12thinF_2.png": samples.noise(2),
    "cell_images/Parasitized/Thumbs.db": samples.THUMBS_DB,
    "cell_images/Uninfected/C1_thinF (1).png": samples.noise(3),
    "cell_images/Uninfected/C1_thinF_ü.jpg": samples.good_files()["jpeg-rgb"],
    "cell_images/Uninfected/C1_thinF_cut.png": samples.noise(4)[:-50],
    "cell_images/Uninfected/C1_thinF_empty.png": b"",
    "cell_images/Uninfected/a#b?c%20d.png": samples.noise(2),  # the same bytes once more
}
STATUS = ["ok", "ok", "not_an_image", "ok", "ok", "truncated", "empty_file", "ok"]


def cells(url: str) -> dict[str, dict[str, Any]]:
    """All that is known of each cell, its pixels too."""
    read = read_cells(list_archive(open_archive(url)), image_size=24)
    pixels = iter(read.pixels)
    rows = read.table.to_pylist()
    for row in rows:
        row["pixels"] = next(pixels).tobytes() if row["status"] == "ok" else None
    assert next(pixels, None) is None
    return {row["image_id"]: row for row in rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cells")
    for name, data in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, dict[str, Any]]:
    found = cells(str(folder))
    assert [found[name]["status"] for name in FILES] == STATUS
    return found


def test_each_cell_is_what_decode_and_resize_make_of_its_bytes(expected: dict[str, dict[str, Any]]) -> None:
    for name, data in FILES.items():
        row = expected[name]
        assert row["n_bytes"] == len(data)
        assert row["content_digest"] == content_digest(data)
        if row["status"] == "ok":
            assert row["pixels"] == resize(decode(data), 24).tobytes()
            assert (row["height"], row["width"]) == decode(data).shape[:2]
            assert row["detail"] is None
        else:
            assert (row["height"], row["width"]) == (None, None)
            assert row["detail"]


@pytest.mark.parametrize("method", [0, 8], ids=["stored", "deflated"])
def test_zip_gives_the_same_cells(tmp_path: Path, expected: dict[str, dict[str, Any]], method: int) -> None:
    (tmp_path / "cells.zip").write_bytes(zip_of(FILES, method))
    assert cells(str(tmp_path / "cells.zip")) == expected


def test_zip_behind_http_gives_the_same_cells(expected: dict[str, dict[str, Any]]) -> None:
    with serve(Site({"/data/cells.zip": zip_of(FILES)})) as site:
        assert cells(f"{site.url}/data/cells.zip") == expected
        assert all(range_ for range_ in site.gets())  # never the whole file


def test_neighbours_in_a_zip_are_read_by_one_request() -> None:
    files = {f"{i}.png": samples.noise(i) for i in range(40)}
    with serve(Site({"/cells.zip": zip_of(files)})) as site:
        listing = list_archive(open_archive(f"{site.url}/cells.zip"))
        before = len(site.gets())
        assert list(read_files(listing)) == list(files.values())
        assert len(site.gets()) - before == 1


def test_requests_are_bounded_in_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_REQUEST_BYTES", 10_000)
    monkeypatch.setattr(reading, "_READ_BYTES", 50_000)
    files = {f"{i}.png": samples.noise(i) for i in range(40)}  # 2.5 KB each
    with serve(Site({"/cells.zip": zip_of(files, 0)})) as site:
        listing = list_archive(open_archive(f"{site.url}/cells.zip"))
        site.requests.clear()
        assert list(read_files(listing)) == list(files.values())
        bounds = [range_.removeprefix("bytes=").split("-") for range_ in site.gets() if range_]
    sizes = [int(last) - int(first) + 1 for first, last in bounds]
    assert len(sizes) == 10
    assert max(sizes) <= 10_000


def test_zip_at_a_signed_url_is_a_zip(expected: dict[str, dict[str, Any]]) -> None:
    """Object stores give addresses that end with a signature."""
    with serve(Site({"/cells.zip": zip_of(FILES)})) as site:
        assert cells(f"{site.url}/cells.zip?X-Amz-Signature=abc&X-Amz-Expires=60") == expected


def test_zip_on_s3_gives_the_same_cells(s3: Any, expected: dict[str, dict[str, Any]]) -> None:
    s3.put_object(Bucket="cells-bucket", Key="in/cells.zip", Body=zip_of(FILES))
    assert cells("s3://cells-bucket/in/cells.zip") == expected


def test_folder_on_s3_gives_the_same_cells(s3: Any, expected: dict[str, dict[str, Any]]) -> None:
    for name, data in FILES.items():
        s3.put_object(Bucket="cells-bucket", Key=f"in/{name}", Body=data)
    for marker in ("in/", "in/cell_images/Parasitized/"):  # what consoles write for "new folder"
        s3.put_object(Bucket="cells-bucket", Key=marker, Body=b"")
    assert cells("s3://cells-bucket/in") == expected
    assert cells("s3://cells-bucket/in/") == expected


def test_key_below_a_folder_without_name_is_not_lost(s3: Any) -> None:
    s3.put_object(Bucket="cells-bucket", Key="in/a.png", Body=samples.noise(1))
    for i, key in enumerate(["in/x//b.png", "in/x//y//c.png", "in/x/d.png", "in//e.png"]):
        s3.put_object(Bucket="cells-bucket", Key=key, Body=samples.noise(2 + i))
    found = {name: (row["status"], row["detail"]) for name, row in cells("s3://cells-bucket/in").items()}
    assert found == dict.fromkeys(["a.png", "x//b.png", "x//y//c.png", "x/d.png", "/e.png"], ("ok", None))


def test_object_gone_between_listing_and_reading_is_unreadable(s3: Any) -> None:
    s3.put_object(Bucket="cells-bucket", Key="in/a.png", Body=samples.noise(1))
    s3.put_object(Bucket="cells-bucket", Key="in/b.png", Body=samples.noise(2))
    listing = list_archive(open_archive("s3://cells-bucket/in"))
    s3.delete_object(Bucket="cells-bucket", Key="in/a.png")
    assert read_cells(listing, image_size=16).table["status"].to_pylist() == ["unreadable", "ok"]


@pytest.mark.parametrize("url", ["s3://cells-bucket/none", "s3://no-such-bucket/cells", "s3://cells-bucket/none.zip"])
def test_missing_on_s3_is_refused(s3: Any, url: str) -> None:
    with pytest.raises(ArchiveError, match="is not there"):
        list_archive(open_archive(url))


@pytest.mark.parametrize("url", ["s3://cells-bucket/cells", "s3://cells-bucket/cells.zip"])
def test_missing_credentials_are_told_in_one_line(s3: Any, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    import s3fs

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ArchiveError, match="Unable to locate credentials; check the address and your permissions"):
        list_archive(open_archive(url))


@pytest.mark.parametrize(
    "behaviour",
    [{"ranges": "refused"}, {"ranges": "ignored"}, {"ranges": "ignored", "says_length": False}],
    ids=["says none", "sends all", "sends all, of unknown length"],
)
def test_server_without_ranges_is_told_in_one_line(behaviour: dict[str, Any]) -> None:
    padding = {"first.bin": np.random.default_rng([0]).bytes(7_000_000)}  # larger than what fsspec reads at once
    with serve(Site({"/cells.zip": zip_of({**padding, **FILES}, 0)}, **behaviour)) as site:
        archive = open_archive(f"{site.url}/cells.zip")
        archive.identity()
        with pytest.raises(ArchiveError, match=r"does not answer range requests .*download the file and give its path"):
            list_archive(archive)


def test_server_that_stops_answering_ranges_gives_unreadable_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_REQUEST_BYTES", 1)  # one request a member
    files = {f"{i}.png": samples.noise(i) for i in range(3)}
    with serve(Site({"/cells.zip": zip_of(files)})) as site:
        listing = list_archive(open_archive(f"{site.url}/cells.zip"))
        site.ranges = "ignored"
        table = read_cells(listing, image_size=16).table
    assert table["status"].to_pylist() == ["unreadable"] * 3
    assert "does not answer range requests" in table["detail"][2].as_py()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/none.zip", r"/none.zip is not there \(404.*Not Found.*\); check the path"),
        ("/secret.zip", r"is not there \(403.*; check the path"),
    ],
)
def test_http_error_is_told_with_its_status(path: str, said: str) -> None:
    with serve(Site({})) as site:
        if "secret" in path:
            site.statuses = [403] * 10
        with pytest.raises(ArchiveError, match=said):
            list_archive(open_archive(site.url + path))
        if "secret" in path:
            with pytest.raises(ArchiveError, match=said):
                open_archive(site.url + path).identity()


def test_server_that_is_down_is_told_in_one_line() -> None:
    with pytest.raises(ArchiveError, match=r"cells.zip cannot be reached \(Cannot connect to host 127.0.0.1.*\)"):
        list_archive(open_archive(f"{closed_url()}/cells.zip"))


@pytest.fixture
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "WAITS_S", (0.01, 0.01, 0.01))


@pytest.mark.usefixtures("_short_waits")
@pytest.mark.parametrize("fault", [{"statuses": [503, 500, 503]}, {"cuts": [100, 0, 7]}], ids=["status", "cut"])
def test_read_that_fails_three_times_is_tried_a_fourth(fault: dict[str, Any]) -> None:
    files = {f"{i}.png": samples.noise(i) for i in range(5)}
    with serve(Site({"/cells.zip": zip_of(files)})) as site:
        listing = list_archive(open_archive(f"{site.url}/cells.zip"))
        for name, value in fault.items():
            setattr(site, name, value)
        assert list(read_files(listing)) == list(files.values())


@pytest.mark.usefixtures("_short_waits")
def test_read_that_fails_always_is_unreadable() -> None:
    with serve(Site({"/cells.zip": zip_of({"a.png": samples.noise(1)})})) as site:
        listing = list_archive(open_archive(f"{site.url}/cells.zip"))
        site.requests.clear()
        site.statuses = [503] * 20
        (row,) = read_cells(listing, image_size=16).table.to_pylist()
        assert len(site.requests) == 4
    assert row["status"] == "unreadable"
    assert "503" in row["detail"]


def test_unknown_protocol_is_refused_with_what_to_install() -> None:
    from malaria_ray.errors import ConfigError

    with pytest.raises(ConfigError, match=r"nope://x/y: .*; allowed are local paths and fsspec URLs"):
        open_archive("nope://x/y")


# --- any part of a listing, in any number of pieces ------------------------------------------------------------------


def test_a_listing_may_be_read_in_pieces(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cells.zip").write_bytes(zip_of(FILES))
    for url in (folder, tmp_path / "cells.zip"):
        listing = list_archive(open_archive(str(url)))
        whole = read_cells(listing, image_size=16)
        for n in (1, 3, 100):
            pieces = [read_cells(listing.slice(i, n), image_size=16) for i in range(0, listing.num_rows, n)]
            assert pa.concat_tables([piece.table for piece in pieces]).equals(whole.table)
            np.testing.assert_array_equal(np.concatenate([piece.pixels for piece in pieces]), whole.pixels)


def test_rows_out_of_order_are_read_all_the_same(tmp_path: Path) -> None:
    files = {f"{i}.png": samples.noise(i) for i in range(12)}
    (tmp_path / "cells.zip").write_bytes(zip_of(files))
    listing = list_archive(open_archive(str(tmp_path / "cells.zip")))
    order = np.random.default_rng([5]).permutation(12)
    assert list(read_files(listing.take(order))) == [list(files.values())[i] for i in order]


def test_the_size_of_a_file_that_grew_since_it_was_listed_is_that_of_what_was_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(samples.noise(1))
    listing = list_archive(open_archive(str(tmp_path)))
    (tmp_path / "a.png").write_bytes(larger := samples.noise(2) + bytes(100))
    assert read_cells(listing, image_size=16).table["n_bytes"].to_pylist() == [len(larger)]


def test_no_rows_are_no_cells(folder: Path) -> None:
    read = read_cells(list_archive(open_archive(str(folder))).slice(0, 0), image_size=16)
    assert read.table.num_rows == 0
    assert read.pixels.shape == (0, 16, 16, 3)


def test_only_bad_rows_give_no_pixels(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    read = read_cells(list_archive(open_archive(str(tmp_path))), image_size=16)
    assert read.table["status"].to_pylist() == ["not_an_image"]
    assert read.pixels.shape == (0, 16, 16, 3)


def test_crops_of_another_size_are_refused() -> None:
    column = pa.chunked_array([pa.array([bytes(16 * 16 * 3)], pa.binary(16 * 16 * 3))])
    assert crop_pixels(column, image_size=16).shape == (1, 16, 16, 3)
    with pytest.raises(ModelError, match="the crops are 16 × 16, the model takes 125 × 125"):
        crop_pixels(column, image_size=125)


def test_crops_of_a_slice_and_of_many_chunks_are_the_rows_own() -> None:
    images = [bytes([i]) * (16 * 16 * 3) for i in range(6)]
    type_ = pa.binary(16 * 16 * 3)
    column = pa.chunked_array([pa.array(images[:4], type_), pa.array(images[4:], type_)])
    assert crop_pixels(column, image_size=16)[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert crop_pixels(column.slice(2, 3), image_size=16)[:, 0, 0, 0].tolist() == [2, 3, 4]
    assert crop_pixels(column.slice(1, 2), image_size=16)[:, 0, 0, 0].tolist() == [1, 2]
    assert crop_pixels(column.slice(0, 0), image_size=16).shape == (0, 16, 16, 3)


@pytest.mark.parametrize("name", ["cells.zip", "cells.parquet"])
def test_what_is_said_of_a_refused_read_holds_no_signature(folder: Path, name: str):
    images = pa.table({"image": pa.array([samples.noise(1)], pa.binary())})
    buffer = pa.BufferOutputStream()
    pq.write_table(images, buffer)
    files = {"/cells.zip": zip_of(FILES), "/cells.parquet": buffer.getvalue().to_pybytes()}
    with serve(Site(files, secret="secret-1")) as site:
        listing = list_archive(open_archive(f"{site.url}/{name}?sig=secret-1"))
        site.secret = "secret-2"
        refused = [file for file in read_files(listing) if not isinstance(file, bytes)]
    assert len(refused) == listing.num_rows
    assert not [file.detail for file in refused if "secret" in file.detail]
    assert f"{site.url}/{name}" in refused[0].detail


def test_a_file_that_becomes_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(samples.noise(1))
    listing = list_archive(open_archive(str(tmp_path)))
    (tmp_path / "b.png").unlink()
    os.mkfifo(tmp_path / "b.png")
    table = read_cells(listing, image_size=24).table
    assert table["status"].to_pylist() == ["ok", "unreadable", "ok"]
    assert table["detail"].to_pylist() == [None, "no regular file any more", None]
