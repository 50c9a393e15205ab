"""Labels that an archive holds beside its images: numbers or names, from sidecar files or columns."""

from __future__ import annotations

from typing import Any

from malaria_ray.errors import ArchiveError
from malaria_ray.schema import Label

_NUMBER_OF: dict[Any, int | None] = {None: None, "": None, -1: None, "-1": None}  # -1: Hugging Face's "not labelled"
for _label in Label:
    _NUMBER_OF |= {_label.value: _label.value, str(_label.value): _label.value, _label.name: _label.value}


def label_number(value: Any, *, where: str) -> int | None:
    """0 or `uninfected`, 1 or `parasitized` (any case), None for nothing. `where` names the place in errors.

    Raises: `ArchiveError` for anything else: a label that is not understood must not become "no label".
    """
    asked = value.strip().casefold() if isinstance(value, str) else value
    try:
        return _NUMBER_OF[asked]
    except (KeyError, TypeError):
        raise ArchiveError(
            f"{where} holds the label {value!r}; allowed are 0 or uninfected, 1 or parasitized, and nothing"
        ) from None
