"""Promises of the synthetic cells: an address, the NIH layout, and a task that has to be learned."""

from __future__ import annotations

import re
import struct
import zlib
from collections import Counter, defaultdict

import cv2
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from malaria_ray.cells.patients import label_of, patient_of
from malaria_ray.cells.synthetic import NOTICE, has_synthetic, synthetic_cell, synthetic_cells
from malaria_ray.errors import ConfigError
from malaria_ray.schema import Label

NAME = re.compile(r"cell_images/(Parasitized|Uninfected)/C\d+(P\d+)?ThinF_SYNTHETIC_cell_\d+\.png")

labels = st.sampled_from(list(Label))
numbers = st.integers(min_value=0, max_value=10_000)


def decoded(png: bytes) -> np.ndarray:
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    """(type, data) of each chunk of a PNG, after a check of its CRC."""
    found, place = [], 8
    while place < len(png):
        (length,) = struct.unpack_from(">I", png, place)
        body, crc = png[place + 4 : place + 8 + length], png[place + 8 + length : place + 12 + length]
        assert zlib.crc32(body) == int.from_bytes(crc), f"CRC of {body[:4]!r}"
        found.append((body[:4], body[4:]))
        place += 12 + length
    return found


@pytest.fixture(scope="module")
def archive() -> dict[str, bytes]:
    """400 cells: 15 infected patients and 5 donors."""
    cells = list(synthetic_cells(n_patients=20, n_cells_per_patient=20, seed=11))
    assert len(dict(cells)) == len(cells), "a path comes twice"
    return dict(cells)


# One cell


@settings(max_examples=60, deadline=None)
@given(label=labels, seed=numbers, patient=numbers, index=numbers)
def test_a_cell_is_a_coloured_crop_on_black_that_fills_its_box(label, seed, patient, index):
    cell = synthetic_cell(label, seed=seed, patient=patient, index=index)
    assert cell.dtype == np.uint8
    assert cell.ndim == 3
    assert cell.shape[2] == 3
    assert all(60 <= side <= 240 for side in cell.shape[:2])
    inside = cell.any(axis=2)
    assert (cell.all(axis=2) == inside).all(), "a pixel is neither black nor coloured"
    assert 0.4 < inside.mean() < 0.95
    assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
    assert 90 < cell[inside].mean() < 230


@settings(max_examples=20, deadline=None)
@given(label=labels, seed=numbers, patient=numbers, index=numbers)
def test_same_address_same_pixels_whatever_was_painted_before(label, seed, patient, index):
    first = synthetic_cell(label, seed=seed, patient=patient, index=index)
    synthetic_cell(label, seed=seed, patient=patient, index=index + 1)
    assert np.array_equal(first, synthetic_cell(label, seed=seed, patient=patient, index=index))


def test_every_address_has_a_stream_of_its_own(monkeypatch):
    default_rng, addresses = np.random.default_rng, set()

    def spy(address):
        addresses.add(tuple(address))
        return default_rng(address)

    monkeypatch.setattr(np.random, "default_rng", spy)
    list(synthetic_cells(n_patients=4, n_cells_per_patient=4, seed=0))
    # NumPy pads an address with zeros: [0, 1] and [0, 1, 0] would be one stream.
    streams = {tuple(np.random.SeedSequence(address).generate_state(4)) for address in addresses}
    assert len(streams) == len(addresses) == 1 + 4 + 4 * 4  # the archive's, the smears', the cells'


@settings(max_examples=20, deadline=None)
@given(seed=numbers, patient=numbers, index=numbers)
def test_only_the_parasites_tell_the_twins_of_one_address_apart(seed, patient, index):
    healthy, infected = (synthetic_cell(label, seed=seed, patient=patient, index=index) for label in Label)
    assert healthy.shape == infected.shape
    changed = (healthy != infected).any(axis=2)[healthy.any(axis=2)].mean()
    assert 0 < changed < 0.4


def test_cells_of_one_patient_are_more_alike_than_those_of_two(archive):
    colours = defaultdict(list)
    for path, png in archive.items():
        cell = decoded(png)
        colours[patient_of(path)].append(cell[cell.any(axis=2)].mean(axis=0))
    within = np.mean([np.std(of_one, axis=0) for of_one in colours.values()])
    between = np.std([np.mean(of_one, axis=0) for of_one in colours.values()], axis=0).mean()
    assert between > 1.2 * within


# The archive


def test_an_archive_is_the_same_every_time_and_one_cell_can_be_made_alone(archive):
    again = synthetic_cells(n_patients=20, n_cells_per_patient=20, seed=11)
    assert [next(again) for _ in range(3)] == list(archive.items())[:3]
    path, png = list(archive.items())[47]  # the eighth cell of the third patient
    assert patient_of(path) == "P3"
    assert np.array_equal(decoded(png), synthetic_cell(label_of(path), seed=11, patient=3, index=7))


def test_another_seed_is_another_archive():
    one, two = (dict(synthetic_cells(n_patients=2, n_cells_per_patient=3, seed=seed)) for seed in (1, 2))
    assert not set(one.values()) & set(two.values())


def test_names_say_synthetic_and_parse_as_the_nih_names(archive):
    assert [path for path in archive if not NAME.fullmatch(path)] == []
    assert all(label_of(path) is not None for path in archive)
    per_patient = Counter(patient_of(path) for path in archive)
    assert per_patient == {**{f"P{n}": 20 for n in range(1, 16)}, **{f"C{n}": 20 for n in range(216, 221)}}


def test_one_synthetic_cell_among_many_others_is_found(archive):
    others = [f"cell_images/Parasitized/C1P1ThinF_cell_{i}.png" for i in range(2000)]
    assert not has_synthetic(pa.chunked_array([others]))
    assert has_synthetic(pa.chunked_array([others, [next(iter(archive))]]))
    assert not has_synthetic(pa.chunked_array([], pa.string()))


def test_donors_have_no_parasites_and_patients_have_both_classes(archive):
    classes = defaultdict(set)
    for path in archive:
        classes[patient_of(path)].add(label_of(path))
    assert all(found == ({Label.uninfected} if who[0] == "C" else set(Label)) for who, found in classes.items())


@pytest.mark.parametrize(
    ("n_patients", "n_cells_per_patient"),
    [
        (1, 10),
        (2, 10),  # no donor yet
        (3, 10),
        (4, 10),  # the first donor
        (7, 5),
        (12, 25),
    ],
)
def test_classes_are_balanced(n_patients, n_cells_per_patient):
    cells = synthetic_cells(n_patients=n_patients, n_cells_per_patient=n_cells_per_patient, seed=3)
    found = [label_of(path) for path, _ in cells]
    assert len(found) == n_patients * n_cells_per_patient
    assert np.mean(found) == pytest.approx(0.5, abs=0.06)


def test_every_png_says_that_it_is_synthetic(archive):
    for png in archive.values():
        kinds = chunks(png)
        assert kinds[0][0] == b"IHDR"
        assert kinds[1] == (b"tEXt", b"Description\0" + NOTICE.encode())
        assert kinds[-1] == (b"IEND", b"")


@pytest.mark.parametrize("wrong", [{"n_patients": 0}, {"n_cells_per_patient": 0}, {"seed": -1}])
def test_impossible_requests_are_refused_at_once(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        synthetic_cells(**{"n_patients": 2, "n_cells_per_patient": 2, "seed": 0, **wrong})


# The task


def accuracy_on_new_patients(features: np.ndarray, labels: np.ndarray, patients: list[str]) -> float:
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return accuracy_score(labels, cross_val_predict(model, features, labels, groups=patients, cv=GroupKFold(5)))


def test_the_task_is_about_spots_and_not_about_colour(archive):
    """By logistic regression on patients it has not seen; chance is 0.5."""
    mean_colour, histogram, spots = [], [], []
    for cell in map(decoded, archive.values()):
        inside = cell.any(axis=2)
        mean_colour.append(cell[inside].mean(axis=0))
        histogram.append(np.concatenate([np.bincount(cell[inside][:, c] // 16, minlength=16) for c in range(3)]))
        green = np.where(inside, cell[..., 1], np.median(cell[inside][:, 1])).astype(np.uint8)
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (25, 25))
        dark = cv2.morphologyEx(cv2.GaussianBlur(green, (0, 0), 1), cv2.MORPH_BLACKHAT, disc)
        spots.append([*np.percentile(dark, (98, 99, 99.9)), (dark > 15).sum()])
    truth = np.array([label_of(path) for path in archive])
    patients = [patient_of(path) for path in archive]
    assert accuracy_on_new_patients(np.array(mean_colour), truth, patients) < 0.6
    assert 0.55 < accuracy_on_new_patients(np.array(histogram), truth, patients) < 0.9
    assert 0.77 < accuracy_on_new_patients(np.array(spots), truth, patients) < 0.98


def test_debris_and_platelets_are_in_both_classes(archive):
    """Some uninfected cells have darker spots than half of the parasitized ones."""
    depth = {Label.uninfected: [], Label.parasitized: []}
    for path, png in archive.items():
        green = decoded(png)[..., 1]
        depth[label_of(path)].append(np.median(green[green > 0]) - np.percentile(green[green > 0], 0.3))
    typical = np.median(depth[Label.parasitized])
    assert 0.01 < np.mean(np.array(depth[Label.uninfected]) > typical) < 0.3
    truth = np.repeat([0, 1], [len(depth[Label.uninfected]), len(depth[Label.parasitized])])
    assert 0.75 < roc_auc_score(truth, depth[Label.uninfected] + depth[Label.parasitized]) < 0.99
