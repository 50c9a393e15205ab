"""The `image` column of crops: arrays in memory, raw bytes in Parquet (`schema.image_type`)."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from malaria_ray.cells.images import Pixels
from malaria_ray.errors import ModelError
from malaria_ray.schema import image_type


def crops_column(pixels: Pixels) -> pa.FixedSizeBinaryArray:
    """uint8 (n, size, size, 3), RGB, as a column of n values."""
    buffer = pa.py_buffer(np.ascontiguousarray(pixels))
    return pa.FixedSizeBinaryArray.from_buffers(image_type(pixels.shape[1]), len(pixels), [None, buffer])


def crop_pixels(column: pa.ChunkedArray, *, image_size: int) -> Pixels:
    """A column of crops as uint8 (n, image_size, image_size, 3), RGB.

    Raises: `ModelError` where the crops have another size.
    """
    if column.type != image_type(image_size):
        found = int((column.type.byte_width // 3) ** 0.5)
        raise ModelError(f"the crops are {found} × {found}, the model takes {image_size} × {image_size}")
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    pixels = np.frombuffer(array.buffers()[1], np.uint8).reshape(-1, image_size, image_size, 3)
    return pixels[array.offset : array.offset + len(array)]
