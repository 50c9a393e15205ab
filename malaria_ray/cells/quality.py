"""Whether an image looks as the crops do that a model of this package knows: cells of a Giemsa-stained thin film, cut
out of their field, black around.

Images are uint8 (h, w, 3), RGB, 0..255, as `cells.images.resize` makes them. Focus, exposure and stain are judged in
the middle half of the width and height, which the cell fills. The limits were set on 2026-11-23 from the 10,678 crops
of 81 patients of the development archive (NIH/NLM), resized to 125 pixels: `tests/cells/test_quality.py` says what
they flag. A flag says 'look at this', never 'leave it out'; where an archive's crops are not cut out, all are flagged.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np

from malaria_ray.cells.images import Pixels
from malaria_ray.schema import QualityFlag

SURROUND = 20
"""Up to this brightness (0..255) a pixel is of the black around the cell; resizing leaves no clean 0 there."""

SHARPNESS_SIZES = (90, 180)
"""Widths and heights in pixels for which limits of sharpness hold; a Laplacian depends on the scale."""

_PALE = 0.08  # below this saturation a hue is chance
_EVERY = 4  # of the rows and columns, to measure the cell's share
_EDGE = np.ones((7, 7), np.uint8)


@dataclass(frozen=True)
class Limits:
    """What is usual of one measure, and the flags for less and for more; infinite where there is no limit."""

    measure: str
    low: float
    high: float
    below: QualityFlag
    above: QualityFlag


USUAL: tuple[Limits, ...] = (
    Limits("cell_share", 0.28, 0.90, QualityFlag.blank, QualityFlag.not_cut_out),
    Limits("contrast", 0.6, math.inf, QualityFlag.blank, QualityFlag.blank),
    Limits("sharpness", 3.0, 500.0, QualityFlag.blurred, QualityFlag.noisy),
    Limits("brightness", 85.0, 205.0, QualityFlag.underexposed, QualityFlag.overexposed),
    Limits("hue", -150.0, 35.0, QualityFlag.stain, QualityFlag.stain),
    Limits("saturation", 0.012, 0.70, QualityFlag.stain, QualityFlag.stain),
    Limits("green_excess", -math.inf, 5.0, QualityFlag.inverted, QualityFlag.inverted),
    Limits("width", 45.0, 260.0, QualityFlag.size, QualityFlag.size),
    Limits("height", 45.0, 260.0, QualityFlag.size, QualityFlag.size),
)


def quality(pixels: Pixels, *, width: int | None = None, height: int | None = None) -> dict[str, float]:
    """Measures of one image by name.

    width, height  pixels before resizing; those of `pixels` where not given

    cell_share    share of the image that is not black, 0..1
    sharpness     mean square of the Laplacian, whose mean is next to 0: its variance (Pech-Pacheco et al. 2000, Diatom
                  autofocusing in brightfield microscopy); NaN for images outside of `SHARPNESS_SIZES`
    brightness    mean of the grey values, 0..255
    contrast      their standard deviation, 0..128
    hue           of the mean colour, degrees in -180..180, 0 red, -60 magenta, -120 blue; NaN where there is next to
                  none
    saturation    of the mean colour, 0..1
    green_excess  mean green less the mean of red and blue, -255..255: a Giemsa stain takes out green before all
                  else, so it is negative, and positive once colours are inverted

    All but the first are of the middle's pixels that are not black; where it has none, of all its pixels.
    """
    h, w = pixels.shape[:2]
    middle = pixels[h // 4 : h - h // 4, w // 4 : w - w // 4]
    grey = cv2.cvtColor(middle, cv2.COLOR_RGB2GRAY)
    laplacian = cv2.Laplacian(grey, cv2.CV_16S)
    mask, n = None, grey.size
    if grey.min() <= SURROUND:  # one crop in six; the outline itself must not count as sharpness
        mask = cv2.erode(cv2.threshold(grey, SURROUND, 255, cv2.THRESH_BINARY)[1], _EDGE)
        n = cv2.countNonZero(mask)
        mask, n = (mask, n) if n else (None, grey.size)
    mean, deviation = cv2.meanStdDev(grey, mask=mask)
    red, green, blue, _ = cv2.mean(middle, mask=mask)
    hue, saturation, _ = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    some = pixels[::_EVERY, ::_EVERY, 1]
    smallest, largest = SHARPNESS_SIZES
    is_known_scale = smallest <= min(h, w) and max(h, w) <= largest
    return {
        "cell_share": np.count_nonzero(some > SURROUND) / some.size,
        "sharpness": cv2.norm(laplacian, cv2.NORM_L2, mask) ** 2 / n if is_known_scale else math.nan,
        "brightness": mean.item(),
        "contrast": deviation.item(),
        "hue": (hue * 360 + 180) % 360 - 180 if saturation >= _PALE else math.nan,
        "saturation": saturation,
        "green_excess": green - (red + blue) / 2,
        "width": float(w if width is None else width),
        "height": float(h if height is None else height),
    }


def flags(measures: Mapping[str, float]) -> list[QualityFlag]:
    """What is unusual about the measures of one image, in the order of `QualityFlag`; empty for a usual one.

    NaN is not unusual. A blank image gets no other flag but `size`: its measures say nothing.
    """
    found = {limits.below for limits in USUAL if measures[limits.measure] < limits.low}
    found |= {limits.above for limits in USUAL if measures[limits.measure] > limits.high}
    if QualityFlag.blank in found:
        found &= {QualityFlag.blank, QualityFlag.size}
    return [flag for flag in QualityFlag if flag in found]
