"""Cells pass, and what is no cell, or a bad picture of one, is flagged with the right word.

The limits were set on the development archive: of the same 10,678 crops they flag 20 (0.19 %), 14 as noisy, 3 as
blurred, 3 by stain and 1 as underexposed. `quality` and `flags` together took 30 µs an image where decoding and
resizing took 350 (8.5 %; CPU time of one core, 2026-11-23).
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from malaria_ray.cells.images import resize
from malaria_ray.cells.quality import USUAL, flags, quality
from malaria_ray.cells.synthetic import synthetic_cell
from malaria_ray.schema import QUALITY_MEANING, Label, QualityFlag

Pixels = npt.NDArray[np.uint8]
SIZE = 125


def cell(patient: int = 1, index: int = 0, label: Label = Label.parasitized) -> Pixels:
    return resize(synthetic_cell(label, seed=3, patient=patient, index=index), SIZE)


CELLS = [cell(patient, index, label) for patient in range(1, 21) for index in range(2) for label in Label]


def flagged(pixels: Pixels, **size: int) -> set[str]:
    return set(flags(quality(np.ascontiguousarray(pixels, np.uint8), **size)))


def histology() -> Pixels:
    """A full frame of pink tissue, its fibres and some sixty dark nuclei, as stained by haematoxylin and eosin."""
    rng = np.random.default_rng(0)
    image = np.full((SIZE, SIZE, 3), (225, 160, 200), np.uint8)
    for _ in range(40):
        x, y = rng.integers(0, SIZE, (2, 2)).tolist()
        cv2.line(image, (x[0], y[0]), (x[1], y[1]), (205, 120, 175), 2, cv2.LINE_AA)
    for x, y, a, b in rng.integers((0, 0, 3, 3), (SIZE, SIZE, 7, 7), (60, 4)).tolist():
        cv2.ellipse(image, (x, y), (a, b), 0, 0, 360, (80, 45, 120), -1, cv2.LINE_AA)
    return image


def noise() -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def plain(red: int, green: int, blue: int) -> Pixels:
    return np.full((SIZE, SIZE, 3), (red, green, blue), np.uint8)


def test_cells_are_not_flagged() -> None:
    assert [flagged(pixels) for pixels in CELLS].count(set()) >= 0.97 * len(CELLS)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (plain(0, 0, 0), {"blank"}),
        (plain(255, 255, 255), {"blank"}),
        (plain(220, 150, 160), {"blank"}),  # a colour of cells, but none there
        (noise(), {"noisy", "stain", "not_cut_out"}),
        (histology(), {"not_cut_out"}),
        (255 - cell(), {"inverted", "not_cut_out", "stain"}),
        (cv2.cvtColor(cell(), cv2.COLOR_RGB2GRAY)[..., None].repeat(3, axis=2), {"stain"}),
        (cell() // 3, {"underexposed"}),
        (np.minimum(cell() * 1.6, 255), {"overexposed"}),
        (cv2.GaussianBlur(cell(label=Label.uninfected), (0, 0), 5), {"blurred"}),
    ],
    ids=["black", "white", "pink", "noise", "histology", "inverted", "grey", "dark", "bright", "blurred"],
)
def test_what_is_no_good_cell_is_flagged(pixels: Pixels, expected: set[str]) -> None:
    assert expected <= flagged(pixels)


def test_every_inverted_cell_is_flagged_as_that() -> None:
    assert all("inverted" in flagged(255 - pixels) for pixels in CELLS)


@pytest.mark.parametrize(
    ("size", "expected"), [((130, 130), set()), ((20, 130), {"size"}), ((130, 400), {"size"}), ((45, 260), set())]
)
def test_size_before_resizing(size: tuple[int, int], expected: set[str]) -> None:
    assert flagged(CELLS[1], width=size[0], height=size[1]) == expected


def test_sharpness_is_not_judged_at_a_scale_without_limits() -> None:
    small = resize(synthetic_cell(Label.uninfected, seed=3, patient=1, index=0), 32)
    measures = quality(small)
    assert math.isnan(measures["sharpness"])
    assert not {"blurred", "noisy"} & set(flags(measures))


@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))))
def test_any_pixels_have_measures_and_flags(pixels: Pixels) -> None:
    measures = quality(pixels)
    assert set(measures) == {limits.measure for limits in USUAL}
    assert all(isinstance(value, float) for value in measures.values())
    assert flags(measures) == [flag for flag in QualityFlag if flag in flags(measures)]


def test_every_flag_can_be_raised_and_is_explained() -> None:
    assert (
        {flag for limits in USUAL for flag in (limits.below, limits.above)} == set(QualityFlag) == set(QUALITY_MEANING)
    )
