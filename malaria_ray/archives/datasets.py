"""A dataset made by `ingest` as a source of cells: its crops, decoded and resized already.

What ingest refused stays in the dataset's own quarantine and is not listed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from upath import UPath

from malaria_ray.runtime import outputs, storage


class DatasetArchive:
    """The crops of a finished dataset. Raises: `NotCompleteError` where it has no `_SUCCESS.json`."""

    def __init__(self, path: UPath):
        self.path = path
        self.url = str(path)
        self.success = outputs.check_complete(path, "ingest")
        self.image_size: int = outputs.read_config(path, "ingest")["identity"]["image_size"]

    def identity(self) -> dict[str, Any]:
        return {"archive": self.url, "dataset_digest": self.success["dataset_digest"]}

    def places(self) -> Iterator[pa.Table]:
        manifest = storage.read_table(self.path / "manifest.parquet", columns=["image_id", "n_bytes"])
        for part in storage.parts(self.path / "crops"):
            crops = storage.read_table(part, columns=["image_id", "label", "patient_id"])
            n = crops.num_rows
            places = crops.append_column("container", pa.repeat(storage.as_url(part), n))
            places = places.append_column("method", pa.repeat("crops", n))
            places = places.append_column("offset", pa.array(range(n), pa.int64()))
            yield places.join(manifest, "image_id", join_type="left outer")
