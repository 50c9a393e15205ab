"""A plain .tar read in place: its headers once, one after the other, then each member's bytes by range.

WebDataset's layout is understood: `key.png` with `key.cls` (a label) or `key.json` (an object with `label` and
`patient_id`, others are left). Such a sidecar file is of the files that have its name but for the last ending; else of
the one file, if it is one, that agrees with it up to the first dot of the name, as in WebDataset's own samples. It is
read while listing and is no row of its own; one without an image beside it is a row like any file.
"""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
from upath import UPath

from malaria_ray.archives import containers
from malaria_ray.archives.labels import label_number
from malaria_ray.errors import ArchiveError
from malaria_ray.runtime import storage

T = TypeVar("T")

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")

_BATCH = 10_000
_SIDECARS, _MAX_SIDECAR_BYTES = (".cls", ".json"), 64 * 1024
_BLOCK = tarfile.BLOCKSIZE


class TarArchive:
    """All members of a .tar but its folders; `image_id` is the member's name."""

    def __init__(self, path: UPath):
        self.path = path
        self.url = str(path)
        self.states: dict[str, containers.State] = {}

    def identity(self) -> dict[str, Any]:
        return {"archive": self.url, "archive_bytes": containers.n_bytes(self.path)}

    def places(self) -> Iterator[pa.Table]:
        return containers.listed(self.path, lambda: tar_places(self.path), self.states)


@dataclass(slots=True)
class _Member:
    name: str
    offset: int
    size: int
    method: str
    label: int | None = None
    patient_id: str | None = None


def tar_places(path: UPath) -> Iterator[pa.Table]:
    """The members of one tar in their order, a bounded number at a time.

    Raises: `ArchiveError` where it cannot be read to its end: members behind a damage would be lost without a word.
    """
    batch: list[_Member] = []
    with containers.opened(path) as file:
        try:
            for sample in _samples(file, path):
                batch += sample
                if len(batch) >= _BATCH:
                    yield _table(batch, path)
                    batch = []
        except tarfile.TarError as error:
            raise ArchiveError(
                f"{path} is no complete tar archive: {error}; it may be cut off or compressed, fetch or pack it anew"
            ) from error
    if batch:
        yield _table(batch, path)


def _samples(file: BinaryIO, path: UPath) -> Iterator[list[_Member]]:
    """The files of one key after the other, with what their sidecar files say."""
    sample: list[_Member] = []
    held = None
    for member in _members(file, path):
        folder, slash, name = member.name.rpartition("/")
        key = folder + slash + name.partition(".")[0]
        if key != held and sample:
            yield _joined(sample, file, path)
            sample = []
        held = key
        sample.append(member)
    if sample:
        yield _joined(sample, file, path)


def _joined(sample: list[_Member], file: BinaryIO, path: UPath) -> list[_Member]:
    """The images of a sample, its sidecar files read and left out; all of it where there is nothing to join."""
    if len(sample) == 1:
        return sample
    sidecars = [member for member in sample if _is_sidecar(member)]
    files = [member for member in sample if not _is_sidecar(member)]
    of_stem = defaultdict(list)
    for member in files:
        of_stem[_stem(member)].append(member)
    alone = []
    for sidecar in sidecars:
        if described := of_stem.get(_stem(sidecar)) or (files if len(files) == 1 else None):
            _describe(described, sidecar, file, path)
        else:
            alone.append(sidecar)
    return files + alone


def _stem(member: _Member) -> str:
    return posixpath.splitext(member.name)[0]


def _describe(files: list[_Member], sidecar: _Member, file: BinaryIO, path: UPath) -> None:
    """Gives the files the label and patient of their sidecar file. Raises: `ArchiveError` where another gave others."""
    where = f"{path}: {sidecar.name}"
    file.seek(sidecar.offset)
    content = _content(file.read(sidecar.size), sidecar.name, where=where)
    label = label_number(content.get("label"), where=where)
    patient = None if (given := content.get("patient_id")) is None else str(given)
    for member in files:
        member.label = _agreed("label", member.label, label, member, where)
        member.patient_id = _agreed("patient", member.patient_id, patient, member, where)


def _agreed(what: str, was: T | None, now: T | None, member: _Member, where: str) -> T | None:
    if was is not None and now is not None and was != now:
        raise ArchiveError(
            f"{where} gives {member.name} the {what} {now!r}, another file {was!r}; correct one or leave it out"
        )
    return was if now is None else now


def _is_sidecar(member: _Member) -> bool:
    is_small = member.method == "tar" and member.size <= _MAX_SIDECAR_BYTES
    return is_small and member.name.lower().endswith(_SIDECARS)


def _content(data: bytes, name: str, *, where: str) -> dict[str, Any]:
    try:
        text = data.decode()
        content = json.loads(text) if name.lower().endswith(".json") else {"label": text}
    except ValueError as error:
        raise ArchiveError(f"{where} cannot be read: {error}; correct the file or leave it out") from error
    return content if isinstance(content, dict) else {}


def _members(file: BinaryIO, path: UPath) -> Iterator[_Member]:
    with tarfile.open(fileobj=file, mode="r:") as tar:
        before = -1
        while (info := tar.next()) is not None:
            if tar.offset <= before:  # else Python would read one header for ever (CVE-2025-8194)
                raise tarfile.ReadError("a header says that its file has less than no bytes")
            before = tar.offset
            tar.members.clear()  # type: ignore[attr-defined]  # it keeps them all
            if info.isdir():
                continue
            method = "tar" if info.isreg() and not info.issparse() else _kind(info)
            name = info.name.removeprefix("./")  # as the same folder names it
            try:
                name.encode()
            except UnicodeEncodeError:
                name, method = name.encode("utf-8", "backslashreplace").decode(), "a file whose name is not UTF-8"
            yield _Member(name, info.offset_data, info.size, method)
        _check_end(file, tar.offset, path)


def _kind(info: tarfile.TarInfo) -> str:
    if info.issparse():
        return "a sparse file"
    return "a link" if info.islnk() or info.issym() else "a pipe or device"


def _check_end(file: BinaryIO, offset: int, path: UPath) -> None:
    """Python's reader takes a damaged header for the end. Raises: `ArchiveError` unless only zeros follow."""
    file.seek(offset)
    data = file.read(2**20)
    if len(data) < _BLOCK:
        raise ArchiveError(f"{path} is cut off after {offset:,} bytes: it has no end mark; fetch or pack it anew")
    while data:
        if data.count(0) != len(data):
            raise ArchiveError(
                f"{path} is damaged, or several archives in one file, after {offset:,} bytes; fetch or pack it anew"
            )
        data = file.read(2**20)


def _table(batch: list[_Member], path: UPath) -> pa.Table:
    size = pa.array([member.size for member in batch], pa.int64())
    return pa.table(
        {
            "image_id": pa.array([member.name for member in batch], pa.string()),
            "label": pa.array([member.label for member in batch], pa.int8()),
            "patient_id": pa.array([member.patient_id for member in batch], pa.string()),
            "n_bytes": size,
            "container": pa.repeat(storage.as_url(path), len(batch)),
            "method": pa.array([member.method for member in batch], pa.string()),
            "offset": pa.array([member.offset for member in batch], pa.int64()),
            "span": size,
            "packed_bytes": size,
        }
    )
