"""A listing of very many files takes bounded memory: a tenth of a million here, a million in `make bench`."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks import listing


@pytest.mark.slow
@pytest.mark.parametrize("kind", listing.KINDS)
def test_driver_memory_of_a_listing_is_bounded(tmp_path: Path, kind: str) -> None:
    """Below what a million would be allowed (1 GB), and far below what Python objects for each would take."""
    found = listing.measured(kind, 100_000, tmp_path)
    assert found["rows"] == 100_000
    assert found["table_mb"] < 25
    assert found["peak_mb"] - found["loaded_mb"] < 300
