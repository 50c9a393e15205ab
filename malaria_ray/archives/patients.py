"""The flags by which a user says whose cells an archive holds, shared by the stages that list archives."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from malaria_ray.cells.patients import compiled_pattern, parse_mapping, patient_of
from malaria_ray.errors import PatientMappingError
from malaria_ray.runtime import storage


@dataclass(frozen=True)
class PatientRule:
    """How the patient of a file is found: `of_file` by mapping first, then `pattern` or the NIH rule on its name."""

    of_file: dict[str, str]
    pattern: re.Pattern[str] | None
    identity: dict[str, object]


def patient_rule(mapping_urls: tuple[str, ...], expression: str | None) -> PatientRule:
    """Reads `--patients` files and `--patient-pattern`. Raises: `PatientMappingError`."""
    texts = {url: _read_text(url) for url in mapping_urls}
    pattern = None if expression is None else compiled_pattern(expression)
    of_file = _patients(texts, pattern)
    digests = sorted(hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts.values())
    return PatientRule(
        of_file=of_file,
        pattern=pattern,
        identity={"patients": digests, "patient_pattern": expression},
    )


def _patients(texts: dict[str, str], pattern: re.Pattern[str] | None) -> dict[str, str]:
    """The patient of each file that the mappings name. Raises: `PatientMappingError` where one cannot be meant so."""
    of_file: dict[str, str] = {}
    for url, text in texts.items():
        for name, key in parse_mapping(text, source=url):
            patient = patient_of(key, pattern)
            if patient is None and patient_of(name, pattern) is None:  # else the name says it
                rule = "--patient-pattern" if pattern else "the NIH rule (C51AP12thinF is patient P12)"
                raise PatientMappingError(
                    f"--patients {url}: {rule} finds no patient in the key {key!r} of {name!r}; give a "
                    "--patient-pattern that fits the keys, (?P<patient>.+) where they are the patients"
                )
            if patient is not None and of_file.setdefault(name, patient) != patient:
                raise PatientMappingError(
                    f"--patients {url}: {name!r} is of {patient} here, of {of_file[name]} elsewhere in the mappings; "
                    "correct them: no file is of two patients"
                )
    return of_file


def _read_text(url: str) -> str:
    try:
        return storage.locate(url).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PatientMappingError(f"--patients {url} cannot be read: {error}") from error
