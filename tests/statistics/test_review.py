"""The images worth a look come first, each with its reasons, and none without a reason."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from malaria_ray import schema
from malaria_ray.errors import ConfigError, DatasetError
from malaria_ray.schema import Call, ReviewReason
from malaria_ray.statistics.calibration import Calibration
from malaria_ray.statistics.review import review, uncertainty

HALF = Calibration(temperature=1, threshold=0.5, specificity=None, n=100, n_patients=10)
STRICT = Calibration(temperature=2, threshold=0.9, specificity=0.99, n=100, n_patients=10)
CALLS = pd.Series({"P1": Call.undecided, "P2": Call.positive, "C1": Call.negative})

IMAGES = pd.DataFrame(
    [
        # image, score, patient, quality, novel, reasons
        ("sure", 0.01, "C1", [], False, []),
        ("near", 0.45, "C1", [], False, ["uncertain"]),
        ("nearer", 0.49, "C1", [], False, ["uncertain"]),
        ("odd", 0.99, "P2", ["stain"], False, ["quality"]),
        ("strange", 0.02, None, [], True, ["novel"]),
        ("called", 0.999, "P1", [], False, ["undecided_patient"]),
        ("uncalled", 0.001, "P1", [], False, []),
        ("all", 0.52, "P1", ["blurred", "size"], True, ["undecided_patient", "uncertain", "novel", "quality"]),
    ],
    columns=["image_id", "score", "patient_id", "quality_flags", "is_novel", "reasons"],
)


def reviewed(images: pd.DataFrame = IMAGES) -> pd.DataFrame:
    return review(
        images["image_id"],
        images["score"].astype(np.float32),
        calibration=HALF,
        quality_flags=images["quality_flags"].tolist(),
        is_novel=images["is_novel"],
        patient_id=images["patient_id"],
        patient_call=images["patient_id"].map(CALLS),
    )


def test_each_image_has_its_reasons() -> None:
    table = reviewed()
    assert table["reasons"].tolist() == IMAGES["reasons"].tolist()
    assert table["needs_review"].tolist() == [bool(reasons) for reasons in IMAGES["reasons"]]


def test_the_most_valuable_image_comes_first() -> None:
    ranked = reviewed().dropna(subset="rank").sort_values("rank")
    assert ranked["image_id"].tolist() == ["all", "called", "nearer", "near", "strange", "odd"]
    assert ranked["rank"].tolist() == [1, 2, 3, 4, 5, 6]
    assert ranked["value"].is_monotonic_decreasing


def test_what_is_unsure_weighs_twice_in_an_undecided_patient_and_a_strange_image_half_a_coin() -> None:
    rows = [  # image, score, patient, novel, value
        ("called", 0.999, "P1", False, 2 * 0.5),
        ("unsure of undecided", 0.4, "P1", False, 2 * 0.4),
        ("strange of undecided", 0.001, "P1", True, 2 * 0.25),
        ("unsure", 0.48, "C1", False, 0.48),
        ("strange", 0.001, "C1", True, 0.25),
        ("less unsure", 0.15, "C1", False, 0.15),
    ]
    images = pd.DataFrame(rows, columns=["image_id", "score", "patient_id", "is_novel", "value"])
    table = reviewed(images.assign(quality_flags=[[]] * len(images)))
    assert table["value"].tolist() == pytest.approx(images["value"].tolist())
    assert table["rank"].tolist() == [1, 2, 3, 4, 5, 6]


def test_the_table_is_that_of_the_schema() -> None:
    table = reviewed()
    assert list(table) == schema.REVIEW.names
    pa.Table.from_pandas(table, schema=schema.REVIEW.arrow_schema(), preserve_index=False)
    assert set(schema.REVIEW_MEANING) == set(ReviewReason)


def test_the_order_does_not_depend_on_the_order_given() -> None:
    one, other = reviewed(), reviewed(IMAGES[::-1].reset_index(drop=True))
    pd.testing.assert_frame_equal(one, other[::-1].reset_index(drop=True))


def test_scores_alone_are_enough() -> None:
    table = review(["a", "b"], [0.5, 0.999], calibration=HALF)
    assert table["reasons"].tolist() == [["uncertain"], []]
    assert table["rank"].tolist() == [1, pd.NA]
    assert table["patient_id"].isna().all()


def test_nothing_to_look_at_is_a_table_without_ranks() -> None:
    assert review(["a"], [0.999], calibration=HALF)["rank"].isna().all()


def test_uncertainty_is_twice_the_chance_of_a_wrong_call_at_a_half() -> None:
    np.testing.assert_allclose(uncertainty([0.5, 0.3, 0.9, 0.0], HALF), [1, 0.6, 0.2, 0], atol=1e-6)


@pytest.mark.filterwarnings("error")
@given(st.floats(0, 1), st.floats(0, 1))
def test_the_score_nearest_to_the_threshold_is_the_most_uncertain(score: float, other: float) -> None:
    one, two, top = uncertainty([score, other, 0.9], STRICT)
    assert top == 1
    assert 0 <= one <= 1
    if 0.9 <= score <= other or other <= score <= 0.9:
        assert one >= two


def test_bad_columns_are_named() -> None:
    with pytest.raises(DatasetError, match="score of row 1 is nan"):
        review(["a", "b"], [0.5, np.nan], calibration=HALF)
    with pytest.raises(DatasetError, match="1 rows of image_id, 2 rows of score"):
        review(["a"], [0.5, 0.6], calibration=HALF)
    with pytest.raises(ConfigError, match="uncertain is 0"):
        review(["a"], [0.5], calibration=HALF, uncertain=0)
