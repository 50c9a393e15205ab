"""Heat over a crop: what a model looked at, as colour."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from malaria_ray.cells.images import Pixels


def overlay(pixels: Pixels, heat: npt.NDArray[np.float32], *, opacity: float = 0.6) -> Pixels:
    """One crop under its heat, uint8 (size, size, 3), RGB. `heat`: float32 (size, size), 0..1; where it is 0 the crop
    stays as it is, where it is 1 the colour covers `opacity` of it.
    """
    levels = np.rint(np.clip(heat, 0, 1) * 255).astype(np.uint8)
    colour = cv2.applyColorMap(levels, cv2.COLORMAP_TURBO)[:, :, ::-1]
    share = opacity * np.clip(heat, 0, 1)[:, :, None]
    return np.asarray(np.rint(pixels * (1 - share) + colour * share), np.uint8)
