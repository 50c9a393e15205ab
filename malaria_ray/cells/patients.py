"""Patients and labels from names, with one rule for mapping keys and file names.

`C51AP12thinF` is patient `P12` (case 51A); a thin film without a patient number, `C201ThinF`, is of the healthy donor
`C201`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from malaria_ray.errors import PatientMappingError
from malaria_ray.schema import Label

_PATIENT = re.compile(r"C\d+[A-Za-z]?(P\d+)")
_DONOR = re.compile(r"(C\d+)[A-Za-z]?_?[Tt]hin")  # C0001.png is anybody's first cell
_DONOR_OR_PATIENT = (  # both at once, as Arrow writes it
    r"^(?P<donor>C\p{Nd}+)(?:[A-Za-z]?(?P<patient>P\p{Nd}+)|[A-Za-z]?_?[Tt]hin)"
)
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")
_LABEL_OF_FOLDER = {label.name: label for label in Label}


def patient_of(name: str, pattern: re.Pattern[str] | None = None) -> str | None:
    """Patient of a mapping key or an `image_id`: `P12`, a donor's `C201`, None where the rule does not fit.

    The NIH rule looks at the file name alone; `pattern`, another archive's rule, is searched in the whole path, and its
    group `patient` is the patient.
    """
    if pattern is not None:
        found = pattern.search(name)
        return (found.group("patient") or None) if found else None
    name = name.rpartition("/")[2]
    if found := _PATIENT.match(name):
        return found.group(1)
    return found.group(1) if (found := _DONOR.match(name)) else None


def patients_of(image_ids: pa.Array, pattern: re.Pattern[str] | None = None) -> pa.Array:
    """`patient_of` of a whole column, strings in, strings out. Only a `pattern` makes Python objects."""
    if pattern is not None:
        return pa.array([patient_of(image_id, pattern) for image_id in image_ids.to_pylist()], pa.string())
    found = pc.extract_regex(file_names(image_ids), _DONOR_OR_PATIENT)
    donor, patient = pc.struct_field(found, "donor"), pc.struct_field(found, "patient")
    return pc.if_else(pc.equal(patient, ""), donor, patient)


def labels_of(image_ids: pa.Array) -> pa.Array:
    """`label_of` of a whole column, strings in, int8 out; each folder is looked at once, not each name."""
    folders = pc.replace_substring_regex(image_ids, r"[^/]*$", "").dictionary_encode()
    labels = pa.array([label_of(folder) for folder in folders.dictionary.to_pylist()], pa.int8())
    return labels.take(folders.indices)


def file_names(image_ids: pa.Array) -> pa.Array:
    """What stands behind the last `/` of each."""
    return pc.replace_substring_regex(image_ids, r"^(?s:.*)/", "")


def compiled_pattern(expression: str) -> re.Pattern[str]:
    """`--patient-pattern` as a regular expression. Raises: `PatientMappingError`."""
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise PatientMappingError(f"--patient-pattern {expression!r} is no regular expression: {error}") from error
    if "patient" not in pattern.groupindex:
        raise PatientMappingError(
            f"--patient-pattern {expression!r} has no group named patient; write the part that names it as "
            "(?P<patient>…)"
        )
    return pattern


def parse_mapping(text: str, *, source: str) -> Iterator[tuple[str, str]]:
    """(file name, key) pairs of one official mapping file.

    Each line is a key, then a bracketed list of quoted file names with unquoted commas, then trailing commas: no CSV
    reader takes it. The list may stand in quotes, as CSV writers put it. A first line without a list is a header.
    `source` names the file in errors.
    Raises: `PatientMappingError` for a later line without a list of file names, or where no line has one.
    """
    n_names = 0
    text = text.removeprefix("\ufeff")  # the byte order mark that spreadsheets put first
    for number, line in enumerate(text.split("\n"), start=1):
        key, _, names = line.partition(",")
        names = names.strip(" ,\r").removeprefix('"').removesuffix('"').strip()
        is_list = names.startswith("[") and names.endswith("]")
        found = [single or double for single, double in _QUOTED.findall(names)] if is_list else []
        n_names += len(found)
        if not found and number > 1 and line.strip(" ,\r"):
            raise PatientMappingError(
                f"{source} line {number}: found {line[:60]!r}; expected KEY,['file.png', …] as in the NIH mapping files"
            )
        for name in found:
            yield name, key.strip()
    if not n_names:
        raise PatientMappingError(
            f"{source} names no files; expected lines of KEY,['file.png', …] as in the NIH mapping files"
        )


def label_of(image_id: str) -> Label | None:
    """Label by the nearest folder named `Parasitized` or `Uninfected` (any case); None where there is none."""
    for folder in reversed(image_id.split("/")[:-1]):
        if (label := _LABEL_OF_FOLDER.get(folder.casefold())) is not None:
            return label
    return None
