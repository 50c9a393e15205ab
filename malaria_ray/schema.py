"""Every column, label, split and quarantine reason, once.

`TABLES` is the contract with analysts: the order, names and types of the columns of each table on disk. Each Parquet
file carries the table's name and `SCHEMA_VERSION` in its footer, and each column its description and unit.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import pyarrow as pa

SCHEMA_VERSION = 1
"""Raised when a column changes its name, type or meaning; adding a column at the end does not raise it."""

RESEARCH_ONLY = "A research tool, not a diagnosis."


class Label(enum.IntEnum):
    """What a cell crop shows. The numbers are fixed and never taken from the order of a folder listing."""

    uninfected = 0
    parasitized = 1


class Split(enum.StrEnum):
    train = "train"
    val = "val"
    test = "test"


class Reason(enum.StrEnum):
    """Why a file is in quarantine. `OK` is the `status` of a file that is not."""

    EMPTY_FILE = "empty_file"
    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_LARGE = "too_large"
    UNREADABLE = "unreadable"
    CHECKSUM_MISMATCH = "checksum_mismatch"
    ENCRYPTED = "encrypted"
    UNSUPPORTED_COMPRESSION = "unsupported_compression"


class Call(enum.StrEnum):
    """What the counts of a patient's cells say at a fixed specificity for patients."""

    positive = "positive"
    negative = "negative"
    undecided = "undecided"


class QualityFlag(enum.StrEnum):
    """What is unusual about an image; a reason to look at it, not to leave it out."""

    blank = "blank"
    blurred = "blurred"
    noisy = "noisy"
    underexposed = "underexposed"
    overexposed = "overexposed"
    stain = "stain"
    inverted = "inverted"
    not_cut_out = "not_cut_out"
    size = "size"


QUALITY_MEANING: dict[QualityFlag, str] = {
    QualityFlag.blank: "no cell: black nearly all over, or of one colour",
    QualityFlag.blurred: "out of focus",
    QualityFlag.noisy: "pixels that differ from their neighbours more than in any cell",
    QualityFlag.underexposed: "too dark",
    QualityFlag.overexposed: "too bright",
    QualityFlag.stain: "a colour that Giemsa's stain does not give, grey included",
    QualityFlag.inverted: "greenish, as a negative is",
    QualityFlag.not_cut_out: "no black around: not one cell cut out of its field",
    QualityFlag.size: "far smaller or larger than a red blood cell of the images learnt from",
}


class ReviewReason(enum.StrEnum):
    """Why a person should look at an image."""

    undecided_patient = "undecided_patient"
    uncertain = "uncertain"
    novel = "novel"
    quality = "quality"


REVIEW_MEANING: dict[ReviewReason, str] = {
    ReviewReason.undecided_patient: "called parasitized in a patient whose cells do not decide: the look may decide",
    ReviewReason.uncertain: "the score is near the threshold",
    ReviewReason.novel: "unlike the images that the model has learnt from",
    ReviewReason.quality: "has a quality flag",
}


OK = "ok"

REASON_MEANING: dict[Reason, str] = {
    Reason.EMPTY_FILE: "the file has no bytes",
    Reason.NOT_AN_IMAGE: "the content is not PNG, JPEG, TIFF, BMP or WebP, whatever the name says",
    Reason.TRUNCATED: "the image data ends early",
    Reason.CORRUPT: "the decoder refused the content",
    Reason.TOO_LARGE: "the header promises more pixels, or the archive more bytes, than the limit; nothing was decoded",
    Reason.UNREADABLE: "the bytes could not be read from storage, also after retries",
    Reason.CHECKSUM_MISMATCH: "the bytes are not those that the archive's own checksum describes",
    Reason.ENCRYPTED: "the archive member needs a password",
    Reason.UNSUPPORTED_COMPRESSION: "the archive member is packed by a method other than stored or deflate",
}


@dataclass(frozen=True)
class Column:
    """One column: `name`, Arrow `type`, what it means, its `unit` where it has one."""

    name: str
    type: pa.DataType
    meaning: str
    unit: str | None = None

    def field(self) -> pa.Field:
        metadata = {"description": self.meaning}
        if self.unit:
            metadata["unit"] = self.unit
        return pa.field(self.name, self.type, metadata=metadata)


@dataclass(frozen=True)
class Table:
    """One table of the contract."""

    name: str
    meaning: str
    columns: tuple[Column, ...]

    @property
    def names(self) -> list[str]:
        return [column.name for column in self.columns]

    def arrow_schema(self) -> pa.Schema:
        metadata = {"malaria_ray.table": self.name, "malaria_ray.schema_version": str(SCHEMA_VERSION)}
        return pa.schema([column.field() for column in self.columns], metadata=metadata)


def image_type(image_size: int) -> pa.DataType:
    """Arrow type of one resized crop: the bytes of a uint8 array (image_size, image_size, 3), RGB, rows from the top.

    Fixed-size binary and not a tensor or list type: Parquet stores lists of numbers value by value, which wrote six
    times and read twenty times slower (ARCHITECTURE.md, 2026-11-23).
    """
    return pa.binary(image_size * image_size * 3)


IMAGE_ID = Column("image_id", pa.string(), "path of the image relative to the archive's root, with '/'; unique")
LABEL = Column("label", pa.int8(), "0 uninfected, 1 parasitized; null where the archive has no labels")
PATIENT_ID = Column("patient_id", pa.string(), "patient (P…) or healthy donor (C…); null where unknown")
N_BYTES = Column("n_bytes", pa.int64(), "size of the encoded file", "byte")
WIDTH = Column("width", pa.int32(), "width of the decoded image before resizing; null in quarantine", "pixel")
HEIGHT = Column("height", pa.int32(), "height of the decoded image before resizing; null in quarantine", "pixel")
CONTENT_DIGEST = Column(
    "content_digest", pa.string(), "first 32 hex digits of the SHA-256 of the encoded file; null where unread"
)
MODEL = Column("model", pa.string(), "name of the model: cnn, vgg19-frozen or vgg19-finetuned")
RUN_ID = Column("run_id", pa.string(), "identifier of the training run whose model gave the score")

MANIFEST = Table(
    "manifest",
    "one row per file found in the archive, good or bad",
    (
        IMAGE_ID,
        LABEL,
        PATIENT_ID,
        N_BYTES,
        WIDTH,
        HEIGHT,
        CONTENT_DIGEST,
        Column("status", pa.string(), "ok, or the reason for which the file is in quarantine"),
    ),
)

QUARANTINE = Table(
    "quarantine",
    "one row per file that could not be used",
    (
        IMAGE_ID,
        Column("stage", pa.string(), "stage that refused the file: ingest or screen"),
        Column("reason", pa.string(), "enumerated code: " + ", ".join(Reason)),
        Column("detail", pa.string(), "what was found, for people"),
        N_BYTES,
        CONTENT_DIGEST,
    ),
)

SPLITS = Table(
    "splits",
    "which split each image of the dataset belongs to",
    (IMAGE_ID, PATIENT_ID, LABEL, Column("split", pa.string(), "train, val or test"), CONTENT_DIGEST),
)

HISTORY = Table(
    "history",
    "one row per epoch of training",
    (
        Column("epoch", pa.int32(), "1 for the first"),
        Column(
            "train_loss",
            pa.float64(),
            "mean binary cross-entropy over the epoch's training images, dropout on",
        ),
        Column("train_accuracy", pa.float64(), "share of them on the right side of 0.5, dropout on"),
        Column("val_loss", pa.float64(), "mean binary cross-entropy over all validation images after the epoch"),
        Column("val_accuracy", pa.float64(), "share of them on the right side of 0.5"),
        Column("val_roc_auc", pa.float64(), "area under the ROC curve of the validation images"),
        Column("learning_rate", pa.float64(), "learning rate during the epoch"),
        Column("seconds", pa.float64(), "wall time of the epoch, validation included", "second"),
        Column(
            "images_per_second",
            pa.float64(),
            "training images per second of training, validation excluded",
            "1/second",
        ),
    ),
)

PREDICTIONS = Table(
    "predictions",
    "one row per image that was scored",
    (
        IMAGE_ID,
        PATIENT_ID,
        LABEL,
        Column("score", pa.float32(), "P(parasitized) in 0..1 by the model, calibrated on validation cells"),
        Column("predicted_label", pa.int8(), "1 where score >= the run's threshold, else 0"),
        WIDTH,
        HEIGHT,
        CONTENT_DIGEST,
        MODEL,
        RUN_ID,
        Column(
            "raw_score",
            pa.float32(),
            "score as the network gives it; `score` is calibrated",
        ),
        Column(
            "novelty",
            pa.float32(),
            "distance of the model's features to those of its training set; above 1 for the 1 % of validation images "
            "that lie farthest",
        ),
        Column("quality_flags", pa.list_(pa.string()), "enumerated codes: " + ", ".join(QualityFlag)),
    ),
)

METRICS = Table(
    "metrics",
    "one row per metric, split and level",
    (
        MODEL,
        Column(
            "split",
            pa.string(),
            "train, val or test of the run that gave the scores; unseen for images that are in none",
        ),
        Column("level", pa.string(), "cell or patient"),
        Column("metric", pa.string(), "name as in scikit-learn, or n_true_positive and the like for counts"),
        Column("value", pa.float64(), "the metric; null where it is undefined (one class only, say)"),
        Column(
            "ci_low",
            pa.float64(),
            "lower end of the 95 % interval by bootstrap over patients; null where none",
        ),
        Column(
            "ci_high",
            pa.float64(),
            "upper end of the 95 % interval by bootstrap over patients; null where none",
        ),
        Column("n", pa.int64(), "labelled cells of the split; of patients, those whose label the metric is about"),
        Column("threshold", pa.float64(), "score from which a cell is called parasitized; roc_auc, say, knows none"),
    ),
)

DIFFERENCES = Table(
    "differences",
    "one row per metric: these results against others of the same images, by cell, on the labelled cells that both "
    "models held out (else on all labelled ones)",
    (
        MODEL,
        RUN_ID,
        Column("against_model", pa.string(), "architecture that the other results are of"),
        Column("against_run_id", pa.string(), "run that the other results are of"),
        Column("metric", pa.string(), "as in metrics, by cell"),
        Column("value", pa.float64(), "of these results; null where undefined"),
        Column("against_value", pa.float64(), "of the other results; null where undefined"),
        Column("difference", pa.float64(), "value - against_value; null where either is undefined"),
        Column(
            "ci_low", pa.float64(), "lower end of its 95 % interval by paired bootstrap over patients; null where none"
        ),
        Column("ci_high", pa.float64(), "upper end of that interval; null where none"),
        Column("n", pa.int64(), "cells that both values are computed from"),
        Column("is_held_out", pa.bool_(), "whether neither model was trained or tuned on any of these cells"),
    ),
)

CURVES = Table(
    "curves",
    "points of the curves of each split, by cell; at most 1,000 a curve",
    (
        MODEL,
        Column("split", pa.string(), "as in metrics"),
        Column("curve", pa.string(), "roc, precision_recall or calibration"),
        Column("x", pa.float64(), "false positive rate; sensitivity; mean score of a bin"),
        Column("y", pa.float64(), "sensitivity; precision; share of the bin's cells that are labelled parasitized"),
        Column("threshold", pa.float64(), "score of the point, infinity where nothing is called; null for calibration"),
        Column("n", pa.int64(), "cells that the curve, for calibration the bin, is computed from"),
    ),
)

PATIENTS = Table(
    "patients",
    "one row per patient and split. A class-balanced crop archive gives no parasitaemia: fractions are of its crops",
    (
        PATIENT_ID,
        Column(
            "label",
            pa.int8(),
            "of the patient, the same in all splits: 1 where any crop here or in the run's data set is labelled "
            "parasitized, 0 where all here are labelled uninfected; else null, also where none here has a label",
        ),
        Column("n_cells", pa.int64(), "scored crops of the patient in this split"),
        Column("n_parasitized", pa.int64(), "of them, called parasitized"),
        Column("parasitized_fraction", pa.float64(), "n_parasitized / n_cells; not parasitaemia"),
        Column("ci_low", pa.float64(), "lower end of its 95 % Wilson interval"),
        Column("ci_high", pa.float64(), "upper end of its 95 % Wilson interval"),
        Column(
            "corrected_fraction",
            pa.float64(),
            "parasitized_fraction corrected for the model's rates of error; not parasitaemia. This and all that "
            "follows is null where the rates of error are not known",
        ),
        Column(
            "corrected_ci_low",
            pa.float64(),
            "lower end of its 95 % interval, the spread of the rates of error between patients included",
        ),
        Column("corrected_ci_high", pa.float64(), "upper end of that interval"),
        Column(
            "call",
            pa.string(),
            "positive, negative or undecided: whether ci_low..ci_high lies above, below or across call_threshold; "
            "never negative without a limit_of_detection",
        ),
        Column(
            "call_threshold",
            pa.float64(),
            "parasitized_fraction that the wanted share of uninfected patients does not exceed, the same in all rows",
        ),
        Column(
            "limit_of_detection",
            pa.float64(),
            "true fraction from which 95 % of patients with n_cells cells are called positive; null where none is",
        ),
        Column(
            "n_more_cells",
            pa.int64(),
            "cells that an undecided patient needs on top, should they be called as those before; 0 where decided, "
            "null where no number in reason decides",
        ),
        Column("split", pa.string(), "as in metrics: what the model knows of these crops"),
    ),
)

REVIEW = Table(
    "review",
    "one row per image that was scored: whether a person should look at it, why, and which first",
    (
        IMAGE_ID,
        PATIENT_ID,
        Column("score", pa.float32(), "P(parasitized) in 0..1 by the model"),
        Column("predicted_label", pa.int8(), "1 where score >= the run's threshold, else 0"),
        Column("needs_review", pa.bool_(), "true where there is a reason to look"),
        Column("reasons", pa.list_(pa.string()), "enumerated codes: " + ", ".join(ReviewReason)),
        Column("quality_flags", pa.list_(pa.string()), "enumerated codes: " + ", ".join(QualityFlag)),
        Column("uncertainty", pa.float64(), "1 for a score on the threshold, towards 0 far from it"),
        Column("value", pa.float64(), "what a look is worth, 0..1, to order by; no probability"),
        Column("rank", pa.int64(), "1 for the image to look at first; null where there is no reason to look"),
    ),
)

LABEL_AUDIT = Table(
    "label_audit",
    "one row per image whose label is likely wrong, the least credible label first",
    (
        IMAGE_ID,
        PATIENT_ID,
        Column("label", pa.int8(), "the label of the archive: 0 uninfected, 1 parasitized"),
        Column("suggested_label", pa.int8(), "the other one"),
        Column("label_credibility", pa.float64(), "probability of the archive's label by the models' mean score"),
        Column("score_mean", pa.float64(), "mean out-of-fold P(parasitized) of the models"),
        Column("score_min", pa.float64(), "least of the models' scores"),
        Column("score_max", pa.float64(), "greatest of the models' scores"),
        Column("n_models", pa.int64(), "models that have scored the image and were not trained on it"),
        Column("n_models_against", pa.int64(), "of them, those whose score is on the other side of 0.5 than the label"),
    ),
)

AUDIT_METRICS = Table(
    "audit_metrics",
    "one row per model and metric: on all images that were audited, and without those of likely wrong labels. The "
    "truth lies between: leaving out what models disagree with flatters them",
    (
        Column("results", pa.string(), "results directory of the scores; mean for the models' mean score"),
        MODEL,
        Column("metric", pa.string(), "as in metrics, by cell"),
        Column("value", pa.float64(), "of all out-of-fold scores; null where undefined"),
        Column("n", pa.int64(), "cells that value is computed from"),
        Column("value_without", pa.float64(), "without the images of label_audit; null where undefined"),
        Column("n_without", pa.int64(), "cells that value_without is computed from"),
        Column("threshold", pa.float64(), "score from which a cell is called parasitized"),
    ),
)

LISTING = Table(
    "listing",
    "one row per file found in the archive, before anything was read: what it is and where its bytes lie",
    (
        Column(
            "key",
            pa.int64(),
            "row number in the whole listing, ordered by image_id; what the ledger counts by",
        ),
        IMAGE_ID,
        LABEL,
        PATIENT_ID,
        N_BYTES,
        Column("container", pa.string(), "URL of the folder or file that holds it, without passwords and signatures"),
        Column(
            "method",
            pa.string(),
            "how its bytes lie there: file, stored, deflate, tar, parquet or crops; else what is unsupported",
        ),
        Column(
            "offset",
            pa.int64(),
            "where its record begins in the container, its bytes where the method is tar; its row where it is parquet "
            "or crops",
        ),
        Column("span", pa.int64(), "bytes from there to the next record", "byte"),
        Column("packed_bytes", pa.int64(), "size of its data as packed", "byte"),
        Column("crc32", pa.int64(), "checksum of the unpacked bytes by the archive; null where it gives none"),
    ),
)


PACKED = Table(
    "packed",
    "one row per file of the archive that was packed, its encoded bytes with it",
    (
        IMAGE_ID,
        LABEL,
        PATIENT_ID,
        N_BYTES,
        CONTENT_DIGEST,
        Column("status", pa.string(), "ok, or the reason for which the bytes could not be had"),
        Column("detail", pa.string(), "what was found then, for people"),
        Column("image", pa.binary(), "the encoded file as it was; null where status is not ok"),
    ),
)


def crops_table(image_size: int) -> Table:
    """The `crops` table of a dataset resized to `image_size` pixels a side."""
    meaning = f"raw bytes of a uint8 array {image_size} × {image_size} × 3, RGB, 0..255, rows from the top"
    image = Column("image", image_type(image_size), meaning)
    return Table(
        "crops",
        "one row per usable image, resized",
        (IMAGE_ID, LABEL, PATIENT_ID, WIDTH, HEIGHT, CONTENT_DIGEST, image),
    )


TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        MANIFEST,
        crops_table(125),
        QUARANTINE,
        SPLITS,
        HISTORY,
        PREDICTIONS,
        METRICS,
        DIFFERENCES,
        CURVES,
        PATIENTS,
        REVIEW,
        LABEL_AUDIT,
        AUDIT_METRICS,
        LISTING,
        PACKED,
    )
}

_RESULTS = Column("results", pa.string(), "name of the results directory: its last part, or all where two end alike")
_THRESHOLD = Column("threshold", pa.float64(), "score from which an image is called parasitized")

VIEWS: dict[str, Table] = {
    table.name: table
    for table in (
        Table(
            "runs",
            "a view of query: one row per results directory given",
            (
                Column("number", pa.int32(), "its place among those given, 1 for the first"),
                _RESULTS,
                RUN_ID,
                MODEL,
                _THRESHOLD,
                Column("engine", pa.string(), "what was asked to compute the network"),
                Column("screened_split", pa.string(), "split of the run that was screened; all for everything"),
                Column("source", pa.string(), "archive or dataset as it was given"),
                Column("finished_at", pa.string(), "when screening ended, ISO 8601, UTC"),
            ),
        ),
        Table(
            "cells",
            "a view of query: predictions, and what the run knew of each image",
            (
                *PREDICTIONS.columns,
                Column("split", pa.string(), "split that the run knows the image by; unseen where it knows it not"),
                Column("knows_patient", pa.bool_(), "whether the run was trained or tuned on cells of the patient"),
                _THRESHOLD,
                Column(
                    "outcome",
                    pa.string(),
                    "'true positive', 'false negative', 'false positive' or 'true negative'; null without a label",
                ),
                Column("is_copy", pa.bool_(), "whether an earlier image is the same cell; metrics count one of them"),
                _RESULTS,
            ),
        ),
    )
}
"""What `query` offers beside the tables on disk, each of which has a last column `results` there."""

REPEATED_COLUMNS = frozenset(
    {
        *("label", "patient_id", "status", "stage", "reason", "split", "predicted_label", "suggested_label", "model"),
        *(
            "run_id",
            "against_model",
            "against_run_id",
            "results",
            "level",
            "metric",
            "call",
            "reasons",
            "quality_flags",
            "container",
            "method",
        ),
    }
)
"""Columns of few distinct values, which Parquet files keep as dictionaries; of ids and numbers one only costs space."""

PROVENANCE = "malaria_ray.provenance"
"""Key of a Parquet footer: JSON with the stage, what decided the result (digests of model and input, options), the
version and digest of the code, and the versions of packages."""
