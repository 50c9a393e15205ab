"""What is unlike the training set lies far from it, and what is like it does not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import OAS

from malaria_ray.errors import DatasetError, ModelError
from malaria_ray.statistics.metrics import cell_metrics
from malaria_ray.statistics.novelty import Novelty, fit_novelty

D = 16
MIX = np.random.default_rng(1).normal(size=(D, D)) / 4
SHIFT = np.random.default_rng(2).normal(size=D) * 3


def cells(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of two classes, the numbers of a row correlated."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, n)
    return (rng.normal(size=(n, D)) @ MIX + label[:, None] * SHIFT).astype(np.float32), label


def fitted() -> Novelty:
    return fit_novelty(*cells(2000, 0), cells(3000, 1)[0])


def test_images_like_those_learnt_from_are_about_1_away_and_seldom_novel() -> None:
    novelty = fitted()
    distance = novelty.distance(cells(5000, 2)[0])
    assert distance.dtype == np.float32
    assert distance.mean() == pytest.approx(1, abs=0.1)
    assert np.mean(distance > novelty.threshold) == pytest.approx(0.01, abs=0.006)


def test_images_of_another_kind_are_novel() -> None:
    novelty, rng = fitted(), np.random.default_rng(0)
    # As large as the training set's and in no way as correlated; and halfway between the classes.
    other = (rng.normal(size=(500, D)) * cells(2000, 0)[0].std()).astype(np.float32)
    between = cells(500, 3)[0] * 0.1 + SHIFT.astype(np.float32) / 2
    for unlike in (other, between):
        distance = np.concatenate([novelty.distance(cells(500, 4)[0]), novelty.distance(unlike)])
        found = cell_metrics(np.repeat([0, 1], 500), distance / distance.max(), threshold=0.5)
        assert found["roc_auc"] > 0.98
        assert np.mean(novelty.distance(unlike) > novelty.threshold) > 0.9


def test_the_covariance_is_that_of_scikit_learn() -> None:
    features = cells(300, 0)[0]
    novelty = fit_novelty(features, np.zeros(300), features)
    expected = OAS(assume_centered=True).fit((features - features.mean(axis=0)).astype(np.float64)).covariance_
    found = np.linalg.inv((novelty.whitening @ novelty.whitening.T).astype(np.float64))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_distances_do_not_depend_on_the_unit_of_the_features() -> None:
    (features, label), (validation, _) = cells(2000, 0), cells(500, 1)
    one = fit_novelty(features, label, validation)
    other = fit_novelty(features * 1000, label, validation * 1000)
    np.testing.assert_allclose(one.distance(validation), other.distance(validation * 1000), rtol=1e-3)


def test_a_row_has_its_distance_whatever_else_is_asked() -> None:
    novelty, features = fitted(), cells(9000, 3)[0]
    np.testing.assert_allclose(novelty.distance(features)[[0, 8999]], novelty.distance(features[[0, 8999]]), rtol=1e-5)
    assert novelty.distance(features[:0]).shape == (0,)


@pytest.mark.filterwarnings("error")
@settings(deadline=None, max_examples=30)
@given(st.integers(2, 12), st.integers(1, 30), st.integers(0, 100))
def test_few_images_and_dead_numbers_still_give_finite_distances(n: int, d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, d)).astype(np.float32)
    features[:, 1:] *= rng.integers(0, 2, max(d - 1, 0))  # neurons that never fire
    novelty = fit_novelty(features, np.zeros(n), features)
    assert np.isfinite(novelty.distance(rng.normal(size=(20, d)).astype(np.float32))).all()


def test_novelty_survives_being_stored() -> None:
    novelty, features = fitted(), cells(100, 5)[0]
    restored = Novelty.from_bytes(novelty.to_bytes())
    np.testing.assert_array_equal(restored.distance(features), novelty.distance(features))
    assert restored.threshold == novelty.threshold


@pytest.mark.parametrize("data", [b"", b"not an npz", fitted().to_bytes()[:500]])
def test_a_damaged_file_is_one_clear_line(data: bytes) -> None:
    with pytest.raises(ModelError, match="the novelty of the run cannot be read"):
        Novelty.from_bytes(data)


def test_one_class_and_unlabelled_images_are_enough() -> None:
    features, label = cells(500, 0)
    unlabelled = np.where(label == 0, 0, np.nan)
    novelty = fit_novelty(features, unlabelled, features[label == 0])
    assert novelty.means.shape == (1, D)


@pytest.mark.parametrize(
    ("features", "label", "validation", "message"),
    [
        (np.zeros((3, 2)), [0, 0, 1], np.zeros((1, 2)), "features of all training images are the same"),
        ([[1.0, 2.0]], [0], [[1.0, 2.0]], "1 labelled training images"),
        ([[1.0], [2.0]], [None, None], [[1.0]], "0 labelled training images"),
        ([[1.0], [np.nan]], [0, 1], [[1.0]], "features of row 1 are not finite"),
        ([1.0, 2.0], [0, 1], [[1.0]], r"features have shape \(2,\)"),
        ([[1.0], [2.0]], [0, 1], [[1.0, 2.0]], r"validation features have shape \(1, 2\)"),
        ([[1.0], [2.0]], [0, 1, 1], [[1.0]], "2 rows of features, 3 rows of label"),
    ],
)
def test_features_that_cannot_be_used_are_named(
    features: object, label: object, validation: object, message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        fit_novelty(features, label, validation)  # type: ignore[arg-type]


def test_features_of_another_model_are_refused() -> None:
    with pytest.raises(ModelError, match="features have 3 numbers, those of the training set had 16"):
        fitted().distance(np.zeros((1, 3)))


def test_the_distance_of_an_image_does_not_hang_on_its_neighbours():
    random = np.random.default_rng(0)
    features = random.normal(size=(400, 512)).astype(np.float32)
    novelty = fit_novelty(features, random.integers(0, 2, 400), features[:50])
    together = novelty.distance(features)
    for start, n in ((0, 1), (3, 5), (100, 60), (101, 64), (7, 237)):
        np.testing.assert_array_equal(novelty.distance(features[start : start + n]), together[start : start + n])
