"""Time and peak memory of listing a million files: python -m tests.benchmarks.listing [N].

The archives are synthetic and sparse: what a listing looks at is there (directories, headers, footers, names), what
only a reader looks at is holes or one image for all. Each archive is listed by a process of its own, as a driver would,
and that process's highest resident memory is told; 'loaded' is what it has before, with all modules imported.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

N_FILES, IMAGE_BYTES = 1_000_000, 12_000
KINDS = ("zip", "tar", "tar shards", "parquet", "folder")


def name(i: int) -> str:
    folder = ("Parasitized", "Uninfected")[i % 2]
    return f"cell_images/{folder}/C{i % 400}P{i % 200}ThinF_IMG_20150724_154023_cell_{i}.png"


def sparse_zip(path: Path, n: int) -> None:
    """Members of holes, and a true directory of them with the zip64 end that more than 65,535 members need."""
    with path.open("wb") as file:
        file.truncate(n * (IMAGE_BYTES + 200))
        file.seek(0, os.SEEK_END)
        start = file.tell()
        size = 0
        for i in range(n):
            text = name(i).encode()
            offset = i * (IMAGE_BYTES + 200)
            is_far = offset >= 0xFFFFFFFF
            extra = struct.pack("<HHQ", 1, 8, offset) if is_far else b""
            entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 45, 45, 0x800, 0, 0, 33, i, IMAGE_BYTES, IMAGE_BYTES,
                                len(text), len(extra), 0, 0, 0, 0, 0xFFFFFFFF if is_far else offset)  # fmt: skip
            size += file.write(entry + text + extra)
        end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, n, n, size, start)
        end += struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1)
        file.write(end + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))


def sparse_tar(path: Path, n: int, first: int = 0) -> None:
    with path.open("wb") as file:
        for i in range(first, first + n):
            info = tarfile.TarInfo(name(i))
            info.size = IMAGE_BYTES
            file.write(info.tobuf())
            file.seek(-(-IMAGE_BYTES // 512) * 512, os.SEEK_CUR)
        file.write(bytes(10_240))


def tar_shards(path: Path, n: int) -> None:
    path.mkdir()
    for shard, first in enumerate(range(0, n, 10_000)):
        sparse_tar(path / f"{shard:06d}.tar", min(10_000, n - first), first)


def parquet_of_one_image(path: Path, n: int) -> None:
    """One image for all rows, which a dictionary holds once."""
    image = bytes(IMAGE_BYTES)
    with pq.ParquetWriter(path, pa.schema([("image_id", pa.string()), ("image", pa.binary())])) as writer:
        for start in range(0, n, 10_000):
            names = [name(i) for i in range(start, min(start + 10_000, n))]
            images = pa.DictionaryArray.from_arrays(pa.array([0] * len(names), pa.int32()), [image])
            writer.write_table(pa.table({"image_id": names, "image": images.cast(pa.binary())}))


def folder(path: Path, n: int) -> None:
    """Hard links to few files: a million names without a million inodes."""
    path.mkdir()
    target = path.with_suffix(".png")
    for i in range(n):
        if i % 30_000 == 0:  # a file system gives one inode no more than some 65,000 names
            target.unlink(missing_ok=True)
            target.write_bytes(bytes(IMAGE_BYTES))
        link = path / name(i)
        if i < 2:
            link.parent.mkdir(parents=True, exist_ok=True)
        os.link(target, link)
    target.unlink()


MAKE: dict[str, Callable[[Path, int], None]] = {
    "zip": sparse_zip,
    "tar": sparse_tar,
    "tar shards": tar_shards,
    "parquet": parquet_of_one_image,
    "folder": folder,
}
FILE = {"zip": "cells.zip", "tar": "cells.tar", "tar shards": "shards", "parquet": "cells.parquet", "folder": "cells"}


def peak_mb() -> float:
    """Not from getrusage, whose maximum a process inherits from the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def list_here(url: str) -> None:
    """Lists and prints what it took; the part that runs in a process of its own."""
    from malaria_ray.archives import open_archive
    from malaria_ray.archives.listing import list_archive, listing_digest

    loaded, begun = peak_mb(), time.monotonic()
    listing = list_archive(open_archive(url))
    listed = time.monotonic()
    listing_digest(listing)
    seconds = {"listing_s": listed - begun, "digest_s": time.monotonic() - listed}
    print(json.dumps({"rows": listing.num_rows, "loaded_mb": loaded, "peak_mb": peak_mb(), **seconds,
                      "table_mb": listing.nbytes / 2**20}))  # fmt: skip


def measured(kind: str, n: int, scratch: Path) -> dict[str, float]:
    path = scratch / FILE[kind]
    MAKE[kind](path, n)
    call = [sys.executable, "-m", "tests.benchmarks.listing", "--list", str(path)]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    if found["rows"] != n:
        raise AssertionError(f"{kind}: {found['rows']} rows of {n}")
    return found


def main(n: int = N_FILES) -> None:
    print(f"\nlisting of {n:,} files       seconds   digest   table MB   loaded MB   peak MB")
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as scratch:
            row = measured(kind, n, Path(scratch))
        print(f"{kind:27} {row['listing_s']:9.1f} {row['digest_s']:8.1f} {row['table_mb']:10.0f} "
              f"{row['loaded_mb']:11.0f} {row['peak_mb']:9.0f}")  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--list"]:
        list_here(sys.argv[2])
    else:
        main(*map(int, sys.argv[1:2]))
