"""A dataset made by `ingest` as a source of cells: its crops, decoded and resized already.

What ingest refused stays in the dataset's own quarantine and is not listed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from upath import UPath

from malaria_ray.archives import containers
from malaria_ray.errors import DirectoryError
from malaria_ray.runtime import outputs, storage


class DatasetArchive:
    """The crops of a finished dataset. Raises: `NotCompleteError` where it has no `_SUCCESS.json`."""

    def __init__(self, path: UPath):
        self.path = path
        self.url = str(path)
        self.states: dict[str, containers.State] = {}
        self.success = outputs.check_complete(path, "ingest")
        self.image_size: int = outputs.read_config(path, "ingest")["identity"]["image_size"]

    def identity(self) -> dict[str, Any]:
        return {"archive": self.url, "dataset_digest": self.success["dataset_digest"]}

    def places(self) -> Iterator[pa.Table]:
        parts = [part for part, _ in outputs.files_in(self.path, self.success, "crops")]
        self.states |= containers.states(parts)
        # By its digest, so that a dataset that was made anew since it was opened is found.
        manifest = outputs.read_written(self.path, self.success, "manifest.parquet", ["image_id", "n_bytes"])
        tables = [_places(part) for part in parts]
        if not tables:
            return
        places = pa.concat_tables(tables)
        rows = pc.index_in(places["image_id"], value_set=manifest["image_id"])
        yield places.append_column("n_bytes", manifest["n_bytes"].take(rows))


def _places(part: UPath) -> pa.Table:
    """The crops of one part, by its small columns alone: the pixels are not read.

    Raises: `DirectoryError` where a column is an Arrow extension, as `storage.read_table`.
    """
    with containers.opened(part, is_read_in_order=False) as file:
        crops = pq.read_table(file, columns=["image_id", "label", "patient_id"], use_threads=False)
    if "extension<" in str(crops.schema):
        raise DirectoryError(f"{part} is no plain table: a column is an Arrow extension; make the directory anew")
    n = crops.num_rows
    places = crops.append_column("container", pa.repeat(storage.as_url(part), n))
    places = places.append_column("method", pa.repeat("crops", n))
    return places.append_column("offset", pa.array(range(n), pa.int64()))
