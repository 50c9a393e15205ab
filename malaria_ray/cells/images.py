"""From encoded bytes to the pixels that every model sees: the one decode-and-resize of training and screening.

Images are uint8 arrays of shape (height, width, 3), RGB, 0..255. Files may be PNG, JPEG, TIFF, BMP or WebP with any bit
depth and colour model that OpenCV reads: grey and 1-bit are repeated over the channels, 16-bit is cut to its upper eight
bits, alpha is dropped, CMYK is converted, EXIF orientation is applied.
"""

from __future__ import annotations

import hashlib
import struct
from io import BytesIO
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from malaria_ray.errors import ImageRefused
from malaria_ray.schema import Reason

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 50_000_000
"""Images with more pixels are refused from their header: decoded they would take more than 150 MB."""

PREPROCESSING = "opencv-rgb-bicubic-1"
"""Name of what `decode` and `resize` do; part of every fingerprint. Changes when a pixel changes."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (_PNG_SIGNATURE, "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"BM", "BMP"),
    (b"RIFF", "WEBP"),
)

cv2.setNumThreads(0)  # the processes of a node are the parallelism; OpenCV's own threads would only fight over cores
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # a refused file is reported in quarantine, not on stderr


def content_digest(data: bytes) -> str:
    """First 32 hex digits of the SHA-256 of an encoded file: what `sha256sum | cut -c1-32` prints."""
    return hashlib.sha256(data).hexdigest()[:32]


def image_format(data: bytes) -> str | None:
    """PNG, JPEG, TIFF, BMP or WEBP by the first bytes; None for anything else, whatever the file's name says."""
    name = next((name for signature, name in _SIGNATURES if data.startswith(signature)), None)
    return None if name == "WEBP" and data[8:12] != b"WEBP" else name


def declared_size(data: bytes, kind: str) -> tuple[int, int] | None:
    """(width, height) in pixels that the header promises, without decoding; None where the header is unreadable."""
    if kind == "PNG":  # the common case by far: fixed place, 30 µs saved per image
        return struct.unpack(">II", data[16:24]) if len(data) >= 24 else None
    try:
        with Image.open(BytesIO(data), formats=[kind]) as header:
            return header.size
    except Image.DecompressionBombError:  # Pillow's own limit, above ours
        return (MAX_PIXELS, MAX_PIXELS)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, struct.error, EOFError):
        return None


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decodes one file to RGB.

    Returns: uint8 (height, width, 3), RGB, 0..255.
    Raises: `ImageRefused` with the reason `empty_file`, `not_an_image`, `too_large`, `truncated` or `corrupt`. A file that
        declares more than `max_pixels` is refused from its header, before memory is taken.
    """
    if not data:
        raise ImageRefused(Reason.EMPTY_FILE, "0 bytes")
    kind = image_format(data)
    if kind is None:
        raise ImageRefused(Reason.NOT_AN_IMAGE, f"begins with {data[:8]!r}; allowed are PNG, JPEG, TIFF, BMP and WebP")
    size = declared_size(data, kind)
    if size is not None and size[0] * size[1] > max_pixels:
        raise ImageRefused(
            Reason.TOO_LARGE, f"{kind} header declares {size[0]} × {size[1]} pixels; at most {max_pixels:,} are decoded"
        )
    try:
        pixels = None if size is None else cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise ImageRefused(Reason.CORRUPT, f"{kind}: {error.err or error}") from error
    if pixels is None:
        if _ends_early(data, kind):
            raise ImageRefused(Reason.TRUNCATED, f"{kind} of {len(data)} bytes ends before its last record")
        raise ImageRefused(Reason.CORRUPT, f"{kind} of {len(data)} bytes: the decoder found damaged data")
    return pixels  # type: ignore[return-value]  # IMREAD_COLOR_RGB is always uint8


def resize(pixels: Pixels, image_size: int) -> Pixels:
    """Resizes to a square: bicubic as in the article; by area where it shrinks more than twofold, which bicubic aliases.

    `pixels`: uint8 (height, width, 3). Returns: uint8 (image_size, image_size, 3); the aspect ratio is not kept.
    """
    shrink = min(pixels.shape[:2]) / image_size
    interpolation = cv2.INTER_AREA if shrink > 2 else cv2.INTER_CUBIC
    resized: Any = cv2.resize(pixels, (image_size, image_size), interpolation=interpolation)
    return resized  # type: ignore[no-any-return]


def _ends_early(data: bytes, kind: str) -> bool:
    """Whether a file that could not be decoded lacks its format's last record, as far as the format tells."""
    if kind == "PNG":
        return b"IEND" not in data[-64:]
    if kind == "JPEG":
        return b"\xff\xd9" not in data[-64:]
    if kind in ("BMP", "WEBP"):
        promised = struct.unpack("<I", data[2:6] if kind == "BMP" else data[4:8])[0] if len(data) >= 8 else len(data) + 1
        return len(data) < int(promised)
    return _tiff_directory_is_missing(data)


def _tiff_directory_is_missing(data: bytes) -> bool:
    order = "<" if data[:2] == b"II" else ">"
    return len(data) < 8 or struct.unpack(order + "I", data[4:8])[0] + 2 > len(data)
