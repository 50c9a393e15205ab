"""A folder of files, with everything that people and disks put into folders."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pytest
import samples
from servers import Site, serve

from malaria_ray.archives import open_archive, reading
from malaria_ray.archives.listing import list_archive
from malaria_ray.archives.reading import read_cells, read_files
from malaria_ray.errors import ArchiveError, ConfigError, DirectoryError, ReadError
from malaria_ray.runtime import outputs, storage
from malaria_ray.stages.pack import part_bounds

pytestmark = pytest.mark.timeout(60)  # a test that hangs is one that opened a pipe

PNG = samples.noise(1)


def fill(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def statuses(root: Path | str) -> dict[str, str]:
    return {row["image_id"]: row["status"] for row in rows(root)}


def rows(root: Path | str) -> list[dict]:
    return read_cells(list_archive(open_archive(str(root))), image_size=16).table.to_pylist()


ODD_NAMES = [
    "plain.png",
    "with space.png",
    " space first.png",
    "space last.png ",
    "new\nline.png",
    "tab\there.png",
    "Zelle_Größe_细胞_🔬.png",
    "e\u0301_composed.png",  # e and an accent; the next is the one letter é: two files on Linux
    "\u00e9_composed.png",
    "<script>alert(1)<script>.png",
    "right\u202eto\u202dleft.png",
    "back\\slash.png",
    "percent%20and#hash?query.png",
    "star*[0-9]?.png",
    "quote'and\"quote.png",
    "-rf.png",
    "~",
    "a::b.png",
    "file:c.png",
    ".hidden",
    "no_suffix",
    "x" * 251 + ".png",  # the longest that a disk takes
    "deep/" * 60 + "a.png",  # more than 300 characters of path
    "a/b/same.png",
    "a/c/same.png",
]


def test_every_name_that_a_disk_takes_is_read_and_named_as_it_is(tmp_path: Path) -> None:
    files = {name: samples.noise(i) for i, name in enumerate(ODD_NAMES)}
    listing = list_archive(open_archive(str(fill(tmp_path, files))))
    assert dict(zip(listing["image_id"].to_pylist(), read_files(listing), strict=True)) == files
    assert set(statuses(tmp_path).values()) == {"ok"}


@pytest.mark.parametrize("name", ["a b", "ü", "run[1]", "100%", "a#b", "x.zip", "new\nline", "a::b"])
def test_the_folder_itself_may_have_any_name(tmp_path: Path, name: str) -> None:
    assert statuses(fill(tmp_path / name, {"Parasitized/a.png": PNG})) == {"Parasitized/a.png": "ok"}


@pytest.mark.parametrize("ending", ["", "/", "/."])
def test_the_same_folder_by_other_words_gives_the_same_names(tmp_path: Path, ending: str) -> None:
    fill(tmp_path, {"Parasitized/a.png": PNG})
    assert statuses(f"{tmp_path}{ending}") == {"Parasitized/a.png": "ok"}


def test_relative_path_and_file_url_are_the_same_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "cells", {"a.png": PNG})
    monkeypatch.chdir(tmp_path)
    assert statuses("cells") == statuses(f"file://{tmp_path}/cells") == {"a.png": "ok"}
    assert open_archive("cells").url == str(tmp_path / "cells")


def test_same_bytes_twice_are_two_cells_of_one_digest(tmp_path: Path) -> None:
    first, second = rows(fill(tmp_path, {"a.png": PNG, "b/a.png": PNG}))
    assert first["content_digest"] == second["content_digest"]
    assert (first["image_id"], second["image_id"]) == ("a.png", "b/a.png")


def test_what_is_no_image_is_a_row_with_its_reason(tmp_path: Path) -> None:
    fill(
        tmp_path,
        {
            "Parasitized/Thumbs.db": samples.THUMBS_DB,
            "Parasitized/empty.png": b"",
            "Parasitized/cut.png": PNG[:-30],
            "Parasitized/good.png": PNG,
            "readme.txt": b"text",
        },
    )
    assert statuses(tmp_path) == {
        "Parasitized/Thumbs.db": "not_an_image",
        "Parasitized/cut.png": "truncated",
        "Parasitized/empty.png": "empty_file",
        "Parasitized/good.png": "ok",
        "readme.txt": "not_an_image",
    }


def test_links_are_followed_to_files_and_nothing_else(tmp_path: Path) -> None:
    outside = fill(tmp_path / "outside", {"real.png": PNG, "folder/b.png": PNG})
    inside = fill(tmp_path / "cells", {"a.png": PNG})
    (inside / "link.png").symlink_to(outside / "real.png")
    (inside / "chain.png").symlink_to("link.png")
    (inside / "broken.png").symlink_to("nowhere.png")
    (inside / "itself.png").symlink_to("itself.png")
    (inside / "folder").symlink_to(outside / "folder")
    (inside / "round").symlink_to(inside)
    os.mkfifo(outside / "pipe")
    (inside / "piped.png").symlink_to(outside / "pipe")
    found = {row["image_id"]: (row["status"], row["detail"]) for row in rows(inside)}
    assert found == {
        "a.png": ("ok", None),
        "link.png": ("ok", None),
        "chain.png": ("ok", None),
        "broken.png": ("unreadable", "not a regular file but a broken link"),
        "itself.png": ("unreadable", "not a regular file but a broken link"),
        "folder": ("unreadable", "not a regular file but a link to a folder"),
        "round": ("unreadable", "not a regular file but a link to a folder"),
        "piped.png": ("unreadable", "not a regular file but a link to a pipe or device"),
    }


def test_link_to_a_file_has_the_files_size(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": PNG})
    (tmp_path / "link.png").symlink_to("a.png")
    assert [row["n_bytes"] for row in rows(tmp_path)] == [len(PNG), len(PNG)]


def test_pipes_and_sockets_are_rows_and_never_opened(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": PNG})
    os.mkfifo(tmp_path / "pipe.png")
    assert statuses(tmp_path) == {"a.png": "ok", "pipe.png": "unreadable"}


def test_name_that_is_not_utf8_is_a_row_in_quarantine(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": PNG})
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(PNG)  # Latin-1, from an old disk
    good, bad = sorted(rows(tmp_path), key=lambda row: row["image_id"])
    assert good["status"] == "ok"
    assert (bad["image_id"], bad["status"]) == ("caf\\udce9.png", "unreadable")
    assert bad["detail"] == "not a regular file but a file whose name is not UTF-8"


def test_listing_is_taken_in_bounded_batches_and_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from malaria_ray.archives import folders

    monkeypatch.setattr(folders, "_BATCH", 3)
    fill(tmp_path, {f"{i % 2}/{i}.png": PNG for i in range(10)})
    tables = list(open_archive(str(tmp_path)).places())
    assert [table.num_rows for table in tables] == [3, 3, 3, 1]
    names = pa.concat_tables(tables)["image_id"].to_pylist()
    assert sorted(names) == sorted(f"{i % 2}/{i}.png" for i in range(10))


def test_file_gone_between_listing_and_reading_is_unreadable(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": PNG, "b.png": samples.noise(2)})
    listing = list_archive(open_archive(str(tmp_path)))
    (tmp_path / "a.png").unlink()
    gone, here = read_cells(listing, image_size=16).table.to_pylist()
    assert (gone["image_id"], gone["status"], gone["content_digest"]) == ("a.png", "unreadable", None)
    assert "FileNotFoundError" in gone["detail"]
    assert here["status"] == "ok"


def test_file_larger_than_any_image_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(600 * 1024**2)  # a hole: takes no room on the disk
    (row,) = rows(tmp_path)
    assert (row["status"], row["content_digest"]) == ("too_large", None)
    assert row["detail"] == "629,145,600 bytes; at most 536,870,912 are read"


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder in which this process has no special rights: root may read anything."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    was = os.geteuid()
    if was == 0:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    yield folder
    os.seteuid(was)
    shutil.rmtree(folder)


def test_folder_that_cannot_be_listed_is_an_error_and_not_left_out(nobody: Path) -> None:
    """`fsspec.walk` leaves it out without a word, also where it is told to raise."""
    fill(nobody, {"Parasitized/a.png": PNG, "Uninfected/b.png": PNG})
    (nobody / "Uninfected").chmod(0)
    with pytest.raises(
        ArchiveError, match=r"Uninfected cannot be listed: .*Permission denied.*; check that it can be read"
    ):
        statuses(nobody)
    (nobody / "Uninfected").chmod(0o755)


def test_file_that_may_not_be_read_is_unreadable(nobody: Path) -> None:
    fill(nobody, {"a.png": PNG})
    (nobody / "a.png").chmod(0)
    assert statuses(nobody) == {"a.png": "unreadable"}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "is not there; an archive is a folder of images or shards, a .zip"),
        (lambda folder: folder.mkdir(), "holds no files; give an archive with images in it"),
        (lambda folder: (folder / "only" / "folders").mkdir(parents=True), "holds no files"),
        (
            lambda folder: folder.write_bytes(b"x"),
            "is a file of an unknown kind; an archive is a folder of images or shards, a .zip",
        ),
    ],
)
def test_what_is_no_archive_is_refused_with_what_is(tmp_path: Path, make, said: str) -> None:
    make(tmp_path / "cells")
    with pytest.raises(ArchiveError, match=said):
        list_archive(open_archive(str(tmp_path / "cells")))


def test_folder_in_memory_gives_the_same_cells_as_on_disk(tmp_path: Path) -> None:
    import fsspec

    files = {"Parasitized/a b.png": PNG, "Uninfected/[c].png": samples.noise(3), "Thumbs.db": samples.THUMBS_DB}
    memory = fsspec.filesystem("memory")
    for name, data in files.items():
        memory.pipe(f"/test_folders/{name}", data)
    assert rows("memory://test_folders") == rows(fill(tmp_path, files))
    memory.rm("/test_folders", recursive=True)


def index(above: str, names: list[str]) -> bytes:
    """A folder's page as Apache writes it: links that sort it, one to the folder above, one to each entry."""
    columns = "".join(f'<th><a href="?C={column};O=D">{column}</a></th>' for column in "NMSD")
    rows = "".join(f'<tr><td><a href="{name}">{name}</a></td></tr>' for name in names)
    return f'<table><tr>{columns}</tr><tr><td><a href="{above}">Parent Directory</a></td></tr>{rows}</table>'.encode()


IMAGES = {f"{folder}/{i}.png": samples.noise(i) for folder, i in (("Parasitized", 1), ("Uninfected", 2))}
IMAGES |= {f"{i}.png": samples.noise(i) for i in range(3, 7)}
PAGES = {
    "/cells": index("/", ["Parasitized/", "Uninfected/", "3.png", "4.png", "5.png", "6.png"]),
    "/cells/Parasitized/": index("/cells/", ["1.png"]),
    "/cells/Uninfected/": index("/cells/", ["2.png"]),
}


def test_folder_behind_http_is_its_files_whose_sizes_are_not_known() -> None:
    with serve(
        Site({**PAGES, "/cells/": PAGES["/cells"], **{f"/cells/{name}": IMAGES[name] for name in IMAGES}})
    ) as site:
        listing = list_archive(open_archive(f"{site.url}/cells/"))
        assert listing["image_id"].to_pylist() == sorted(IMAGES)
        assert listing["n_bytes"].null_count == len(IMAGES)
        table = read_cells(listing, image_size=16).table
    assert table["status"].to_pylist() == ["ok"] * len(IMAGES)
    assert table["n_bytes"].to_pylist() == [len(IMAGES[name]) for name in sorted(IMAGES)]
    assert len(part_bounds(listing, 2 * reading.UNKNOWN_BYTES)) == 3


def test_names_behind_http_are_those_of_the_folder() -> None:
    files = {"with space#1.png": samples.noise(1), "100%.png": samples.noise(2), "Größe.png": samples.noise(3)}
    links = [quote(name) for name in files] + ["%ff.png"]
    pages = {"/cells": index("/", links), "/cells/": index("/", links)}
    with serve(Site(pages | {f"/cells/{quote(name)}": data for name, data in files.items()})) as site:
        listing = list_archive(open_archive(f"{site.url}/cells/"))
        found = dict(zip(listing["image_id"].to_pylist(), read_files(listing), strict=True))
    refused = found.pop("%ff.png")
    assert found == files
    assert isinstance(refused, ReadError)
    assert "whose name is not UTF-8" in refused.detail


def test_files_of_unknown_size_are_not_all_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = list_archive(open_archive(str(fill(tmp_path, IMAGES))))
    at = listing.schema.get_field_index("n_bytes")
    listing = listing.set_column(at, "n_bytes", pa.nulls(len(IMAGES), pa.int64()))
    read, group = list[int](), reading._read_group
    monkeypatch.setattr(reading, "_READ_BYTES", 4 * reading.UNKNOWN_BYTES)
    monkeypatch.setattr(reading, "_read_group", lambda rows: (read.append(len(rows)), group(rows))[1])
    assert list(read_files(listing)) == [IMAGES[name] for name in sorted(IMAGES)]
    assert read == [4, 2]


@pytest.mark.parametrize("config", ["", "// comment\n{}", '{"stage": "train", "lr": 1}', "[1]", None])
def test_a_config_of_somebody_elses_is_a_file_of_the_archive(tmp_path: Path, config: str | None) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    if config is None:
        fill(tmp_path, {"config.json/b.png": PNG})
    else:
        (tmp_path / "config.json").write_text(config)
    names = list_archive(open_archive(str(tmp_path)))["image_id"].to_pylist()
    assert sorted(names) == ["a.png", "config.json/b.png" if config is None else "config.json"]


def claim_beside(archive: str, output: str) -> None:
    inputs = [open_archive(archive).url]
    with suppress(DirectoryError):  # of what else lies there
        outputs.claim(storage.locate(output), stage="ingest", config=None, identity={}, overwrite=False, inputs=inputs)


@pytest.mark.parametrize(
    ("archive", "output"),
    [
        ("cells", "cells"),
        ("cells", "cells/Parasitized/out"),
        ("cells/", "link/out"),
        ("link", "cells/../cells/out"),
        ("memory://cells_in", "memory://cells_in/"),
        ("memory://cells_in", "memory:///cells_in/a/b"),
    ],
)
def test_output_in_the_archive_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archive: str, output: str
) -> None:
    _archives(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"lies in .*; give a directory outside") as caught:
        claim_beside(archive, output)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("archive", "output"),
    [
        ("cells", "cells-out"),
        ("cells", "out"),
        ("cells", "."),
        ("cells/a.zip", "cells"),
        ("cells", "memory://cells/out"),
        ("memory://cells_in", "memory://cells_in2"),
        ("memory://cells_in", "cells_in"),
    ],
)
def test_output_beside_the_archive_is_none_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archive: str, output: str
) -> None:
    _archives(tmp_path, monkeypatch)
    claim_beside(archive, output)


def _archives(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    fill(root, {"cells/Parasitized/a.png": PNG, "cells/a.zip": samples.zip_of({"a.png": PNG})})
    (root / "link").symlink_to(root / "cells")
    fsspec.filesystem("memory").pipe("/cells_in/a.png", PNG)
    monkeypatch.chdir(root)
