"""Real encoded images and real zip archives for tests, good and bad. Nothing here imports malaria_ray.

`picture()` has four plain quarters, so that what a decoder made of it can be told by four pixels:

    RED    (200, 30, 60) | GREEN  (20, 180, 90)
    ---------------------+---------------------
    BLUE   (40, 60, 190) | YELLOW (230, 220, 40)
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

RED, GREEN, BLUE, YELLOW = (200, 30, 60), (20, 180, 90), (40, 60, 190), (230, 220, 40)
WIDTH, HEIGHT = 60, 40


def picture() -> npt.NDArray[np.uint8]:
    """uint8 (40, 60, 3), RGB: the four quarters."""
    pixels = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    top, left = HEIGHT // 2, WIDTH // 2
    pixels[:top, :left], pixels[:top, left:] = RED, GREEN
    pixels[top:, :left], pixels[top:, left:] = BLUE, YELLOW
    return pixels


def noise(seed: int, height: int = 30, width: int = 26) -> bytes:
    """A PNG with pixels of its own: no two seeds give the same bytes."""
    pixels = np.random.default_rng([seed]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), "PNG")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _of_16_bits(suffix: str) -> bytes:
    bgr = np.ascontiguousarray(picture()[:, :, ::-1]).astype(np.uint16) * 257
    return bytes(cv2.imencode(suffix, bgr)[1].tobytes())


def _with_alpha(alpha: int) -> Image.Image:
    image = Image.fromarray(picture()).convert("RGBA")
    image.putalpha(Image.fromarray(np.full((HEIGHT, WIDTH), alpha, np.uint8)))
    return image


def _turned() -> Image.Exif:
    """EXIF that says: turn me by 90° clockwise to see me upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def good_files() -> dict[str, bytes]:
    """One valid file for each name; all show `picture()`, as far as their mode can."""
    rgb = Image.fromarray(picture())
    other = Image.fromarray(255 - picture())
    return {
        "png-rgb": encoded(rgb, "PNG"),
        "png-1-bit": encoded(rgb.convert("1", dither=Image.Dither.NONE), "PNG"),
        "png-grey": encoded(rgb.convert("L"), "PNG"),
        "png-grey-alpha": encoded(rgb.convert("LA"), "PNG"),
        "png-palette": encoded(rgb.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        "png-alpha": encoded(_with_alpha(100), "PNG"),
        "png-invisible": encoded(_with_alpha(0), "PNG"),
        "png-16-bit": _of_16_bits(".png"),
        "png-turned": encoded(rgb, "PNG", exif=_turned()),
        "png-animated": encoded(rgb, "PNG", save_all=True, append_images=[other]),
        "jpeg-rgb": encoded(rgb, "JPEG", quality=95, subsampling=0),
        "jpeg-grey": encoded(rgb.convert("L"), "JPEG", quality=95),
        "jpeg-cmyk": encoded(rgb.convert("CMYK"), "JPEG", quality=95),
        "jpeg-progressive": encoded(rgb, "JPEG", quality=95, subsampling=0, progressive=True),
        "jpeg-turned": encoded(rgb, "JPEG", quality=95, subsampling=0, exif=_turned()),
        "tiff-rgb": encoded(rgb, "TIFF"),
        "tiff-1-bit": encoded(rgb.convert("1", dither=Image.Dither.NONE), "TIFF", compression="group4"),
        "tiff-grey": encoded(rgb.convert("L"), "TIFF"),
        "tiff-palette": encoded(rgb.convert("P", palette=Image.Palette.ADAPTIVE), "TIFF"),
        "tiff-cmyk": encoded(rgb.convert("CMYK"), "TIFF"),
        "tiff-16-bit": _of_16_bits(".tiff"),
        "tiff-lzw": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "tiff-deflate": encoded(rgb, "TIFF", compression="tiff_adobe_deflate"),
        "tiff-jpeg": encoded(rgb, "TIFF", compression="jpeg", quality=95),
        "tiff-turned": encoded(rgb, "TIFF", exif=_turned()),
        "tiff-big": encoded(rgb, "TIFF", big_tiff=True),
        "bmp-rgb": encoded(rgb, "BMP"),
        "bmp-1-bit": encoded(rgb.convert("1", dither=Image.Dither.NONE), "BMP"),
        "bmp-palette": encoded(rgb.convert("P", palette=Image.Palette.ADAPTIVE), "BMP"),
        "bmp-top-down": _bmp_from_the_top(),
        "webp-lossless": encoded(rgb, "WEBP", lossless=True),
        "webp-lossy": encoded(rgb, "WEBP", quality=100),
        "webp-alpha": encoded(_with_alpha(100), "WEBP", lossless=True),
        "webp-turned": encoded(rgb, "WEBP", lossless=True, exif=_turned()),
        "webp-animated": encoded(rgb, "WEBP", lossless=True, save_all=True, append_images=[other]),
    }


def _bmp_from_the_top() -> bytes:
    bgr = picture()[:, :, ::-1].tobytes()
    header = struct.pack("<IiiHHIIiiII", 40, WIDTH, -HEIGHT, 1, 24, 0, len(bgr), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(bgr), 0, 0, 54) + header + bgr


# --- files that promise more than they hold -------------------------------------------------------------------------


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_header(width: int, height: int) -> bytes:
    """A PNG that is whole but for its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(name, body) for name, body in chunks)


def jpeg_header(width: int, height: int) -> bytes:
    return (
        b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
        + b"\xff\xc0\0\x11\x08"
        + struct.pack(">HH", height, width)
        + b"\3\1\x22\0\2\x11\1\3\x11\1\xff\xd9"
    )


def bmp_header(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


def webp_header(width: int, height: int, kind: bytes) -> bytes:
    """WebP whose first record is VP8X, VP8L or `VP8 `; the format ends at 16,384 pixels a side (VP8X: 2**24)."""
    if kind == b"VP8X":
        body = bytes([2, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif kind == b"VP8L":
        body = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(5)
    else:
        body = b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(6)
    record = kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(record)) + b"WEBP" + record


def tiff_header(tags: dict[int, int], order: str = "<", *, is_big: bool = False) -> bytes:
    """A TIFF with one value for each tag and 1,000 zeros for pixels."""
    mark = b"II" if order == "<" else b"MM"
    if is_big:
        entries = b"".join(struct.pack(order + "HHQQ", tag, 16, 1, value) for tag, value in sorted(tags.items()))
        start = struct.pack(order + "HHHQQ", 43, 8, 0, 16, len(tags))
    else:
        entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
        start = struct.pack(order + "HIH", 42, 8, len(tags))
    return mark + start + entries + bytes(1008)


def tiff_tags(width: int, height: int, **more: int) -> dict[int, int]:
    """Tags of an uncompressed grey TIFF in one strip; `more`: tile_width, tile_height, rows_per_strip."""
    numbers = {"rows_per_strip": 278, "tile_width": 322, "tile_height": 323}
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 277: 1, 273: 300, 279: 1000}
    return tags | {numbers[name]: value for name, value in more.items()}


# --- what lies in folders of images and is none ---------------------------------------------------------------------

THUMBS_DB = bytes.fromhex("d0cf11e0a1b11ae1") + bytes(504)  # the OLE header of Windows' thumbnail cache
GIF = encoded(Image.fromarray(picture()).convert("P"), "GIF")


# --- zip archives ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """One file of `raw_zip`. `packed`, `crc` and `size`: what is written instead of the truth."""

    name: bytes
    data: bytes
    method: int = zipfile.ZIP_DEFLATED
    flags: int = 0x800  # the name is UTF-8
    local_extra: bytes = b""
    central_extra: bytes = b""
    packed: bytes | None = None
    crc: int | None = None
    size: int | None = None
    has_descriptor: bool = False
    is_zip64: bool = False


def raw_zip(members: list[Member], *, prefix: bytes = b"", gap: bytes = b"") -> bytes:
    """A zip written field by field, so that its directory may say one thing and its members another.

    `prefix` stands before the archive, whose offsets do not count it (a self-extracting archive); `gap` between
    members.
    """
    body, central = b"", b""
    for member in members:
        offset = len(body)
        packed = member.packed if member.packed is not None else _packed(member)
        crc = zlib.crc32(member.data) if member.crc is None else member.crc
        size = len(member.data) if member.size is None else member.size
        flags = member.flags | (8 if member.has_descriptor else 0)
        known = (0, 0, 0) if member.has_descriptor else (crc, len(packed), size)
        body += struct.pack("<4s5H3I2H", b"PK\3\4", 20, flags, member.method, 0, 33, *known, len(member.name),
                            len(member.local_extra))  # fmt: skip
        body += member.name + member.local_extra + packed
        if member.has_descriptor:
            body += struct.pack("<4s3I", b"PK\7\x08", crc, len(packed), size)
        body += gap
        extra, sizes = member.central_extra, (len(packed), size, offset)
        if member.is_zip64:
            extra += struct.pack("<HHQQQ", 1, 24, size, len(packed), offset)
            sizes = (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
        central += struct.pack("<4s6H3I5H2I", b"PK\1\2", 45, 20, flags, member.method, 0, 33, crc, sizes[0], sizes[1],
                               len(member.name), len(extra), 0, 0, 0, 0, sizes[2])  # fmt: skip
        central += member.name + extra
    start, n = len(body), len(members)
    end = b""
    if any(member.is_zip64 for member in members):
        end += struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, n, n, len(central), start)
        end += struct.pack("<4sIQI", b"PK\6\7", 0, start + len(central), 1)
        n, start = 0xFFFF, 0xFFFFFFFF
    end += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, n, n, len(central), start, 0)
    return prefix + body + central + end


def _packed(member: Member) -> bytes:
    if member.method != zipfile.ZIP_DEFLATED:
        return member.data
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(member.data) + packer.flush()


def zip_of(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip as Python writes it; a name that ends with `/` is a folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()
