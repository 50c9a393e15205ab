"""Synthetic red-blood-cell crops that look like the NIH/NLM ones, to run the whole line without a download.

A crop is painted as light through a stained smear (Beer and Lambert): maps of what lies in the cell
(haemoglobin, chromatin, dirt; float32, (h, w), 0 or more) times the colour that each takes out of the light
of empty glass. Images are uint8, (h, w, 3), RGB, 0..255, with 0 outside the cell and only there.

Each patient has a smear of its own (light, stain, dirt, focus). The same address with the other label is the
same cell with or without its parasites, so nothing but them tells the classes apart: outline, colour,
debris, platelets and focus are drawn alike for both.

No real image is in them; the colours were matched by eye. Scores on them say that the line works, no more.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from malaria_ray.errors import ConfigError
from malaria_ray.schema import Label

Image = npt.NDArray[np.uint8]
Map = npt.NDArray[np.float32]
Point = npt.NDArray[np.float64]

NOTICE = "Synthetic image made by malaria_ray; not a real cell"

_MARK = "SYNTHETIC"  # in the name of every cell drawn here
_DONOR_SHARE = 0.25  # 50 of the 200 patients of the NIH set are healthy donors
_BLOCK = 3  # pixels: NIH cells were cut out at a third of the resolution, hence the stairs along their edge


@dataclass(frozen=True, kw_only=True)
class _Smear:
    """What one patient's cells have in common; colours are float32 (3,), RGB, densities natural logarithms."""

    light: Map  # empty glass, 0..255
    haemoglobin: Map  # optical density of a cell of thickness 1
    chromatin: Map  # optical density of a parasite's nucleus
    dirt: Map  # optical density of stain debris
    radius: float  # pixels
    pallor: float  # how much thinner a cell is in its middle, 0..1
    rim: float  # pixels from glass to full thickness
    n_specks: float  # mean stain specks a cell
    blur: float  # sigma in pixels
    grain: float  # sigma of the noise, 0..255


def _smear(seed: int, patient: int) -> _Smear:
    # Address index 0 is the smear's and a cell's is its index + 1: NumPy pads entropy with zeros, so that
    # default_rng([seed, patient]) would be the very stream of default_rng([seed, patient, 0]).
    rng = np.random.default_rng([seed, patient, 0])
    warmth = rng.beta(0.7, 0.7)  # most slides of the NIH set are either lavender or salmon

    def between(cold: tuple[float, ...], warm: tuple[float, ...], spread: float) -> Map:
        colour = np.asarray(cold) * (1 - warmth) + np.asarray(warm) * warmth
        return (colour * rng.normal(1, spread, 3)).astype(np.float32)

    return _Smear(
        light=between((212, 212, 208), (234, 190, 164), 0.025),
        haemoglobin=between((0.22, 0.28, 0.09), (0.14, 0.30, 0.15), 0.07) * np.float32(rng.uniform(0.75, 1.5)),
        chromatin=between((0.24, 1.75, 0.16), (0.26, 1.75, 0.34), 0.10),
        dirt=between((0.50, 0.80, 0.15), (0.40, 0.85, 0.30), 0.12),
        radius=rng.uniform(58, 70),
        pallor=rng.beta(1.2, 2.4),
        rim=rng.uniform(2.0, 7.0),
        n_specks=rng.gamma(0.6, 1.3),
        blur=rng.uniform(0.8, 1.6),
        grain=rng.uniform(1.0, 2.2),
    )


def _cell_mask(rng: np.random.Generator, radius: float) -> Image:
    """Cut-out of one cell: uint8 (h, w), 0 or 1, touching all four sides; now and then bitten or horned."""
    theta = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    waves = np.arange(2, 7)
    outline = 1 + (rng.normal(0, 0.05, 5) / (waves - 1)) @ np.cos(np.outer(waves, theta) + rng.uniform(0, 7, (5, 1)))
    if rng.random() < 0.25:  # a neighbour cut away, or a part of it left on
        bump = np.exp(rng.uniform(8, 50) * (np.cos(theta - rng.uniform(0, 7)) - 1))
        outline += rng.choice([-0.45, 0.35]) * rng.uniform(0.3, 1) * bump
    stretch, turn = np.exp(rng.normal(0, 0.09)), rng.uniform(0, np.pi)
    x, y = outline * np.cos(theta) * stretch, outline * np.sin(theta) / stretch
    points = np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], axis=1)
    points *= np.clip(radius * rng.normal(1, 0.08), 50, 85) / _BLOCK
    points = np.rint(points - points.min(axis=0)).astype(np.int32)
    coarse = np.zeros(points.max(axis=0)[::-1] + 1, np.uint8)
    cv2.fillPoly(coarse, [points], 1)
    return coarse.repeat(_BLOCK, axis=0).repeat(_BLOCK, axis=1)


def _unevenness(rng: np.random.Generator, shape: tuple[int, int], n_waves: int) -> Map:
    """Smooth noise of mean 0 and deviation about 1, with some `n_waves` hills a side."""
    hills = rng.standard_normal((n_waves, n_waves), dtype=np.float32)
    return np.asarray(cv2.resize(hills, shape[::-1], interpolation=cv2.INTER_CUBIC))


def _place(rng: np.random.Generator, depth: Map, margin: float) -> Point:
    """A random pixel (x, y) at least `margin` pixels inside the cell, or its deepest one."""
    inside = np.flatnonzero(depth >= min(margin, float(depth.max())))
    return np.array(divmod(int(rng.choice(inside)), depth.shape[1])[::-1], np.float64)


def _ellipse(
    layer: Map,
    centre: Point,
    radii: Point,
    density: float,
    *,
    turn: float = 0.0,
    arc: tuple[float, float] = (0.0, 360.0),
    stroke: int = -1,
) -> None:
    """Sets an ellipse, or an `arc` of it (degrees), to `density`; `stroke` is a width in pixels, -1 fills."""
    (x, y), (a, b) = centre.round().astype(int).tolist(), np.maximum(radii, 1).round().astype(int).tolist()
    cv2.ellipse(layer, (x, y), (a, b), turn, *arc, density, stroke)


def _paint_dirt(rng: np.random.Generator, dirt: Map, chromatin: Map, depth: Map, n_specks: float) -> None:
    """Adds what fools a classifier and is in both classes: stain specks, smudges and platelets."""
    for _ in range(min(rng.poisson(n_specks), 9)):
        radii, turn = rng.uniform(1.5, 4.0, 2), rng.uniform(0, 180)
        _ellipse(dirt, _place(rng, depth, 5), radii, rng.uniform(0.4, 2.0), turn=turn)
    if rng.random() < 0.10:  # a smudge
        radii, turn = rng.uniform((8, 2), (18, 5)), rng.uniform(0, 180)
        _ellipse(dirt, _place(rng, depth, 8), radii, rng.uniform(0.1, 0.5), turn=turn)
    if rng.random() < 0.12:  # a platelet lying on the cell: a pale purple body with darker grains
        centre, radii = _place(rng, depth, 6), rng.uniform(6, 11, 2)
        _ellipse(chromatin, centre, radii, rng.uniform(0.15, 0.4))
        for grain in rng.normal(centre, radii.min() / 2.5, (rng.integers(4, 12), 2)):
            _ellipse(chromatin, grain, np.full(2, rng.uniform(1, 2)), rng.uniform(0.3, 0.8))


def _paint_parasites(rng: np.random.Generator, haemoglobin: Map, chromatin: Map, depth: Map) -> None:
    """Adds one to three rings (cytoplasm around a paler vacuole) or trophozoites, with chromatin dots."""
    strength = 1.15 - 0.8 * rng.beta(1.3, 3.5)  # of all in a cell: a pale stain or young rings
    for _ in range(rng.choice([1, 2, 3], p=[0.8, 0.15, 0.05])):
        size, turn, cytoplasm = rng.uniform(8, 17), rng.uniform(0, 360), 0.30 * strength
        centre, radii = _place(rng, depth, rng.choice([6, 12])), size * rng.uniform((0.7, 0.5), (1, 1))
        if rng.random() < 0.65:  # a ring, often open
            x, y = centre.astype(int)
            start = rng.uniform(0, 360)
            _ellipse(haemoglobin, centre, radii, 0.8 * float(haemoglobin[y, x]), turn=turn)
            arc = (start, start + rng.uniform(200, 360))
            _ellipse(chromatin, centre, radii, cytoplasm, turn=turn, arc=arc, stroke=3)
            n_dots = rng.choice([1, 2], p=[0.7, 0.3])
            at = np.deg2rad(start + rng.choice([0, 60, 150], size=n_dots, replace=False))
            c, s = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))
            dots = centre + radii * np.stack([np.cos(at), np.sin(at)], axis=1) @ np.array([[c, s], [-s, c]])
        else:  # a trophozoite: compact, its chromatin in the middle
            _ellipse(chromatin, centre, radii, cytoplasm, turn=turn)
            dots = rng.normal(centre, size / 5, (rng.integers(1, 4), 2))
        nucleus = rng.uniform(0.85, 1.3) * strength
        for dot in dots:
            dot_radii = np.maximum(size * rng.uniform((0.22, 0.18), (0.4, 0.3)), 2)
            _ellipse(chromatin, dot, dot_radii, nucleus, turn=rng.uniform(0, 180))


def synthetic_cell(label: Label, *, seed: int, patient: int, index: int) -> Image:
    """Paints the `index`-th cell of a patient: uint8 (h, w, 3), RGB, 0 outside the cell and 1..255 in it.

    h and w are some 70 to 220 pixels. The same arguments give the same pixels, whatever was painted before.
    """
    smear = _smear(seed, patient)
    rng = np.random.default_rng([seed, patient, index + 1])
    mask = _cell_mask(rng, smear.radius)
    h, w = shape = mask.shape[0], mask.shape[1]
    depth = cv2.distanceTransform(np.pad(mask, 1), cv2.DIST_L2, 3)[1:-1, 1:-1].astype(np.float32)

    # The cell itself: thin at its rim, often pale in the middle, never quite even.
    rows, columns = np.indices(shape, dtype=np.float32)
    x, y = 2 * columns / w - 1, 2 * rows / h - 1
    off_x, off_y, slope_x, slope_y = rng.normal(0, (0.15, 0.15, 0.06, 0.06)).tolist()
    hollow = np.exp(-((x - off_x) ** 2 + (y - off_y) ** 2) / rng.uniform(0.05, 0.4))
    haemoglobin = (1 - np.exp(-depth / smear.rim)) * (1 - smear.pallor * rng.uniform(0.4, 1.1) * hollow)
    haemoglobin *= 1 + slope_x * x + slope_y * y + 0.03 * _unevenness(rng, shape, 5)
    haemoglobin *= rng.lognormal(0, 0.15)

    chromatin, dirt = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    _paint_dirt(rng, dirt, chromatin, depth, smear.n_specks)
    # Nothing in a smear is a true ellipse: all is pushed about by a pixel or two.
    warp = columns + 2 * _unevenness(rng, shape, 12), rows + 2 * _unevenness(rng, shape, 12)
    light = smear.light * rng.normal(1, 0.015, 3).astype(np.float32)
    blur = smear.blur * rng.lognormal(0, 0.2) + rng.binomial(1, 0.06) * rng.uniform(1, 2)  # 6 % out of focus
    grain = rng.standard_normal(shape, dtype=np.float32)[..., None] * smear.grain
    if label == Label.parasitized:  # last, so that all the above is the same for both labels
        _paint_parasites(rng, haemoglobin, chromatin, depth)

    layers = np.dstack([haemoglobin, chromatin, dirt])
    layers = cv2.GaussianBlur(cv2.remap(layers, *warp, cv2.INTER_LINEAR, None, cv2.BORDER_REPLICATE), (0, 0), blur)
    density = layers @ np.stack([smear.haemoglobin, smear.chromatin, smear.dirt])
    cell: Image = np.clip(light * np.exp(-density) + grain, 1, 255).astype(np.uint8) * mask[..., None]
    return cell


def _png(image: Image) -> bytes:
    """PNG of an RGB image with `NOTICE` in a tEXt chunk right after the header."""
    _, encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    png = encoded.tobytes()
    body = b"tEXtDescription\0" + NOTICE.encode("latin-1")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    end_of_header = 8 + 25  # signature, IHDR (PNG specification, 11.2.1)
    return png[:end_of_header] + chunk + png[end_of_header:]


def has_synthetic(image_ids: pa.Array | pa.ChunkedArray) -> bool:
    """Whether one of the names is a synthetic cell's."""
    return bool(pc.any(pc.match_substring(image_ids, _MARK)).as_py())


def synthetic_cells(*, n_patients: int, n_cells_per_patient: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yields (path in the archive, PNG) of each cell, patient by patient, laid out as the NIH archive.

    A quarter of the patients are healthy donors (`C204ThinF_…`) with uninfected cells only. Infected ones
    (`C101P1ThinF_…`) have both classes, in shares that vary around the one that balances the archive.
    Raises ConfigError for counts below 1 or a negative seed.
    """
    if min(n_patients, n_cells_per_patient) < 1 or seed < 0:
        raise ConfigError(
            f"synthetic cells: n_patients={n_patients}, n_cells_per_patient={n_cells_per_patient}, seed={seed}; "
            "give counts of 1 or more and a seed of 0 or more"
        )
    n_infected = n_patients - int(n_patients * _DONOR_SHARE)
    # Evenly spread around the mean that balances the archive, so that few patients suffice for a balance.
    shares = 0.5 * n_patients / n_infected + np.linspace(-0.15, 0.15, n_infected) * (n_infected > 1)
    n_parasitized = (np.random.default_rng([seed]).permutation(shares) * n_cells_per_patient).round().astype(int)

    def cell(patient: int, index: int) -> tuple[str, bytes]:
        infected = patient <= n_infected
        label = Label(infected and index < n_parasitized[patient - 1])
        key = f"C{100 + patient}P{patient}" if infected else f"C{200 + patient}"
        path = f"cell_images/{label.name.capitalize()}/{key}ThinF_{_MARK}_cell_{index}.png"
        return path, _png(synthetic_cell(label, seed=seed, patient=patient, index=index))

    return (cell(patient, index) for patient in range(1, n_patients + 1) for index in range(n_cells_per_patient))
