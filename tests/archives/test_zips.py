"""A zip read in place: whoever wrote it, however it is damaged."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest
import samples
from samples import Member, raw_zip, zip_of

from malaria_ray.archives import open_archive
from malaria_ray.archives.listing import list_archive
from malaria_ray.archives.reading import read_cells, read_files
from malaria_ray.errors import ArchiveError, ReadError

PNG, OTHER = samples.noise(1), samples.noise(2)


@pytest.fixture
def archive(tmp_path: Path):
    """Writes bytes to a file and gives the rows of its cells: {image_id: row}."""

    def rows(data: bytes, name: str = "cells.zip") -> dict[str, dict]:
        (tmp_path / name).write_bytes(data)
        table = read_cells(list_archive(open_archive(str(tmp_path / name))), image_size=16).table
        return {row["image_id"]: row for row in table.to_pylist()}

    return rows


def statuses(rows: dict[str, dict]) -> dict[str, str]:
    return {name: row["status"] for name, row in rows.items()}


ODD_NAMES = [
    "cell_images/Parasitized/a.png",
    "with space.png",
    "new\nline.png",
    "Größe_细胞_🔬.png",
    "e\u0301.png",
    "\u00e9.png",
    "<script>alert(1)</script>.png",
    "right\u202eto\u202dleft.png",
    "back\\slash.png",
    "/absolute.png",  # nothing is ever written to where a name points
    "../../outside.png",
    "x" * 300 + ".png",
    "deep/" * 100 + "a.png",
    "a//b.png",
    ".",
]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_every_name_is_read_and_named_as_it_is(tmp_path: Path, method: int) -> None:
    files = {name: samples.noise(i) for i, name in enumerate(ODD_NAMES)}
    (tmp_path / "cells.zip").write_bytes(zip_of(files, method))
    listing = list_archive(open_archive(str(tmp_path / "cells.zip")))
    assert dict(zip(listing["image_id"].to_pylist(), read_files(listing), strict=True)) == files


def test_member_without_a_name_is_a_row(archive) -> None:
    assert statuses(archive(raw_zip([Member(b"", PNG), Member(b"a.png", OTHER)]))) == {"": "ok", "a.png": "ok"}


def test_old_name_encoding_is_dos(archive) -> None:
    assert statuses(archive(raw_zip([Member("Gr\u00f6\u00dfe.png".encode("cp437"), PNG, flags=0)]))) == {
        "Größe.png": "ok"
    }


@pytest.mark.parametrize("name", ["CELLS.ZIP", "a b.zip", "run[1].zip", "ü#?.zip", "a::b.zip"])
def test_the_archive_itself_may_have_any_name(archive, name: str) -> None:
    assert statuses(archive(zip_of({"a.png": PNG}), name)) == {"a.png": "ok"}


def test_folders_are_left_out_and_what_is_no_image_has_its_reason(archive) -> None:
    files = {"c/": b"", "c/Thumbs.db": samples.THUMBS_DB, "c/empty.png": b"", "c/a.png": PNG, "c/cut.png": PNG[:99]}
    assert statuses(archive(zip_of(files))) == {
        "c/Thumbs.db": "not_an_image",
        "c/empty.png": "empty_file",
        "c/a.png": "ok",
        "c/cut.png": "truncated",
    }


GOOD_LAYOUTS = {
    "plain": raw_zip([Member(b"a.png", PNG), Member(b"b.png", OTHER)]),
    "stored": raw_zip([Member(b"a.png", PNG, method=0), Member(b"b.png", OTHER, method=0)]),
    # The local extra field is often longer than the directory's (Info-ZIP's time stamps).
    "other local extra": raw_zip(
        [Member(b"a.png", PNG, local_extra=struct.pack("<HH9s", 0x5455, 9, b"t" * 9), central_extra=b""),
         Member(b"b.png", OTHER, central_extra=struct.pack("<HH5s", 0x5455, 5, b"t" * 5))]
    ),
    "longest extra": raw_zip([Member(b"a.png", PNG, local_extra=bytes(65_000)), Member(b"b.png", OTHER)]),
    "streamed": raw_zip([Member(b"a.png", PNG, has_descriptor=True), Member(b"b.png", OTHER, has_descriptor=True)]),
    "zip64": raw_zip([Member(b"a.png", PNG, is_zip64=True), Member(b"b.png", OTHER, is_zip64=True)]),
    "self-extracting": raw_zip([Member(b"a.png", PNG), Member(b"b.png", OTHER)], prefix=b"#!/bin/sh\n" + bytes(5000)),
    "gaps": raw_zip([Member(b"a.png", PNG), Member(b"b.png", OTHER)], gap=bytes(300_000)),
    "comment": zip_of({"a.png": PNG, "b.png": OTHER})[:-2] + struct.pack("<H", 4) + b"NIH!",
}  # fmt: skip


@pytest.mark.parametrize("layout", GOOD_LAYOUTS)
def test_every_layout_gives_the_same_bytes(tmp_path: Path, layout: str) -> None:
    (tmp_path / "cells.zip").write_bytes(GOOD_LAYOUTS[layout])
    listing = list_archive(open_archive(str(tmp_path / "cells.zip")))
    assert listing["image_id"].to_pylist() == ["a.png", "b.png"]
    assert list(read_files(listing)) == [PNG, OTHER]


def test_what_lies_unused_between_members_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "cells.zip").write_bytes(GOOD_LAYOUTS["gaps"])
    listing = list_archive(open_archive(str(tmp_path / "cells.zip")))
    assert max(listing["span"].to_pylist()) < 140_000 + len(PNG)  # two fields of 64 KB, not the 300 KB between


def _zipped(method: int) -> bytes:
    return zip_of({"bad.png": PNG}, method)


BAD_MEMBERS = {
    "encrypted": (Member(b"bad.png", PNG, flags=0x801), "encrypted", "the archive member is encrypted"),
    "AES": (Member(b"bad.png", PNG, flags=0x801, method=99), "encrypted", "the archive member is encrypted"),
    "deflate64": (Member(b"bad.png", PNG, method=9), "unsupported_compression", "zip method 9; allowed are stored and"),
    "wrong CRC": (Member(b"bad.png", PNG, crc=1), "checksum_mismatch", "size or CRC-32 differs"),
    "wrong CRC, stored": (Member(b"bad.png", PNG, crc=1, method=0), "checksum_mismatch", "size or CRC-32 differs"),
    "size too small": (Member(b"bad.png", PNG, size=len(PNG) - 1), "checksum_mismatch", "size or CRC-32 differs"),
    "size too large": (Member(b"bad.png", PNG, size=len(PNG) + 1), "checksum_mismatch", "size or CRC-32 differs"),
    "stored size": (Member(b"bad.png", PNG, method=0, size=9), "checksum_mismatch", "size or CRC-32 differs"),
    "no deflate": (Member(b"bad.png", PNG, packed=b"\xff" * 50), "corrupt", "cannot be unpacked: Error -3"),
    "cut deflate": (Member(b"bad.png", PNG, packed=zlib.compress(PNG, wbits=-15)[:-40]), "checksum_mismatch", "size"),
    "promises 1 GB": (Member(b"bad.png", PNG, size=2**30), "too_large", "1,073,741,824 bytes; at most 536,870,912"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_bad_member_is_a_row_with_its_reason_and_its_neighbours_are_read(archive, case: str) -> None:
    member, reason, detail = BAD_MEMBERS[case]
    rows = archive(raw_zip([Member(b"a.png", PNG), member, Member(b"z.png", OTHER)]))
    assert statuses(rows) == {"a.png": "ok", "bad.png": reason, "z.png": "ok"}
    assert rows["bad.png"]["detail"].startswith(detail)


@pytest.mark.parametrize(("method", "number"), [(zipfile.ZIP_BZIP2, 12), (zipfile.ZIP_LZMA, 14)])
def test_bzip2_and_lzma_are_named_as_unsupported(archive, method: int, number: int) -> None:
    row = archive(_zipped(method))["bad.png"]
    assert (row["status"], row["detail"]) == (
        "unsupported_compression",
        f"zip method {number}; allowed are stored and deflate",
    )


def test_zip_bomb_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    zeros = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = b"".join(zeros.compress(bytes(2**20)) for _ in range(60)) + zeros.flush()  # 60 MB in 60 KB
    bomb = Member(b"bomb.png", b"", packed=packed, crc=0, size=5000)  # and says that it is small
    (tmp_path / "cells.zip").write_bytes(raw_zip([bomb, Member(b"z.png", PNG)]))
    listing = list_archive(open_archive(str(tmp_path / "cells.zip")))
    tracemalloc.start()
    try:
        bomb_bytes, png = read_files(listing)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(bomb_bytes, ReadError)
    assert bomb_bytes.reason == "checksum_mismatch"
    assert png == PNG
    assert peak < 10 * 2**20


def test_bit_flipped_on_disk_is_told_by_the_checksum(archive) -> None:
    data = bytearray(zip_of({"a.png": PNG, "b.png": OTHER}, zipfile.ZIP_STORED))
    data[data.index(PNG) + 900] ^= 1
    assert statuses(archive(bytes(data))) == {"a.png": "checksum_mismatch", "b.png": "ok"}


def test_member_that_is_not_where_the_directory_says_is_corrupt(archive) -> None:
    data = bytearray(zip_of({"a.png": PNG, "b.png": OTHER}))
    data[0:4] = b"XXXX"
    rows = archive(bytes(data))
    assert statuses(rows) == {"a.png": "corrupt", "b.png": "ok"}
    assert rows["a.png"]["detail"] == "no zip member stands where the archive's directory says"


def test_one_name_twice_is_refused_with_the_name(archive) -> None:
    with pytest.raises(
        ArchiveError, match=r"holds 1 names more than once, 'a.png' the first; .*: pack the archive anew"
    ):
        archive(raw_zip([Member(b"a.png", PNG), Member(b"a.png", OTHER), Member(b"b.png", PNG)]))


def test_members_that_share_their_bytes_are_all_read(archive) -> None:
    """Two directory entries for one place, as some deduplicating packers write."""
    data = raw_zip([Member(b"a.png", PNG)])
    entry = data[data.index(b"PK\1\2") : data.index(b"PK\5\6")]
    start = data.index(b"PK\1\2")
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 2, 2, 2 * len(entry), start, 0)
    rows = archive(data[:start] + entry + entry.replace(b"a.png", b"b.png") + end)
    assert statuses(rows) == {"a.png": "ok", "b.png": "ok"}


PLAIN = zip_of({"a.png": PNG, "b.png": OTHER})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is no complete zip archive: File is not a zip file; it may have been cut off, fetch it again"),
        (b"no zip at all", "is no complete zip archive"),
        (PLAIN[:-22], "is no complete zip archive"),  # the last record is gone
        (PLAIN[: len(PLAIN) // 2], "is no complete zip archive"),
        (PLAIN[len(PLAIN) // 2 :].replace(b"PK\1\2", b"PK\0\0"), "is no complete zip archive"),
        (zip_of({}), "holds no files; give an archive with images in it"),
        (zip_of({"only/": b"", "folders/": b""}), "holds no files"),
        (raw_zip([Member(b"a\xff.png", PNG)]), "is no complete zip archive: 'utf-8' codec"),  # says UTF-8, is not
        (PLAIN.replace(b"PK\1\2\x14\x03\x14", b"PK\1\2\x14\x03\xff"), "be read: zip file version 25.5; pack it anew"),
    ],
)  # fmt: skip
def test_what_is_no_zip_is_refused_in_one_line(archive, data: bytes, said: str) -> None:
    with pytest.raises(ArchiveError) as caught:
        archive(data)
    assert said in str(caught.value)
    assert str(caught.value).startswith("/")  # names the file
    assert "range requests" not in str(caught.value)  # what is said of servers


def test_missing_zip_is_refused(tmp_path: Path) -> None:
    archive = open_archive(str(tmp_path / "none.zip"))
    with pytest.raises(ArchiveError, match=r"none.zip is not there; check the path"):
        archive.identity()
    with pytest.raises(ArchiveError, match=r"none.zip is not there; check the path"):
        list_archive(archive)


def test_identity_tells_path_and_size(tmp_path: Path) -> None:
    (tmp_path / "cells.zip").write_bytes(PLAIN)
    identity = open_archive(str(tmp_path / "cells.zip")).identity()
    assert identity == {"archive": str(tmp_path / "cells.zip"), "archive_bytes": len(PLAIN)}


def test_zip_cut_off_after_it_was_listed_gives_rows(tmp_path: Path) -> None:
    file = tmp_path / "cells.zip"
    file.write_bytes(PLAIN)
    listing = list_archive(open_archive(str(file)))
    file.write_bytes(PLAIN[: len(PNG) // 2])
    assert read_cells(listing, image_size=16).table["status"].to_pylist() == ["corrupt", "corrupt"]
    file.unlink()
    assert read_cells(listing, image_size=16).table["status"].to_pylist() == ["unreadable", "unreadable"]


@pytest.mark.parametrize("layout", ["plain", "zip64", "other local extra", "streamed"])
def test_any_damage_gives_rows_or_one_archive_error(tmp_path: Path, layout: str) -> None:
    chance = random.Random(layout)
    whole = GOOD_LAYOUTS[layout]
    directory = whole.index(b"PK\1\2")
    for turn in range(150):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 1, 2, 6])):
            place = chance.randrange(directory, len(data)) if chance.random() < 0.7 else chance.randrange(60)
            data[place] = chance.choice([data[place] ^ 1 << chance.randrange(8), 0, 255])
        if chance.random() < 0.1:
            del data[chance.randrange(len(data)) :]
        file = tmp_path / f"{turn}.zip"
        file.write_bytes(data)
        try:
            listing = list_archive(open_archive(str(file)))
        except ArchiveError:
            continue
        table = read_cells(listing, image_size=16).table
        assert table.num_rows == listing.num_rows
        for name, status, digest in zip(
            *(table[c].to_pylist() for c in ("image_id", "status", "content_digest")), strict=True
        ):
            if status == "ok" and name in ("a.png", "b.png"):
                assert digest is not None


def test_python_and_the_reader_agree_on_the_real_download_layout(tmp_path: Path) -> None:
    files = {
        f"cell_images/{label}/{i}.png": samples.noise(i) for label in ("Parasitized", "Uninfected") for i in range(40)
    }
    data = zip_of({"cell_images/": b"", **files})
    (tmp_path / "cell_images.zip").write_bytes(data)
    listing = list_archive(open_archive(str(tmp_path / "cell_images.zip")))
    with zipfile.ZipFile(io.BytesIO(data)) as python:
        for name, found in zip(listing["image_id"].to_pylist(), read_files(listing), strict=True):
            assert found == python.read(name)
