"""--patients and --patient-pattern: what cannot be meant so is refused, for wrong patients leak between splits."""

from __future__ import annotations

from pathlib import Path

import pytest

from malaria_ray.archives.patients import patient_rule
from malaria_ray.errors import PatientMappingError


def mappings(folder: Path, *texts: str) -> tuple[str, ...]:
    files = [folder / f"mapping-{number}.csv" for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    return tuple(map(str, files))


def test_keys_are_read_by_the_pattern_else_by_the_nih_rule(tmp_path: Path) -> None:
    (file,) = mappings(tmp_path, "C51AP12thinF,['x.png']\n")
    assert patient_rule((file,), None).of_file == {"x.png": "P12"}
    assert patient_rule((file,), "(?P<patient>.+)").of_file == {"x.png": "C51AP12thinF"}


@pytest.mark.parametrize(
    ("pattern", "said"),
    [(None, "the NIH rule .* finds no patient in the key 'subject0'"), (r"^(?P<patient>\d+)$", "fits the keys")],
)
def test_keys_without_a_patient_are_refused(tmp_path: Path, pattern: str | None, said: str) -> None:
    with pytest.raises(PatientMappingError, match=said):
        patient_rule(mappings(tmp_path, "subject0,['x.png']\n"), pattern)


def test_a_key_without_a_patient_is_none_where_the_file_name_has_one(tmp_path: Path) -> None:
    (file,) = mappings(tmp_path, "subject0,['C51AP12thinF_1.png']\n")
    assert patient_rule((file,), None).of_file == {}


@pytest.mark.parametrize("is_one_file", [True, False])
def test_a_file_of_two_patients_is_refused_in_any_order(tmp_path: Path, is_one_file: bool) -> None:
    lines = ["C1P1thinF,['x.png']\n", "C2P2thinF,['x.png']\n"]
    for texts in (lines, lines[::-1]):
        given = mappings(tmp_path, *(["".join(texts)] if is_one_file else texts))
        with pytest.raises(PatientMappingError, match="'x.png' is of P. here, of P. elsewhere"):
            patient_rule(given, None)
    assert patient_rule(mappings(tmp_path, lines[0], lines[0]), None).of_file == {"x.png": "P1"}


@pytest.mark.parametrize("pattern", ["", "P\\d+", "("])
def test_a_pattern_that_can_name_no_patient_is_refused(pattern: str) -> None:
    with pytest.raises(PatientMappingError, match="--patient-pattern"):
        patient_rule((), pattern)
