"""A plain tar read in place, single or as WebDataset shards in a folder."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import samples
from servers import Site, serve

from malaria_ray.archives import open_archive, tars
from malaria_ray.archives.listing import list_archive
from malaria_ray.archives.reading import read_cells, read_files
from malaria_ray.errors import ArchiveError

PNG, OTHER = samples.noise(1), samples.noise(2)


def tar_of(files: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar as Python writes it; a name that ends with `/` is a folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name.rstrip("/"))
            info.size, info.type = len(data), tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def listed(path: Path) -> list[dict]:
    return list_archive(open_archive(str(path))).to_pylist()


NAMES = [
    "cell_images/Parasitized/C33P1thinF_1.png",
    "with space.png",
    "Größe_细胞_🔬.png",
    "x" * 300 + ".png",  # longer than a header has room for
    "deep/" * 60 + "a.png",
    "new\nline.png",
    "../../outside.png",
    "noending",
]


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_every_name_is_read_and_named_as_it_is(tmp_path: Path, kind: int) -> None:
    files = {name: samples.noise(i) for i, name in enumerate(NAMES)}
    (tmp_path / "cells.tar").write_bytes(tar_of({"cell_images/": b"", **files}, kind))
    listing = list_archive(open_archive(str(tmp_path / "cells.tar")))
    assert dict(zip(listing["image_id"].to_pylist(), read_files(listing), strict=True)) == files


def test_a_tar_of_the_folder_where_it_was_made_has_the_folders_names(tmp_path: Path) -> None:
    """As `tar -C cells -cf cells.tar .` writes it; a sidecar file's name too."""
    files = {"./": b"", "./Parasitized/": b"", "./Parasitized/a.png": PNG, "./b.png": OTHER, "./b.cls": b"1"}
    (tmp_path / "cells.tar").write_bytes(tar_of(files))
    assert [(row["image_id"], row["label"]) for row in listed(tmp_path / "cells.tar")] == [
        ("Parasitized/a.png", 1),
        ("b.png", 1),
    ]


def test_what_is_no_image_is_a_row_with_its_reason(tmp_path: Path) -> None:
    files = {"Thumbs.db": samples.THUMBS_DB, "empty.png": b"", "a.png": PNG, "cut.png": PNG[:99], "z.png": OTHER}
    (tmp_path / "cells.tar").write_bytes(tar_of(files))
    table = read_cells(list_archive(open_archive(str(tmp_path / "cells.tar"))), image_size=16).table
    assert table["status"].to_pylist() == ["not_an_image", "empty_file", "ok", "truncated", "ok"]


def test_links_and_pipes_are_rows_and_never_followed(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, type_ in (("a", tarfile.SYMTYPE), ("b", tarfile.LNKTYPE), ("c", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = type_, "/etc/passwd"
            archive.addfile(info)
    (tmp_path / "cells.tar").write_bytes(buffer.getvalue())
    table = read_cells(list_archive(open_archive(str(tmp_path / "cells.tar"))), image_size=16).table
    assert table["status"].to_pylist() == ["unreadable"] * 3
    assert table["detail"][0].as_py() == "not a regular file but a link"


SAMPLES = {
    "number": ({"k.png": PNG, "k.cls": b"1\n"}, (1, None)),
    "name": ({"k.cls": b"Uninfected", "k.png": PNG}, (0, None)),
    "json": ({"k.png": PNG, "k.json": b'{"label": "parasitized", "patient_id": "P7", "more": [1]}'}, (1, "P7")),
    "both": ({"k.json": b'{"patient_id": 7}', "k.cls": b"0", "k.png": PNG}, (0, "7")),
    "without a word": ({"k.png": PNG, "k.json": b"[1]"}, (None, None)),
    "not labelled": ({"k.png": PNG, "k.cls": b"-1"}, (None, None)),
    "by the folder": ({"Parasitized/k.png": PNG}, (1, None)),
    "folder and sidecar agree": ({"Parasitized/k.png": PNG, "Parasitized/k.cls": b"1"}, (1, None)),
    "NIH name": ({"Uninfected/C1_thinF.png": PNG}, (0, "C1")),
}


@pytest.mark.parametrize("case", SAMPLES)
def test_label_and_patient_of_a_sample(tmp_path: Path, case: str) -> None:
    files, expected = SAMPLES[case]
    (tmp_path / "cells.tar").write_bytes(tar_of(files))
    (row,) = listed(tmp_path / "cells.tar")
    assert row["image_id"].endswith(".png")
    assert (row["label"], row["patient_id"]) == expected


DOTTED = {
    "one after the other": ("s.1.png", "s.1.cls", "s.2.png", "s.2.cls"),
    "images first": ("s.1.png", "s.2.png", "s.2.cls", "s.1.cls"),
    "in a folder with a dot": ("v1.0/s.1.png", "v1.0/s.1.cls", "v1.0/s.2.png", "v1.0/s.2.cls"),
}


@pytest.mark.parametrize("case", DOTTED)
def test_sidecar_of_a_name_with_dots_is_of_that_file_alone(tmp_path: Path, case: str) -> None:
    """Up to the first dot both images have one name: the last sidecar file's label became that of both."""
    said = {"1.cls": b"1", "2.cls": b"0"}
    files = {name: said.get(name[-5:]) or samples.noise(int(name[-5])) for name in DOTTED[case]}
    (tmp_path / "cells.tar").write_bytes(tar_of(files))
    labels = {row["image_id"][-5:]: row["label"] for row in listed(tmp_path / "cells.tar")}
    assert labels == {"1.png": 1, "2.png": 0}


def test_sidecar_of_a_shorter_name_is_of_a_single_image_alone(tmp_path: Path) -> None:
    files = {"a.left.png": PNG, "a.cls": b"1", "b.left.png": OTHER, "b.right.png": samples.noise(3), "b.cls": b"1"}
    (tmp_path / "cells.tar").write_bytes(tar_of(files))
    labels = {row["image_id"]: row["label"] for row in listed(tmp_path / "cells.tar")}
    assert labels == {"a.left.png": 1, "b.left.png": None, "b.right.png": None, "b.cls": None}


AGREEING = {"k.png": PNG, "k.cls": b"1", "k.json": b'{"label": "parasitized", "patient_id": 7}', "k.more.json": b"{}"}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"k.more.json": b'{"label": 1, "patient_id": "7"}'}, None),
        ({"k.cls": b"0"}, "k.json gives k.png the label 1, another file 0; correct one or leave it out"),
        ({"k.more.json": b'{"patient_id": "8"}'}, "k.more.json gives k.png the patient '8', another file '7'; correct"),
    ],
)
def test_sidecars_of_one_image_must_agree(tmp_path: Path, other: dict[str, bytes], said: str | None) -> None:
    (tmp_path / "cells.tar").write_bytes(tar_of(AGREEING | other))
    if said is None:
        (row,) = listed(tmp_path / "cells.tar")
        assert (row["image_id"], row["label"], row["patient_id"]) == ("k.png", 1, "7")
        return
    with pytest.raises(ArchiveError, match=said):
        listed(tmp_path / "cells.tar")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"k.png": PNG, "k.cls": b"3"}, "k.cls holds the label '3'; allowed are 0 or uninfected, 1 or parasitized"),
        ({"k.png": PNG, "k.json": b"{"}, "k.json cannot be read: Expecting property name"),
        ({"Parasitized/k.png": PNG, "Parasitized/k.cls": b"0"}, "has the label 0 beside it but lies in a folder that"),
    ],
)
def test_label_that_is_not_understood_is_no_missing_label(tmp_path: Path, files: dict, said: str) -> None:
    (tmp_path / "cells.tar").write_bytes(tar_of(files))
    with pytest.raises(ArchiveError, match=said):
        listed(tmp_path / "cells.tar")


def test_sidecar_without_an_image_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "cells.tar").write_bytes(tar_of({"a.png": PNG, "b.cls": b"1", "c.json": b"{}", "c.cls": b"1"}))
    assert [row["image_id"] for row in listed(tmp_path / "cells.tar")] == ["a.png", "b.cls", "c.json", "c.cls"]


WHOLE = tar_of({f"{i}.png": samples.noise(i) for i in range(5)})
HEADER = WHOLE.index(b"2.png")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is no complete tar archive: empty file"),
        (b"no tar at all" * 100, "is no complete tar archive"),
        (WHOLE[:1000], "is no complete tar archive: unexpected end of data"),
        (WHOLE[: len(WHOLE) // 2], "is no complete tar archive: unexpected end of data"),
        (WHOLE.rstrip(b"\0"), "cut"),
        (
            WHOLE[:HEADER] + b"?" * 512 + WHOLE[HEADER + 512 :],
            f"is damaged, or several archives in one file, after {HEADER:,}",
        ),
        (WHOLE + WHOLE, "several archives in one file"),
        (tar_of({}), "holds no files"),
        (tar_of({"a/": b""}), "holds no files"),
    ],
)
def test_what_is_no_whole_tar_is_refused_in_one_line(tmp_path: Path, data: bytes, said: str) -> None:
    """Python's own reader takes a damaged header for the end, and the members behind it for nothing."""
    (tmp_path / "cells.tar").write_bytes(data)
    with pytest.raises(ArchiveError, match=said) as caught:
        listed(tmp_path / "cells.tar")
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize("ending", [".tar.gz", ".tgz", ".tar.zst"])
def test_compressed_tar_is_refused_with_what_to_do(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"cells{ending}").write_bytes(b"x")
    with pytest.raises(ArchiveError, match=r"compressed as a whole: .*; unpack it to a folder or a plain .tar"):
        open_archive(str(tmp_path / f"cells{ending}"))


def test_folder_of_shards_is_the_members_of_all(tmp_path: Path) -> None:
    files = {f"Parasitized/{i:03d}.png": samples.noise(i) for i in range(9)}
    for shard in range(3):
        part = {name: files[name] for name in list(files)[shard::3]}
        (tmp_path / f"sub{shard % 2}").mkdir(exist_ok=True)
        (tmp_path / f"sub{shard % 2}" / f"cells-{shard:06d}.tar").write_bytes(tar_of(part))
    listing = list_archive(open_archive(str(tmp_path)))
    assert dict(zip(listing["image_id"].to_pylist(), read_files(listing), strict=True)) == files
    assert listing["label"].to_pylist() == [1] * 9


def test_one_name_in_two_shards_is_refused(tmp_path: Path) -> None:
    for shard in range(2):
        (tmp_path / f"{shard}.tar").write_bytes(tar_of({"a.png": PNG}))
    with pytest.raises(ArchiveError, match="holds 1 names more than once, 'a.png' the first"):
        listed(tmp_path)


def test_listing_is_taken_in_bounded_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "_BATCH", 2)
    (tmp_path / "cells.tar").write_bytes(WHOLE)
    assert [table.num_rows for table in open_archive(str(tmp_path / "cells.tar")).places()] == [2, 2, 1]


def test_neighbours_are_read_by_one_request_behind_http() -> None:
    files = {f"{i}.png": samples.noise(i) for i in range(40)}
    with serve(Site({"/cells.tar": tar_of(files)})) as site:
        listing = list_archive(open_archive(f"{site.url}/cells.tar"))
        before = len(site.gets())
        assert list(read_files(listing)) == list(files.values())
        assert len(site.gets()) - before == 1


@pytest.mark.parametrize("ending", ["tar", "parquet"])
def test_server_without_ranges_is_told_in_one_line(ending: str) -> None:
    data = tar_of({"a.png": PNG, "large.bin": bytes(12_000_000), "b.png": OTHER})
    said = r"does not answer range requests .*download the file and give its path"
    with serve(Site({f"/cells.{ending}": data}, ranges="ignored")) as site, pytest.raises(ArchiveError, match=said):
        list_archive(open_archive(f"{site.url}/cells.{ending}"))


def test_a_header_that_leads_back_to_itself_is_told(tmp_path: Path) -> None:
    """Python's reader, before its versions of 2025, takes it for the next member for ever (CVE-2025-8194)."""
    data = bytearray(tar_of({"a.png": bytes(100), "b.png": b""}))
    at = data.index(b"b.png")
    data[at + 124 : at + 136] = b"\xff" + (256**11 - 512).to_bytes(11, "big")
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    (tmp_path / "cells.tar").write_bytes(data)
    with pytest.raises(ArchiveError, match=r"cells\.tar"):
        list_archive(open_archive(str(tmp_path / "cells.tar")))


def test_tar_shards_of_any_case_in_a_folder_are_shards(tmp_path: Path) -> None:
    (tmp_path / "S.TAR").write_bytes(tar_of({"a.png": bytes(100)}))
    assert list_archive(open_archive(str(tmp_path)))["image_id"].to_pylist() == ["a.png"]


def test_tar_cut_off_after_it_was_listed_gives_rows(tmp_path: Path) -> None:
    file = tmp_path / "cells.tar"
    file.write_bytes(WHOLE)
    listing = list_archive(open_archive(str(file)))
    file.write_bytes(WHOLE[:4000])
    assert set(read_cells(listing, image_size=16).table["status"].to_pylist()) <= {"ok", "corrupt", "unreadable"}
