"""Planted wrong labels are found, right ones are left alone, and both sets of metrics are told."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from scipy.special import expit

from malaria_ray import schema
from malaria_ray.errors import DatasetError
from malaria_ray.statistics.audit import label_audit, likely_wrong, metrics_with_and_without
from malaria_ray.statistics.metrics import cell_metrics


def planted(n: int, share: float, n_models: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Labels of which a share is flipped, where, and scores of models of which each is 97 to 98 % right.

    Cells differ in how hard they are, for all models alike; the rest of a score is the model's own.
    """
    rng = np.random.default_rng([seed, n, n_models])
    truth = rng.integers(0, 2, n)
    is_wrong = rng.random(n) < share
    ease = rng.normal(4, 1.6, n) * (2 * truth - 1)
    scores = {f"model-{i}": expit(ease + rng.normal(0, 1.2, n)).astype(np.float32) for i in range(n_models)}
    return np.where(is_wrong, 1 - truth, truth), is_wrong, scores


@pytest.mark.parametrize(("n_models", "precision", "recall"), [(1, 0.86, 0.91), (3, 0.93, 0.96)])
def test_two_percent_of_flipped_labels_are_found(n_models: int, precision: float, recall: float) -> None:
    """The numbers are those found; models that err oftener than these do are less precise."""
    label, is_wrong, scores = planted(10_000, 0.02, n_models)
    found = likely_wrong(label, scores)
    hits = np.sum(found & is_wrong)
    assert hits / found.sum() == pytest.approx(precision, abs=0.03)
    assert hits / is_wrong.sum() == pytest.approx(recall, abs=0.03)


def test_right_labels_are_left_alone() -> None:
    label, _, scores = planted(10_000, 0.0, 3)
    assert likely_wrong(label, scores).mean() < 0.012  # the share that the models themselves get wrong


def test_the_audit_table_gives_the_evidence_the_least_credible_first() -> None:
    label, is_wrong, scores = planted(2000, 0.02, 3)
    names = [f"cell_{i}.png" for i in range(2000)]
    table = label_audit(names, label, scores, patient_id=[f"P{i % 20}" for i in range(2000)])
    assert list(table) == schema.LABEL_AUDIT.names
    pa.Table.from_pandas(table, schema=schema.LABEL_AUDIT.arrow_schema(), preserve_index=False)
    assert table["label_credibility"].is_monotonic_increasing
    assert (table["suggested_label"] == 1 - table["label"]).all()
    assert (table["score_min"] <= table["score_mean"]).all()
    assert (table["score_mean"] <= table["score_max"]).all()
    assert is_wrong[[names.index(name) for name in table["image_id"][:20]]].mean() >= 0.95
    row = table.iloc[0]
    of_row = [score[names.index(row["image_id"])] for score in scores.values()]
    assert row["n_models_against"] == sum((score >= 0.5) != row["label"] for score in of_row)
    assert (row["n_models"], row["patient_id"]) == (3, f"P{names.index(row['image_id']) % 20}")


def test_the_audit_does_not_depend_on_row_order() -> None:
    label, _, scores = planted(1000, 0.02, 2)
    found = likely_wrong(label, scores)
    reverse = likely_wrong(label[::-1], {name: score[::-1] for name, score in scores.items()})
    np.testing.assert_array_equal(found, reverse[::-1])


def test_metrics_with_and_without_the_doubtful_labels() -> None:
    label, is_wrong, scores = planted(10_000, 0.02, 3)
    table = metrics_with_and_without(label, scores["model-0"], likely_wrong(label, scores), threshold=0.5)
    row = table.set_index("metric").loc["accuracy"]
    truth = np.where(is_wrong, 1 - label, label)
    assert row["value"] == cell_metrics(label, scores["model-0"], threshold=0.5)["accuracy"]
    true_accuracy = cell_metrics(truth, scores["model-0"], threshold=0.5)["accuracy"]
    assert row["value"] < true_accuracy < row["value_without"]  # the truth lies between
    assert row["n_without"] < row["n"] == 10_000


@pytest.mark.filterwarnings("error")
def test_nothing_and_all_left_out() -> None:
    label, score = [0, 1, 1], [0.1, 0.9, 0.4]
    table = metrics_with_and_without(label, score, [False] * 3, threshold=0.5)
    np.testing.assert_array_equal(table["value"], table["value_without"])
    assert metrics_with_and_without(label, score, [True] * 3, threshold=0.5)["value_without"].isna().all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("label", "score"), [([0, 1], [0.1, 0.9]), ([0, 1], [0.9, 0.1]), ([0, 1, 1], [0.5, 0.5, 0.5]), ([0, 1], [0, 1])]
)
def test_few_cells_give_a_table(label: list[int], score: list[float]) -> None:
    assert list(label_audit(["a", "b", "c"][: len(label)], label, {"m": score})) == schema.LABEL_AUDIT.names


@pytest.mark.parametrize(
    ("label", "scores", "message"),
    [
        ([0, 1], {}, "no model"),
        ([1, 1], {"m": [0.5, 0.6]}, "none of the 2 cells is uninfected"),
        ([0, 0], {"m": [0.5, 0.6]}, "none of the 2 cells is parasitized"),
        ([0, 1], {"m": [0.5, np.nan], "other": [0.5, np.nan]}, "score of row 1 is nan"),
        ([0, None], {"m": [0.5, 0.6]}, "label of row 1 is nan"),
        ([0, 1], {"m": [0.5]}, "2 rows of label, 1 rows of score"),
    ],
)
def test_what_cannot_be_audited_is_one_clear_line(label: list[object], scores: dict[str, object], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        likely_wrong(label, scores)  # type: ignore[arg-type]
