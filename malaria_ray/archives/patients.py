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

    of_file: dict[str, str | None]
    pattern: re.Pattern[str] | None
    identity: dict[str, object]


def patient_rule(mapping_urls: tuple[str, ...], expression: str | None) -> PatientRule:
    """Reads `--patients` files and `--patient-pattern`. Raises: `PatientMappingError`."""
    texts = {url: _read_text(url) for url in mapping_urls}
    pattern = compiled_pattern(expression) if expression else None
    pairs = [pair for url, text in texts.items() for pair in parse_mapping(text, source=url)]
    digests = sorted(hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts.values())
    return PatientRule(
        of_file={name: patient_of(key, pattern) for name, key in pairs},
        pattern=pattern,
        identity={"patients": digests, "patient_pattern": expression},
    )


def _read_text(url: str) -> str:
    try:
        return storage.locate(url).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PatientMappingError(f"--patients {url} cannot be read: {error}") from error
