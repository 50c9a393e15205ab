"""Every file becomes pixels or a refusal with its reason; nothing else comes out of `decode`."""

from __future__ import annotations

import hashlib
import random
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import samples
from hypothesis import example, given, settings
from hypothesis import strategies as st

from malaria_ray.cells.images import MAX_PIXELS, content_digest, declared_size, decode, image_format, resize
from malaria_ray.errors import ImageRefused
from malaria_ray.schema import Reason

GOOD = samples.good_files()
COLOURS = [samples.RED, samples.GREEN, samples.BLUE, samples.YELLOW]
GREYS = [(round(0.299 * r + 0.587 * g + 0.114 * b),) * 3 for r, g, b in COLOURS]
BLACK_OR_WHITE = [(255 * (grey[0] > 127),) * 3 for grey in GREYS]
QUARTER_TURN = [samples.BLUE, samples.RED, samples.YELLOW, samples.GREEN]


def refusal(data: bytes) -> Reason:
    with pytest.raises(ImageRefused) as caught:
        decode(data)
    assert caught.value.detail
    return caught.value.reason


def quarters(pixels: np.ndarray) -> np.ndarray:
    """Mean colour of the middle of each quarter, in reading order."""
    h, w = pixels.shape[:2]
    spots = [(h // 4, w // 4), (h // 4, 3 * w // 4), (3 * h // 4, w // 4), (3 * h // 4, 3 * w // 4)]
    return np.array([pixels[y - 2 : y + 3, x - 2 : x + 3].mean(axis=(0, 1)) for y, x in spots])


@pytest.mark.parametrize("name", GOOD)
def test_every_valid_file_becomes_rgb_pixels_of_its_colours(name: str) -> None:
    pixels = decode(GOOD[name])
    expected, shape = COLOURS, (samples.HEIGHT, samples.WIDTH, 3)
    if "grey" in name:
        expected = GREYS
    elif "1-bit" in name:
        expected = BLACK_OR_WHITE
    elif "turned" in name:  # EXIF says by 90° clockwise
        expected, shape = QUARTER_TURN, (samples.WIDTH, samples.HEIGHT, 3)
    assert pixels.dtype == np.uint8
    assert pixels.shape == shape
    is_exact = not any(part in name for part in ("jpeg", "lossy", "palette", "grey"))
    np.testing.assert_allclose(quarters(pixels), expected, atol=0 if is_exact else 6)


@pytest.mark.parametrize("name", GOOD)
def test_the_header_alone_tells_the_size(name: str) -> None:
    data = GOOD[name]
    assert declared_size(data, image_format(data)) == (samples.WIDTH, samples.HEIGHT)  # before any EXIF turn


def test_alpha_of_a_tiff_is_multiplied_in_by_libtiff() -> None:
    from PIL import Image

    image = Image.fromarray(samples.picture()).convert("RGBA")
    image.putalpha(128)
    pixels = decode(samples.encoded(image, "TIFF"))
    np.testing.assert_allclose(quarters(pixels), np.array(COLOURS) * 128 / 255, atol=1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.EMPTY_FILE),
        (b"\0", Reason.NOT_AN_IMAGE),
        (b"this is a text named cell.png", Reason.NOT_AN_IMAGE),
        (samples.THUMBS_DB, Reason.NOT_AN_IMAGE),  # in each folder of the official download
        (samples.GIF, Reason.NOT_AN_IMAGE),
        (b"RIFF\x24\0\0\0WAVEfmt " + bytes(20), Reason.NOT_AN_IMAGE),  # shares WebP's first bytes
        (b"\x89PNG\r\n\x1a\n", Reason.TRUNCATED),  # nothing after the signature
        (GOOD["png-rgb"][:33], Reason.TRUNCATED),  # nothing after the header
        (GOOD["png-rgb"][8:], Reason.NOT_AN_IMAGE),  # the signature is lost
        (GOOD["png-rgb"].replace(b"IHDR", b"IHDX"), Reason.CORRUPT),
        (samples.png_header(0, 10), Reason.CORRUPT),
        (samples.bmp_header(0, 0), Reason.CORRUPT),
        (samples.jpeg_header(8, 8), Reason.CORRUPT),  # a header and an end, nothing between
        (samples.tiff_header({258: 8}), Reason.CORRUPT),  # has no width
        (samples.tiff_header(samples.tiff_tags(60, 40)), Reason.TRUNCATED),  # says 1,000 bytes at 300, has not as many
    ],
)
def test_bad_file_is_refused_with_its_reason(data: bytes, reason: Reason) -> None:
    assert refusal(data) is reason


@pytest.mark.parametrize("name", GOOD)
def test_truncated_file_is_refused_as_truncated(name: str) -> None:
    data = GOOD[name]
    for kept in {len(data) // 3, len(data) // 2, len(data) * 4 // 5, len(data) - 20}:
        assert refusal(data[:kept]) is Reason.TRUNCATED, kept


def test_of_an_animated_png_the_still_picture_is_taken() -> None:
    """Animation records are left out before decoding; the file is refused where one of them is cut."""
    data = GOOD["png-animated"]
    still = data[: data.index(b"fcTL", data.index(b"IDAT")) - 4] + data[-12:]
    np.testing.assert_array_equal(decode(data), decode(still))
    assert refusal(data[: data.index(b"fdAT") + 20] + data[-12:]) is Reason.CORRUPT


def test_damaged_animation_does_not_end_the_process() -> None:
    """OpenCV 5.0 alone dies of it by a segmentation fault (opencv/opencv#27744)."""
    data = bytearray(GOOD["png-animated"])
    data[data.index(b"fcTL")] ^= 4
    data[data.index(b"fdAT") + 60] ^= 0xFF
    code = "import sys; from malaria_ray.cells.images import decode; print(decode(sys.stdin.buffer.read()).shape)"
    ended = subprocess.run([sys.executable, "-c", code], input=bytes(data), capture_output=True, check=False)
    assert ended.returncode in (0, 1), ended
    assert b"ImageRefused" in ended.stderr or b"(40, 60, 3)" in ended.stdout


@pytest.mark.parametrize("kind", ["png-rgb", "png-16-bit", "png-palette"])
def test_flipped_bit_in_png_pixels_is_refused_as_corrupt(kind: str) -> None:
    data = bytearray(GOOD[kind])
    data[data.index(b"IDAT") + 20] ^= 0x10
    assert refusal(bytes(data)) is Reason.CORRUPT


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (samples.png_header(30_000, 30_000), (30_000, 30_000)),
        (samples.png_header(30_000, 30_000)[:40], (30_000, 30_000)),  # told before it is told to be truncated
        (samples.jpeg_header(30_000, 30_000), (30_000, 30_000)),
        (samples.bmp_header(30_000, 30_000), (30_000, 30_000)),
        (samples.bmp_header(30_000, -30_000), (30_000, 30_000)),  # rows from the top
        (samples.webp_header(16_383, 16_383, b"VP8X"), (16_383, 16_383)),
        (samples.webp_header(16_383, 16_383, b"VP8L"), (16_383, 16_383)),
        (samples.webp_header(16_383, 16_383, b"VP8 "), (16_383, 16_383)),
        (samples.tiff_header(samples.tiff_tags(30_000, 30_000)), (30_000, 30_000)),
        (samples.tiff_header(samples.tiff_tags(30_000, 30_000), ">"), (30_000, 30_000)),
        (samples.tiff_header(samples.tiff_tags(30_000, 30_000), is_big=True), (30_000, 30_000)),
        # A small image in large tiles or strips: their memory is what a decoder takes.
        (samples.tiff_header(samples.tiff_tags(60, 40, tile_width=30_000, tile_height=30_000)), (30_000, 30_000)),
        (samples.tiff_header(samples.tiff_tags(60, 40, rows_per_strip=9_000_000)), (60, 9_000_000)),
    ],
)
def test_image_larger_than_the_limit_is_refused_from_its_header(data: bytes, size: tuple[int, int]) -> None:
    with pytest.raises(ImageRefused, match=rf"{size[0]} × {size[1]} pixels; at most 50,000,000") as caught:
        decode(data)
    assert caught.value.reason is Reason.TOO_LARGE


def test_one_strip_for_the_whole_tiff_is_no_large_strip() -> None:
    tags = samples.tiff_tags(60, 40, rows_per_strip=2**32 - 1)
    assert declared_size(samples.tiff_header(tags), "TIFF") == (60, 40)


def test_the_limit_itself_is_decoded_and_one_pixel_more_is_not() -> None:
    assert decode(GOOD["png-rgb"], max_pixels=2400).shape == (40, 60, 3)
    with pytest.raises(ImageRefused, match="60 × 40 pixels; at most 2,399"):
        decode(GOOD["png-rgb"], max_pixels=2399)


_BOMBS = {
    **{f"header-{i}": data for i, data in enumerate(
        [
            samples.png_header(30_000, 30_000),
            samples.jpeg_header(30_000, 30_000),
            samples.bmp_header(30_000, 30_000),
            samples.webp_header(16_383, 16_383, b"VP8X"),
            samples.webp_header(16_383, 16_383, b"VP8L"),
            samples.tiff_header(samples.tiff_tags(30_000, 30_000)),
            samples.tiff_header(samples.tiff_tags(60, 40, tile_width=30_000, tile_height=30_000)),
        ]
    )},
    # A record that says it has 4 GB: OpenCV takes them before it reads.
    "record": GOOD["png-rgb"][:33] + struct.pack(">I", 0xFF00062B) + GOOD["png-rgb"][37:],
}  # fmt: skip


def test_bombs_are_refused_without_taking_memory(tmp_path: Path) -> None:
    for name, data in _BOMBS.items():
        (tmp_path / name).write_bytes(data)
    code = """
import pathlib, resource, sys
from malaria_ray.cells.images import decode
from malaria_ray.errors import ImageRefused
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
for file in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        decode(file.read_bytes())
        print(file.name, "decoded")
    except ImageRefused:
        pass
print("MB", peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True).stdout
    assert "decoded" not in out
    assert int(out.split()[-1]) < 20, out


# --- arbitrary bytes: the seeds are fixed, so that a crash of the decoder can be found again -------------------------


def check_pixels_or_refusal(data: bytes) -> None:
    try:
        pixels = decode(data)
    except ImageRefused:
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert 0 < pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS
    assert resize(pixels, 32).shape == (32, 32, 3)


_SIGNATURES = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"II+\0", b"BM", b"RIFF\x40\0\0\0WEBP", b""]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(signature=st.sampled_from(_SIGNATURES), rest=st.binary(max_size=400))
@example(signature=b"II*\0", rest=b"\xff\xff\xff\xff")  # a directory beyond the end
@example(signature=b"II+\0", rest=b"\x08\0\0\0" + b"\xff" * 8)
@example(signature=b"\xff\xd8\xff", rest=b"\xff" * 50)
def test_arbitrary_bytes_become_pixels_or_a_refusal(signature: bytes, rest: bytes) -> None:
    check_pixels_or_refusal(signature + rest)


def test_a_jpeg_that_ends_in_erased_storage_is_refused_at_once() -> None:
    """Erased flash reads as ff. A search that begins anew at each of them takes hours for a megabyte."""

    def too_long(*_: object) -> None:
        raise TimeoutError

    head = b"\xff\xd8\xff\xe0\x00\x10JFIF\0\1\1\0\0\1\0\1\0\0"
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(30)
    try:
        for end in (b"", b"\x00"):
            check_pixels_or_refusal(head + b"\xff" * 1_000_000 + end)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", GOOD)
def test_any_truncation_becomes_pixels_or_a_refusal(name: str) -> None:
    data = GOOD[name]
    for kept in [*range(min(300, len(data))), *range(300, len(data), max(1, len(data) // 60))]:
        check_pixels_or_refusal(data[:kept])


@pytest.mark.parametrize("name", GOOD)
def test_any_damage_becomes_pixels_or_a_refusal(name: str) -> None:
    chance = random.Random(name)
    for _ in range(120):
        data = bytearray(GOOD[name])
        for _ in range(chance.choice([1, 1, 2, 8])):
            # Half of the damage goes to the first 200 bytes, where the structure is.
            place = chance.randrange(len(data) if chance.random() < 0.5 else min(200, len(data)))
            data[place] = chance.choice([data[place] ^ 1 << chance.randrange(8), 0, 255])
        check_pixels_or_refusal(bytes(data))


@pytest.mark.filterwarnings("error")
def test_a_damaged_header_warns_of_nothing() -> None:
    check_pixels_or_refusal(GOOD["tiff-lzw"][:-40])
    check_pixels_or_refusal(samples.tiff_header(samples.tiff_tags(9_500, 9_500)))


# --- resizing and digests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (40, 60), (125, 125), (251, 251), (300, 40_000)])
@pytest.mark.parametrize("image_size", [16, 125, 300])
def test_resized_is_square_uint8_and_keeps_a_plain_colour(shape: tuple[int, int], image_size: int) -> None:
    resized = resize(np.full((*shape, 3), samples.RED, np.uint8), image_size)
    assert resized.dtype == np.uint8
    assert resized.shape == (image_size, image_size, 3)
    assert (resized == samples.RED).all()


@pytest.mark.parametrize("side", [60, 125, 300])
def test_resizing_into_an_array_writes_there_what_it_would_return(side: int) -> None:
    pixels = np.random.default_rng([8]).integers(0, 256, (side, side + 9, 3), dtype=np.uint8)
    many = np.zeros((3, 125, 125, 3), np.uint8)
    resize(pixels, 125, out=many[1])
    np.testing.assert_array_equal(many[1], resize(pixels, 125))
    assert not many[[0, 2]].any()


def test_resizing_to_the_same_size_changes_nothing() -> None:
    pixels = np.random.default_rng([7]).integers(0, 256, (125, 125, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize(pixels, 125), pixels)


@pytest.mark.parametrize(
    ("side", "is_by_area"),
    [
        (100, False),  # enlarged
        (180, False),
        (250, False),  # twofold, the last that is bicubic
        (251, True),
        (1000, True),
    ],
)
def test_more_than_twofold_shrinking_is_by_area_and_all_else_bicubic(side: int, is_by_area: bool) -> None:
    import cv2

    pixels = np.random.default_rng([side]).integers(0, 256, (side, side, 3), dtype=np.uint8)
    expected = cv2.resize(pixels, (125, 125), interpolation=cv2.INTER_AREA if is_by_area else cv2.INTER_CUBIC)
    np.testing.assert_array_equal(resize(pixels, 125), expected)


def test_stripes_do_not_alias_where_an_image_is_shrunk() -> None:
    stripes = np.zeros((1000, 1000, 3), np.uint8)
    stripes[:, ::2] = 255
    assert abs(resize(stripes, 125).astype(int) - 127).max() <= 1


@pytest.mark.parametrize("data", [b"", b"abc", GOOD["png-rgb"]])
def test_digest_is_what_sha256sum_prints(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    printed = subprocess.run(["sha256sum", tmp_path / "file"], capture_output=True, text=True, check=True).stdout
    assert content_digest(data) == printed[:32] == hashlib.sha256(data).hexdigest()[:32]
