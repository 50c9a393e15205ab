"""From encoded bytes to the pixels that every model sees: the one decode-and-resize of training and screening.

Images are uint8 arrays of shape (height, width, 3), RGB, 0..255. Files may be PNG, JPEG, TIFF, BMP or WebP with any bit
depth and colour model that OpenCV reads: grey and 1-bit are repeated over the channels, 16-bit is cut to its upper
eight
bits, alpha is dropped (in a TIFF libtiff multiplies the colours by it), CMYK is converted, EXIF orientation is applied.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

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
cv2.utils.logging.setLogLevel(
    cv2.utils.logging.LOG_LEVEL_SILENT
)  # a refused file is reported in quarantine, not on stderr


def content_digest(data: bytes) -> str:
    """First 32 hex digits of the SHA-256 of an encoded file: what `sha256sum | cut -c1-32` prints."""
    return hashlib.sha256(data).hexdigest()[:32]


def image_format(data: bytes) -> str | None:
    """PNG, JPEG, TIFF, BMP or WEBP by the first bytes; None for anything else, whatever the file's name says."""
    name = next((name for signature, name in _SIGNATURES if data.startswith(signature)), None)
    return None if name == "WEBP" and data[8:12] != b"WEBP" else name


def declared_size(data: bytes, kind: str) -> tuple[int, int] | None:
    """(width, height) in pixels that the header promises, without decoding; None where the header is unreadable.

    Where a TIFF's tiles or strips are larger than the image theirs counts, because that is what a decoder allocates.
    Read by hand: Pillow maps the whole canvas of a WebP to tell its size, and its warnings of odd TIFF tags become
    exceptions where warnings are errors.
    """
    try:
        return _SIZE_OF[kind](data)
    except (struct.error, IndexError, KeyError, OverflowError):
        return None


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decodes one file to RGB.

    Returns: uint8 (height, width, 3), RGB, 0..255.
    Raises: `ImageRefused` with the reason `empty_file`, `not_an_image`, `too_large`, `truncated` or `corrupt`. A
        file that declares more than `max_pixels` is refused from its header, before memory is taken.
    """
    if not data:
        raise ImageRefused(Reason.EMPTY_FILE, "0 bytes")
    kind = image_format(data)
    if kind is None:
        raise ImageRefused(Reason.NOT_AN_IMAGE, f"begins with {data[:8]!r}; allowed are PNG, JPEG, TIFF, BMP and WebP")
    size = declared_size(data, kind)
    if size is None:
        raise _damaged(data, kind, "its header cannot be followed")
    if size[0] * size[1] > max_pixels:
        raise ImageRefused(
            Reason.TOO_LARGE,
            f"{kind} header declares {size[0]} × {size[1]} pixels; at most {max_pixels:,} are decoded",
        )
    still = _still_png(data) if kind == "PNG" else data
    if still is None:
        raise _damaged(data, kind, "a record reaches beyond the end of the file")
    try:
        pixels = cv2.imdecode(np.frombuffer(still, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise _damaged(data, kind, error.err or str(error)) from error
    if pixels is None:
        raise _damaged(data, kind, "the decoder found damaged data or a variant of the format that it does not know")
    return pixels  # type: ignore[return-value]  # IMREAD_COLOR_RGB is always uint8


def resize(pixels: Pixels, image_size: int, *, out: Pixels | None = None) -> Pixels:
    """Resizes to a square: bicubic as in the article; by area where it shrinks more than twofold, which bicubic
    aliases.

    `pixels`: uint8 (height, width, 3); `out`: where to write. Returns: uint8 (image_size, image_size, 3), `out` where
    it is given; the aspect ratio is not kept.
    """
    shrink = min(pixels.shape[:2]) / image_size
    interpolation = cv2.INTER_AREA if shrink > 2 else cv2.INTER_CUBIC
    resized: Any = cv2.resize(pixels, (image_size, image_size), dst=out, interpolation=interpolation)
    return resized  # type: ignore[no-any-return]


def _damaged(data: bytes, kind: str, found: str) -> ImageRefused:
    if _ends_early(data, kind):
        return ImageRefused(Reason.TRUNCATED, f"{kind} of {len(data)} bytes ends before its last record")
    return ImageRefused(Reason.CORRUPT, f"{kind} of {len(data)} bytes: {found}")


def _ends_early(data: bytes, kind: str) -> bool:
    """Whether a file that could not be decoded lacks its format's last record, as far as the format tells."""
    if kind == "PNG":
        return _PNG_END not in data[-64:]
    if kind == "JPEG":
        return b"\xff\xd9" not in data[-64:]
    if kind == "TIFF":
        return _tiff_ends_early(data)
    if len(data) < 8:
        return True
    promised = struct.unpack("<I", data[2:6])[0] if kind == "BMP" else struct.unpack("<I", data[4:8])[0] + 8
    return len(data) < int(promised)


def _png_size(data: bytes) -> tuple[int, int]:
    if data[12:16] != b"IHDR":
        raise KeyError("IHDR")
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _still_png(data: bytes) -> bytes | None:
    """The PNG without the records of an animation; None where a record reaches beyond the end of the file.

    OpenCV 5.0 takes the memory that a record's length promises, up to 4 GB, before it reads it, and a damaged animation
    ends the whole process (opencv/opencv#27744).
    """
    at = begun = len(_PNG_SIGNATURE)
    kept = [_PNG_SIGNATURE]
    while at + 12 <= len(data):
        end = at + 12 + struct.unpack_from(">I", data, at)[0]
        name = data[at + 4 : at + 8]
        if name in (b"acTL", b"fcTL", b"fdAT"):
            kept.append(data[begun:at])
            begun = end
        at = end
        if name == b"IEND":
            break
    if at > len(data):
        return None
    return data if begun == len(_PNG_SIGNATURE) else b"".join([*kept, data[begun:]])


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Size of the first frame header, found as libjpeg finds it: whatever stands between two segments is skipped."""
    at = 2
    while found := _JPEG_MARKER.search(data, at):
        marker, at = found[1][0], found.end()
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 3)
            return width, height
        if marker not in _JPEG_WITHOUT_LENGTH:
            at += max(2, struct.unpack_from(">H", data, at)[0])
    raise KeyError("SOF")


def _bmp_size(data: bytes) -> tuple[int, int]:
    is_old = struct.unpack_from("<I", data, 14)[0] == 12  # OS/2, 16-bit sizes
    width, height = struct.unpack_from("<HH" if is_old else "<ii", data, 18)
    return abs(width), abs(height)  # a negative height means rows from the top


def _webp_size(data: bytes) -> tuple[int, int]:
    record = data[12:16]
    if record == b"VP8X":  # canvas of an extended file
        low = int.from_bytes(data[24:30].ljust(6, b"\0"), "little")
        return (low & 0xFFFFFF) + 1, (low >> 24) + 1
    if record == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if record == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise KeyError("VP8")


def _tiff_size(data: bytes) -> tuple[int, int]:
    tags, _ = _tiff_tags(data)
    width, height = (max(tags[tag], default=0) for tag in (_TIFF_WIDTH, _TIFF_HEIGHT))
    piece_width = max(tags.get(_TIFF_TILE_WIDTH, ()), default=0)
    piece_height = max(tags.get(_TIFF_TILE_HEIGHT) or tags.get(_TIFF_ROWS_PER_STRIP) or (), default=0)
    if piece_height == 0xFFFFFFFF:  # the usual way to say: one strip
        piece_height = 0
    return max(width, piece_width), max(height, piece_height)


def _tiff_ends_early(data: bytes) -> bool:
    try:
        tags, end = _tiff_tags(data)
    except (struct.error, OverflowError):  # the directory, often the end of the file, is not there
        return True
    for offsets, lengths in _TIFF_PIECES:
        pieces = zip(tags.get(offsets, ()), tags.get(lengths, ()), strict=False)
        end = max([end, *(offset + length for offset, length in pieces)])
    return end > len(data)


def _tiff_tags(data: bytes) -> tuple[dict[int, tuple[int, ...]], int]:
    """Of the first directory: the values of the tags that tell sizes and places; where the last value of any tag ends.

    Raises: `struct.error`, `OverflowError` where the directory or one of those values is beyond the end of the file.
    """
    order = "<" if data[:2] == b"II" else ">"
    is_big = b"+" in data[2:4]  # BigTIFF
    start, count, entry, pointer = (8, "Q", "HHQ", "Q") if is_big else (4, "H", "HHI", "I")
    n_pointer = struct.calcsize("=" + pointer)
    at = struct.unpack_from(order + pointer, data, start)[0]
    n_entries = struct.unpack_from(order + count, data, at)[0]
    at += struct.calcsize("=" + count)
    step = struct.calcsize("=" + entry) + n_pointer
    tags: dict[int, tuple[int, ...]] = {}
    end = at
    for place in range(at, at + n_entries * step, step):
        tag, type_, n = struct.unpack_from(order + entry, data, place)
        value_at, n_bytes = place + step - n_pointer, n * _TIFF_TYPE_BYTES.get(type_, 0)
        if n_bytes > n_pointer:
            value_at = struct.unpack_from(order + pointer, data, value_at)[0]
        end = max(end, value_at + n_bytes)
        if tag in _TIFF_TAGS and type_ in _TIFF_INTEGERS:
            if n > len(data):
                raise struct.error("more values than bytes")
            tags[tag] = struct.unpack_from(f"{order}{n}{_TIFF_INTEGERS[type_]}", data, value_at)
    return tags, end


_PNG_END = b"IEND\xaeB`\x82"
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff])")  # any number of ff may stand before
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # the others are tables
_JPEG_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
_TIFF_INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}
_TIFF_TYPE_BYTES = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4), start=1)) | {16: 8, 17: 8, 18: 8}
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_ROWS_PER_STRIP, _TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT = 256, 257, 278, 322, 323
_TIFF_PIECES = ((273, 279), (324, 325))  # offsets and lengths of the strips, of the tiles
_TIFF_TAGS = frozenset({256, 257, 273, 278, 279, 322, 323, 324, 325})
_SIZE_OF: dict[str, Callable[[bytes], tuple[int, int]]] = {
    "PNG": _png_size,
    "JPEG": _jpeg_size,
    "TIFF": _tiff_size,
    "BMP": _bmp_size,
    "WEBP": _webp_size,
}
