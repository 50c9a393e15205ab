"""Every error that malaria_ray raises on purpose.

    MalariaRayError                 one line for the user: where, what was found, what is allowed, what to do
    ├── ConfigError                 a flag has a value that cannot work
    ├── ArchiveError                an archive is missing, empty, unreadable or of an unknown kind
    │   └── ReadError               the bytes of one file could not be had; carries a `Reason`
    ├── ImageRefused                one image cannot be used; carries a `Reason` for the quarantine
    ├── PatientMappingError         a patient mapping file or pattern cannot be used
    ├── DirectoryError              an output directory is of another kind, another config, or in use
    │   └── NotCompleteError        a directory has no _SUCCESS.json
    ├── DatasetError                a dataset cannot be trained on (no labels, one class, no patients)
    ├── TrainingError               training stopped (NaN loss, workers lost, more workers than can be had)
    ├── ModelError                  a model file is missing, of another image size, or disagrees with itself
    ├── QueryError                  SQL that DuckDB refuses, or asks for a table that is not there
    ├── TooManyBadImagesError       more of the archive is unusable than --max-bad-fraction allows
    ├── ClusterError                no cluster answers, it refuses the token, or `doctor` found a fault
    └── InvariantError              `verify` found rows that are missing, doubled or changed

`ReadError` and `ImageRefused` concern one file: stages turn them into a quarantine row and never let them end a run.
"""

from malaria_ray.schema import Reason


class MalariaRayError(Exception):
    """Base of all errors with a message meant for the user; the command prints it as one line."""


class ConfigError(MalariaRayError):
    """A flag has a value that cannot work."""


class ArchiveError(MalariaRayError):
    """An archive is missing, empty, unreadable or of an unknown kind."""


class ReadError(ArchiveError):
    """The bytes of one file could not be had."""

    def __init__(self, reason: Reason, detail: str):
        super().__init__(detail)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["ReadError"], tuple[Reason, str]]:
        return type(self), (self.reason, self.detail)


class ImageRefused(MalariaRayError):  # noqa: N818 - a refusal is an outcome, not a fault
    """One image cannot be used; `reason` is its quarantine code, `detail` says what was found."""

    def __init__(self, reason: Reason, detail: str):
        super().__init__(detail)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["ImageRefused"], tuple[Reason, str]]:
        return type(self), (self.reason, self.detail)


class PatientMappingError(MalariaRayError):
    """A patient mapping file or pattern cannot be used."""


class DirectoryError(MalariaRayError):
    """An output directory is of another kind, was made with another config, or is in use."""


class NotCompleteError(DirectoryError):
    """A directory has no _SUCCESS.json."""


class DatasetError(MalariaRayError):
    """A dataset cannot be trained on."""


class TrainingError(MalariaRayError):
    """Training stopped."""


class ModelError(MalariaRayError):
    """A model file is missing, of another image size, or disagrees with itself."""


class QueryError(MalariaRayError):
    """SQL that DuckDB refuses, or that asks for a table that is not there."""


class TooManyBadImagesError(MalariaRayError):
    """More of the archive is unusable than --max-bad-fraction allows."""


class ClusterError(MalariaRayError):
    """No cluster answers, it refuses the token, or `doctor` found a fault."""


class InvariantError(MalariaRayError):
    """`verify` found rows that are missing, doubled or changed."""
